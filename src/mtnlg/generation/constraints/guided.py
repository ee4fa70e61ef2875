"""JSON schemas, regular expressions, grammars and choices, compiled by llguidance.

llguidance walks the tokenizer's trie of byte strings, so a rule about characters holds although a
character may be spread over several tokens.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mtnlg.config.errors import ConfigError
from mtnlg.generation.constraint import DeadEndError, empty_bitmask
from mtnlg.generation.constraints.kept import Kept
from mtnlg.generation.constraints.residuals import Residual

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from mtnlg.tokens.tokenizer import Tokenizer

Ints = npt.NDArray[np.int32]
MOST_RULE_CHARACTERS = 1_000_000
# Space between the parts of a JSON document: none, one space, or a new line with its indentation. With
# any amount allowed, a model that likes white space would never come to an end.
JSON_SPACE = r" |\n[ \t]{0,40}"
# Tokens of nothing but Chinese characters. Where a rule takes so many of any of them, all these tokens are
# allowed without a look at each: in a vocabulary with Chinese words that is most of it.
HAN_SLICES = [f"[\u4e00-\u9fa5]{{1,{most}}}" for most in (8, 4, 3, 2)]
_NAMES = {
    "json_schema": "the JSON schema",
    "json_object": "the JSON object",
    "regex": "the regular expression",
    "grammar": "the grammar",
    "choice": "the choice",
}


@dataclass(frozen=True)
class Shared:
    """What the sequences under a rule share.

    Args:
        num_tokens: tokens that masks speak of.
        tokenizer: knows their bytes.
        masks: int32 [ceil(vocab / 32)] by what the rule still asks for, where that is known.
    """

    num_tokens: int
    tokenizer: LLTokenizer
    masks: Kept[Ints] = field(default_factory=Kept)


class GuidedConstraint:
    """A rule that llguidance has compiled.

    Args:
        matcher: at the beginning of the rule; never moved.
        shared: by all sequences.
        residual: of a regular expression that is understood, at its beginning.
    """

    def __init__(self, matcher: LLMatcher, shared: Shared, residual: Residual | None = None) -> None:
        self._matcher, self._shared, self._residual = matcher, shared, residual

    def start(self) -> GuidedState:
        """The state before the first generated token."""
        return GuidedState(self._matcher.deep_copy(), self._shared, self._residual)


class GuidedState:
    """How far one sequence has come; see ``ConstraintState``."""

    def __init__(self, matcher: LLMatcher, shared: Shared, residual: Residual | None) -> None:
        self._matcher, self._shared, self._residual = matcher, shared, residual

    def fill_mask(self, bitmask: Tensor) -> None:
        """Write which tokens may come next into int32 [ceil(vocab / 32)].

        Raises:
            DeadEndError: the rule has become too large to go on with.
        """
        assert bitmask.is_contiguous() and bitmask.numel() * 32 >= self._shared.num_tokens
        if self._residual is None:
            self._make_mask(bitmask)
            return

        def make() -> Ints:
            self._make_mask(bitmask)
            made: Ints = bitmask.numpy().copy()
            return made

        bitmask.numpy()[:] = self._shared.masks.get(self._residual.key, make)

    def _make_mask(self, bitmask: Tensor) -> None:
        self._matcher.unsafe_compute_mask_ptr(bitmask.data_ptr(), bitmask.numel() * 4)
        self._check()

    def accept(self, token: int) -> None:
        """Go on by a token that the mask allowed.

        Raises:
            DeadEndError: it did not.
        """
        self._matcher.consume_token(token)
        self._check()
        if self._residual is not None:
            self._residual = self._residual.after(self._shared.tokenizer.decode_bytes([token]))

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow."""
        return self._matcher.is_stopped()

    def copy(self) -> GuidedState:
        """The same state, independent of this one."""
        return GuidedState(self._matcher.deep_copy(), self._shared, self._residual)

    def _check(self) -> None:
        if self._matcher.is_error():
            why = self._matcher.get_error().partition("\n")[0]  # then come pages of the parser's state
            raise DeadEndError(f"the rule that guides generation failed: {why}")


def compile_grammar(
    tokenizer: Tokenizer,
    vocab_size: int,
    end_ids: tuple[int, ...],
    grammar: str,
    kind: str,
    expression: str | None = None,
) -> GuidedConstraint:
    """A constraint from a grammar in llguidance's own form, and the regular expression that it is if any.

    Raises:
        ConfigError: the grammar cannot be used; the message says what is wrong with it.
    """
    if not end_ids:
        raise ConfigError("a rule needs a token to end with, and the tokenizer names none: give end_ids.")
    return _compile(tokenizer.definition, vocab_size, end_ids, grammar, kind, expression)


@lru_cache(maxsize=64)
def _compile(
    definition: str,
    vocab_size: int,
    end_ids: tuple[int, ...],
    grammar: str,
    kind: str,
    expression: str | None,
) -> GuidedConstraint:
    from llguidance import LLMatcher

    guided_tokenizer = _guided_tokenizer(definition, vocab_size, end_ids)
    matcher = LLMatcher(guided_tokenizer, grammar, log_level=0)
    if matcher.is_error():
        raise _error(kind, matcher.get_error())
    residual = None if expression is None else Residual.of(expression, _most_characters(definition))
    constraint = GuidedConstraint(matcher, Shared(vocab_size, guided_tokenizer), residual)
    _check_beginning(constraint, vocab_size, kind)
    return constraint


def _check_beginning(constraint: GuidedConstraint, vocab_size: int, kind: str) -> None:
    """Some rules show only at the first token that no text can keep them, or that they are too large."""
    mask = empty_bitmask(1, vocab_size)[0]
    try:
        constraint.start().fill_mask(mask)
    except DeadEndError as error:
        raise _error(kind, str(error)) from error
    if not mask.any():
        raise _error(kind, "no text keeps it")


@lru_cache(maxsize=4)
def _most_characters(definition: str) -> int:
    """No token has more."""
    vocabulary = json.loads(definition)["model"]["vocab"]
    names = vocabulary if isinstance(vocabulary, dict) else (entry[0] for entry in vocabulary)
    return max(len(name) for name in names)  # bytes are written as at least a character


@lru_cache(maxsize=4)
def _guided_tokenizer(definition: str, vocab_size: int, end_ids: tuple[int, ...]) -> LLTokenizer:
    from llguidance import LLTokenizer

    try:
        slices = LLTokenizer.general_slices() + HAN_SLICES
        return LLTokenizer(definition, n_vocab=vocab_size, eos_token=list(end_ids), slices=slices)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"the tokenizer cannot be used with a rule: {error}") from error


# -- from what users write to llguidance's form


def json_schema_grammar(schema: Any) -> str:
    """Of a JSON schema, given as a dict, ``True`` (anything) or JSON text."""
    matcher = _matcher_class()
    try:
        content = json.loads(schema) if isinstance(schema, str) else schema
        content = {} if content is True else content
        text = json.dumps(content, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise _error("json_schema", str(error)) from error
    if not isinstance(content, dict):
        raise _error("json_schema", f"it must be an object, not {text[:60]}")
    _check_length(text, "json_schema")
    try:
        return matcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": JSON_SPACE})
    except ValueError as error:
        raise _error("json_schema", str(error)) from error


def json_object_grammar(_value: object = None) -> str:
    """Of any JSON object."""
    return json_schema_grammar({"type": "object"})


def regex_grammar(expression: Any) -> str:
    """Of a regular expression in Rust's syntax, which is Python's without look-around and references."""
    matcher = _matcher_class()
    if not isinstance(expression, str) or not expression:
        raise _error("regex", f"it must be a text that is not empty, not {expression!r}")
    _check_length(expression, "regex")
    return matcher.grammar_from_regex(expression)


def context_free_grammar(text: Any) -> str:
    """Of a grammar in Lark's or llama.cpp's syntax."""
    matcher = _matcher_class()
    from llguidance.gbnf_to_lark import any_to_lark

    if not isinstance(text, str) or not text.strip():
        raise _error("grammar", f"it must be a text that is not empty, not {text!r}")
    _check_length(text, "grammar")
    try:
        lark = any_to_lark(text)
    except Exception as error:  # the converter raises bare ones
        raise _error(
            "grammar", f"{error} (it has no rule `start:`, so it was read as GBNF, which needs `root ::=`)"
        ) from error
    return matcher.grammar_from_lark(lark)


def choice_grammar(choices: Any) -> str:
    """Of one of several strings."""
    matcher = _matcher_class()
    if isinstance(choices, str) or not choices or not all(isinstance(one, str) and one for one in choices):
        raise _error("choice", f"it must be a list of texts that are not empty, not {choices!r}")
    lark = "start: " + " | ".join(json.dumps(one, ensure_ascii=False) for one in choices)
    _check_length(lark, "choice")
    return matcher.grammar_from_lark(lark)


def _matcher_class() -> type[LLMatcher]:
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise ConfigError(
            'rules for JSON, regular expressions and grammars need llguidance: pip install "mtnlg[guided]".'
        ) from error
    return LLMatcher


def _check_length(text: str, kind: str) -> None:
    if len(text) > MOST_RULE_CHARACTERS:
        raise _error(kind, f"it has {len(text):,} characters, more than {MOST_RULE_CHARACTERS:,}")


def _error(kind: str, problem: str) -> ConfigError:
    return ConfigError(f"{_NAMES[kind]} cannot be used: {_readable(kind, problem).strip().rstrip('.')}.")


def _readable(kind: str, problem: str) -> str:
    """What llguidance found, in words that do not ask the reader to know it."""
    if "NoExtension" in problem:
        return "no text keeps it"
    unknown = re.search(r"Unimplemented keys: \[(.*)\]", problem)
    if unknown is not None:
        return f"{unknown[1]} cannot be kept while a text is generated; leave it out or say it otherwise"
    expression = re.search(r"regex parse error:\n    (.*)\n    ( *)\^.*\nerror: (.*)", problem)
    if expression is not None and kind != "grammar":
        return f"{expression[3].rstrip('.')} (at character {len(expression[2]) + 1} of {expression[1]})"
    return problem
