"""The tokenizer: byte-level byte-pair encoding, trained, saved and loaded as a Hugging Face folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from mtnlg.config.errors import ConfigError, DataError
from mtnlg.tokens.byte_tokens import REPLACEMENT, ByteTokens
from mtnlg.tokens.chat_files import DEFAULT_NAME, read_templates, templates_of, write_templates
from mtnlg.tokens.settings_files import CONFIG_NAME, SPECIAL_MAP_NAME, read_settings

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as CoreTokenizer
    from torch import LongTensor, Tensor

    from mtnlg.tokens.chat_pieces import ChatPieces

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
DIALOGUE_ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
END_OF_TURN = "<|end|>"
SPECIAL_TOKENS = (END_OF_TEXT, PADDING, *DIALOGUE_ROLES.values(), END_OF_TURN)
FILE_NAME = "tokenizer.json"

TEMPLATE_SETTING = "chat_template"
# What a chat template may write by its name in the settings.
_NAMED_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))

# What other families call the end of a text, most usual first, for folders that do not say.
_END_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>", "[EOS]")


class Tokenizer:
    """Text to token ids and back, exactly: ``decode(encode(text)) == text`` for every Unicode text.

    Made by ``Tokenizer.train`` or ``Tokenizer.from_pretrained``; ids count from 0 to ``vocab_size - 1``,
    the reserved special tokens first. A special token's name inside ordinary text (``"<|user|>"``) is
    encoded letter by letter, so that no document can smuggle one in, unless ``allow_special`` is set.

    Args:
        definition: the content of a ``tokenizer.json``.
        settings: the content of a ``tokenizer_config.json``, kept when saved again.
        where: what to call it in errors.

    Raises:
        DataError: the ``tokenizers`` library refuses the definition.
    """

    ends_texts = False  # whether ``encode`` puts the end of the text after it

    def __init__(
        self, definition: str, settings: dict[str, Any] | None = None, where: str = "the tokenizer"
    ) -> None:
        self.definition = definition
        self.settings = dict(settings or {})
        self._core = _load_core(definition, where)
        self._core.encode_special_tokens = True  # i.e. as ordinary text
        self._byte_tokens = ByteTokens(self._core)
        vocabulary = self._core.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1

    # -- making one

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        min_frequency: int = 2,
        show_progress: bool = False,
        more_special_tokens: Sequence[str] = (),
        han_characters: int = 2,
    ) -> Tokenizer:
        """Learn the merges from ``texts``; the same texts give the same tokenizer.

        Args:
            texts: read once, in bounded pieces; memory grows with the distinct words, not the length.
            vocab_size: tokens in all, special tokens and the 256 bytes included. A small corpus may
                give fewer.
            min_frequency: a pair must occur this often to be merged.
            show_progress: let the library draw its bars on a terminal.
            more_special_tokens: names reserved after the usual ones (sentinels, modes).
            han_characters: the most Han characters of a token; 1 makes each a token of its own.

        Raises:
            ConfigError: ``vocab_size`` has no room for the bytes and the special tokens, or
                ``han_characters`` is not positive.
            DataError: there is no text at all.
        """
        from mtnlg.tokens.training import learn_definition

        names = (*SPECIAL_TOKENS, *more_special_tokens)
        if vocab_size < 256 + len(names):
            raise ConfigError(
                f"vocab_size is {vocab_size}: at least {256 + len(names)} are needed "
                f"(256 bytes and {len(names)} special tokens)."
            )
        if han_characters < 1:
            raise ConfigError(f"han_characters is {han_characters}: it must be at least 1.")
        definition = learn_definition(
            texts, vocab_size, names, min_frequency, show_progress, han_characters=han_characters
        )
        return cls(definition)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Tokenizer:
        """Load a Hugging Face tokenizer folder, or its ``tokenizer.json``.

        Raises:
            DataError: the folder or file is missing or damaged; the message names it.
        """
        path = Path(path)
        file = path / FILE_NAME if path.is_dir() else path
        if not file.is_file():
            raise DataError(f"{path} is not a tokenizer: there is no {file.name} in {file.parent}.")
        try:
            definition = file.read_text(encoding="utf-8")
            settings = read_settings(file.parent)
            if templates := read_templates(file.parent, settings):
                settings[TEMPLATE_SETTING] = templates
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{file.parent}: the tokenizer's files are damaged: {error}") from error
        return cls(definition, settings, where=str(file))

    def save_pretrained(self, path: str | Path) -> None:
        """Write the folder that ``transformers.AutoTokenizer`` and ``from_pretrained`` load."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        specials = self._special_map()
        settings = {**_default_settings(), **self.settings, **specials}
        settings.pop(TEMPLATE_SETTING, None)
        write_templates(folder, self.chat_templates)
        (folder / FILE_NAME).write_text(self.definition, encoding="utf-8")
        for name, content in ((CONFIG_NAME, settings), (SPECIAL_MAP_NAME, specials)):
            text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
            (folder / name).write_text(text, encoding="utf-8")

    # -- text to ids and back

    @overload
    def encode(self, text: str, return_tensors: None = None, allow_special: bool = False) -> list[int]: ...
    @overload
    def encode(
        self, text: str, return_tensors: Literal["pt"], allow_special: bool = False
    ) -> LongTensor: ...
    def encode(
        self, text: str, return_tensors: Literal["pt"] | None = None, allow_special: bool = False
    ) -> list[int] | LongTensor:
        """Token ids of ``text``, with nothing added before or after.

        Args:
            text: any Unicode text.
            return_tensors: ``"pt"`` for a LongTensor ``[1, tokens]`` instead of a list.
            allow_special: read the names of special tokens as those tokens.

        Raises:
            DataError: ``text`` holds half of a surrogate pair, which is no Unicode character.
        """
        core = self._special_core if allow_special else self._core
        try:
            ids = core.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            place = next((i for i, letter in enumerate(text) if "\ud800" <= letter <= "\udfff"), None)
            if place is None:
                raise  # no text at all
            raise DataError(
                f"the text is not valid Unicode: half of a surrogate pair at character {place}."
            ) from error
        if return_tensors is None:
            return ids
        if return_tensors != "pt":
            raise ConfigError(f"return_tensors is {return_tensors!r}: give 'pt' or None.")
        import torch

        return torch.tensor([ids], dtype=torch.long)  # type: ignore[return-value]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        return [part.ids for part in self._core.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int] | Tensor, skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are not (yet) a whole character become U+FFFD.

        Args:
            ids: a list, or a tensor ``[tokens]`` or ``[1, tokens]``. Ids the tokenizer does not have
                give nothing.
            skip_special_tokens: leave special tokens out of the text.
        """
        flat = _flat(ids)
        text: str = self._core.decode(flat, skip_special_tokens=skip_special_tokens)
        if self._byte_tokens and REPLACEMENT in text:
            return self._byte_tokens.decode(self._core, flat, skip_special_tokens)
        return text

    def characters_per_token(self, texts: Iterable[str]) -> float:
        """How much text a token holds, on average; higher is better."""
        characters = tokens = 0
        for text in texts:
            characters += len(text)
            tokens += len(self._core.encode(text, add_special_tokens=False).ids)
        return characters / max(tokens, 1)

    # -- conversations

    @property
    def chat_templates(self) -> dict[str, str]:
        """The chat templates by name; ``default`` is the usual one."""
        return templates_of(self.settings.get(TEMPLATE_SETTING), "the tokenizer")

    @property
    def chat_template(self) -> str | None:
        """The usual chat template, jinja2 source; ``None`` for a tokenizer of no chat model."""
        return self.chat_templates.get(DEFAULT_NAME)

    @chat_template.setter
    def chat_template(self, template: str | None) -> None:
        others = {name: text for name, text in self.chat_templates.items() if name != DEFAULT_NAME}
        self.settings[TEMPLATE_SETTING] = others if template is None else {**others, DEFAULT_NAME: template}

    def chat_pieces(self, template: str | None = None, for_tools: bool = False) -> ChatPieces:
        """What renders and encodes conversations.

        Args:
            template: jinja2 source, or the name of one of ``chat_templates``; ``None`` takes the usual.
            for_tools: take the one named ``tool_use`` where there is one.

        Raises:
            ConfigError: there is no template, or it is broken.
        """
        from mtnlg.tokens.chat_pieces import ChatPieces

        mine = self.chat_templates
        if template is None and for_tools and "tool_use" in mine:
            template = "tool_use"
        chosen = mine.get(DEFAULT_NAME) if template is None else mine.get(template, template)
        if chosen is None:
            names = f"; name one of {', '.join(sorted(mine))}" if mine else ""
            raise ConfigError(
                f"the tokenizer has no chat template{names}: put chat_template.jinja into its folder, "
                "or give one."
            )
        return ChatPieces(self, chosen)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        chat_template: str | None = None,
        continue_final_message: bool = False,
        tokenize: bool = True,
        **variables: Any,
    ) -> list[int] | str:
        """A conversation as the chat template writes it.

        Only special tokens that the template writes become special; in a message their names are text.

        Args:
            messages: with ``role`` and ``content``, oldest first.
            add_generation_prompt: end with the beginning of an answer.
            tools: JSON schemas of functions, in OpenAI's form.
            chat_template: jinja2 source or a template's name; ``None`` takes the tokenizer's.
            continue_final_message: leave the last message open.
            tokenize: token ids; the text if not.
            variables: anything else that the template reads.

        Raises:
            ConfigError: no template, a broken one, or one that refuses these messages (names the line).
        """
        writer = self.chat_pieces(chat_template, tools is not None)
        pieces = writer.render(messages, tools, add_generation_prompt, continue_final_message, **variables)
        return writer.encode(pieces) if tokenize else "".join(piece.text for piece in pieces)

    # -- facts

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size})"

    def __getstate__(self) -> tuple[str, dict[str, Any]]:
        return self.definition, self.settings

    def __setstate__(self, state: tuple[str, dict[str, Any]]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    @property
    def fingerprint(self) -> str:
        """Hex digest of what decides the ids; token files carry it."""
        return hashlib.sha256(self.definition.encode("utf-8")).hexdigest()[:16]

    @property
    def core(self) -> CoreTokenizer:
        """The ``tokenizers`` object underneath; special tokens in text are ordinary text to it."""
        return self._core

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Every special token's name and id."""
        added = self._core.get_added_tokens_decoder()
        return {token.content: index for index, token in sorted(added.items()) if token.special}

    @cached_property
    def special_flags(self) -> dict[str, AddedToken]:
        """How each special token is found in text."""
        added = self._core.get_added_tokens_decoder()
        return {token.content: token for token in added.values() if token.special}

    @property
    def special_names(self) -> dict[str, str]:
        """Special tokens by what the settings call them (``eos_token`` ...), as chat templates do."""
        names = {**self.settings, **self._special_map()}
        found = {key: _token_name(names[key]) for key in _NAMED_TOKENS if names.get(key)}
        return {key: name for key, name in found.items() if name is not None}

    @cached_property
    def end_of_text_id(self) -> int:
        """The id that ends a document.

        Raises:
            DataError: this tokenizer names none.
        """
        named = _token_name(self.settings.get("eos_token"))
        for name in (named, *_END_NAMES):
            index = None if name is None else self._core.token_to_id(name)
            if index is not None:
                return index
        raise DataError("the tokenizer has no end-of-text token: name one as eos_token in its config.")

    @cached_property
    def padding_id(self) -> int:
        """The id that fills up short rows; the end-of-text id where the tokenizer has no padding."""
        for name in (_token_name(self.settings.get("pad_token")), PADDING):
            index = None if name is None else self._core.token_to_id(name)
            if index is not None:
                return index
        return self.end_of_text_id

    @cached_property
    def _special_core(self) -> CoreTokenizer:
        return _load_core(self.definition, "the tokenizer")

    def _special_map(self) -> dict[str, Any]:
        present = self.special_tokens
        names: dict[str, Any] = {}
        for key, usual in (("eos_token", END_OF_TEXT), ("bos_token", END_OF_TEXT), ("pad_token", PADDING)):
            name = self.settings.get(key) or (usual if usual in present else None)
            if name is not None:
                names[key] = name
        others = [name for name in present if name in SPECIAL_TOKENS[2:]]
        more = self.settings.get("additional_special_tokens") or others
        return {**names, "additional_special_tokens": more} if more else names


def _default_settings() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }


def _load_core(definition: str, where: str) -> CoreTokenizer:
    from tokenizers import Tokenizer as CoreTokenizer

    try:
        core = CoreTokenizer.from_str(definition)
    except Exception as error:  # the library raises a bare Exception
        raise DataError(f"{where} cannot be read: {error}") from error
    core.no_truncation()
    core.no_padding()
    return core


def _token_name(entry: Any) -> str | None:
    return entry.get("content") if isinstance(entry, dict) else entry


def _flat(ids: Any) -> list[int]:
    values = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if isinstance(values, int):
        return [values]
    if values and isinstance(values[0], list):
        if len(values) > 1:
            raise ConfigError(f"decode takes one row of ids, not {len(values)}: decode each row.")
        values = values[0]
    if any(value < 0 for value in values):
        raise ConfigError(f"token ids must not be negative; the smallest is {min(values)}.")
    return values
