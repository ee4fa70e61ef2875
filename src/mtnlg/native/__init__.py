"""C++ sources of ours as libraries: compiled once for a machine, in the background, and kept in a cache."""

from mtnlg.native.cache import NoFolderError
from mtnlg.native.compiler import NoCompilerError, begin, is_busy, library

__all__ = ["NoCompilerError", "NoFolderError", "begin", "is_busy", "library"]
