"""Guessing tokens that the model then checks several at a time."""

from mtnlg.generation.speculation.choose import make_drafter
from mtnlg.generation.speculation.model import ModelDrafter
from mtnlg.generation.speculation.ngram import NgramDrafter
from mtnlg.generation.speculation.verify import sample_drafted

__all__ = ["ModelDrafter", "NgramDrafter", "make_drafter", "sample_drafted"]
