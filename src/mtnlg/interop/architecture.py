"""What is known of one Hugging Face family, and what those of Llama's kind have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mtnlg.interop.settings import GATED_ACTIVATIONS, Activation, Rotary, Setting


@dataclass(frozen=True)
class Architecture:
    """One family of Hugging Face.

    Args:
        model_type: its name in ``config.json``.
        class_name: transformers' class.
        fields: our field → its key in ``config.json``.
        defaults: what transformers assumes where ``config.json`` leaves a key out.
        unsupported: key → the only values under which our model computes the same.
        fixed: our field → what it is in every model of the family.
        settings: what takes more than one key.
        aliases: another name of a key → the key.
    """

    model_type: str
    class_name: str
    fields: dict[str, str]
    defaults: dict[str, Any]
    unsupported: dict[str, tuple[Any, ...]]
    fixed: dict[str, Any] = field(default_factory=dict)
    settings: tuple[Setting, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)

    @property
    def expressed(self) -> set[str]:
        """Our fields that a ``config.json`` of the family says; all others have their defaults."""
        return {*self.fields, *self.fixed, *(name for setting in self.settings for name in setting.names)}


LLAMA_FIELDS = dict(
    vocab_size="vocab_size",
    hidden_size="hidden_size",
    num_hidden_layers="num_hidden_layers",
    num_attention_heads="num_attention_heads",
    num_key_value_heads="num_key_value_heads",
    head_dim="head_dim",
    intermediate_size="intermediate_size",
    max_position_embeddings="max_position_embeddings",
    layernorm_eps="rms_norm_eps",
    init_method_std="initializer_range",
    attention_dropout="attention_dropout",
    tie_word_embeddings="tie_word_embeddings",
    use_cache="use_cache",
)
LLAMA_DEFAULTS: dict[str, Any] = dict(
    vocab_size=32000, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=None, head_dim=None, intermediate_size=11008, max_position_embeddings=2048,
    rms_norm_eps=1e-6, initializer_range=0.02, attention_dropout=0.0, tie_word_embeddings=False,
    use_cache=True, hidden_act="silu", attention_bias=False, mlp_bias=False,
)  # fmt: skip
LLAMA_FIXED: dict[str, Any] = dict(position_embedding="rotary", normalization="rmsnorm")
LLAMA_SETTINGS: tuple[Setting, ...] = (Activation("hidden_act", GATED_ACTIVATIONS), Rotary())
NO_BIASES: dict[str, Any] = dict(attention_bias=False, attention_output_bias=False, mlp_bias=False)
