"""From text to tokens and batches: tokenizer, documents, token files, blends, the batch stream.

The names load on first use, so that a worker that only reads token files imports nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtnlg.tokens.documents import Document, read_documents
    from mtnlg.tokens.encode import EncodeReport, encode_files
    from mtnlg.tokens.token_file import TokenFile
    from mtnlg.tokens.token_writer import TokenFileWriter
    from mtnlg.tokens.tokenizer import Tokenizer

_HOMES = {
    "Document": "mtnlg.tokens.documents",
    "EncodeReport": "mtnlg.tokens.encode",
    "TokenFile": "mtnlg.tokens.token_file",
    "TokenFileWriter": "mtnlg.tokens.token_writer",
    "Tokenizer": "mtnlg.tokens.tokenizer",
    "encode_files": "mtnlg.tokens.encode",
    "read_documents": "mtnlg.tokens.documents",
}
__all__ = [
    "Document",
    "EncodeReport",
    "TokenFile",
    "TokenFileWriter",
    "Tokenizer",
    "encode_files",
    "read_documents",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mtnlg.tokens' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
