"""mtnlg: Megatron-Turing NLG as software that people can run.

The public names load on first use, so that ``import mtnlg`` and ``mtnlg --help`` stay fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mtnlg.api import MegatronLmModel
    from mtnlg.config import MegatronModelConfig
    from mtnlg.tokens import Tokenizer

_HOMES = {
    "MegatronLmModel": "mtnlg.api",
    "MegatronModelConfig": "mtnlg.config",
    "Tokenizer": "mtnlg.tokens",
}
__all__ = ["MegatronLmModel", "MegatronModelConfig", "Tokenizer", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mtnlg' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
