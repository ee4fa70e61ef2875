from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtnlg.config.errors import ConfigError
from mtnlg.config.generation import EngineConfig
from mtnlg.generation.attention_kernel import AttentionKernel
from mtnlg.generation.choose_runner import make_runner
from mtnlg.generation.fast_runner import FastRunner
from mtnlg.generation.prepared import can_prepare
from mtnlg.generation.runner import PAGE_SIZE, PlainRunner, Row, Runner
from mtnlg.model import MegatronLmDecoder
from mtnlg.model.attention import scaled_dot_product

MakeModel = Callable[..., MegatronLmDecoder]
LLAMA = dict(
    position_embedding="rotary",
    normalization="rmsnorm",
    activation_function="swiglu",
    attention_bias=False,
    mlp_bias=False,
    tie_word_embeddings=False,
)
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt": {},
    "gpt-tanh": dict(activation_function="gelu_tanh"),
    "squared-relu": dict(activation_function="squared_relu", position_embedding="none"),
    "llama": LLAMA | dict(num_key_value_heads=2),
    "part-rotary": LLAMA | dict(rotary_percent=0.5, activation_function="geglu"),
    "qwen2": LLAMA | dict(attention_bias=True, attention_output_bias=False, num_key_value_heads=1),
    "qwen3": LLAMA | dict(qk_normalization=True, head_dim=16),
    "mixtral": LLAMA | dict(num_experts=4, moe_intermediate_size=24),
    "mistral": LLAMA | dict(num_key_value_heads=2, sliding_window=7),
    "llama3": LLAMA
    | dict(
        rotary_scaling=dict(
            rope_type="llama3",
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        )
    ),
    "gpt-neox": dict(position_embedding="rotary", rotary_percent=0.5, parallel_residual=True),
    "opt-350m": dict(position_offset=2, norm_placement="after", embedding_size=20),
    "bloom": dict(position_embedding="alibi", embedding_norm=True),
    "gemma2": LLAMA
    | dict(
        normalization="rmsnorm_1p",
        norm_placement="around",
        embedding_scale=3.0,
        logit_softcap=2.0,
        attention_softcap=1.5,
        attention_scalar=5.0,
        sliding_window=6,
        full_attention_layers=[1],
        num_key_value_heads=2,
    ),
    "gemma3": LLAMA
    | dict(
        normalization="rmsnorm_1p",
        norm_placement="around",
        qk_normalization=True,
        rotary_local_base=100.0,
        sliding_window=6,
        full_attention_layers=[0],
    ),
    "qwen2-moe": LLAMA
    | dict(
        num_experts=4,
        moe_intermediate_size=24,
        num_shared_experts=1,
        shared_expert_intermediate_size=20,
        shared_expert_gate=True,
    ),
    "deepseek": LLAMA
    | dict(
        num_experts=6,
        moe_intermediate_size=16,
        num_shared_experts=1,
        num_dense_layers_first=1,
        router_score_function="sigmoid",
        router_load_balancing="bias",
    ),
}
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 4e-2}  # of the largest logit


def rows_of(prompts: list[list[int]], start: int = 0, end: int | None = None, **fields: Any) -> list[Row]:
    """One row for each prompt, whose pages lie apart and in no order."""
    pages = list(range(3 * len(prompts)))
    random.Random(4).shuffle(pages)
    return [
        Row(prompt[start:end], start, pages[3 * index : 3 * index + 3], **fields)
        for index, prompt in enumerate(prompts)
        if len(prompt) > start
    ]


def make_prompts(lengths: list[int]) -> list[list[int]]:
    return [torch.randint(67, (length,)).tolist() for length in lengths]


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert (found - expected).abs().max() <= BOUNDS[dtype] * expected.abs().max()


def continue_greedily(runner: Runner, prompts: list[list[int]], count: int) -> list[list[int]]:
    texts = [list(prompt) for prompt in prompts]
    logits = runner.run(rows_of(texts))
    for _ in range(count):
        for text, token in zip(texts, logits.argmax(dim=-1).tolist()):
            text.append(token)
        rows = [
            Row(text[-1:], len(text) - 1, row.pages)
            for text, row in zip(texts, rows_of(texts), strict=True)
        ]
        logits = runner.run(rows)
    return texts


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_plain_runner(
    make_model: MakeModel, family: str, deterministic: bool, dtype: torch.dtype, device: str
) -> None:
    model = make_model(**FAMILIES[family]).to(device)
    prompts = make_prompts([1, 19, 33, 16, 7])
    plain = PlainRunner(copy.deepcopy(model).to(dtype), 15)
    fast = FastRunner(model, 15, dtype=dtype, deterministic=deterministic)
    assert_near(fast.run(rows_of(prompts)), plain.run(rows_of(prompts)), dtype)
    if dtype == torch.float32:
        assert continue_greedily(fast, prompts, 5) == continue_greedily(plain, prompts, 5)


def test_prompts_in_pieces_beside_single_tokens_and_any_number_of_logits(make_model: MakeModel) -> None:
    model = make_model(**FAMILIES["llama"])
    long, short = make_prompts([40, 20])
    whole = PlainRunner(model, 3).run([Row(long, 0, [0, 1, 2], num_logits=40)])
    of_short = PlainRunner(model, 3).run([Row(short, 0, [0, 1], num_logits=20)])
    fast = FastRunner(model, 9)
    assert fast.run([Row(long[:18], 0, [6, 3, 5], num_logits=0)]).shape == (0, 67)
    found = fast.run([Row(short[:1], 0, [8, 1]), Row(long[18:36], 18, [6, 3, 5], num_logits=18)])
    assert_near(found, torch.cat([of_short[:1], whole[18:36]]))
    found = fast.run(
        [
            Row(long[36:38], 36, [6, 3, 5], num_logits=2),
            Row(short[1:19], 1, [8, 1], num_logits=0),
            Row(long[:1], 0, [2], num_logits=1),
        ]
    )
    assert_near(found, torch.cat([whole[36:38], whole[:1]]))
    found = fast.run([Row(short[19:], 19, [8, 1]), Row(long[38:], 38, [6, 3, 5], num_logits=2)])
    assert_near(found, torch.cat([of_short[19:], whole[38:]]))


def test_shared_pages_are_read_and_not_written(make_model: MakeModel) -> None:
    model = make_model()
    prompt = make_prompts([37])[0]
    fast = FastRunner(model, 8)
    fast.run([Row(prompt[:32], 0, [5, 2])])
    before = [(pool.keys[[5, 2]].clone(), pool.values[[5, 2]].clone()) for pool in fast._pools.values()]
    found = fast.run([Row(prompt[32:], 32, [5, 2, 7]), Row(prompt[32:34], 32, [5, 2, 0])])
    for pool, (keys, values) in zip(fast._pools.values(), before):
        assert torch.equal(pool.keys[[5, 2]], keys) and torch.equal(pool.values[[5, 2]], values)
    assert_near(found, torch.cat([PlainRunner(model, 3).run(rows_of([prompt[:end]])) for end in (37, 34)]))


def test_a_copied_page_goes_on_as_its_source_would(make_model: MakeModel) -> None:
    model = make_model()
    prompt = make_prompts([21])[0]
    fast = FastRunner(model, 6)
    fast.run([Row(prompt[:20], 0, [4, 1])])
    fast.copy_pages([1], [3])
    found = fast.run([Row(prompt[20:], 20, [4, 1]), Row(prompt[20:], 20, [4, 3])])
    assert_near(found[1], found[0])


def test_hidden_states_are_those_of_the_plain_runner(make_model: MakeModel) -> None:
    model = make_model()
    prompts = make_prompts([3, 18, 20])
    plain, fast = PlainRunner(model, 9), FastRunner(model, 9)
    for found, expected in zip(fast.hidden(rows_of(prompts)), plain.hidden(rows_of(prompts)), strict=True):
        assert_near(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt", "qwen3", "deepseek"])
@pytest.mark.parametrize("compile", ["off", "on"])
def test_deterministic_numbers_depend_on_nothing_beside_the_text(
    make_model: MakeModel, family: str, dtype: torch.dtype, compile: str
) -> None:
    shape = dict(hidden_size=64, head_dim=16) | FAMILIES[family]
    runner = FastRunner(make_model(**shape), 40, dtype=dtype, deterministic=True, compile=compile)
    assert runner.kernel.is_compiled == (compile == "on")
    prompts = make_prompts([45, 17, 46, 2, 31, 44, 33])
    alone = [runner.run([row])[0] for row in rows_of(prompts)]
    together = runner.run(rows_of(prompts))
    in_pieces = _in_pieces(runner, prompts)
    for one, other, pieces in zip(alone, together, in_pieces, strict=True):
        assert torch.equal(one, other) and torch.equal(one, pieces)


def _in_pieces(runner: FastRunner, prompts: list[list[int]]) -> list[Tensor]:
    """Last logits where each prompt is cut by chance and other rows come and go."""
    chance, rows = random.Random(1), rows_of(prompts)[::-1]
    done, found = [0] * len(rows), [torch.empty(0)] * len(rows)
    while any(done[i] < len(row.ids) for i, row in enumerate(rows)):
        open_ = [i for i, row in enumerate(rows) if done[i] < len(row.ids)]
        step = chance.sample(open_, chance.randint(1, len(open_)))
        parts = [list(rows[i].ids[done[i] : done[i] + chance.randint(1, 20)]) for i in step]
        logits = runner.run([Row(part, done[i], rows[i].pages) for i, part in zip(step, parts)])
        for i, part, logit in zip(step, parts, logits):
            done[i], found[i] = done[i] + len(part), logit
    return found[::-1]


def without_our_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtnlg.generation.attention_kernel.native_attention", lambda shape: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["our own", "torch.compile's"])
def test_compiled_attention_is_the_plain_one(
    make_model: MakeModel, kernel: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel != "our own":
        without_our_kernel(monkeypatch)
    model = make_model(hidden_size=64, head_dim=16)
    prompts = make_prompts([1, 19, 33, 16, 7])
    runners = [FastRunner(model, 15, dtype=dtype, compile=mode) for mode in ("off", "on")]
    assert [runner.kernel.is_compiled for runner in runners] == [False, True]
    plain, compiled = (runner.run(rows_of(prompts)) for runner in runners)
    assert_near(compiled, plain, dtype)
    for count in (1, 2, 5):  # one token, two, more
        plain, compiled = (runner.run(_next(prompts[:count])) for runner in runners)
        assert_near(compiled, plain, dtype)


def _next(prompts: list[list[int]]) -> list[Row]:
    pages = [row.pages for row in rows_of(make_prompts([1, 19, 33, 16, 7]))]
    return [Row([3], len(prompt), own) for prompt, own in zip(prompts, pages)]


def test_a_long_text_beside_short_ones(make_model: MakeModel) -> None:
    model = make_model(max_position_embeddings=1500)
    prompts = make_prompts([1400, 3, 20])
    pages = [list(range(90)), [90], [91, 92]]
    fast, plain = FastRunner(model, 93), PlainRunner(model, 93)
    for runner in (fast, plain):
        runner.run([Row(prompt[:-1], 0, own, 0) for prompt, own in zip(prompts, pages)])
    rows = [Row(prompt[-1:], len(prompt) - 1, own) for prompt, own in zip(prompts, pages)]
    assert_near(fast.run(rows), plain.run(rows))


def test_changed_weights_count_after_a_refresh(make_model: MakeModel) -> None:
    model = make_model()
    fast, prompts = FastRunner(model, 3), make_prompts([9])
    before = fast.run(rows_of(prompts))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    fast.refresh()
    after = fast.run(rows_of(prompts))
    assert not torch.equal(after, before)
    assert_near(after, PlainRunner(model, 3).run(rows_of(prompts)))


def test_without_a_compiler_the_plain_form_answers(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise RuntimeError("no C++ compiler")

    without_our_kernel(monkeypatch)
    monkeypatch.setattr("mtnlg.generation.attention_kernel.compiled_kernel", missing)
    model, prompts = make_model(), make_prompts([9, 3])
    fast = FastRunner(model, 6, deterministic=True, compile="auto")
    assert not fast.kernel.is_compiled
    assert_near(fast.run(rows_of(prompts)), PlainRunner(model, 6).run(rows_of(prompts)))
    with pytest.raises(RuntimeError, match="no C"):
        FastRunner(model, 6, compile="on")


def test_without_a_compiler_on_is_the_users_error(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch._inductor.config

    without_our_kernel(monkeypatch)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    # numbers of its own, so that no other test has compiled this shape
    model = make_model(hidden_size=12, num_attention_heads=3, num_hidden_layers=1)
    compiler = torch._inductor.config.patch("cpp.cxx", (None, "no-such-compiler"))
    with compiler, pytest.raises(ConfigError, match=r"No working C\+\+ compiler .*no-such-compiler"):
        FastRunner(model, 6, compile="on")


def test_compiling_in_the_background_begins_with_work_and_changes_nothing(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_our_kernel(monkeypatch)
    fast = FastRunner(make_model(hidden_size=64, head_dim=16), 6, compile="auto")
    assert fast.kernel._calls_left < 0  # a CPU's cores are the steps' own
    monkeypatch.setattr("mtnlg.generation.attention_kernel.NEVER_BESIDE_STEPS", ())
    monkeypatch.setattr("mtnlg.generation.attention_kernel.CALLS_BEFORE_COMPILING", 7)
    monkeypatch.setattr(AttentionKernel, "compile_in_background", lambda kernel: begun.append(kernel))
    begun: list[AttentionKernel] = []
    model, prompts = make_model(hidden_size=64, head_dim=16), make_prompts([9, 3])
    fast = FastRunner(model, 6, compile="auto")
    before = fast.run(rows_of(prompts))
    assert not begun  # three layers: three calls
    for _ in range(4):
        fast.run(rows_of(prompts))
    assert begun == [fast.kernel]
    monkeypatch.undo()
    fast.kernel.compile_in_background().join()
    assert fast.kernel.is_compiled
    assert_near(fast.run(rows_of(prompts)), before)


def test_the_runner_is_chosen_by_model_and_settings(make_model: MakeModel) -> None:
    model = make_model()
    chosen = make_runner(model, EngineConfig(max_batch_size=2))
    assert isinstance(chosen, FastRunner) and chosen.num_pages == 2 * 3 and chosen.page_size == PAGE_SIZE
    assert chosen.dtype == torch.float32 and not chosen.is_invariant
    assert make_runner(model, EngineConfig(dtype="bf16", deterministic=True)).is_invariant
    assert isinstance(make_runner(model.double(), EngineConfig()), PlainRunner)


def test_what_is_not_known_runs_plainly(make_model: MakeModel) -> None:
    class Adapted(nn.Linear):
        pass

    assert can_prepare(make_model())
    adapted = make_model()
    adapted.layers["1"].mlp.up = Adapted(32, 128)
    other_attention = make_model()
    other_attention.layers["0"].attention.attention_function = lambda *args: scaled_dot_product(*args)
    hooked = make_model()
    hooked.layers["2"].register_forward_hook(lambda *args: None)
    stage = make_model()
    stage.head = None
    for model in (adapted, other_attention, hooked, stage):
        assert not can_prepare(model)
    model = make_model()
    model.layers["1"].mlp.up = Adapted(32, 128)
    runner = make_runner(model, EngineConfig(dtype="bf16"))
    assert isinstance(runner, PlainRunner)
    assert next(model.parameters()).dtype == torch.float32  # the caller's model stays as it was
    assert next(runner.model.parameters()).dtype == torch.bfloat16
