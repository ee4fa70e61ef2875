"""How the HTTP server behaves: its door, its limits, its patience, its logs."""

from __future__ import annotations

from dataclasses import dataclass

from mtnlg.config.errors import ConfigError

LOG_FORMATS = ("auto", "json", "text")


@dataclass(frozen=True)
class ServerConfig:
    """Settings of ``mtnlg serve`` beside those of the engine.

    Args:
        host: address to listen on; 127.0.0.1 is this machine only.
        port: to listen on; 0 takes a free one.
        model_name: what requests call the model; ``None`` is the name of its folder.
        api_keys: keys that are let in; with none, and no file, everybody is.
        api_key_file: more of them, with a name and limits each (see :mod:`mtnlg.serving.keys`).
        requests_per_minute: for each key, 0 is no limit. The file may say otherwise for a key.
        tokens_per_minute: prompt and generated tokens of each key; 0 is no limit.
        concurrency: requests of a key that are worked on at a time; 0 is no limit.
        max_body_bytes: largest body of a request.
        max_header_bytes: largest request line and headers together.
        max_connections: open connections; a further one is refused.
        max_choices: most sequences of one request (prompts times ``n`` or ``best_of``).
        header_timeout_seconds: for a request's headers, from its first byte or the connection's start.
        body_timeout_seconds: for a request's body, whole.
        send_timeout_seconds: a reader that takes nothing for so long is hung up on.
        request_timeout_seconds: longest that an answer may take, waiting included; 0 is no limit.
            What there is by then is the answer.
        keep_alive_seconds: how long a connection without a request stays open.
        drain_timeout_seconds: how long running answers may take to finish after SIGTERM.
        log_prompts: write prompts and answers into the log.
        log_format: ``json`` (one object a line), ``text``, or ``auto``: text on a terminal.
        allow_origins: other web origins whose pages may call the API (CORS); ``*`` is any.
        page: serve the chat page at ``/``.
        ignore_unknown_fields: let requests hold fields that nobody here knows, instead of refusing them.
        constraint_timeout_seconds: longest that preparing a schema, expression or grammar may take.
        admin_key: key with which adapters are loaded and removed; ``None`` lets nobody do it.
        adapter_folder: where they are looked for; ``None`` loads none while running.

    Raises:
        ConfigError: naming every value that is out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str | None = None
    api_keys: tuple[str, ...] = ()
    api_key_file: str | None = None
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    concurrency: int = 0
    max_body_bytes: int = 4 * 2**20
    max_header_bytes: int = 32 * 2**10
    max_connections: int = 1024
    max_choices: int = 128
    header_timeout_seconds: float = 10.0
    body_timeout_seconds: float = 30.0
    send_timeout_seconds: float = 60.0
    request_timeout_seconds: float = 600.0
    keep_alive_seconds: float = 75.0
    drain_timeout_seconds: float = 30.0
    log_prompts: bool = False
    log_format: str = "auto"
    allow_origins: tuple[str, ...] = ()
    page: bool = True
    ignore_unknown_fields: bool = False
    constraint_timeout_seconds: float = 10.0
    admin_key: str | None = None
    adapter_folder: str | None = None

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.port <= 65535:
            problems.append(f"port is {self.port}: it must be from 0 to 65535.")
        for name in ("requests_per_minute", "tokens_per_minute", "concurrency"):
            problems += self._below(name, 0)
        for name in ("max_body_bytes", "max_header_bytes", "max_connections", "max_choices"):
            problems += self._below(name, 1)
        for name in ("request_timeout_seconds", "drain_timeout_seconds", "keep_alive_seconds"):
            problems += self._below(name, 0)
        for name in (
            "header_timeout_seconds",
            "body_timeout_seconds",
            "send_timeout_seconds",
            "constraint_timeout_seconds",
        ):
            if not 0 < getattr(self, name) < float("inf"):
                problems.append(f"{name} is {getattr(self, name)}: it must be above 0 and finite.")
        if self.log_format not in LOG_FORMATS:
            problems.append(f"log_format is {self.log_format!r}: choose one of {', '.join(LOG_FORMATS)}.")
        if self.admin_key is not None and self.admin_key in self.api_keys:
            problems.append("admin_key is one of api_keys: it would let everybody change what is served.")
        if any(
            not key.strip() or not key.isascii() or " " in key
            for key in (*self.api_keys, self.admin_key or "x")
        ):
            problems.append(
                "api_keys or admin_key holds an empty key, or one with spaces or letters beyond ASCII."
            )
        if problems:
            raise ConfigError(problems)

    def _below(self, name: str, least: int) -> list[str]:
        value = getattr(self, name)
        return [] if least <= value < float("inf") else [f"{name} is {value}: it must be at least {least}."]
