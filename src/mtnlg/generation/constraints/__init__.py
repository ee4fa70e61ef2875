"""Rules that a continuation follows: JSON, regular expressions, grammars, choices, verse forms."""

from mtnlg.generation.constraints.options import KINDS, constraint_from_options, default_end_ids

__all__ = ["KINDS", "constraint_from_options", "default_end_ids"]
