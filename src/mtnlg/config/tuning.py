"""What a tuned run begins from, what of it is trained, and which conversations it learns."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from mtnlg.config.adapter import ADAPTER_METHODS, AdapterConfig
from mtnlg.config.errors import ConfigError

METHODS = ("full", *ADAPTER_METHODS)
DATA_FORMATS = ("auto", "messages", "sharegpt", "instruction", "completion", "kdconv")
LOSS_ON = ("assistant", "last", "all")
TOO_LONG = ("cut", "leave_out", "refuse")


@dataclass
class DistillationConfig:
    """Learning from the logits of a larger model (Hinton et al. 2015, arXiv 1503.02531).

    A token's loss is ``share * temperature² * KL(teacher || student)``, both at the temperature, plus
    ``(1 - share)`` times its cross entropy.

    Args:
        teacher: a run, a checkpoint, a Hugging Face folder or hub name; its vocabulary is the student's.
        share: of the loss that is the teacher's.
        temperature: both distributions are softened by it.

    Raises:
        ConfigError: naming every field that is out of range, all at once.
    """

    teacher: str = ""
    share: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        problems = []
        if not self.teacher:
            problems.append("teacher is missing: name the model to learn from.")
        if not 0.0 < self.share <= 1.0:
            problems.append(f"share is {self.share}: it must be above 0 and at most 1.")
        if not self.temperature > 0.0:
            problems.append(f"temperature is {self.temperature}: it must be greater than 0.")
        if problems:
            raise ConfigError(problems)


@dataclass
class TuningConfig:
    """A run that goes on from another model's weights.

    Args:
        base: the model to begin from: a run, a checkpoint, a Hugging Face folder or hub name.
        method: ``full`` trains every weight; ``lora``, ``prompt`` and ``prefix`` train what ``adapter``
            describes beside weights that stay as they are.
        adapter: of the methods other than ``full``; its own ``method`` follows this one's.
        data: files of conversations; see ``format``.
        validation_data: files to evaluate on; none keeps ``validation_share`` of ``data`` apart.
        validation_share: share of the conversations of ``data`` kept for evaluation; 0 evaluates nothing.
        format: ``messages`` (OpenAI's), ``sharegpt``, ``instruction`` (instruction, input, output),
            ``completion`` (prompt, completion), ``kdconv``, or ``auto`` to see from each record.
        template: how conversations are written: a file with a jinja2 chat template; ``None`` takes the
            base's own, or ours where it has none. It is saved with the run.
        system: system message of conversations that have none.
        loss_on: ``assistant``, every answer; ``last``, only the last one; ``all``, every token.
        max_turns: longer dialogues are cut into parts of so many messages; ``None`` leaves them whole.
        too_long: of conversations longer than a sample: ``cut`` drops turns from their end, ``leave_out``
            drops them, ``refuse`` stops and names the first.
        packing: put several conversations into one sample; none sees another.
        epochs: how often the data is read; it becomes ``stop.steps``. ``None`` leaves that to ``stop``.
        distillation: learn from a larger model's logits too.

    Raises:
        ConfigError: naming every field that is out of range, all at once.
    """

    base: str = ""
    method: str = "full"
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: list[str] = field(default_factory=list)
    validation_data: list[str] = field(default_factory=list)
    validation_share: float = 0.05
    format: str = "auto"
    template: str | None = None
    system: str | None = None
    loss_on: str = "assistant"
    max_turns: int | None = None
    too_long: str = "cut"
    packing: bool = True
    epochs: float | None = None
    distillation: DistillationConfig | None = None

    def __post_init__(self) -> None:
        problems = []
        if not self.base:
            problems.append("tuning.base is missing: name the model to begin from.")
        if not self.data:
            problems.append("tuning.data is missing: name files of conversations.")
        for name, valid in (
            ("method", METHODS),
            ("format", DATA_FORMATS),
            ("loss_on", LOSS_ON),
            ("too_long", TOO_LONG),
        ):
            if getattr(self, name) not in valid:
                problems.append(
                    f"tuning.{name} is {getattr(self, name)!r}: choose one of {', '.join(valid)}."
                )
        if not 0.0 <= self.validation_share < 1.0:
            problems.append(
                f"tuning.validation_share is {self.validation_share}: it must be at least 0 and below 1."
            )
        if self.max_turns is not None and self.max_turns < 2:
            problems.append(f"tuning.max_turns is {self.max_turns}: it must be at least 2.")
        if self.epochs is not None and not self.epochs > 0.0:
            problems.append(f"tuning.epochs is {self.epochs}: it must be greater than 0.")
        if problems:
            raise ConfigError(problems)
        if self.trains_adapter:
            self.adapter = replace(self.adapter, method=self.method)

    @property
    def trains_adapter(self) -> bool:
        """Whether the base's own weights stay as they are."""
        return self.method != "full"
