"""``mtnlg serve MODEL``: OpenAI's HTTP API and a chat page for a model."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mtnlg.cli.models import MODEL_HELP

if TYPE_CHECKING:
    from collections.abc import Callable

    from jsonargparse import ArgumentParser, Namespace

    from mtnlg.config.serving import ServerConfig
    from mtnlg.serving.backend import Backend

EXAMPLE = """
mtnlg serve runs/demo
mtnlg serve runs/demo --port 8080 --api-key-file keys.yaml --requests-per-minute 60
mtnlg serve runs/demo --adapter poet=runs/poet --adapter cook=runs/cook
mtnlg serve runs/demo --host 0.0.0.0 --max-batch-size 64 --dtype bf16
"""
KEY_VARIABLE = "MTNLG_API_KEY"
ADMIN_KEY_VARIABLE = "MTNLG_ADMIN_KEY"


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the model, the door, the limits and the engine."""
    from mtnlg.cli.engine_options import add_engine_arguments
    from mtnlg.cli.ranks import add_rank_arguments

    add = parser.add_argument
    add("model", metavar="MODEL", help=MODEL_HELP)
    add("--host", type=str, default="127.0.0.1", help="address to listen on; 0.0.0.0 is every one")
    add("--port", type=int, default=8000, help="0 takes a free one")
    add(
        "--model-name", type=str | None, default=None, help="as requests call it; null is its folder's name"
    )
    add("--api-key", type=str | None, default=None, help=f"a key to let in; better in {KEY_VARIABLE}")
    what = "adapter that requests may name as their model; may come again"
    add("--adapter", type=str, action="append", default=[], metavar="NAME=DIR", help=what)
    what = "with --admin-key, POST /v1/adapters loads more from here while the server runs"
    add("--adapter-folder", type=str | None, default=None, metavar="DIR", help=what)
    what = f"key for loading and removing adapters; better in {ADMIN_KEY_VARIABLE}"
    add("--admin-key", type=str | None, default=None, help=what)
    add("--api-key-file", type=str | None, default=None, help="keys, one a line or with limits each")
    _add_limits(add)
    add("--chat-template", type=str | None, default=None, help="jinja2 file, or name of a template")
    add("--persona", type=str | None, default=None, help="who answers, for a model without a template")
    add("--page", type=bool, default=True, help="serve the chat page at /")
    add("--allow-origin", type=list[str], default=[], help="other web origins that may call (CORS)")
    add("--log-prompts", action="store_true", help="write prompts and answers into the log")
    add("--log-format", type=str, default="auto", help="json, text, or auto: text on a terminal")
    add("--ignore-unknown-fields", action="store_true", help="do not refuse fields that nobody knows")
    add("--device", type=str | None, default=None, help="cpu or cuda; null is the best one")
    add_engine_arguments(parser)
    add_rank_arguments(parser)


def _add_limits(add: Callable[..., object]) -> None:
    add("--requests-per-minute", type=int, default=0, help="of each key; 0 is no limit")
    add("--tokens-per-minute", type=int, default=0, help="of each key; 0 is no limit")
    add("--concurrency", type=int, default=0, help="requests of a key at a time; 0 is no limit")
    add("--max-body-bytes", type=int, default=4 * 2**20, help="largest body of a request")
    add("--max-connections", type=int, default=1024, help="open at a time")
    add("--request-timeout", type=float, default=600.0, help="seconds for an answer; 0 is no limit")
    add("--body-timeout", type=float, default=30.0, help="seconds for a request's body")
    what = "seconds for preparing a schema, expression or grammar"
    add("--constraint-timeout", type=float, default=10.0, help=what)
    add("--drain-timeout", type=float, default=30.0, help="seconds for running answers after SIGTERM")


def run(arguments: Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    from mtnlg.cli.ahead import begin_kernels
    from mtnlg.config import ConfigError
    from mtnlg.serving.logs import logging_to
    from mtnlg.serving.port import listen

    config = server_config(arguments)
    # The port first: that it is taken is then said before anything heavy is imported. But where several
    # ranks run this very command, only the first may take it.
    listener = None if _may_have_ranks(arguments) else listen(config)
    with logging_to(log_format=config.log_format):
        begin_kernels(arguments)
        open_backend = _opener(arguments, config)
        listener = listener or listen(config)
        try:
            from mtnlg.serving.lifecycle import serve
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("mtnlg"):
                raise
            raise ConfigError(f"serving needs {error.name}: pip install 'mtnlg[serve]'") from error
        serve(config, open_backend, listener)
    return 0


def _may_have_ranks(arguments: Namespace) -> bool:
    sizes = (arguments.tensor_parallel_size, arguments.pipeline_parallel_size)
    return any(sizes) or any(name in os.environ for name in ("RANK", "SLURM_PROCID"))


def server_config(arguments: Namespace) -> ServerConfig:
    """The server's settings.

    Raises:
        ConfigError: naming every value that is out of range.
    """
    from mtnlg.config.serving import ServerConfig

    keys = (arguments.api_key, os.environ.get(KEY_VARIABLE) or None)
    return ServerConfig(
        host=arguments.host,
        port=arguments.port,
        model_name=arguments.model_name,
        api_keys=tuple(dict.fromkeys(key for key in keys if key is not None)),
        api_key_file=arguments.api_key_file,
        requests_per_minute=arguments.requests_per_minute,
        tokens_per_minute=arguments.tokens_per_minute,
        concurrency=arguments.concurrency,
        max_body_bytes=arguments.max_body_bytes,
        max_connections=arguments.max_connections,
        request_timeout_seconds=arguments.request_timeout,
        body_timeout_seconds=arguments.body_timeout,
        constraint_timeout_seconds=arguments.constraint_timeout,
        drain_timeout_seconds=arguments.drain_timeout,
        log_prompts=arguments.log_prompts,
        log_format=arguments.log_format,
        allow_origins=tuple(arguments.allow_origin),
        page=arguments.page,
        ignore_unknown_fields=arguments.ignore_unknown_fields,
        admin_key=arguments.admin_key or os.environ.get(ADMIN_KEY_VARIABLE) or None,
        adapter_folder=arguments.adapter_folder,
    )


def _opener(arguments: Namespace, config: ServerConfig) -> Callable[[], Backend]:
    """What loads the model; a model over ranks is loaded at once, for only the first rank serves."""
    from mtnlg.cli.ahead import loading
    from mtnlg.cli.engine_options import engine_config
    from mtnlg.cli.models import open_model
    from mtnlg.cli.ranks import wants_ranks
    from mtnlg.config import ConfigError

    engine = engine_config(arguments)
    adapters = _adapters(arguments.adapter)
    name = config.model_name or Path(arguments.model).resolve().name
    template = _template(arguments.chat_template)
    loaded = open_model(arguments.model, arguments.device, arguments) if wants_ranks(arguments) else None

    def open_backend() -> Backend:
        from mtnlg.generation.dialogue_format import choose_format
        from mtnlg.serving.backend import Backend

        with loading():
            opened, tokenizer = loaded or open_model(arguments.model, arguments.device, arguments)
            form = choose_format(tokenizer, arguments.persona, template)
            backend = Backend.of_model(opened, tokenizer, name, form, engine)
        for adapter, folder in adapters.items():
            if adapter == name:
                raise ConfigError(f"--adapter {adapter}: the model is called so itself.")
            backend.engine.adapters.load(adapter, folder)
        return backend

    return open_backend


def _adapters(given: list[str]) -> dict[str, Path]:
    """Folders of adapters by the names that requests use.

    Raises:
        ConfigError: something is no NAME=DIR, or a name comes twice.
    """
    from mtnlg.config import ConfigError

    found: dict[str, Path] = {}
    for words in given:
        name, _, folder = words.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}", name) or not folder:
            raise ConfigError(f"--adapter is {words!r}: write NAME=DIR, as in poet=runs/poet.")
        if name in found:
            raise ConfigError(f"--adapter names {name} twice.")
        found[name] = Path(folder)
    return found


def _template(name_or_file: str | None) -> str | None:
    """A file's content, or the name as it is."""
    if name_or_file is not None and Path(name_or_file).is_file():
        return Path(name_or_file).read_text(encoding="utf-8")
    return name_or_file
