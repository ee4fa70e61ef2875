"""Going on from a trained model: conversations to learn, what of the model is trained, distillation."""

from mtnlg.tuning.conversations import Conversation, read_conversations
from mtnlg.tuning.defaults import tuning_defaults
from mtnlg.tuning.prepare import prepare_tuning
from mtnlg.tuning.work import Tuning

__all__ = ["Conversation", "Tuning", "prepare_tuning", "read_conversations", "tuning_defaults"]
