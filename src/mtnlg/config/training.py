"""How to train: optimizer, schedules, batch, precision, when to stop, what to keep."""

from __future__ import annotations

from dataclasses import dataclass, field

from mtnlg.config.errors import ConfigError

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "linear", "wsd", "constant")
PRECISIONS = ("float32", "bf16", "fp16")
REDUCE_DTYPES = ("float32", "bf16")
RECOMPUTATIONS = ("none", "selective", "operators", "budget", "full")
RECOMPUTED_OPERATORS = ("attention", "normalization", "activation", "linear")


def _require(problems: list[str]) -> None:
    if problems:
        raise ConfigError(problems)


def _out_of_range(section: str, config: object, positive: str = "", non_negative: str = "") -> list[str]:
    problems = []
    for name in positive.split():
        value = getattr(config, name)
        if value is not None and not value > 0:
            problems.append(f"{section}.{name} is {value}: it must be greater than 0.")
    for name in non_negative.split():
        value = getattr(config, name)
        if value is not None and not value >= 0:
            problems.append(f"{section}.{name} is {value}: it must not be negative.")
    return problems


def _not_a_choice(section: str, config: object, **choices: tuple[str, ...]) -> list[str]:
    return [
        f"{section}.{name} is {getattr(config, name)!r}: choose one of {', '.join(valid)}."
        for name, valid in choices.items()
        if getattr(config, name) not in valid
    ]


@dataclass
class OptimizerConfig:
    """The optimizer; the defaults are MT-NLG's (arXiv 2201.11990, section 3.2) but for the rate.

    Args:
        name: ``adamw``, or ``muon`` (orthogonalised momentum for the matrices of the layers, AdamW
            for everything else).
        learning_rate: peak rate of AdamW.
        muon_learning_rate: peak rate of Muon's matrices; it follows the same schedule.
        muon_momentum: Nesterov momentum of Muon.
        beta1: decay of AdamW's first moment.
        beta2: decay of AdamW's second moment.
        epsilon: AdamW's epsilon.
        weight_decay: decoupled; never on norms and biases.
        clip_grad_norm: largest global gradient norm; 0 turns clipping off.
    """

    name: str = "adamw"
    learning_rate: float = 6e-4
    muon_learning_rate: float = 0.02
    muon_momentum: float = 0.95
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        problems = _not_a_choice("optimizer", self, name=OPTIMIZERS)
        problems += _out_of_range(
            "optimizer", self, "learning_rate muon_learning_rate epsilon", "weight_decay clip_grad_norm"
        )
        for name in ("beta1", "beta2", "muon_momentum"):
            if not 0.0 <= getattr(self, name) < 1.0:
                problems.append(f"optimizer.{name} is {getattr(self, name)}: it must be in [0, 1).")
        _require(problems)


@dataclass
class ScheduleConfig:
    """Learning rate over the tokens seen.

    Args:
        name: ``cosine``, ``linear``, ``wsd`` (warmup, stable, decay) or ``constant``.
        warmup_tokens: linear warmup from 0.
        decay_tokens: tokens at which the decay ends; ``None`` is the end of the run.
        wsd_decay_share: share of the run that ``wsd`` spends decaying (as 1 - sqrt).
        min_learning_rate_ratio: floor as a share of the peak.
    """

    name: str = "cosine"
    warmup_tokens: int = 0
    decay_tokens: int | None = None
    wsd_decay_share: float = 0.2
    min_learning_rate_ratio: float = 0.1

    def __post_init__(self) -> None:
        problems = _not_a_choice("schedule", self, name=SCHEDULES)
        problems += _out_of_range("schedule", self, "decay_tokens", "warmup_tokens")
        for name in ("wsd_decay_share", "min_learning_rate_ratio"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                problems.append(f"schedule.{name} is {getattr(self, name)}: it must be in [0, 1].")
        _require(problems)


@dataclass
class BatchConfig:
    """Batch sizes, in sequences.

    Args:
        micro_batch_size: sequences one replica runs through the model at once.
        global_batch_size: sequences of one optimizer step over all replicas.
        ramp_start: first global batch size; ``None`` starts at ``global_batch_size``.
        ramp_increment: sequences added at each step of the ramp.
        ramp_tokens: tokens over which the ramp runs.
    """

    micro_batch_size: int = 8
    global_batch_size: int = 32
    ramp_start: int | None = None
    ramp_increment: int = 32
    ramp_tokens: int = 0

    def __post_init__(self) -> None:
        problems = _out_of_range(
            "batch", self, "micro_batch_size global_batch_size ramp_start ramp_increment", "ramp_tokens"
        )
        if not problems and self.ramp_start is not None:
            span = self.global_batch_size - self.ramp_start
            if span < 0 or span % self.ramp_increment:
                problems.append(
                    f"batch.ramp_increment is {self.ramp_increment}: steps of it must lead from "
                    f"ramp_start ({self.ramp_start}) to global_batch_size ({self.global_batch_size})."
                )
        _require(problems)


@dataclass
class PrecisionConfig:
    """Number formats of the computation; weights and optimizer state are always float32.

    Args:
        dtype: ``float32``, ``bf16`` or ``fp16`` (with dynamic loss scaling).
        reduce_dtype: of gradients as they are summed over ranks: ``float32``, or ``bf16`` for half the
            messages.
        fp8: multiply in 8-bit floats in the linear layers of the blocks (through torchao, on GPUs of
            compute capability 8.9 and later); the rest stays ``dtype``.
        initial_loss_scale: fp16's first scale.
        loss_scale_window: good steps after which fp16's scale doubles.
        min_loss_scale: fp16 gives up below it.
    """

    dtype: str = "float32"
    reduce_dtype: str = "float32"
    fp8: bool = False
    initial_loss_scale: float = 65536.0
    loss_scale_window: int = 1000
    min_loss_scale: float = 1.0

    def __post_init__(self) -> None:
        problems = _not_a_choice("precision", self, dtype=PRECISIONS, reduce_dtype=REDUCE_DTYPES)
        problems += _out_of_range("precision", self, "initial_loss_scale loss_scale_window min_loss_scale")
        _require(problems)


@dataclass
class StopConfig:
    """When training ends: at whichever comes first. At least one must be given.

    Args:
        tokens: tokens trained on.
        steps: optimizer steps.
        minutes: wall time of training, earlier parts of a resumed run counted in. With it alone,
            schedules run over the share of time that has passed.
        patience: evaluations without an improvement of the validation loss; 0 never stops for it.
        margin: how much lower (nats a token) counts as an improvement.
    """

    tokens: int | None = None
    steps: int | None = None
    minutes: float | None = None
    patience: int = 0
    margin: float = 0.0

    def __post_init__(self) -> None:
        problems = _out_of_range("stop", self, "tokens steps minutes", "patience margin")
        if self.tokens is None and self.steps is None and self.minutes is None:
            problems.append("stop: give at least one of tokens, steps, minutes.")
        _require(problems)


@dataclass
class EvaluationConfig:
    """Evaluation and samples during training.

    Args:
        interval_steps: steps between evaluations; 0 evaluates only at the end.
        num_batches: micro-batches of each evaluation; 0 is the whole validation split.
        prompts: texts to continue at each evaluation, written to ``samples.jsonl``.
        sample_tokens: new tokens of each sample.
    """

    interval_steps: int = 200
    num_batches: int = 20
    prompts: list[str] = field(default_factory=list)
    sample_tokens: int = 64

    def __post_init__(self) -> None:
        _require(_out_of_range("evaluation", self, "sample_tokens", "interval_steps num_batches"))


@dataclass
class CheckpointConfig:
    """What is kept.

    Args:
        interval_steps: steps between checkpoints; 0 saves only at the end.
        interval_minutes: minutes between checkpoints; ``None`` counts steps only.
        keep_last: newest checkpoints kept.
        keep_every: also keep each checkpoint whose step is a multiple of this; 0 keeps none.
        asynchronous: copy to the CPU's memory and write while training goes on.
    """

    interval_steps: int = 500
    interval_minutes: float | None = None
    keep_last: int = 2
    keep_every: int = 0
    asynchronous: bool = True

    def __post_init__(self) -> None:
        _require(
            _out_of_range("checkpoint", self, "keep_last interval_minutes", "interval_steps keep_every")
        )


@dataclass
class LoggingConfig:
    """Metrics.

    Args:
        interval_steps: steps between lines of ``metrics.jsonl``.
        tensorboard: also write TensorBoard files (needs the ``tensorboard`` extra).
    """

    interval_steps: int = 10
    tensorboard: bool = False

    def __post_init__(self) -> None:
        _require(_out_of_range("logging", self, "interval_steps"))


@dataclass
class TrainingConfig:
    """The engine's switches.

    Args:
        device: ``cpu``, ``cuda`` or ``None`` for the best that is present.
        num_threads: CPU threads of one rank; ``None`` divides the cores over the ranks.
        compile: ``torch.compile`` each Transformer layer.
        activation_recomputation: ``none``; ``selective``, attention only; ``operators``, those of
            ``recomputed_operators``; ``budget``, whatever keeps within ``activation_memory_budget``;
            ``full``, whole layers.
        recomputed_operators: any of ``attention``, ``normalization``, ``activation``, ``linear``.
        activation_memory_budget: share of the activations of a run without recomputation that may be
            kept, in [0, 1]; 0 keeps as little as ``full``.
        activation_offload: keep what waits for the backward pass in the CPU's memory (GPUs only).
        max_skipped_steps: consecutive steps with non-finite gradients before training gives up.
        deterministic: use torch's deterministic kernels.
    """

    device: str | None = None
    num_threads: int | None = None
    compile: bool = False
    activation_recomputation: str = "none"
    recomputed_operators: list[str] = field(default_factory=lambda: ["attention", "activation"])
    activation_memory_budget: float = 0.5
    activation_offload: bool = False
    max_skipped_steps: int = 10
    deterministic: bool = False

    def __post_init__(self) -> None:
        problems = _not_a_choice("training", self, activation_recomputation=RECOMPUTATIONS)
        problems += _out_of_range("training", self, "num_threads", "max_skipped_steps")
        if self.device not in (None, "cpu", "cuda"):
            problems.append(f"training.device is {self.device!r}: choose one of cpu, cuda.")
        problems += self._recomputation_problems()
        _require(problems)

    def check_device(self, device_type: str) -> None:
        """Refuse what the device that was found cannot do.

        Args:
            device_type: ``cpu`` or ``cuda``.

        Raises:
            ConfigError: activations are to be moved to the CPU's memory from the CPU.
        """
        if self.activation_offload and device_type == "cpu":
            raise ConfigError(
                "training.activation_offload is true: activations of a run on the CPU are in the CPU's "
                "memory already. Switch it off, or use activation_recomputation to keep fewer of them."
            )

    def _recomputation_problems(self) -> list[str]:
        what, problems = self.activation_recomputation, []
        unknown = [name for name in self.recomputed_operators if name not in RECOMPUTED_OPERATORS]
        if unknown or (what == "operators" and not self.recomputed_operators):
            problems.append(
                f"training.recomputed_operators is {self.recomputed_operators}: name some of "
                f"{', '.join(RECOMPUTED_OPERATORS)}."
            )
        if not 0.0 <= self.activation_memory_budget <= 1.0:
            problems.append(
                f"training.activation_memory_budget is {self.activation_memory_budget}: it must be in "
                "[0, 1]."
            )
        if self.compile and (what in ("operators", "budget") or self.activation_offload):
            setting = "activation_offload: true" if self.activation_offload else what
            problems.append(
                f"training.compile does not go with {setting}: the compiler decides by itself what a "
                "compiled layer keeps. Use activation_recomputation none, selective or full with it, or "
                "compile: false."
            )
        return problems
