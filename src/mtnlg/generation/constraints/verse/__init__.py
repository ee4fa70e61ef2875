"""Chinese verse forms: line lengths, tone patterns and rhymes, kept at every token."""

from mtnlg.generation.constraints.verse.constraint import VerseConstraint, verse_constraint
from mtnlg.generation.constraints.verse.forms import REGULATED, VerseForm

__all__ = ["REGULATED", "VerseConstraint", "VerseForm", "verse_constraint"]
