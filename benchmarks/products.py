"""Products of all matrices of GPT-2 124M with a few rows: weights in bf16 and in few bits, alternating.

    python benchmarks/products.py
    python benchmarks/products.py --rows 1 8 --float32

Random weights, every matrix of its own memory, so that they come from memory as they do in a model.
Milliseconds for all 49, the least of some rounds: what other work on the machine adds is left out.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn

from mtnlg.config.quantize import QuantizeConfig
from mtnlg.generation.linears import Linear, make_linear
from mtnlg.generation.quantized_linears import have_kernel_for, make_quantized_linear
from mtnlg.model.mlp import ACTIVATION_FUNCTIONS
from mtnlg.quantization import QuantizedLinear

# (inputs, outputs): how many
SHAPES = {(768, 2304): 12, (768, 768): 12, (768, 3072): 12, (3072, 768): 12, (768, 50257): 1}
KINDS = {
    "int8, activations int8": QuantizeConfig("int8", activations="int8"),
    "int4 in groups of 32, activations int8": QuantizeConfig("int4", activations="int8"),
    "int4 in groups of 64, zero points, activations int8": QuantizeConfig("int4", 64, False, "int8"),
    "int8": QuantizeConfig("int8"),
    "int4 in groups of 32": QuantizeConfig("int4"),
    "int4 in groups of 128, zero points": QuantizeConfig("int4", 128, False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 8, 16, 128])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--float32", action="store_true", help="rows, and the weights beside, in float32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = torch.float32 if arguments.float32 else torch.bfloat16
    models = {str(dtype).removeprefix("torch."): floating(dtype)}
    models |= {name: quantized(config, dtype) for name, config in KINDS.items()}
    print(f"torch {torch.__version__}, {arguments.threads} threads, rows in {dtype}\n")
    print(f"| rows | {' | '.join(map(str, arguments.rows))} |\n|---|{'---|' * len(arguments.rows)}")
    least = {
        name: [min(times) for times in zip(*found)] for name, found in measure(models, arguments, dtype)
    }
    for name, times in least.items():
        print(f"| {name} | {' | '.join(f'{1000 * seconds:.1f}' for seconds in times)} |")


@torch.inference_mode()
def floating(dtype: torch.dtype) -> list[Linear]:
    return [
        make_linear([torch.randn(outputs, inputs)], [None], dtype, ACTIVATION_FUNCTIONS, in_tiles=True)
        for (inputs, outputs), count in SHAPES.items()
        for _ in range(count)
    ]


@torch.inference_mode()
def quantized(config: QuantizeConfig, dtype: torch.dtype) -> list[Linear]:
    made = []
    for (inputs, outputs), count in SHAPES.items():
        layer = QuantizedLinear.of(nn.Linear(inputs, outputs, bias=False), config)
        have_kernel_for(layer)
        made += [make_quantized_linear([layer], dtype, ACTIVATION_FUNCTIONS) for _ in range(count)]
    return made


@torch.inference_mode()
def measure(models, arguments: argparse.Namespace, dtype: torch.dtype):
    """(name, seconds [rounds][rows]) of each."""
    found = {name: [] for name in models}
    inputs = [wide for (wide, _), count in SHAPES.items() for _ in range(count)]
    for _ in range(arguments.rounds):
        for times in found.values():
            times.append([])
        for count in arguments.rows:
            rows = {wide: torch.randn(count, wide).to(dtype) for wide in set(inputs)}
            for name, linears in models.items():
                began = time.perf_counter()
                for wide, linear in zip(inputs, linears):
                    linear(rows[wide])
                found[name][-1].append(time.perf_counter() - began)
    return found.items()


if __name__ == "__main__":
    main()
