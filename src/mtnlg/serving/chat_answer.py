"""What is answered to a conversation, whole or in chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from json.encoder import encode_basestring as quote
from typing import Any

from mtnlg.generation.dialogue_format import DialogueFormat
from mtnlg.generation.request import FinishReason, Generation, TokenEvent
from mtnlg.serving import logprobs
from mtnlg.serving.chat_schemas import ChatRequest, NamedTool
from mtnlg.serving.jobs import FINISH_REASONS, Job
from mtnlg.serving.state import ServerState
from mtnlg.serving.streaming import as_event, dumps
from mtnlg.serving.tools import Call, Piece, ToolReader, joined


class ChatAnswer:
    """Writes the assistant's turn.

    Args:
        state: the server's.
        body: the request.
        job: its sequences, one for each choice.
        tool_names: functions that may be called.
        form: how the conversation was written.
    """

    def __init__(
        self,
        state: ServerState,
        body: ChatRequest,
        job: Job,
        tool_names: Sequence[str],
        form: DialogueFormat,
    ) -> None:
        self._form = form
        is_stripped = form.content_of(" a ") == "a"
        self._is_rest = body.continue_final_message is True
        self._strippers = [Stripper(self._is_rest) if is_stripped else None for _ in job.generations]
        self._job, self._has_logprobs = job, bool(body.logprobs)
        self._vocabulary = state.backend.vocabulary
        self._includes_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._tool_names = tool_names
        self._is_forced = isinstance(body.tool_choice, NamedTool)
        self._readers = [ToolReader(tool_names) if tool_names else None for _ in job.generations]
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._rest = {
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": state.backend.fingerprint,
        }
        usage = ',"usage":null' if self._includes_usage else ""
        head = {"id": self._id, "object": "chat.completion.chunk", **self._rest}
        self._begin = "data: " + dumps(head)[:-1] + f'{usage},"choices":[{{"index":'

    # -- whole

    def whole(self) -> dict[str, Any]:
        """The answer's object."""
        choices = [self._choice(index, found) for index, found in enumerate(self._job.generations)]
        head = {"id": self._id, "object": "chat.completion", **self._rest}
        return {**head, "choices": choices, "usage": self._job.usage()}

    def _choice(self, index: int, generation: Generation) -> dict[str, Any]:
        before = "|" if self._is_rest else ""  # the space that the rest of an answer begins with counts
        content = self._form.content_of(before + generation.text)[len(before) :]
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        num_calls = 0
        if self._tool_names:
            reader = ToolReader(self._tool_names)
            parts = joined([*reader.push(generation.text), *reader.finish()])
            calls = [part.as_json() for part in parts if isinstance(part, Call)]
            if calls:
                num_calls = len(calls)
                text = "".join(part for part in parts if isinstance(part, str))
                message |= {"content": text or None, "tool_calls": calls}
        found = None
        if self._has_logprobs:
            pairs = zip(generation.new_ids, generation.logprobs)
            entries = [logprobs.chat(self._vocabulary, token, entry) for token, entry in pairs]
            found = {"content": entries, "refusal": None}
        message |= {"annotations": []}
        reason = self._reason(generation.finish_reason, num_calls)
        return {"index": index, "message": message, "logprobs": found, "finish_reason": reason}

    def _reason(self, reason: FinishReason | None, num_calls: int) -> str:
        ended = FINISH_REASONS[reason or "length"]
        return "tool_calls" if num_calls and ended == "stop" and not self._is_forced else ended

    # -- in chunks

    def opening(self) -> str:
        """Who speaks, for each choice."""
        delta = '{"role":"assistant","content":"","refusal":null}'
        return "".join(self._chunk(index, delta) for index in range(len(self._job.generations)))

    def chunk(self, index: int, event: TokenEvent) -> str:
        """What an event says."""
        found = "null"
        if self._has_logprobs and event.token is not None and event.logprobs is not None:
            entry = logprobs.chat(self._vocabulary, event.token, event.logprobs)
            found = f'{{"content":[{dumps(entry)}],"refusal":null}}'
        reader = self._readers[index]
        if reader is None:
            stripper = self._strippers[index]
            text = event.text if stripper is None else stripper.push(event.text)
            chunks = self._text_chunk(index, text, found)
        else:
            chunks = self._parts(index, reader, event, found)
        if event.finish_reason is not None:
            reason = self._reason(_shown(event.finish_reason), reader.num_calls if reader else 0)
            chunks += self._chunk(index, "{}", "null", quote(reason))
        return chunks

    def _text_chunk(self, index: int, text: str, found: str) -> str:
        if not text and found == "null":
            return ""
        return self._chunk(index, f'{{"content":{quote(text)}}}', found)

    def _parts(self, index: int, reader: ToolReader, event: TokenEvent, found: str) -> str:
        """Text and calls, parted; the token's logprobs go with the first chunk."""
        before = reader.num_calls
        parts = reader.push(event.text)
        if event.finish_reason is not None:
            parts += reader.finish()
        number, chunks = before, ""
        for part in parts:
            if isinstance(part, Call):
                delta = dumps({"tool_calls": [{"index": number, **part.as_json()}]})
                number += 1
                chunks += self._chunk(index, delta, found)
            elif isinstance(part, Piece):
                function = {"arguments": part.text}
                delta = dumps({"tool_calls": [{"index": number - 1, "function": function}]})
                chunks += self._chunk(index, delta, found)
            else:
                chunks += self._chunk(index, f'{{"content":{quote(part)}}}', found)
            found = "null"
        return chunks or self._text_chunk(index, "", found)

    def _chunk(self, index: int, delta: str, found: str = "null", reason: str = "null") -> str:
        return f'{self._begin}{index},"delta":{delta},"logprobs":{found},"finish_reason":{reason}}}]}}\n\n'

    def closing(self) -> str:
        """What it took, if that was asked for."""
        if not self._includes_usage:
            return ""
        head = {"id": self._id, "object": "chat.completion.chunk", **self._rest}
        return as_event({**head, "choices": [], "usage": self._job.usage()})


class Stripper:
    """Takes the white space around a text away while it grows.

    Args:
        has_begun: something stands before it, so that white space there is part of it.
    """

    def __init__(self, has_begun: bool = False) -> None:
        self._has_begun, self._held = has_begun, ""

    def push(self, text: str) -> str:
        """What is certain: white space is held back until something follows."""
        text = self._held + text
        if not self._has_begun:
            text = text.lstrip()
        stripped = text.rstrip()
        self._has_begun = self._has_begun or bool(stripped)
        self._held = text[len(stripped) :]
        return stripped


def _shown(reason: FinishReason) -> FinishReason:
    return reason if reason in FINISH_REASONS else "length"
