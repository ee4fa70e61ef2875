"""Everything that can be said to ``model.generate``, and the requests that follow from it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, TypedDict, get_type_hints

from mtnlg.config import ConfigError
from mtnlg.generation.constraint import Constraint
from mtnlg.generation.constraints import KINDS, constraint_from_options
from mtnlg.generation.request import GenerationRequest, TokenEvent
from mtnlg.generation.sampling import LogitBias, SamplingRules
from mtnlg.generation.search import SearchOptions
from mtnlg.tokens import Tokenizer


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
        constraint: a compiled rule that the continuation follows; or one of json_schema, json_object,
            regex, grammar, choice, verse (``mtnlg.generation.constraints``).

    Searching instead of choosing token by token (:class:`~mtnlg.generation.search.SearchOptions`):
        num_beams, num_beam_groups, diversity_penalty, length_penalty, early_stopping: beam search.
        penalty_alpha: contrastive search among ``top_k`` candidates.

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
    json_schema: Any
    json_object: bool
    regex: str | None
    grammar: str | None
    choice: Sequence[str] | None
    verse: Any
    num_beams: int | None
    num_beam_groups: int | None
    diversity_penalty: float | None
    length_penalty: float | None
    early_stopping: bool | Literal["never"] | None
    penalty_alpha: float | None
    streamer: Callable[[Any], None] | None
    start_of_document: bool
    use_cache: bool | None


class DetailedOptions(GenerationOptions, total=False):
    """Options that change what comes back.

    n: so many continuations of each prompt; the result is then a list for each prompt. Of beams the
        best ones.
    best_of: draw so many and keep the ``n`` likeliest (mean log-probability of a token).
    details: give finished :class:`~mtnlg.generation.Generation` objects instead of texts or ids.
    logprobs: with ``details``: log-probabilities of the tokens and of so many alternatives.
    prompt_logprobs: with ``details``: the same for the tokens of the prompt.
    listener: called with (number of the continuation, :class:`~mtnlg.generation.TokenEvent`) as things
        become known, those of one prompt counted after each other.
    """

    n: int | None
    best_of: int | None
    details: bool
    logprobs: int | None
    prompt_logprobs: int | None
    listener: Callable[[int, TokenEvent], None] | None


RULES = [field.name for field in fields(SamplingRules)]
OF_REQUEST = (
    "max_length",
    "max_new_tokens",
    "min_new_tokens",
    "include_stop",
    "deadline_seconds",
    "logprobs",
    "prompt_logprobs",
)
BEAMS = ("num_beams", "num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping")


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


def constraint_for(
    options: Mapping[str, Any], tokenizer: Tokenizer | None, vocab_size: int, end_ids: Collection[int]
) -> Constraint | None:
    """The compiled rule that the options name, if any.

    Raises:
        ConfigError: there are several, one cannot be used, or there is no tokenizer to compile it for.
    """
    given: Constraint | None = options.get("constraint")
    kinds = [kind for kind in KINDS if options.get(kind) not in (None, False)]
    if len(kinds) + (given is not None) > 1:
        named = [*kinds, *(["constraint"] if given is not None else [])]
        raise ConfigError(f"{' and '.join(named)} are given: a continuation follows one rule.")
    if not kinds:
        return given
    if tokenizer is None:
        raise ConfigError(f"{kinds[0]} needs a tokenizer: set model.tokenizer.")
    return constraint_from_options(tokenizer, vocab_size, kinds[0], options[kinds[0]], end_ids)


def search_options(options: Mapping[str, Any], wanted: int) -> SearchOptions | None:
    """The search that the options ask for, if any.

    With ``penalty_alpha``, ``top_k`` is the number of candidates and no rule for random draws.

    Args:
        options: as :class:`GenerationOptions` says.
        wanted: sequences to give back.

    Raises:
        ConfigError: an option is out of range, or goes only with a search that is not asked for.
    """
    given = {name: options[name] for name in BEAMS if options.get(name) is not None}
    alpha = options.get("penalty_alpha")
    if alpha is not None:
        given["penalty_alpha"] = alpha
        if options.get("top_k") is not None:
            given["top_k"] = options["top_k"]
    if not given:
        return None
    if given.get("num_beams", 1) != 1:
        given["num_return_sequences"] = wanted
    found = SearchOptions(**given)
    usual = SearchOptions()
    problems = []
    if found.num_beams == 1:
        problems = [
            f"{name} needs num_beams above 1, or leave it out."
            for name in BEAMS
            if name in given and given[name] != getattr(usual, name)
        ]
    if found.is_search:
        problems += [
            f"{name} is set: a search gives whole sequences and draws nothing; leave it out."
            for name in ("streamer", "listener", "best_of")
            if options.get(name) is not None
        ]
    if alpha is not None and wanted > 1:
        problems.append(f"n is {wanted}: contrastive search finds one continuation; leave it out.")
    if problems:
        raise ConfigError(problems)
    return found if found.is_search else None


def requests_for(
    rows: Sequence[Sequence[int]],
    options: Mapping[str, Any],
    end_ids: Collection[int],
    num_start: int,
    num_drawn: int,
    constraint: Constraint | None = None,
) -> list[GenerationRequest]:
    """The requests of one call, the continuations of a prompt beside each other.

    Args:
        rows: prompts.
        options: as :class:`GenerationOptions` says.
        end_ids: tokens that end a sequence.
        num_start: tokens at the beginning of each prompt that count in no length.
        num_drawn: continuations of each.
        constraint: see :func:`constraint_for`.

    Raises:
        ConfigError: a rule is out of range.
    """
    taken = ("top_k",) if options.get("penalty_alpha") is not None else ()
    names = [name for name in RULES if name in options and name not in taken]
    rules = SamplingRules.from_options(**{name: options[name] for name in names})
    given = {name: options[name] for name in OF_REQUEST if options.get(name) is not None}
    if given.get("max_length") is not None:
        given["max_length"] += num_start
    stop = options.get("stop") or ()
    given["stop"] = [stop] if isinstance(stop, str) else list(stop)
    if num_drawn > 1 and given.get("logprobs") is None and options.get("best_of") is not None:
        given["logprobs"] = 0
    given |= {"end_ids": list(end_ids), "constraint": constraint}
    return [
        GenerationRequest(row, rules, stream=number * num_drawn + sample, **given)
        for number, row in enumerate(rows)
        for sample in range(num_drawn)
    ]
