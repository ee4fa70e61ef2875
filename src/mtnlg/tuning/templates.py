"""How a tuned model's conversations are written, where its base does not say."""

from __future__ import annotations

from pathlib import Path

from mtnlg.config import ConfigError
from mtnlg.tokens import Tokenizer
from mtnlg.tokens.chat_template import DEFAULT_CHAT_TEMPLATE, READER_CHAT_TEMPLATE
from mtnlg.tokens.tokenizer import DIALOGUE_ROLES, END_OF_TURN

# For tokenizers without special tokens for turns: names on lines of their own; the end of the text ends
# an answer.
TEXT_CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role == 'system' %}{{ message.content + '\\n\\n' }}
    {%- elif message.role == 'user' %}{{ 'User:\\n' + message.content + '\\n\\n' }}
    {%- elif message.role == 'assistant' %}{{ 'Assistant:\\n' + message.content ~ eos_token + '\\n\\n' }}
    {%- else %}
        {{- raise_exception('a role is ' + message.role + ': use system, user or assistant') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}
"""


def with_template(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    """``tokenizer`` with the chat template that the tuned model is asked with.

    Args:
        tokenizer: the base's.
        template: a file with jinja2 source; ``None`` keeps the tokenizer's own, or gives it ours.

    Raises:
        ConfigError: the file cannot be read, or is no template.
    """
    source = tokenizer.chat_template if template is None else _read(template)
    changed = type(tokenizer)(tokenizer.definition, tokenizer.settings)
    changed.chat_template = source or _own(tokenizer)
    changed.chat_pieces().render([{"role": "user", "content": "?"}], add_generation_prompt=True)
    return changed


def _own(tokenizer: Tokenizer) -> str:
    if tokenizer.ends_texts:
        return READER_CHAT_TEMPLATE
    has_turns = {*DIALOGUE_ROLES.values(), END_OF_TURN} <= set(tokenizer.special_tokens)
    return DEFAULT_CHAT_TEMPLATE if has_turns else TEXT_CHAT_TEMPLATE


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"tuning.template is {path!r}: the file cannot be read ({error}).") from None
