"""Everything that can be said to ``model.generate``, and the requests that follow from it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypedDict, get_type_hints

from mtnlg.config import ConfigError
from mtnlg.generation.constraint import Constraint
from mtnlg.generation.request import GenerationRequest
from mtnlg.generation.sampling import LogitBias, SamplingRules


class GenerationOptions(TypedDict, total=False):
    """Options of ``MegatronLmModel.generate``; every one may be left out.

    How long:
        max_length: total tokens of prompt and continuation, as in transformers.
        max_new_tokens: tokens of the continuation; 64 if neither is given, the smaller end if both are.
        min_new_tokens: nothing ends the text before so many tokens.
        end_ids: tokens that end a sequence; ``None`` is the tokenizer's end of text.
        stop: texts that end it, wherever token borders are; they are not part of the result.
        include_stop: let the result end with the stop text.
        deadline_seconds: end with what there is after so much time.

    Which tokens (:class:`~mtnlg.generation.SamplingRules` says what each does): temperature, top_k,
    top_p, min_p, typical_p, repetition_penalty, frequency_penalty, presence_penalty,
    no_repeat_ngram_size, logit_bias, seed; and
        constraint: a rule that the continuation follows (``mtnlg.generation.constraints``).

    How:
        streamer: for one prompt and one continuation: called with each new piece of text or new id.
        start_of_document: put the token that separates documents in training before a text prompt, as
            at the beginning of one (the default); it counts in no length. Ids stay as they are.
        use_cache: keep keys and values; ``None`` is the config's.
    """

    max_length: int | None
    max_new_tokens: int | None
    min_new_tokens: int
    end_ids: Collection[int] | None
    stop: str | Sequence[str]
    include_stop: bool
    deadline_seconds: float | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    no_repeat_ngram_size: int | None
    logit_bias: LogitBias | None
    seed: int | None
    constraint: Constraint | None
    streamer: Callable[[Any], None] | None
    start_of_document: bool
    use_cache: bool | None


class DetailedOptions(GenerationOptions, total=False):
    """Options that change what comes back.

    n: so many continuations of each prompt; the result is then a list for each prompt.
    best_of: draw so many and keep the ``n`` likeliest (mean log-probability of a token).
    details: give finished :class:`~mtnlg.generation.Generation` objects instead of texts or ids.
    logprobs: with ``details``: log-probabilities of the tokens and of so many alternatives.
    prompt_logprobs: with ``details``: the same for the tokens of the prompt.
    """

    n: int | None
    best_of: int | None
    details: bool
    logprobs: int | None
    prompt_logprobs: int | None


RULES = [field.name for field in fields(SamplingRules)]
OF_REQUEST = (
    "max_length",
    "max_new_tokens",
    "min_new_tokens",
    "include_stop",
    "deadline_seconds",
    "constraint",
    "logprobs",
    "prompt_logprobs",
)


def check_names(options: Mapping[str, Any]) -> None:
    """See that every option exists.

    Raises:
        TypeError: one does not, as Python says of any unknown argument.
    """
    known = list(get_type_hints(DetailedOptions))
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"generate() got an unexpected option {name!r}.{hint}")


def num_samples(options: Mapping[str, Any], num_prompts: int) -> tuple[int, int]:
    """How many continuations of each prompt are wanted, and how many are drawn to choose from.

    Raises:
        ConfigError: naming every option that does not go with the others.
    """
    n, best_of = options.get("n"), options.get("best_of")
    wanted = 1 if n is None else n
    drawn = wanted if best_of is None else best_of
    problems = []
    if type(wanted) is not int or wanted < 1:
        problems.append(f"n is {wanted!r}: it must be a whole number, at least 1.")
    elif type(drawn) is not int or drawn < wanted:
        problems.append(f"best_of is {drawn!r}: it must be a whole number, at least n ({wanted}).")
    if options.get("streamer") is not None and (num_prompts != 1 or n is not None or best_of is not None):
        problems.append(f"a streamer needs one prompt and one continuation, not {num_prompts} prompts"
                        f"{'' if n is None else f' and n={n}'}.")  # fmt: skip
    if options.get("logprobs") is not None and not options.get("details"):
        problems.append("logprobs come with details=True, which gives more than texts or ids.")
    if options.get("prompt_logprobs") is not None and not options.get("details"):
        problems.append("prompt_logprobs come with details=True, which gives more than texts or ids.")
    if problems:
        raise ConfigError(problems)
    return wanted, drawn


def requests_for(
    rows: Sequence[Sequence[int]],
    options: Mapping[str, Any],
    end_ids: Collection[int],
    num_start: int,
    num_drawn: int,
) -> list[GenerationRequest]:
    """The requests of one call, the continuations of a prompt beside each other.

    Args:
        rows: prompts.
        options: as :class:`GenerationOptions` says.
        end_ids: where the options name none.
        num_start: tokens at the beginning of each prompt that count in no length.
        num_drawn: continuations of each.

    Raises:
        ConfigError: a rule is out of range.
    """
    rules = SamplingRules.from_options(**{name: options[name] for name in RULES if name in options})
    given = {name: options[name] for name in OF_REQUEST if options.get(name) is not None}
    if given.get("max_length") is not None:
        given["max_length"] += num_start
    stop = options.get("stop") or ()
    given["stop"] = [stop] if isinstance(stop, str) else list(stop)
    chosen_ends = options.get("end_ids")
    given["end_ids"] = list(end_ids if chosen_ends is None else chosen_ends)
    if num_drawn > 1 and given.get("logprobs") is None and options.get("best_of") is not None:
        given["logprobs"] = 0
    return [
        GenerationRequest(row, rules, stream=number * num_drawn + sample, **given)
        for number, row in enumerate(rows)
        for sample in range(num_drawn)
    ]
