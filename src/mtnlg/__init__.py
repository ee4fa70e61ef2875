"""mtnlg: Megatron-Turing NLG as software that people can run.

The public names load on first use, so that ``import mtnlg`` and ``mtnlg --help`` stay fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mtnlg.api import MegatronLmModel
    from mtnlg.config import MegatronModelConfig
    from mtnlg.encoder_decoder import (
        MegatronEncoderDecoderModel,
        MT5ForConditionalGeneration,
        MT5Tokenizer,
        T5ForConditionalGeneration,
        T5Tokenizer,
        UMT5ForConditionalGeneration,
    )
    from mtnlg.tokens import Tokenizer

_HOMES = {
    "MT5ForConditionalGeneration": "mtnlg.encoder_decoder",
    "MT5Tokenizer": "mtnlg.encoder_decoder",
    "MegatronEncoderDecoderModel": "mtnlg.encoder_decoder",
    "MegatronLmModel": "mtnlg.api",
    "MegatronModelConfig": "mtnlg.config",
    "T5ForConditionalGeneration": "mtnlg.encoder_decoder",
    "T5Tokenizer": "mtnlg.encoder_decoder",
    "Tokenizer": "mtnlg.tokens",
    "UMT5ForConditionalGeneration": "mtnlg.encoder_decoder",
}
__all__ = [
    "MT5ForConditionalGeneration",
    "MT5Tokenizer",
    "MegatronEncoderDecoderModel",
    "MegatronLmModel",
    "MegatronModelConfig",
    "T5ForConditionalGeneration",
    "T5Tokenizer",
    "Tokenizer",
    "UMT5ForConditionalGeneration",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mtnlg' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
