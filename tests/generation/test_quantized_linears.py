"""Products with codes in the fast runner: the same as the quantized layers' own, whatever the batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mtnlg import MegatronLmModel, MegatronModelConfig
from mtnlg.config.quantize import QuantizeConfig
from mtnlg.generation import native, native_step, quantized_linears
from mtnlg.generation.fast_runner import FastRunner
from mtnlg.generation.integer_kernel import FLOAT_KERNEL, KERNEL
from mtnlg.generation.prepared import can_prepare
from mtnlg.generation.quantized_linears import (
    CodesLinear,
    RoundedLinear,
    have_kernel_for,
    make_quantized_linear,
)
from mtnlg.generation.runner import PlainRunner, Row
from mtnlg.model.mlp import ACTIVATION_FUNCTIONS
from mtnlg.quantization import QuantizedLinear
from mtnlg.quantization.linear import rounded_activations

needs_kernels = pytest.mark.skipif(
    KERNEL.load() is None or FLOAT_KERNEL.load() is None, reason="no C++ compiler, or no AVX-512 with VNNI"
)
KINDS = [
    QuantizeConfig(weights, group, is_symmetric, activations)
    for activations in ("int8", "float")
    for weights, group, is_symmetric in [
        ("int8", 0, True),
        ("int8", 32, True),
        ("int8", 0, False),
        ("int4", 32, True),
        ("int4", 64, True),
        ("int4", 128, False),
        ("int4", 16, False),
        ("int4", 0, False),
    ]
]
INT8, INT4 = KINDS[0], KINDS[3]  # with rounded activations


def layers(config, sizes=(40, 7), inputs=72, bias=True, dtype=torch.float32):
    torch.manual_seed(5)
    return [QuantizedLinear.of(nn.Linear(inputs, size, bias=bias, dtype=dtype), config) for size in sizes]


@needs_kernels
@pytest.mark.parametrize("config", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_compute_what_the_layers_do(config, dtype):
    modules = layers(config, inputs=200)
    product = make_quantized_linear(modules, dtype, ACTIVATION_FUNCTIONS)
    assert isinstance(product, CodesLinear)
    for count in (1, 2, 3, 4, 5, 8, 17):
        rows = torch.randn(count, 200).to(dtype)
        other = torch.randn(count, 47).to(dtype)
        expected = torch.cat([module(rows.float()) for module in modules], dim=1)
        near = dict(atol=1e-5, rtol=1e-5) if dtype == torch.float32 else dict(atol=0.01, rtol=0.01)
        torch.testing.assert_close(product(rows).float(), expected, **near)
        wanted = ACTIVATION_FUNCTIONS["gelu"](expected)
        torch.testing.assert_close(product(rows, "gelu").float(), wanted, **near)
        torch.testing.assert_close(product(rows, plus=other).float(), expected + other.float(), **near)
        torch.testing.assert_close(product(rows, times=other).float(), expected * other.float(), **near)


@needs_kernels
@pytest.mark.parametrize("config", KINDS, ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(33, 8), (1, 20), (64, 64), (70, 200)])
def test_products_are_those_of_float64(config, outputs, inputs):
    (module,) = layers(config, (outputs,), inputs, bias=False)
    weight = module.dequantize().double()
    for dtype, last_bit in ((torch.float32, 2.0**-24), (torch.bfloat16, 2.0**-8)):
        product = make_quantized_linear([module], dtype, ACTIVATION_FUNCTIONS)
        rows = torch.randn(17, inputs).to(dtype)
        said = rounded_activations(rows.float()) if config.activations == "int8" else rows
        exact, size = said.double() @ weight.T, said.double().abs() @ weight.abs().T
        for count in (1, 2, 7, 8, 9, 16, 17):
            error = (product(rows[:count]).double() - exact[:count]).abs()
            # Sums are kept in float32; the result is rounded once.
            assert (error <= exact[:count].abs() * last_bit + size[:count] * 1e-6).all()


@needs_kernels
@pytest.mark.parametrize("config", KINDS, ids=str)
def test_a_row_does_not_depend_on_those_beside_it(config):
    product = make_quantized_linear(layers(config), torch.float32, ACTIVATION_FUNCTIONS)
    rows = torch.randn(17, 72) * torch.logspace(-3, 3, 17)[:, None]
    together = product(rows)
    assert all(torch.equal(product(rows[place : place + 1])[0], together[place]) for place in range(17))


@needs_kernels
def test_weights_take_their_bits_of_memory():
    for activations in ("int8", "float"):
        (module,) = layers(QuantizeConfig("int4", activations=activations), (64,), 128)
        product = make_quantized_linear([module], torch.float32, ACTIVATION_FUNCTIONS)
        assert product.num_bytes == 64 * 128 // 2 + 64 * 4 * 2  # codes, scales in bf16


@needs_kernels
def test_columns_in_another_order():
    rows = torch.randn(3, 72)
    for config in (INT4, KINDS[-1]):
        modules = layers(config)
        for module in modules:
            module.order = torch.randperm(72, generator=torch.Generator().manual_seed(3)).int()
        for rounds in range(2):  # the same order, and one for each
            product = make_quantized_linear(modules, torch.float32, ACTIVATION_FUNCTIONS)
            assert isinstance(product, CodesLinear) == (rounds == 0)
            expected = torch.cat([module(rows) for module in modules], dim=1)
            torch.testing.assert_close(product(rows), expected, atol=1e-5, rtol=1e-5)
            modules[1].order = modules[1].order.flip(0)


@needs_kernels
def test_what_no_kernel_is_made_for():
    uneven = layers(QuantizeConfig("int4", 20))  # whose groups do not begin where vectors do
    for modules in (uneven, layers(QuantizeConfig("float8"))):
        assert not have_kernel_for(nn.ModuleList(modules))
        assert not isinstance(
            make_quantized_linear(modules, torch.float32, ACTIVATION_FUNCTIONS), CodesLinear
        )
    both = nn.ModuleList(layers(INT8) + layers(KINDS[-1]))
    assert have_kernel_for(both) and not have_kernel_for(nn.ModuleList([*both, nn.Linear(2, 2)]))


def lost_kernel(monkeypatch, kernel=KERNEL):
    """A kernel on a machine that cannot have it."""
    monkeypatch.setattr("mtnlg.native.compiler.processor", lambda: "another")
    lost = native.NativeKernel(kernel.file, kernel.function, kernel.arguments, kernel.needed)
    assert lost.load() is None
    return lost


def test_without_the_kernels_the_matrix_is_made_floating_point_again(monkeypatch):
    for name, kernel in (("KERNEL", KERNEL), ("FLOAT_KERNEL", FLOAT_KERNEL)):
        monkeypatch.setattr(quantized_linears, name, lost_kernel(monkeypatch, kernel))
    for config in (INT4, QuantizeConfig("int4"), QuantizeConfig("float8")):
        modules = layers(config)
        product = make_quantized_linear(modules, torch.float32, ACTIVATION_FUNCTIONS)
        assert isinstance(product, RoundedLinear) == (config.activations == "int8")
        assert not isinstance(product, CodesLinear)
        rows = torch.randn(5, 72)
        expected = torch.cat([module(rows) for module in modules], dim=1)
        torch.testing.assert_close(product(rows), expected, atol=1e-5, rtol=1e-5)


def test_a_machine_without_a_compiler_says_so(monkeypatch, caplog):
    with caplog.at_level("INFO"):
        lost = lost_kernel(monkeypatch)
    assert "avx512_vnni" in caplog.text
    assert lost.loaded is None


FAMILIES = [
    dict(),
    dict(
        position_embedding="rotary", normalization="rmsnorm", activation_function="swiglu",
        attention_bias=False, mlp_bias=False, tie_word_embeddings=False, num_key_value_heads=2,
    ),
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES, ids=["gpt2", "llama"])
@pytest.mark.parametrize(
    "quantize",
    [
        dict(),
        dict(activations="int8"),
        dict(weights="int4", activations="int8"),
        dict(weights="int4", symmetric=False, activations="int8", head="float"),
        dict(weights="float8"),
    ],
    ids=str,
)
def test_the_fast_runner_says_what_the_plain_one_says(family, quantize):
    config = MegatronModelConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=40, init_method_std=0.15, quantize=True, quantize_config=quantize, **family,
    )  # fmt: skip
    model = MegatronLmModel(config).eval()
    assert can_prepare(model)
    fast, plain = FastRunner(model, 8, compile="on"), PlainRunner(model, 8)
    if native_step.KERNEL.load() is not None and KERNEL.load() is not None:
        fast._hidden = None  # what does not go into one call would fail
    steps = [
        [Row([3, 9, 4, 1, 7], 0, [0], 5), Row([5, 2], 0, [1], 1)],
        [Row([8], 5, [0]), Row([6], 2, [1])],
        [Row([11], 6, [0])],
    ]
    for rows in steps:
        # Where a value lies between two codes, a last bit decides: one code apart in 127.
        torch.testing.assert_close(fast.run(rows), plain.run(rows), atol=0.02, rtol=0.02)
