"""The page about deploying: its commands name what is there, and what it exports is what others load."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from tests.docs.commands import blocks
from tests.generation.test_dialogue import TEMPLATES, tokenizer

from mtnlg.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "deploy.md"
COMMANDS = [shlex.split(line) for block in blocks(PAGE, "bash") for line in block.splitlines() if line]
SMALL = {"vocab_size": 320, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
KNOWN = {"docker", "journalctl", "kubectl", "nginx", "pip", "ray", "serve", "vllm", "install", "systemctl"}


def words_after_settings(words):
    """A command without what stands before it: settings, sudo, taskset."""
    words = [*words]
    while "=" in words[0]:
        words.pop(0)
    if words[0] == "sudo":
        words.pop(0)
    return words[3:] if words[0] == "taskset" else words


@pytest.mark.parametrize("words", COMMANDS, ids=[" ".join(words)[:60] for words in COMMANDS])
def test_a_command_names_what_is_there(words):
    words = words_after_settings(words)
    for word in words:
        for path in re.findall(r"recipes/[\w./-]+", word):
            assert (ROOT / path).exists(), path
    extras = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r"mtnlg\[(\w+)\]", " ".join(words)):
        assert re.search(rf"^{extra} = ", extras, re.MULTILINE)
    arguments = [words[n + 1].partition("=")[0] for n, word in enumerate(words) if word == "--build-arg"]
    for argument in arguments:
        assert f"ARG {argument}" in (ROOT / "recipes" / "serve" / "Dockerfile").read_text()
    if words[0] == "mtnlg":
        cli.verb_parser("serve").read(words[2:])
    elif words[:2] == ["docker", "run"] and words[-1] not in ("mtnlg", "mtnlg:cuda"):
        cli.verb_parser("serve").read(words[words.index("mtnlg") + 1 :])
    else:
        assert Path(words[0]).name in KNOWN | {"python3"}


def test_what_is_exported_is_loaded_by_transformers(tmp_path, monkeypatch):
    """The page's own lines, on a tiny model; the same logits, the same ids, the same chat."""
    transformers = pytest.importorskip("transformers", reason="needs the interop extra (transformers)")
    from mtnlg import MegatronLmModel, MegatronModelConfig

    words = tokenizer(TEMPLATES["chatml"])
    made = MegatronLmModel(MegatronModelConfig(max_position_embeddings=512, **SMALL)).eval()
    made.tokenizer = words
    (tmp_path / "runs").mkdir()
    made.save_pretrained(tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    [code] = blocks(PAGE, "python")
    exec(compile(code, PAGE.name, "exec"), {})
    theirs = transformers.AutoModelForCausalLM.from_pretrained("exported").eval()
    their_words = transformers.AutoTokenizer.from_pretrained("exported")
    ids = words.encode("User: hello there 早上好！")
    assert their_words("User: hello there 早上好！")["input_ids"] == ids
    with torch.no_grad():
        ours = made(torch.tensor([ids])).logits
        assert torch.allclose(theirs(torch.tensor([ids])).logits, ours, atol=1e-4)
    messages = [{"role": "user", "content": "hello there"}]
    chat = their_words.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(chat) == words.apply_chat_template(messages, add_generation_prompt=True)
    assert theirs.config.max_position_embeddings == 512  # --max-model-len
