"""Judging layouts before anything runs: what a rank must hold, and which layout to take."""

from mtnlg.planning.auto_layout import choose_layout, resolve_auto_layout
from mtnlg.planning.memory import MemoryNeed, memory_of_rank

__all__ = ["MemoryNeed", "choose_layout", "memory_of_rank", "resolve_auto_layout"]
