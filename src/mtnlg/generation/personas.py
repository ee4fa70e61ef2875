"""Personas: who a model speaks as that never learned to chat.

A base model continues texts. Shown the transcript of a conversation it goes on with the next line, and a
few turns before the first question show it the tone. Each persona is such a beginning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtnlg.config.errors import ConfigError


@dataclass(frozen=True)
class Persona:
    """The beginning of a transcript.

    Args:
        name: what the model's lines begin with.
        description: the text before the first line; a system prompt takes its place.
        examples: (question, answer) turns that show the tone, the most telling last.
        user: what the person's lines begin with.
        colon: between a name and its line.

    Raises:
        ConfigError: a name is empty, longer than a line, or both are the same.
    """

    name: str
    description: str
    examples: tuple[tuple[str, str], ...] = ()
    user: str = "User"
    colon: str = ":"

    def __post_init__(self) -> None:
        problems = [
            f"{field} is {value!r}: give a name of one line."
            for field, value in (("name", self.name), ("user", self.user))
            if not value.strip() or "\n" in value
        ]
        if self.name == self.user:
            problems.append(f"name and user are both {self.name!r}: the lines could not be told apart.")
        if self.colon not in (":", "："):
            problems.append(f"colon is {self.colon!r}: it must be : or ：.")
        if problems:
            raise ConfigError(problems)

    @property
    def space(self) -> str:
        """What stands between the colon and the text: nothing in Chinese."""
        return " " if self.colon == ":" else ""

    @property
    def messages(self) -> list[dict[str, str]]:
        """The examples as messages, oldest first."""
        return [
            {"role": role, "content": text}
            for turn in self.examples
            for role, text in zip(("user", "assistant"), turn)
        ]


PERSONAS = {
    "assistant": Persona(
        "Assistant",
        "A conversation between a curious person and a friendly assistant. The assistant answers each "
        "question in one or two clear sentences.",
        (
            ("What is a river?", "A river is water that flows over land, from the hills down to the sea."),
            ("Good morning!", "Good morning! What would you like to talk about?"),
        ),
    ),
    "assistant-zh": Persona(
        "助手",
        "下面是一个人和一位友好的助手的对话。助手用一两句清楚的话回答每个问题。",
        (
            ("什么是河？", "河是从高处流向大海的水，两岸常常有人家和田地。"),
            ("早上好！", "早上好！今天想聊些什么？"),
        ),
        user="用户",
        colon="：",
    ),
    "poet": Persona(
        "Poet",
        "A conversation with a poet, who answers everything in a few lines of verse.",
        (
            (
                "What is the moon?",
                "A lamp that no one lit,\na boat that none can row;\nit sails across the dark.",
            ),
            (
                "How are you?",
                "As leaves are in the wind:\na little here, a little there,\nand glad of morning air.",
            ),
        ),
    ),
    "poet-zh": Persona(
        "诗人",
        "下面是和一位诗人的对话。诗人总是用诗句回答。",
        (
            ("月亮是什么？", "一盏无人点的灯，照着千家夜归人。"),
            ("你好吗？", "且看窗前新柳绿，春风过处自安然。"),
        ),
        user="客人",
        colon="：",
    ),
}  # fmt: skip


def persona_for(text: str) -> Persona:
    """The built-in assistant that speaks the language of ``text``."""
    return PERSONAS["assistant-zh" if is_chinese(text) else "assistant"]


def is_chinese(text: str) -> bool:
    """Whether ``text`` is rather Chinese than English."""
    num_latin = sum(letter.isascii() and letter.isalpha() for letter in text)
    return 2 * sum(map(has_han, text)) > num_latin


def has_han(text: str) -> bool:
    """Whether there are Chinese characters in ``text``."""
    return any("\u4e00" <= letter <= "\u9fff" or "\u3400" <= letter <= "\u4dbf" for letter in text)


def find_persona(name_or_file: str) -> Persona:
    """A built-in persona by name, or one from a YAML or JSON file.

    Raises:
        ConfigError: there is neither, or the file has other fields than a persona.
    """
    if name_or_file in PERSONAS:
        return PERSONAS[name_or_file]
    path = Path(name_or_file)
    if not path.is_file():
        raise ConfigError(
            f"there is no persona {name_or_file!r}: choose one of {', '.join(PERSONAS)}, or name a file "
            "with name, description and examples."
        )
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a persona: {error}") from error
    return _persona_of(content, str(path))


def _persona_of(content: Any, where: str) -> Persona:
    if not isinstance(content, Mapping) or not content.get("name"):
        raise ConfigError(f"{where}: a persona needs at least a name (and description, examples, user).")
    unknown = set(content) - {"name", "description", "examples", "user", "colon"}
    if unknown:
        raise ConfigError(
            f"{where}: a persona has no {', '.join(sorted(map(str, unknown)))}: it has name, description, "
            "examples, user and colon."
        )
    examples = content.get("examples") or []
    try:
        turns = tuple((str(turn["user"]), str(turn["answer"])) for turn in examples)
    except (TypeError, KeyError) as error:
        raise ConfigError(f"{where}: each of the examples needs user and answer.") from error
    texts = {key: str(content[key]) for key in ("name", "user", "colon") if content.get(key)}
    if "colon" not in texts and has_han(texts["name"]):
        texts["colon"] = "："
    if "user" not in texts and has_han(texts["name"]):
        texts["user"] = "用户"
    return Persona(description=str(content.get("description") or "").strip(), examples=turns, **texts)
