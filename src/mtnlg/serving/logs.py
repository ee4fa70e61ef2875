"""What the server writes down: one line for each request, never what was asked or answered unless told."""

from __future__ import annotations

import json
import logging
import logging.handlers
import queue
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

LOGGER = logging.getLogger("mtnlg.serving")


def log(event: str, level: int = logging.INFO, /, **fields: object) -> None:
    """Write a line.

    Args:
        event: what has happened, in one word.
        level: of :mod:`logging`.
        fields: facts; those that are ``None`` are left out.
    """
    known = {name: value for name, value in fields.items() if value is not None}
    LOGGER.log(level, event, extra={"fields": known})


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time``, ``level``, ``event`` and the facts."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line = {"time": _time(record), "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """``12:30:05 request POST /v1/completions status=200 ...`` for people."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        facts = " ".join(
            f"{name}={json.dumps(value, ensure_ascii=False, default=str) if _is_odd(value) else value}"
            for name, value in getattr(record, "fields", {}).items()
        )
        mark = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{clock} {mark}{record.getMessage()} {facts}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _time(record: logging.LogRecord) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{whole}.{int(record.msecs):03d}Z"


def _is_odd(value: object) -> bool:
    text = str(value)
    return not text.isprintable() or " " in text or not text


@contextmanager
def logging_to(stream: TextIO | None = None, log_format: str = "auto") -> Iterator[None]:
    """Write lines to ``stream`` (stderr) from a thread, so that a slow reader of them stops nobody.

    Warnings and errors of the engine and of uvicorn come along; uvicorn's lines for each request do not.
    """
    stream = stream or sys.stderr
    is_text = log_format == "text" or (log_format == "auto" and stream.isatty())
    handler = logging.StreamHandler(stream)
    handler.setFormatter(TextFormatter() if is_text else JsonFormatter())
    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    listener = logging.handlers.QueueListener(lines, handler)
    sender = _PlainQueueHandler(lines)
    beside = [logging.getLogger(name) for name in ("mtnlg.generation", "mtnlg.native", "uvicorn.error")]
    loggers = [(LOGGER, logging.INFO), *((logger, logging.WARNING) for logger in beside)]
    before = [(logger, logger.level, logger.propagate) for logger, _ in loggers]
    for logger, level in loggers:
        logger.addHandler(sender)
        logger.setLevel(level)
        logger.propagate = False
    listener.start()
    try:
        yield
    finally:
        for logger, level, propagates in before:
            logger.removeHandler(sender)
            logger.setLevel(level)
            logger.propagate = propagates
        listener.stop()


class _PlainQueueHandler(logging.handlers.QueueHandler):
    """Hands records over as they are: the thread that formats them is in this process."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record
