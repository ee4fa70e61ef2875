"""``--adapter``: one for generate and chat, many by name for serve."""

from __future__ import annotations

import pytest
import torch

from mtnlg import MegatronLmModel, MegatronModelConfig, Tokenizer
from mtnlg.cli import serve
from mtnlg.cli.main import main, verb_parser
from mtnlg.config import ConfigError
from mtnlg.config.adapter import AdapterConfig

TEXT = "秋天的夜晚，星光闪烁。The stars are bright tonight."
ADAPTERS = {
    "low-rank": AdapterConfig(rank=4),
    "soft": AdapterConfig(method="prompt", num_virtual_tokens=4),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model and two adapters of it that say something else."""
    made = tmp_path_factory.mktemp("adapters")
    tokenizer = Tokenizer.train([TEXT] * 3, vocab_size=300, min_frequency=1)
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64)
    model = MegatronLmModel(MegatronModelConfig(vocab_size=300, init_method_std=0.3, **shape), tokenizer)
    model.save_pretrained(made / "model")
    for name, config in ADAPTERS.items():
        adapted = MegatronLmModel.from_pretrained(made / "model")
        adapted.add_adapter(config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.5)
        adapted.save_adapter(made / name)
    return made


@pytest.mark.parametrize("name", ADAPTERS)
def test_generate_speaks_with_the_adapter(folders, name, capsys):
    said = []
    for words in ([], ["--adapter", str(folders / name)]):
        command = ["generate", str(folders / "model"), "The stars", "--greedy", "--max-new-tokens", "8"]
        assert main([*command, *words]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] != said[1]
    adapted = MegatronLmModel.from_pretrained(folders / "model")
    adapted.add_adapter(folders / name)
    assert said[1].strip() == adapted.generate("The stars", max_new_tokens=8, temperature=0.0).strip()


def test_an_adapter_of_another_model_ends_with_an_error(folders, tmp_path, capsys):
    other = MegatronLmModel.from_pretrained(folders / "model")
    with torch.no_grad():
        other.layers["0"].mlp.up.weight.add_(1.0)
    other.save_pretrained(tmp_path / "other")
    words = ["generate", str(tmp_path / "other"), "The", "--adapter", str(folders / "low-rank")]
    assert main(words) == 2
    assert "another base model" in capsys.readouterr().err


def backend(folders, *words):
    arguments = verb_parser("serve").read([str(folders / "model"), "--compile", "off", *words])
    return serve._opener(arguments, serve.server_config(arguments))()


def test_serve_loads_adapters_by_name(folders):
    words = [word for name in ADAPTERS for word in ("--adapter", f"{name}={folders / name}")]
    loaded = backend(folders, *words)
    assert loaded.engine.adapters.names == list(ADAPTERS)
    loaded.close()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["poet"], "write NAME=DIR"),
        (["=x"], "write NAME=DIR"),
        (["a b=x"], "write NAME=DIR"),
        (["a=x", "a=y"], "names a twice"),
        (["model=low-rank"], "the model is called so itself"),
    ],
)
def test_what_is_no_name_and_folder_is_refused(folders, words, said):
    with pytest.raises(ConfigError, match=said):
        backend(folders, *[word for one in words for word in ("--adapter", one)])
