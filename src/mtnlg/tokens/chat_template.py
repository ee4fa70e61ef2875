"""Chat templates: from messages to one text, by the jinja2 template in a tokenizer's folder.

The same template gives the same text as in transformers: same sandbox, same functions, same variables.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

from mtnlg.config.errors import ConfigError

if TYPE_CHECKING:
    from jinja2 import Environment, Template
    from jinja2.nodes import Node
    from jinja2.parser import Parser

Message = Mapping[str, Any]

DEFAULT_CHAT_TEMPLATE = """\
{{- bos_token }}
{%- set system = messages[0].content if messages and messages[0].role == 'system' else '' %}
{%- set turns = messages[1:] if system else messages %}
{%- if system or tools %}
    {{- '<|system|>' + system }}
    {%- if tools %}
        {{- ('\\n\\n' if system else '') + '# Tools' }}
        {%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}
        {{- '\\nCall one with <tool_call>{"name": ..., "arguments": {...}}</tool_call>.' }}
    {%- endif %}
    {{- '<|end|>' }}
{%- endif %}
{%- for message in turns %}
    {%- set content = message.content or '' %}
    {%- if message.role == 'user' or message.role == 'system' %}
        {{- '<|' + message.role + '|>' + content + '<|end|>' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|assistant|>' + content }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function or call %}
            {{- '<tool_call>' + ({'name': call.name, 'arguments': call.arguments} | tojson) }}
            {{- '</tool_call>' }}
        {%- endfor %}
        {{- '<|end|>' }}
    {%- elif message.role == 'tool' %}
        {{- '<|user|><tool_response>' + content + '</tool_response><|end|>' }}
    {%- else %}
        {{- raise_exception('a role is ' + message.role + ': use system, user, assistant or tool') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
"""
"""For the special tokens that our own tokenizers reserve; tools as in the Hermes style."""

READER_CHAT_TEMPLATE = """\
{%- set system = messages[0].content if messages and messages[0].role == 'system' else '' %}
{%- set turns = messages[1:] if system else messages %}
{{- system + ('\\n\\n' if system else '') }}
{%- for message in turns %}
    {%- if message.role not in ('user', 'assistant') %}
        {{- raise_exception('a role is ' + message.role + ': use system, user or assistant') }}
    {%- endif %}
    {%- if turns | length > 1 %}{{ 'User: ' if message.role == 'user' else 'Assistant: ' }}{% endif %}
    {{- message.content + ('' if loop.last else '\\n') }}
{%- endfor %}
"""
"""For encoders, which read everything that was said before an answer: a question alone stands as it is."""


def render_chat(template: str, variables: Mapping[str, Any]) -> str:
    """The text of a conversation.

    Args:
        template: jinja2 source.
        variables: ``messages``, ``tools``, ``add_generation_prompt``, special tokens, whatever else the
            template reads. Only plain JSON values reach it.

    Raises:
        ConfigError: the template is broken or refuses these messages; names the line.
    """
    compiled = _compile(template)
    try:
        return compiled.render(**_plain(dict(variables)))
    except Exception as error:  # whatever a template does wrong: it is a program of somebody else's
        _explain(template, error)


@lru_cache(maxsize=32)
def template_literals(template: str) -> frozenset[str]:
    """The string constants that a template compares with, splits at or writes.

    Raises:
        ConfigError: the template is broken.
    """
    from jinja2.nodes import Const

    _compile(template)  # raises what is wrong with it
    constants = _environment().parse(template).find_all(Const)
    return frozenset(node.value for node in constants if isinstance(node.value, str))


@lru_cache(maxsize=32)
def _compile(template: str) -> Template:
    from jinja2 import TemplateError

    try:
        return _environment().from_string(template)
    except TemplateError as error:
        _explain(template, error)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    """jinja2 as transformers sets it up: nothing of Python's or of the machine's can be reached."""
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Scope
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what the model wrote, for training; here it only stands aside."""

        tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

        def parse(self, parser: Parser) -> Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return Scope(body, lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "namespace": _namespace(),
    }
    return environment


def _namespace() -> type:
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    class PlainNamespace(Namespace):
        """A namespace without names that lead into Python's internals."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, args = args[0], args[1:]
            attributes = dict(*args, **kwargs)
            for name in attributes:
                _check_name(name)
            Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            Namespace.__setitem__(self, name, value)

    def _check_name(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace may not hold {name!r}: its name begins with an underscore")

    return PlainNamespace


def _raise_exception(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of jinja2's own filter."""
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    for mark in MARKS if ensure_ascii else ():
        text = text.replace(f"\\u{ord(mark):04x}", mark)
    return text


# Noncharacters of Unicode, which no text holds: they mark what came from outside, see chat_pieces.py.
MARKS = OPEN, CLOSE, BREAK = "\ufdd0", "\ufdd1", "\ufdd2"


def _plain(value: Any) -> Any:
    """``value`` rebuilt from plain JSON types: richer objects have methods that a template could call."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    if isinstance(value, (bool, int, float)):
        return float(value) if isinstance(value, float) else int(value)
    if callable(getattr(value, "model_dump", None)):  # pydantic's models
        return _plain(value.model_dump())
    return f"<{type(value).__name__}>"


def _explain(template: str, error: Exception) -> NoReturn:
    """Say which line of the template went wrong, and show it."""
    from jinja2 import TemplateError

    line = getattr(error, "lineno", None)
    trace = error.__traceback__
    while trace is not None:  # the innermost line counts
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    lines = template.splitlines()
    is_refusal = type(error) is TemplateError
    what = "the chat template refuses these messages" if is_refusal else "the chat template fails"
    kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
    where = ""
    if isinstance(line, int) and 0 < line <= len(lines):
        shown = lines[line - 1].strip()
        where = f" (line {line}: {shown if len(shown) <= 120 else shown[:117] + '...'})"
    raise ConfigError(f"{what}: {kind}{error}{where}") from error
