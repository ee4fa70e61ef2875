"""What a model learns to predict: the next token, or what was taken out of the text.

Span corruption and prefix language modelling: Raffel et al. 2019, arXiv 1910.10683. The mixture of
denoisers with mode tokens: UL2, Tay et al. 2022, arXiv 2205.05131.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mtnlg.config.errors import ConfigError

OBJECTIVES = ("causal", "span_corruption", "prefix_lm", "ul2")
KINDS = ("spans", "suffix", "prefix")
# UL2's seven, each as often (its table 1); the names of the modes are those of its published weights:
# [NLU] regular, [S2S] sequential, [NLG] extreme denoising.
UL2_DENOISERS = (
    "spans 0.15 3 [NLU]",
    "spans 0.15 8 [NLU]",
    "suffix 0.25 [S2S]",
    "spans 0.5 3 [NLG]",
    "spans 0.5 8 [NLG]",
    "spans 0.15 64 [NLG]",
    "spans 0.5 64 [NLG]",
)
NUM_SENTINELS = 100  # of T5's vocabularies
SENTINEL_NAME = "<extra_id_{}>"


@dataclass(frozen=True)
class Denoiser:
    """One way to make an input and a target of a piece of text.

    Args:
        kind: ``spans`` takes random spans out, ``suffix`` everything from a random place on; sentinels
            stand for them. ``prefix`` splits at a random place without any.
        noise_density: share of the tokens that is taken out; on average but for ``spans``.
        mean_span_length: tokens of a span on average, for ``spans``.
        mode: name of a token that is put before the input.
        weight: how often it is taken, beside the others.
    """

    kind: str
    noise_density: float
    mean_span_length: float = 3.0
    mode: str | None = None
    weight: float = 1.0

    def lengths(self, num_tokens: int) -> tuple[int, int]:
        """Most tokens of input and target that ``num_tokens`` of text become; of spans, always these."""
        modes = self.mode is not None
        if self.kind == "prefix":
            return num_tokens - 1 + modes, self._longest_suffix(num_tokens)
        if self.kind == "suffix":  # each with the sentinel and the end
            return num_tokens + 1 + modes, self._longest_suffix(num_tokens) + 2
        noise, spans = self.noise_and_spans(num_tokens)
        return num_tokens - noise + spans + 1 + modes, noise + spans + 1

    def longest_together(self, num_tokens: int) -> int:
        """Most tokens that input and target have together."""
        if self.kind == "prefix":
            return num_tokens + (self.mode is not None)
        if self.kind == "suffix":
            return num_tokens + 4 + (self.mode is not None)
        return sum(self.lengths(num_tokens))

    def noise_and_spans(self, num_tokens: int) -> tuple[int, int]:
        """Tokens taken out and the spans they are in, of at least 2 tokens of text (``spans``)."""
        noise = min(max(round(num_tokens * self.noise_density), 1), num_tokens - 1)
        spans = max(1, round(noise / self.mean_span_length))
        return noise, min(spans, noise, num_tokens - noise)

    def suffix_length(self, num_tokens: int, uniform: float) -> int:
        """Tokens from the place of the split on, for a number drawn from [0, 1): 1 to twice the mean."""
        return 1 + int(uniform * self._longest_suffix(num_tokens))

    def _longest_suffix(self, num_tokens: int) -> int:
        longest = round(2.0 * self.noise_density * num_tokens) - 1
        return min(max(longest, 1), num_tokens - 1)


@dataclass
class ObjectiveConfig:
    """What is predicted of a text.

    ``prepare`` takes the ids of special tokens from the run's tokenizer; whoever builds streams by hand
    gives them.

    Args:
        name: ``causal``, every next token; ``span_corruption``, T5's random spans; ``prefix_lm``, the
            second part of a text split at a random place; ``ul2``, a mixture of denoisers. Encoder-decoders
            read the input and write the target; a decoder reads one after the other, sees the whole
            input at once and is scored on the target.
        noise_density: share of the tokens taken out; ``None`` is 0.15 of spans, and half of a text for
            ``prefix_lm`` (the mean; the place of the split is uniform).
        mean_span_length: tokens of a span on average (``span_corruption``); ``None`` is 3.
        denoisers: of ``ul2``, each as ``spans DENSITY MEAN_LENGTH [MODE] [xWEIGHT]``,
            ``suffix DENSITY ...`` or ``prefix DENSITY ...``; none are UL2's seven.
        target_length: tokens that the decoder of an encoder-decoder has room for; ``None`` is as many as
            the longest target has. Of conversations (``causal``) it cuts the answers.
        sentinel_ids: tokens that stand for what was taken out, the first first: ``32099-32000``.
        end_id: ends inputs and targets of spans.
        padding_id: fills up what is short.
        start_id: what a decoder's target is read after; ``None`` is the padding.
        mode_ids: token of each mode that a denoiser names.

    Raises:
        ConfigError: naming every field that is out of range, all at once.
    """

    name: str = "causal"
    noise_density: float | None = None
    mean_span_length: float | None = None
    denoisers: list[str] = field(default_factory=list)
    target_length: int | None = None
    sentinel_ids: str | None = None
    end_id: int | None = None
    padding_id: int | None = None
    start_id: int | None = None
    mode_ids: dict[str, int] | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.name not in OBJECTIVES:
            problems.append(f"name is {self.name!r}: choose one of {', '.join(OBJECTIVES)}.")
        if self.noise_density is not None and not 0.0 < self.noise_density < 1.0:
            problems.append(f"noise_density is {self.noise_density}: it must be above 0 and below 1.")
        if self.mean_span_length is not None and not self.mean_span_length >= 1.0:
            problems.append(f"mean_span_length is {self.mean_span_length}: it must be at least 1.")
        if self.target_length is not None and self.target_length < 1:
            problems.append(f"target_length is {self.target_length}: it must be at least 1.")
        problems += self._settings_of_others()
        for text in self.denoisers:
            try:
                parse_denoiser(text)
            except ValueError as error:
                problems.append(str(error))
        try:
            self.sentinels()
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ConfigError(problems)

    @property
    def is_causal(self) -> bool:
        """Whether every next token is predicted."""
        return self.name == "causal"

    @property
    def needs_sentinels(self) -> bool:
        """Whether anything is taken out that a sentinel stands for."""
        return any(denoiser.kind != "prefix" for denoiser in self.chosen())

    @property
    def is_padded(self) -> bool:
        """Whether inputs differ in length (those of one kind of spans never do)."""
        chosen = self.chosen()
        return len(chosen) > 1 or any(denoiser.kind != "spans" for denoiser in chosen)

    def chosen(self) -> list[Denoiser]:
        """The denoisers of this objective; none of ``causal``."""
        if self.name == "span_corruption":
            return [Denoiser("spans", self.noise_density or 0.15, self.mean_span_length or 3.0)]
        if self.name == "prefix_lm":
            return [Denoiser("prefix", self.noise_density or 0.5)]
        if self.name == "ul2":
            return [parse_denoiser(text) for text in self.denoisers or UL2_DENOISERS]
        return []

    def modes(self) -> list[str]:
        """Names of the mode tokens, each once, in the order of the denoisers."""
        return list(dict.fromkeys(denoiser.mode for denoiser in self.chosen() if denoiser.mode))

    def sentinels(self) -> list[int]:
        """Ids of the sentinels, the first first; none where they are not known.

        Raises:
            ValueError: ``sentinel_ids`` is not ``FIRST-LAST``.
        """
        if self.sentinel_ids is None:
            return []
        try:
            first, last = map(int, self.sentinel_ids.split("-"))
        except ValueError:
            raise ValueError(
                f"sentinel_ids is {self.sentinel_ids!r}: give FIRST-LAST, such as 32099-32000."
            ) from None
        step = 1 if last >= first else -1
        return list(range(first, last + step, step))

    def text_length(self, sequence_length: int, has_encoder: bool) -> int:
        """Tokens of text that make one sample.

        Args:
            sequence_length: tokens of an encoder's input, or those that a decoder reads.
            has_encoder: whether the model has an encoder.

        Raises:
            ConfigError: not even two tokens fit.
        """
        if self.is_causal:
            return sequence_length

        def fits(length: int) -> bool:
            if not has_encoder:
                # The last token of a row is predicted and never read.
                return all(d.longest_together(length) <= sequence_length + 1 for d in self.chosen())
            sizes = [denoiser.lengths(length) for denoiser in self.chosen()]
            room = self.target_length or max(targets for _, targets in sizes)
            return all(inputs <= sequence_length and targets <= room for inputs, targets in sizes)

        low, high = 1, 2
        while fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        if low < 2:
            raise ConfigError(
                f"data.sequence_length is {sequence_length}: with data.objective.name {self.name} and "
                f"target_length {self.target_length} not even two tokens of text fit; raise them."
            )
        return low

    def longest_target(self, sequence_length: int) -> int:
        """Tokens that the decoder of an encoder-decoder has room for, derived if need be."""
        if self.target_length is not None:
            return self.target_length
        length = self.text_length(sequence_length, has_encoder=True)
        return max(denoiser.lengths(length)[1] for denoiser in self.chosen())

    def _settings_of_others(self) -> list[str]:
        """Settings that this objective does not read."""
        readers = {
            "noise_density": ("span_corruption", "prefix_lm"),
            "mean_span_length": ("span_corruption",),
            "denoisers": ("ul2",),
        }
        return [
            f"{setting} is {getattr(self, setting)}: only {' and '.join(names)} read it, and name is "
            f"{self.name}; leave it out."
            for setting, names in readers.items()
            if getattr(self, setting) not in (None, []) and self.name not in names
        ]


def parse_denoiser(text: str) -> Denoiser:
    """``spans 0.15 3 [NLU] x2`` as a denoiser.

    Raises:
        ValueError: it cannot be read as one.
    """
    kind, *words = text.split() or [""]
    weight, mode, numbers = 1.0, None, []
    try:
        for word in words:
            if word.startswith("x") and word[1:2].isdigit():
                weight = float(word[1:])
            elif word[0].isdigit() or word[0] == ".":
                numbers.append(float(word))
            elif mode is None:
                mode = word
            else:
                raise ValueError
    except ValueError:
        numbers = []
    right = kind in KINDS and len(numbers) == 1 + (kind == "spans")
    right = right and 0.0 < numbers[0] < 1.0 and numbers[-1] > 0.0 and weight > 0.0
    if not right or (kind == "spans" and numbers[1] < 1.0):
        raise ValueError(
            f"denoisers: {text!r} cannot be read. Write 'spans DENSITY MEAN_LENGTH', 'suffix DENSITY' or "
            "'prefix DENSITY', then a mode's name and xWEIGHT if wanted: 'spans 0.15 3 [NLU] x2'."
        )
    mean_span_length = numbers[1] if kind == "spans" else 3.0
    return Denoiser(kind, numbers[0], mean_span_length, mode, weight)
