"""``mtnlg chat`` in a pipe: a question on stdin, its answer on stdout, nothing else."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

from mtnlg.cli.chat_input import whole_text
from mtnlg.cli.chat_session import speed
from mtnlg.cli.terminal import note

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from mtnlg.generation.dialogue import Answer, Dialogue


def answer_pipe(dialogue: Dialogue, stdin: TextIO | None, arguments: Namespace) -> int:
    """Answer everything that stdin holds: one message, or one a line with ``--lines``.

    With ``--json`` the text may also be a conversation in OpenAI's form, which is gone on with.

    Raises:
        ConfigError: there is nothing to answer, or a message cannot be answered.
    """
    from mtnlg.config import ConfigError

    num_answers = 0
    for where, question in _questions(stdin, arguments.lines):
        try:
            answer = _ask(dialogue, whole_text(question), arguments.json)
        except ConfigError as error:
            if not where:
                raise
            raise ConfigError(f"{where}{error}") from error
        for notice in answer.notices:
            note(f"note: {notice}")
        if arguments.json:
            _print_json(dialogue, answer.result())
        else:
            _stream(answer)
        if arguments.stats:
            note(speed(answer, dialogue.max_length))
        num_answers += 1
    if not num_answers:
        raise ConfigError('there is no question: give one, as in echo "Who are you?" | mtnlg chat MODEL.')
    if arguments.save:
        from mtnlg.cli.chat_files import write_conversation

        write_conversation(arguments.save, dialogue.messages)
    return 0


def _questions(stdin: TextIO | None, by_lines: bool) -> Iterator[tuple[str, str]]:
    """Each message, after where it stands."""
    if stdin is None:  # closed by who started us
        return
    for number, text in enumerate(stdin if by_lines else [stdin.read()], 1):
        if text.strip():
            yield (f"line {number}: " if by_lines else ""), text


def _ask(dialogue: Dialogue, question: str, is_json: bool) -> Answer:
    content = _conversation(question) if is_json else None
    if content is None:
        return dialogue.ask(question)
    from mtnlg.cli.chat_files import messages_in

    system = dialogue.system
    dialogue.load(messages_in(content))
    if dialogue.system is None:
        dialogue.system = system
    return dialogue.answer()


def _conversation(text: str) -> Any:
    """A conversation in JSON; ``None`` for any other text, which is a question."""
    try:
        content = json.loads(text)
    except ValueError:
        return None
    is_list = isinstance(content, list) and bool(content) and isinstance(content[0], dict)
    return content if is_list or (isinstance(content, dict) and "messages" in content) else None


def _stream(answer: Answer) -> None:
    for piece in answer:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


def _print_json(dialogue: Dialogue, answer: Answer) -> None:
    usage = answer.usage
    found = {
        "message": dialogue.messages[-1],
        "finish_reason": answer.finish_reason,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.new_tokens,
        },
        "messages": dialogue.messages,
    }
    print(json.dumps(found, ensure_ascii=False), flush=True)
