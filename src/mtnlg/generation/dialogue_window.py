"""Which part of a conversation the model sees, when it has outgrown the model's positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mtnlg.config.errors import ConfigError
from mtnlg.generation.dialogue_format import DialogueFormat, Tools
from mtnlg.generation.dialogue_ids import DialogueIds, Segment, ids_of
from mtnlg.generation.personas import is_chinese
from mtnlg.tokens.chat_pieces import Piece

POLICIES = ("drop", "refuse", "summarise")
# Turns are dropped until a quarter of the room is free: dropping one at a time would change the beginning
# of every prompt, and the whole of it would be read anew for each answer.
_FREE_AFTER_DROPPING = 4
_MOST_SUMMARY_TOKENS = 128
_REQUESTS = {
    False: "Summarise our conversation so far in two or three sentences. Keep names, facts and wishes.",
    True: "请用两三句话概括我们到目前为止的谈话，保留名字、事实和要求。",
}
_HEADINGS = {False: "What was said before: ", True: "此前的谈话："}

Message = Mapping[str, Any]
Summarise = Callable[[list[int], int], str]


@dataclass(frozen=True)
class Prompt:
    """What the model is given.

    Args:
        segments: the conversation as written, with its tokens.
        notices: what the person should know about it.
    """

    segments: list[Segment]
    notices: list[str] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        """All tokens."""
        return ids_of(self.segments)


class DialogueWindow:
    """Makes the prompts of one conversation; once a turn is left out, it stays out.

    Args:
        form: how the conversation is written.
        ids: what encodes it.
        max_length: positions of the model.
    """

    def __init__(self, form: DialogueFormat, ids: DialogueIds, max_length: int) -> None:
        self.ids = ids
        self._form, self._max_length = form, max_length
        self._start = 0  # the first turn that is shown
        self._told = 0  # so many lost turns were spoken of
        self._summary = ""

    def replay(self, messages: list[dict[str, Any]], max_new_tokens: int) -> None:
        """Begin where a window would that had made every earlier prompt of this conversation, too.

        For who remembers nothing between requests: prompts begin with the same turns for as long as those
        fit, so that the engine finds them in its prefix cache.

        Args:
            messages: as for :meth:`prompt`.
            max_new_tokens: likewise.
        """
        head = messages[:1] if messages[0]["role"] == "system" else []
        turns = [*turns_of(self._form.examples(messages)), *turns_of(messages[len(head) :])]

        def length(shown: list[Message]) -> int:
            return len(self._form.encode(self._form.pieces([*head, *shown])))

        def bare(shown: Sequence[Message]) -> int:
            texts = [Piece(str(message["content"])) for message in shown]
            return sum(len(self._form.encode([text], is_rest=True)) for text in texts)

        room = self._room(max_new_tokens)
        try:
            if length([message for turn in turns for message in turn]) <= room:
                return
            first = length(turns[0])
            more = max(0, length(turns[0] * 2) - first - bare(turns[0]))  # what is written around a turn
        except ConfigError:
            return  # the template wants other turns than these: no better beginning is known
        around = first - bare(turns[0]) - more
        asked, whole = ([bare(turn[:most]) + more for turn in turns] for most in (1, None))
        self._start = stable_start(asked, whole, room - around)

    def _room(self, max_new_tokens: int) -> int:
        return self._max_length - min(max_new_tokens, self._max_length // 4)

    def prompt(
        self,
        messages: list[dict[str, Any]],
        max_new_tokens: int,
        policy: str,
        summarise: Summarise,
        tools: Tools | None = None,
        variables: Mapping[str, Any] | None = None,
        is_open: bool = False,
    ) -> Prompt:
        """The prompt for the next answer.

        Room is kept for ``max_new_tokens``, but at most a quarter of the model's positions.

        Args:
            messages: the whole conversation.
            max_new_tokens: longest answer.
            policy: one of ``POLICIES``.
            summarise: generates from a prompt so many tokens of text.
            tools, variables: see ``DialogueOptions``.
            is_open: the last message is the beginning of the answer.

        Raises:
            ConfigError: the last turn alone does not fit, or the policy is to refuse.
        """
        head = messages[:1] if messages[0]["role"] == "system" else []
        examples = turns_of(self._form.examples(messages))
        turns = [*examples, *turns_of(messages[len(head) :])]
        room = self._room(max_new_tokens)
        before = self._start = min(self._start, len(turns) - 1)
        written: list[Segment] = []

        def write(start: int) -> int:
            nonlocal written
            shown = [message for turn in turns[start:] for message in turn]
            pieces = self._form.pieces([*self._head(head), *shown], tools, is_open, **(variables or {}))
            written = self.ids.encode(pieces)
            return len(ids_of(written))

        length = write(before)
        if length > room:
            last = len(turns) - 1 if policy != "refuse" else min(len(examples), len(turns) - 1)
            self._start = _first(before, last, lambda n: write(n) <= room - room // _FREE_AFTER_DROPPING)
            length = write(self._start)
            if policy == "refuse" and length > room and self._start < len(turns) - 1:
                raise ConfigError(
                    f"the conversation has {length} tokens and the model {self._max_length} positions: "
                    "begin a new one, or choose the policy drop or summarise."
                )
        if policy == "summarise" and (lost := turns[max(before, len(examples)) : self._start]):
            self._summarise(head, lost, summarise)
            length = write(self._start)
        if length >= self._max_length:
            self._start = before
            raise ConfigError(
                f"the last message makes a prompt of {length} tokens, and the model has {self._max_length} "
                "positions: shorten it (or the system prompt), nothing could follow it."
            )
        return Prompt(written, self._notices(len(examples), policy))

    def _head(self, head: list[dict[str, Any]]) -> list[Message]:
        if not self._summary:
            return list(head)
        text = f"{_HEADINGS[is_chinese(self._summary)]}{self._summary}"
        return [{"role": "system", "content": f"{head[0]['content']}\n\n{text}" if head else text}]

    def _summarise(
        self, head: list[dict[str, Any]], lost: list[list[Message]], summarise: Summarise
    ) -> None:
        """Put the lost turns into the summary, as many at a time as fit; one too long is dropped."""
        num_tokens = min(_MOST_SUMMARY_TOKENS, self._max_length // 8)
        room = self._max_length - num_tokens
        rest = list(lost)
        while rest:
            count = self._num_read_at_once(head, rest, room)
            ids = self._summary_prompt(head, rest[:count])
            if len(ids) <= room:
                self._summary = summarise(ids, num_tokens)
            rest = rest[count:]

    def _num_read_at_once(self, head: list[dict[str, Any]], turns: list[list[Message]], room: int) -> int:
        """The most turns, from the first on, whose summary fits into ``room`` tokens; at least one."""
        count = len(turns)
        return count - _first(
            -1, count - 1, lambda left: len(self._summary_prompt(head, turns[: count - left])) <= room
        )

    def _summary_prompt(self, head: list[dict[str, Any]], turns: list[list[Message]]) -> list[int]:
        shown = [message for turn in turns for message in turn]
        request = _REQUESTS[is_chinese("".join(str(message["content"]) for message in shown))]
        asked = {"role": "user", "content": request}
        return self._form.encode(self._form.pieces([*self._head(head), *shown, asked]))

    def _notices(self, num_examples: int, policy: str) -> list[str]:
        num_lost = self._start - max(self._told, num_examples)
        self._told = self._start
        if num_lost <= 0:
            return []
        turns = "the oldest turn" if num_lost == 1 else f"the oldest {num_lost} turns"
        what = "summarised" if policy == "summarise" and self._summary else "left out"
        return [
            f"{turns} of the conversation {'is' if num_lost == 1 else 'are'} {what}: the model has "
            f"{self._max_length} positions."
        ]


def stable_start(asked: Sequence[int], whole: Sequence[int], room: int) -> int:
    """The first turn to show, if turns were dropped as they came until a quarter of the room was free.

    What was dropped before the latest turn depends on the turns before it alone, and stays so.

    Args:
        asked: tokens of each turn's question ``[turns]``.
        whole: tokens of each turn with its answer ``[turns]``.
        room: tokens that may be shown.
    """
    start = total = 0
    for number, question in enumerate(asked):
        if total + question > room:
            while start < number and total + question > room - room // _FREE_AFTER_DROPPING:
                total -= whole[start]
                start += 1
        total += whole[number]
    return start


def _first(before: int, last: int, fits: Callable[[int], bool]) -> int:
    """The first number after ``before`` that fits, else the last: whatever comes after one that does, does.

    Found in a few steps: a conversation may have thousands of turns, and each try writes all of them.
    """
    low, high = before + 1, max(before, last)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return high


def turns_of(messages: list[dict[str, Any]]) -> list[list[Message]]:
    """Messages in turns: each a question with all that came before the next."""
    turns: list[list[Message]] = []
    for message in messages:
        if message["role"] == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    return turns
