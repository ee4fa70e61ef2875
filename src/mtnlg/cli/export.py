"""``mtnlg export MODEL --format NAME --out PATH``: a model in the files that other programs load."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mtnlg.cli.export_adapter import to_peft
from mtnlg.cli.export_quantized import add_quantize_arguments, export_quantized
from mtnlg.cli.models import MODEL_HELP

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from jsonargparse import ArgumentParser, Namespace

    from mtnlg.config.progress import Progress
    from mtnlg.training.model_files import ModelFiles

EXAMPLE = """
mtnlg export runs/demo --format hf --out exported/demo
mtnlg export runs/demo --format hf --precision bf16 --out exported/demo-bf16
mtnlg export runs/demo --format hf --quantize int4 --out exported/demo-int4
mtnlg export runs/demo --format gguf --precision q4_k_m --out exported/demo-q4_k_m.gguf
mtnlg export runs/demo --format megatron --out exported/demo-megatron
mtnlg export runs/demo --format onnx --out exported/demo.onnx
mtnlg export runs/demo-lora --format peft --out exported/demo-lora
"""
FORMATS = ("hf", "gguf", "megatron", "onnx", "peft")
GGUF_NAMES = {"float32": "f32", "fp16": "f16", None: "f16"}


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the model, the format and the place."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--format",
        required=True,
        choices=FORMATS,
        help="hf: a folder for transformers and vLLM; gguf: a file for llama.cpp; megatron: a checkpoint; "
        "onnx: a graph for ONNX Runtime, without a cache; peft: an adapter without its base",
    )
    parser.add_argument(
        "--out", metavar="PATH", required=True, help="folder, or file (gguf, onnx), to write"
    )
    parser.add_argument(
        "--precision",
        type=str | None,
        default=None,
        help="float32, bf16 or fp16; null keeps it (gguf: fp16, onnx: float32). "
        "gguf also takes q8_0, q6_k, q5_k_m, q4_k_m, ... (docs/export.md has them all)",
    )
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="hf: largest file of weights")
    add_quantize_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def run(arguments: Namespace) -> int:
    """Write the files and say how they are loaded."""
    from pathlib import Path

    from mtnlg.cli.terminal import ProgressDisplay, quantity
    from mtnlg.config import ConfigError
    from mtnlg.interop.onnx_file import data_file
    from mtnlg.training.model_files import open_model_files

    out = Path(arguments.out)
    if is_taken(out) and not arguments.overwrite:
        raise ConfigError(f"{out} is there already: choose another --out, or --overwrite.")
    files = open_model_files(arguments.model)
    with ProgressDisplay() as progress:
        if arguments.quantize is None:
            next_step = _WRITERS[arguments.format](files, out, arguments, progress)
        else:
            next_step = export_quantized(arguments, out, dtype_of(arguments), progress)
    written = [out, data_file(out)] if out.is_file() else out.rglob("*")
    size = sum(path.stat().st_size for path in written if path.is_file())
    print(f"{out}: {quantity(files.config.num_parameters, 'parameters')}, {quantity(size, 'bytes')}")
    print(f"next: {next_step}")
    return 0


def is_taken(out: Path) -> bool:
    """Whether something would be overwritten."""
    return out.is_file() or (out.is_dir() and any(out.iterdir()))


def _to_hugging_face(files: ModelFiles, out: Path, arguments: Namespace, progress: Progress) -> str:
    from mtnlg.config import ConfigError
    from mtnlg.generation.prompts import end_id
    from mtnlg.interop import write_hugging_face_folder

    if arguments.max_shard_gb <= 0:
        raise ConfigError(f"--max-shard-gb is {arguments.max_shard_gb}: it must be above 0.")
    tokenizer = files.tokenizer
    write_hugging_face_folder(
        out,
        files.float_config,
        files.stream,
        end_of_text_id=end_id(tokenizer),
        padding_id=None if tokenizer is None else tokenizer.special_tokens.get("<|padding|>"),
        dtype=dtype_of(arguments),
        max_shard_bytes=int(arguments.max_shard_gb * 1e9),
        progress=progress,
    )
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    return f"vllm serve {out}, or transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})"


def dtype_of(arguments: Namespace) -> torch.dtype | None:
    """Of the weights; ``None`` keeps theirs."""
    from mtnlg.config import ConfigError
    from mtnlg.training.precision import COMPUTE_DTYPES

    if arguments.precision not in (None, *COMPUTE_DTYPES):
        names = ", ".join(COMPUTE_DTYPES)
        raise ConfigError(f"--precision is {arguments.precision!r}: choose one of {names}.")
    return COMPUTE_DTYPES.get(arguments.precision or "")


def _to_gguf(files: ModelFiles, out: Path, arguments: Namespace, progress: Progress) -> str:
    from mtnlg.interop import write_gguf

    precision = GGUF_NAMES.get(arguments.precision, arguments.precision)
    write_gguf(out, files.float_config, files.stream, files.tokenizer, precision, out.stem, progress)
    return f"llama-cli -m {out}"


def _to_megatron(files: ModelFiles, out: Path, arguments: Namespace, progress: Progress) -> str:
    from mtnlg.interop import write_megatron

    write_megatron(out, files.float_config, files.stream, dtype_of(arguments), progress)
    if files.tokenizer is not None:
        files.tokenizer.save_pretrained(out)
    return f"Megatron-LM with --load {out} --ckpt-format torch_dist --use-checkpoint-args"


def _to_onnx(files: ModelFiles, out: Path, arguments: Namespace, progress: Progress) -> str:
    import torch

    from mtnlg.interop import write_onnx

    dtype = dtype_of(arguments) or torch.float32
    write_onnx(out, files.float_config, files.stream, files.tokenizer, dtype, progress)
    return f"onnxruntime.InferenceSession({str(out)!r})"


_WRITERS = {
    "hf": _to_hugging_face,
    "gguf": _to_gguf,
    "megatron": _to_megatron,
    "onnx": _to_onnx,
    "peft": to_peft,
}
