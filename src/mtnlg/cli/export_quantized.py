"""``mtnlg export --quantize``: a folder whose matrices are in few bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from jsonargparse import ArgumentParser, Namespace

    from mtnlg.config.progress import Progress
    from mtnlg.config.quantize import QuantizeConfig
    from mtnlg.tokens import Tokenizer

METHODS = ("rtn", "gptq", "awq")
ROWS = 4  # sequences of one batch of calibration


def add_quantize_arguments(parser: ArgumentParser) -> None:
    """Declare what is asked of quantization."""
    parser.add_argument(
        "--quantize",
        metavar="NUMBERS",
        type=str | None,
        default=None,
        help="hf: keep the matrices in int8, int4 or float8; or more exactly, as in "
        "'{weights: int4, group_size: 64, symmetric: false, activations: int8}'",
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="rtn",
        help="how codes are chosen: rtn rounds to the nearest; gptq and awq look at --calibrate",
    )
    parser.add_argument(
        "--calibrate", metavar="FILE", nargs="+", default=[], help="text like that which the model will see"
    )
    parser.add_argument(
        "--calibrate-tokens", type=int, default=32768, help="of that text, how much is looked at"
    )


def quantize_config(text: str) -> QuantizeConfig:
    """From what ``--quantize`` says.

    Raises:
        ConfigError: it names what there is not.
    """
    import yaml

    from mtnlg.config import ConfigError
    from mtnlg.config.quantize import QuantizeConfig

    try:
        values: Any = yaml.safe_load(text)
    except yaml.YAMLError:
        values = None
    if isinstance(values, str):
        values = dict(weights=values)
    if not isinstance(values, dict):
        raise ConfigError(f"--quantize is {text!r}: give int8, int4, float8, or '{{weights: int4, ...}}'.")
    return QuantizeConfig.from_dict(values)


def export_quantized(arguments: Namespace, out: Path, dtype: torch.dtype | None, progress: Progress) -> str:
    """Write the folder; what is to be typed next.

    Args:
        arguments: of the verb.
        out: the folder.
        dtype: of what is not quantized; ``None`` keeps it.
        progress: told of layers.

    Raises:
        ConfigError: the options do not fit together.
    """
    from mtnlg.api import MegatronLmModel
    from mtnlg.config import ConfigError
    from mtnlg.config.quantize import with_quantization
    from mtnlg.quantization import calibrate

    config = quantize_config(arguments.quantize)
    if arguments.format != "hf":
        raise ConfigError(
            f"--quantize goes with --format hf, not {arguments.format}; for gguf say --precision q4_0."
        )
    if bool(arguments.calibrate) != (arguments.method != "rtn"):
        raise ConfigError(
            f"--method is {arguments.method}: gptq and awq need --calibrate FILE, and rtn looks at no text."
        )
    model = MegatronLmModel.from_pretrained(arguments.model, dtype=dtype, quantize=False)
    batches = []
    if arguments.calibrate:
        length = min(model.config.max_position_embeddings, 512)
        batches = read_batches(arguments.calibrate, model.tokenizer, length, arguments.calibrate_tokens)

    def tell(done: int, total: int) -> None:
        progress("quantizing", done, total, "layers")

    calibrate(model, config, arguments.method, batches, tell)
    model.config = with_quantization(model.config, config)
    model.save_pretrained(out, dtype=dtype, max_shard_bytes=int(arguments.max_shard_gb * 1e9))
    return f"mtnlg generate {out} TEXT"


def read_batches(
    paths: Sequence[str], tokenizer: Tokenizer | None, length: int, num_tokens: int
) -> list[torch.Tensor]:
    """Calibration text as batches of ids [rows, length]; documents follow each other.

    Raises:
        ConfigError: the model has no tokenizer, or there is too little text.
    """
    import torch

    from mtnlg.config import ConfigError
    from mtnlg.tokens import read_documents

    if tokenizer is None:
        raise ConfigError("--calibrate needs the model's tokenizer, and there is none beside it.")
    ids: list[int] = []
    for document in read_documents(paths):
        ids += tokenizer.encode(document.text)
        if len(ids) >= num_tokens:
            break
    rows = len(ids[:num_tokens]) // length
    if not rows:
        raise ConfigError(f"--calibrate: {len(ids)} tokens are too few; at least {length} are needed.")
    return list(torch.tensor(ids[: rows * length]).view(rows, length).split(ROWS))
