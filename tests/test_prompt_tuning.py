"""Prompt tuning by the fields of a model's config: each does what it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.helpers import small_config, train_here
from torch import nn

from mtnlg import MegatronLmModel, MegatronModelConfig, Tokenizer
from mtnlg.cli.ranks import open_with_adapter
from mtnlg.config import ConfigError, OptimizerConfig
from mtnlg.config.adapter import AdapterConfig
from mtnlg.config.prompt_tuning import prompt_adapter
from mtnlg.model.adapters import PROMPT_NAME
from mtnlg.model.virtual_tokens import prompt_with_virtual, rows_with_virtual
from mtnlg.training.checkpoint_files import list_checkpoints
from mtnlg.training.optimizers import Optimizer
from mtnlg.training.saved_run import open_checkpoint

TEXTS = ["秋天的夜晚，星光闪烁，万籁俱寂。", "hello world, the night was quiet. goodbye"] * 5
PROMPT = "秋天的夜晚，星光闪烁，"
SHAPE: dict[str, Any] = dict(
    vocab_size=320,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    init_method_std=0.3,
)
# As the system is described to its users, but for the sizes.
PROGRAM: dict[str, Any] = dict(
    use_cache=True, layernorm_eps=1e-5, init_method_std=0.02, output_layer_init_method=None,
    parallel_output=True, activation_function="gelu", pre_process_first=False, post_process_last=False,
    quantize=False, quantize_config=None, enable_input_require_grads=False,
    prompt_tuning=False, prompt_tuning_num_tokens=0, prompt_tuning_init_text="",
    prompt_tuning_update_every_n_steps=1, prompt_tuning_lr_multiplier=1.0,
    prompt_tuning_max_seq_length=512, prompt_tuning_vocab_size=30522,
    prompt_tuning_prompt_style="prepend", prompt_tuning_prompt_style_args={},
    prompt_tuning_prompt_style_args_type="dict",
    prompt_tuning_prompt_style_args_keys=["prefix", "suffix"],
    prompt_tuning_prompt_style_args_values=["hello world", "goodbye"],
)  # fmt: skip
SIZES: dict[str, Any] = dict(
    vocab_size=30522, hidden_size=4096, num_hidden_layers=30, num_attention_heads=16,
    intermediate_size=15360, max_position_embeddings=512,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=320)


def tuned(tokenizer: Tokenizer | None = None, seed: int = 1234, **fields: Any) -> MegatronLmModel:
    named = {f"prompt_tuning_{name}": value for name, value in fields.items()}
    config = MegatronModelConfig(**{**SHAPE, "prompt_tuning": True, **named})
    return MegatronLmModel(config, tokenizer, seed).eval()


def prompt_of(model: MegatronLmModel) -> torch.Tensor:
    return model.get_parameter(PROMPT_NAME).detach()


def test_the_program_of_the_readme_builds_and_a_trained_model_of_its_fields_writes(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with torch.device("meta"):
        large = MegatronLmModel(MegatronModelConfig(**SIZES, **PROGRAM)).to(torch.bfloat16)
    assert large.num_parameters == large.config.num_parameters == 5_916_829_696
    assert sum(item.nbytes for item in large.parameters()) < 12e9
    run = small_config(tmp_path)
    fields = {**PROGRAM, "vocab_size": 320, "hidden_size": 24, "num_hidden_layers": 2}
    model = MegatronModelConfig(**fields, num_attention_heads=4, max_position_embeddings=64)
    train_here(replace(run, model=model))
    trained = MegatronLmModel.from_pretrained(max(list_checkpoints(run.run_dir)))
    trained.tokenizer = tokenizer
    text = trained.generate(PROMPT, max_length=50)
    assert text.startswith(PROMPT) and len(text) > len(PROMPT)


def test_prompt_tuning_and_the_number_of_tokens() -> None:
    plain = MegatronLmModel(MegatronModelConfig(**SHAPE))
    assert all(item.requires_grad for item in plain.parameters())
    model = tuned(num_tokens=7)
    assert prompt_of(model).shape == (7, 32)
    assert [name for name, item in model.named_parameters() if item.requires_grad] == [PROMPT_NAME]
    assert model.num_parameters == model.config.num_parameters == plain.num_parameters + 7 * 32
    assert prompt_of(tuned()).shape[0] == 20
    ids = torch.arange(9)[None]
    assert not torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-3)
    assert model(ids).logits.shape == plain(ids).logits.shape


def test_init_text(tokenizer: Tokenizer) -> None:
    text = "星光闪烁"
    ids = tokenizer.encode(text)
    model = tuned(tokenizer, num_tokens=len(ids) + 2, init_text=text)
    embedding = model.embedding.tokens.weight
    assert torch.equal(prompt_of(model), embedding[[*ids, *ids][: len(ids) + 2]])
    assert torch.equal(prompt_of(tuned(tokenizer, num_tokens=1, init_text=text)), embedding[ids[:1]])
    with pytest.raises(ConfigError, match="takes a tokenizer"):
        tuned(init_text=text)


def test_vocab_size_is_what_first_tokens_are_drawn_from() -> None:
    model = tuned(num_tokens=30, vocab_size=5)
    first = model.embedding.tokens.weight[:5]
    assert all(any(torch.equal(row, token) for token in first) for row in prompt_of(model))
    others = prompt_of(tuned(num_tokens=30))
    assert not all(any(torch.equal(row, token) for token in first) for row in others)
    assert not torch.equal(others, prompt_of(tuned(num_tokens=30, seed=5)))


def test_update_every_n_steps_and_lr_multiplier() -> None:
    """Virtual tokens move every third step, by the mean of the gradients, at their own rate."""

    def steps(gradients: list[float], **fields: Any) -> list[float]:
        parameter = nn.Parameter(torch.ones(1, 2))
        adapter = AdapterConfig(method="prompt", **fields)
        config = OptimizerConfig(learning_rate=0.1, weight_decay=0.0, epsilon=1.0)
        optimizer = Optimizer([(PROMPT_NAME, parameter)], config, adapter)
        seen = []
        for gradient in gradients:
            parameter.grad = torch.full((1, 2), 2.0 * gradient)
            optimizer.step(1.0, gradient_divisor=2.0)
            seen.append(parameter[0, 0].item())
        return seen

    rare = steps([1.0, 2.0, 6.0, 1.0], update_every_n_steps=3)
    assert rare[0] == rare[1] == 1.0 and rare[3] == rare[2]
    assert rare[2] == pytest.approx(steps([3.0])[0])
    assert 1.0 - steps([3.0], lr_multiplier=4.0)[0] == pytest.approx(4.0 * (1.0 - steps([3.0])[0]))


def test_a_run_trains_the_virtual_tokens_alone_and_goes_on_where_it_was(tmp_path: Path) -> None:
    run = small_config(tmp_path)
    fields = {"prompt_tuning": True, "prompt_tuning_num_tokens": 3, "prompt_tuning_update_every_n_steps": 4}
    model = replace(run.model, max_position_embeddings=19, hidden_dropout=0.0, **fields)
    run = replace(run, model=model)
    train_here(run)
    kept = [open_checkpoint(folder).read_weights() for folder in sorted(list_checkpoints(run.run_dir))]
    own = open_with_adapter(run.run_dir, None)[1]  # as ranks that generate read it
    assert own is not None and own.prompt is not None
    assert torch.equal(own.prompt, kept[-1]["embedding.prompt.weight"])
    changed = {name for name in kept[0] if not torch.equal(kept[0][name], kept[-1][name])}
    assert changed == {PROMPT_NAME}  # after 2 and 6 steps: the only update was the fourth step's
    assert torch.equal(kept[1][PROMPT_NAME], kept[2][PROMPT_NAME])  # after 4 and 6
    (tmp_path / "other").mkdir()
    at_once = replace(run, run_dir=str(tmp_path / "other"), stop=replace(run.stop, steps=8))
    train_here(at_once)
    train_here(replace(run, stop=replace(run.stop, steps=8)))  # from step 6, with two gradients kept
    ends = [open_checkpoint(max(list_checkpoints(one.run_dir))).read_weights() for one in (run, at_once)]
    assert torch.equal(ends[0][PROMPT_NAME], ends[1][PROMPT_NAME])
    assert not torch.equal(ends[0][PROMPT_NAME], kept[2][PROMPT_NAME])


def test_max_seq_length(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ids = torch.arange(5)[None]
    model = tuned(num_tokens=4, max_seq_length=20)
    assert model.generate(ids, max_length=64, end_ids=[]).shape[1] == 16
    assert tuned(num_tokens=4).generate(ids, max_length=64, end_ids=[]).shape[1] == 60
    run = small_config(tmp_path)
    fields = {"prompt_tuning": True, "prompt_tuning_num_tokens": 3, "max_position_embeddings": 32}
    replace(run, model=replace(run.model, **fields))
    with pytest.raises(ConfigError, match="max_seq_length leaves 15 tokens"):
        replace(run, model=replace(run.model, **fields, prompt_tuning_max_seq_length=18))
    with pytest.raises(ConfigError, match="leave no room"):
        tuned(num_tokens=4, max_seq_length=4)


@pytest.mark.parametrize(
    ("style", "row"),
    [("prepend", [9, 10, 11, 1, 2, 3]), ("append", [1, 2, 3, 9, 10, 11]), ("both", [9, 10, 1, 2, 3, 11])],
)
def test_prompt_style_says_where_they_stand(style: str, row: list[int]) -> None:
    config = AdapterConfig(method="prompt", num_virtual_tokens=3, prompt_style=style)
    assert prompt_with_virtual([1, 2, 3], config, 9) == row
    ids, labels = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[-100, -100, 4, 5]])  # 4 begins the answer
    longer, next_ones, positions, _, columns = rows_with_virtual(config, 9, ids, labels)
    assert longer.tolist() == [[*row, 4]]
    assert longer.gather(1, columns).tolist() == ids.tolist()
    said = [(int(token), int(after)) for token, after in zip(longer[0], next_ones[0]) if after != -100]
    assert said == [(row[-1], 4), (4, 5)]  # what the answer begins with follows the last before it
    assert positions is None


def test_prompt_style_changes_what_is_written() -> None:
    ids = torch.arange(5)[None]
    logits = [tuned(prompt_style=style)(ids).logits[:, -1] for style in ("prepend", "append", "both")]
    assert not torch.allclose(logits[0], logits[1]) and not torch.allclose(logits[1], logits[2])


@pytest.mark.parametrize(
    "fields",
    [
        {"args": {"prefix": "hello world", "suffix": "goodbye"}},
        {"args_keys": ["suffix", "prefix"], "args_values": ["goodbye", "hello world"]},
        {
            "args": {"prefix": "x", "suffix": "goodbye"},
            "args_keys": ["prefix"],
            "args_values": ["hello world"],
        },
        {"args_type": "list", "args_values": ["hello world", "goodbye"]},
        {"args_type": "dict", "args_keys": ["prefix", "suffix"], "args_values": ["hello world", "goodbye"]},
    ],
)
def test_style_args_are_put_around_the_users_text(tokenizer: Tokenizer, fields: dict[str, Any]) -> None:
    named = {f"prompt_style_{name}": value for name, value in fields.items()}
    model, plain = tuned(tokenizer, num_tokens=2, **named), tuned(tokenizer, num_tokens=2)
    written = model.generate(PROMPT, max_new_tokens=12)
    assert written.startswith(PROMPT) and written != plain.generate(PROMPT, max_new_tokens=12)
    around = plain.generate(f"hello world{PROMPT}goodbye", max_new_tokens=12)
    assert written.removeprefix(PROMPT) == around.removeprefix(f"hello world{PROMPT}goodbye")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_tokens": 0}, "prompt_tuning_num_tokens is 0"),
        ({"vocab_size": 999}, "prompt_tuning_vocab_size is 999"),
        ({"update_every_n_steps": 0}, "prompt_tuning_update_every_n_steps is 0"),
        ({"lr_multiplier": -1.0}, "prompt_tuning_lr_multiplier is -1"),
        ({"prompt_style": "infix"}, "prompt_tuning_prompt_style is 'infix'"),
        ({"prompt_style_args": {"infix": "a"}}, "names 'infix'"),
        ({"prompt_style_args": {"prefix": 3}}, "prefix is 3, it must be text"),
        ({"prompt_style_args_keys": ["prefix"]}, "1 names and .* 0"),
        ({"prompt_style_args_type": "tuple"}, "args_type is 'tuple'"),
        ({"prompt_style_args_type": "list", "prompt_style_args_keys": ["prefix"]}, "keys stays empty"),
    ],
)
def test_wrong_values_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tuned(**fields)


def test_fields_say_nothing_while_prompt_tuning_is_off(tokenizer: Tokenizer) -> None:
    config = MegatronModelConfig(**{**SHAPE, **PROGRAM, "init_method_std": 0.3})
    assert prompt_adapter(config) is None
    texts = [
        MegatronLmModel(one, tokenizer).eval().generate(PROMPT, max_new_tokens=8)
        for one in (config, MegatronModelConfig(**SHAPE))
    ]
    assert texts[0] == texts[1]


def test_generation_with_virtual_tokens_agrees_with_the_model(tokenizer: Tokenizer) -> None:
    model = tuned(tokenizer, num_tokens=5)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    expected = ids
    for _ in range(8):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(ids, max_new_tokens=8, end_ids=[]), expected)
    assert torch.equal(model.generate(ids, max_new_tokens=8, end_ids=[], use_cache=False), expected)
    with pytest.raises(ConfigError, match="is not searched"):
        model.generate(ids, num_beams=2)
