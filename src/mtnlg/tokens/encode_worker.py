"""A worker process of an encoding job: tasks in on stdin, counts and results out on stdout.

Each message is one line of JSON. The first gives the tokenizer's file and the settings, each further one a
task; the end of stdin ends the worker, so none outlives its parent.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from typing import Any

from mtnlg.config.errors import MtnlgError
from mtnlg.tokens.documents import FileSlice, ReadOptions
from mtnlg.tokens.encode_task import Counts, EncodeSettings, Encoding
from mtnlg.tokens.sources import SourceFile
from mtnlg.tokens.tokenizer import Tokenizer


def task_message(number: int, slices: list[FileSlice], prefix: str, facts: dict[str, Any]) -> str:
    """The line that asks for one task."""
    parts = [[vars(part.file), part.start, part.end] for part in slices]
    return json.dumps({"task": number, "slices": parts, "prefix": prefix, "facts": facts}) + "\n"


def setup_message(tokenizer_file: str, settings: EncodeSettings) -> str:
    """The line that begins the conversation."""
    content = {**vars(settings), "reading": vars(settings.reading)}
    return json.dumps({"tokenizer": tokenizer_file, "settings": content}) + "\n"


def serve() -> int:
    """Work until stdin ends; the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends us
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing else may print into the replies

    def reply(**message: Any) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        encoding = _set_up(json.loads(sys.stdin.readline()))
        for line in sys.stdin:
            _work(encoding, json.loads(line), reply)
    except BrokenPipeError:
        return 1  # the parent is gone
    except MtnlgError as error:
        reply(problem=str(error), kind=type(error).__name__)
    except OSError as error:
        reply(problem=error.strerror or str(error), kind="OSError", errno=error.errno, file=error.filename)
    except Exception:
        reply(problem=traceback.format_exc(), kind="bug")
    return 0


def _set_up(message: dict[str, Any]) -> Encoding:
    content = message["settings"]
    settings = EncodeSettings(**{**content, "reading": ReadOptions(**content["reading"])})
    tokenizer = Tokenizer.from_pretrained(message["tokenizer"])
    return Encoding(tokenizer, settings)


def _work(encoding: Encoding, message: dict[str, Any], reply: Any) -> None:
    slices = [FileSlice(SourceFile(**file), start, end) for file, start, end in message["slices"]]
    told = Counts()

    def report(counts: Counts) -> None:
        fresh = {name: value - getattr(told, name) for name, value in vars(counts).items()}
        told.add(fresh)
        reply(progress=fresh)

    encoding.run(slices, message["prefix"], message["facts"], report)
    reply(done=message["task"])


if __name__ == "__main__":
    sys.exit(serve())
