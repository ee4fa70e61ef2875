"""The decoder as plain PyTorch: it knows nothing of ranks, precision or devices."""

from mtnlg.model.attention import Attention, KeyValueCache
from mtnlg.model.decoder import DecoderOutput, Embedding, Head, MegatronLmDecoder
from mtnlg.model.encoder_decoder import CrossDecoderLayer, EncoderLayer, MegatronEncoderDecoder
from mtnlg.model.initialization import (
    NoInitialization,
    initial_expert,
    initial_value,
    initialize_weights,
)
from mtnlg.model.layers import DecoderLayer
from mtnlg.model.loss import IGNORED_LABEL, summed_cross_entropy
from mtnlg.model.moe import Experts, MixtureOfExperts
from mtnlg.model.router import Router

LanguageModel = MegatronLmDecoder | MegatronEncoderDecoder

__all__ = [
    "IGNORED_LABEL",
    "Attention",
    "CrossDecoderLayer",
    "DecoderLayer",
    "DecoderOutput",
    "Embedding",
    "EncoderLayer",
    "Experts",
    "Head",
    "KeyValueCache",
    "LanguageModel",
    "MegatronEncoderDecoder",
    "MegatronLmDecoder",
    "MixtureOfExperts",
    "NoInitialization",
    "Router",
    "initial_expert",
    "initial_value",
    "initialize_weights",
    "summed_cross_entropy",
]
