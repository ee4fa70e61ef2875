"""What is trained beside a frozen model: low-rank updates, virtual tokens, prefixes."""

from __future__ import annotations

from dataclasses import dataclass, field

from mtnlg.config.errors import ConfigError

ADAPTER_METHODS = ("lora", "prompt", "prefix")
# The linear layers of one Transformer layer, by their names in the model.
TARGETS = (
    "attention.query",
    "attention.key",
    "attention.value",
    "attention.output",
    "mlp.gate",
    "mlp.up",
    "mlp.down",
)


@dataclass
class AdapterConfig:
    """One adapter.

    Args:
        method: ``lora`` (Hu et al. 2021, arXiv 2106.09685), ``prompt`` (prompt tuning, Lester et al.
            2021, arXiv 2104.08691) or ``prefix`` (prefix tuning, P-tuning v2; arXiv 2101.00190).
        rank: of LoRA's two matrices.
        alpha: LoRA's update is scaled by ``alpha / rank``.
        dropout: on what goes into LoRA's first matrix.
        target_modules: linear layers that get an update, by the ends of their names.
        rank_stabilized: scale by ``alpha / sqrt(rank)`` instead (arXiv 2312.03732).
        decomposed: DoRA, magnitude and direction apart (arXiv 2402.09353).
        num_virtual_tokens: of prompt and prefix tuning.

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

    def __post_init__(self) -> None:
        problems = []
        if self.method not in ADAPTER_METHODS:
            problems.append(f"method is {self.method!r}: choose one of {', '.join(ADAPTER_METHODS)}.")
        for name in ("rank", "alpha", "num_virtual_tokens"):
            if not getattr(self, name) > 0:
                problems.append(f"{name} is {getattr(self, name)}: it must be greater than 0.")
        if not 0.0 <= self.dropout < 1.0:
            problems.append(f"dropout is {self.dropout}: it must be at least 0 and below 1.")
        if problems:
            raise ConfigError(problems)
