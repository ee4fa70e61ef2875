"""What is trained beside a frozen model: low-rank updates, virtual tokens, prefixes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from mtnlg.config.errors import ConfigError

ADAPTER_METHODS = ("lora", "prompt", "prefix")
# Where virtual tokens stand: before everything; after the user's text, where the answer begins; half of
# them at each of the two.
PROMPT_STYLES = ("prepend", "append", "both")
# Beside the linear layers of the Transformer layers, by their names in the model.
EMBEDDING_TARGET, HEAD_TARGET = "embedding.tokens", "head.output"
ALL_LINEAR = "all-linear"  # every linear layer of the Transformer layers


@dataclass
class AdapterConfig:
    """One adapter.

    Args:
        method: ``lora`` (Hu et al. 2021, arXiv 2106.09685), ``prompt`` (prompt tuning, Lester et al.
            2021, arXiv 2104.08691) or ``prefix`` (prefix tuning, P-tuning v2; arXiv 2101.00190).
        rank: of LoRA's two matrices.
        alpha: LoRA's update is scaled by ``alpha / rank``.
        dropout: on what goes into LoRA's first matrix.
        target_modules: linear layers that get an update, by the ends of their names; ``all-linear`` is
            all of the Transformer layers. ``embedding.tokens`` and ``head.output`` go by name only, and
            each by itself, tied or not.
        rank_stabilized: scale by ``alpha / sqrt(rank)`` instead (arXiv 2312.03732).
        decomposed: DoRA, magnitude and direction apart (arXiv 2402.09353).
        num_virtual_tokens: of prompt and prefix tuning.
        init_text: text whose embeddings the virtual tokens of prompt tuning begin as, repeated or cut
            to their number; empty draws tokens at random.
        init_vocab_size: draw from so many first tokens of the vocabulary (the frequent ones come
            first); ``None`` is all of it.
        update_every_n_steps: gradients of virtual tokens are averaged over so many steps before they
            change.
        lr_multiplier: of the learning rate, for virtual tokens.
        max_seq_length: most tokens, virtual ones among them, of a text that prompt tuning trains on or
            writes; ``None`` is the model's positions.
        prompt_style: where the virtual tokens of prompt tuning stand: ``prepend`` (before everything),
            ``append`` (between prompt and answer), ``both`` (half of them at each).
        prefix: text put before the user's.
        suffix: text put after it.

    Raises:
        ConfigError: naming every field that is out of range, all at once.
    """

    method: str = "lora"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["attention.query", "attention.value"])
    rank_stabilized: bool = False
    decomposed: bool = False
    num_virtual_tokens: int = 20
    init_text: str = ""
    init_vocab_size: int | None = None
    update_every_n_steps: int = 1
    lr_multiplier: float = 1.0
    max_seq_length: int | None = None
    prompt_style: str = "prepend"
    prefix: str = ""
    suffix: str = ""

    def __post_init__(self) -> None:
        problems = []
        if self.method not in ADAPTER_METHODS:
            problems.append(f"method is {self.method!r}: choose one of {', '.join(ADAPTER_METHODS)}.")
        if self.prompt_style not in PROMPT_STYLES:
            problems.append(
                f"prompt_style is {self.prompt_style!r}: choose one of {', '.join(PROMPT_STYLES)}."
            )
        positive = "rank alpha num_virtual_tokens init_vocab_size update_every_n_steps lr_multiplier"
        for name in positive.split():
            value = getattr(self, name)
            if value is not None and not value > 0:
                problems.append(f"{name} is {value}: it must be greater than 0.")
        if not 0.0 <= self.dropout < 1.0:
            problems.append(f"dropout is {self.dropout}: it must be at least 0 and below 1.")
        if self.method == "lora" and not self.target_modules:
            problems.append("target_modules is empty: name at least one linear layer, or all-linear.")
        if self.decomposed and EMBEDDING_TARGET in self.target_modules:
            problems.append(
                f"decomposed goes with linear layers; {EMBEDDING_TARGET} is none: take it out of "
                "target_modules, or use plain lora."
            )
        if self.max_seq_length is not None and self.max_seq_length <= self.num_positions:
            problems.append(
                f"max_seq_length is {self.max_seq_length}: the {self.num_positions} virtual tokens "
                "leave no room for text; it must be greater."
            )
        if problems:
            raise ConfigError(problems)

    @property
    def scale(self) -> float:
        """What LoRA's product counts."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    @property
    def longest_text(self) -> int | None:
        """Most tokens of a text that ``max_seq_length`` leaves room for; ``None`` where it says nothing."""
        return None if self.max_seq_length is None else self.max_seq_length - self.num_positions

    @property
    def num_positions(self) -> int:
        """Positions that virtual tokens take from the text."""
        return 0 if self.method == "lora" else self.num_virtual_tokens
