"""Conversations for encoder-decoders: what was said before an answer is read, the answer is written.

Each answer is an example of its own. The encoder reads exactly the prompt that the model is asked with;
the decoder writes the answer and the token that ends it, and nothing else is scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mtnlg.config import ConfigError, DataError, MegatronModelConfig
from mtnlg.tokens import Tokenizer
from mtnlg.tokens.batch import IGNORED_LABEL, Batch
from mtnlg.tuning.conversations import Conversation, exchanges
from mtnlg.tuning.example_file import ExampleFile
from mtnlg.tuning.rendering import Example
from mtnlg.tuning.stream import ExampleStream

ROUNDING = 8  # target lengths that were not given are multiples of it: ranks can divide them


class PairRenderer:
    """Turns conversations into examples, whose scored tokens are what the decoder writes.

    Args:
        tokenizer: with the chat template that the tuned model will be asked with.
        loss_on: ``assistant`` makes an example of every answer, ``last`` of the last one.
        max_source: tokens that the encoder reads.
        max_target: tokens that the decoder writes.
        too_long: ``cut``, ``leave_out`` or ``refuse``.
        around: literal text before and after the prompts of plain completions.

    Attributes:
        num_cut: examples that lost turns, or the end of a prompt or an answer.
        num_left_out: answers that gave no example.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        loss_on: str,
        max_source: int,
        max_target: int,
        too_long: str = "cut",
        around: tuple[str, str] = ("", ""),
    ) -> None:
        self.tokenizer, self.loss_on, self.around = tokenizer, loss_on, around
        self.max_source, self.max_target, self.too_long = max_source, max_target, too_long
        self.num_cut = self.num_left_out = 0
        self._writer = tokenizer.chat_pieces()

    def examples(self, conversation: Conversation) -> list[Example]:
        """An example for each answer that is learnt.

        Raises:
            DataError: it is too long and that is to be refused, the template does not take it, or it
                calls tools.
        """
        messages = conversation.messages
        if conversation.tools or any(message.get("tool_calls") for message in messages):
            raise DataError(
                f"{conversation.where}: the conversation calls tools; an encoder-decoder learns to write "
                "answers only."
            )
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if self.loss_on == "last":
            answers = answers[-1:]
        found = [self._example(conversation, number) for number in answers]
        return [example for example in found if example is not None]

    def _example(self, conversation: Conversation, number: int) -> Example | None:
        try:
            asked = conversation.messages[:number]
            source, target = self._source(conversation, asked), self._encoded(conversation, number)
            is_short = len(source) <= self.max_source and len(target) <= self.max_target
            if not is_short and self.too_long == "refuse":
                raise DataError(
                    f"{conversation.where}: {len(source)} tokens to read and {len(target)} to write, and "
                    f"there is room for {self.max_source} and {self.max_target}. Raise "
                    "data.sequence_length or data.objective.target_length, or set tuning.too_long to cut "
                    "or leave_out."
                )
            if not is_short and self.too_long == "leave_out":
                self.num_left_out += 1
                return None
            self.num_cut += not is_short
            source, target = self._cut(conversation, asked, source), target[: self.max_target]
        except ConfigError as error:
            raise DataError(f"{conversation.where}: {error}") from error
        return Example([*source, *target], [False] * len(source) + [True] * len(target))

    def _source(self, conversation: Conversation, asked: Sequence[Mapping[str, Any]]) -> list[int]:
        """What the encoder reads; it ends as every text of the tokenizer does."""
        if conversation.is_plain:
            return self.tokenizer.encode(f"{self.around[0]}{asked[0]['content']}{self.around[1]}")
        return self._writer.encode(self._writer.render(asked, add_generation_prompt=True))

    def _encoded(self, conversation: Conversation, number: int) -> list[int]:
        """An answer, in which names of special tokens are plain text, and its end."""
        text = str(conversation.messages[number]["content"])
        return self.tokenizer.encode(text, allow_special=conversation.is_plain)

    def _cut(
        self, conversation: Conversation, asked: Sequence[Mapping[str, Any]], source: list[int]
    ) -> list[int]:
        """Without the oldest exchanges that do not fit; of a single one, its beginning."""
        head = [message for message in asked[:1] if message["role"] == "system"]
        parts = [] if conversation.is_plain else list(exchanges(dict(m) for m in asked[len(head) :]))
        while len(parts) > 1 and len(source) > self.max_source:
            parts.pop(0)
            shorter = [*head, *(message for part in parts for message in part)]
            source = self._source(conversation, shorter)
        if len(source) <= self.max_source:
            return source
        return [*source[: self.max_source - 1], source[-1]]


def lengths_of(examples: ExampleFile) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that are read of each example, and tokens that are written."""
    targets = examples.scored_counts
    return examples.lengths - targets, targets


def places_of(examples: ExampleFile, source_length: int, target_length: int) -> np.ndarray:
    """Places of a sample's sources; a long target takes as many as leave room for it in the targets."""
    sources, targets = lengths_of(examples)
    return np.maximum(sources, -(-targets * source_length // target_length))


def fitting_target(examples: ExampleFile, source_length: int, packs: bool) -> int:
    """A target length for these examples: the longest, and when packed as long as sources fill a sample.

    Args:
        examples: of training.
        source_length: tokens that the encoder reads of a sample.
        packs: whether samples hold several examples.
    """
    sources, targets = lengths_of(examples)
    length = int(targets.max())
    if packs:
        length = max(length, round(source_length * int(targets.sum()) / int(sources.sum())))
    return min(source_length, -(-length // ROUNDING) * ROUNDING)


class PairStream(ExampleStream):
    """Samples of one or several pairs each; where packed, none sees another.

    Args:
        examples: of one split.
        source_length: places that the encoder reads.
        target_length: places that the decoder writes.
        model: an encoder-decoder; knows the padding and what a text begins with.
        **options: of :class:`~mtnlg.tuning.stream.ExampleStream`.
    """

    def __init__(
        self,
        examples: ExampleFile,
        source_length: int,
        target_length: int,
        model: MegatronModelConfig,
        **options: Any,
    ) -> None:
        self.target_length = target_length
        self._start_id = model.decoder_start_token_id
        super().__init__(examples, source_length, padding_id=model.pad_token_id, **options)

    def _places(self) -> list[int]:
        return places_of(self.examples, self.sequence_length, self.target_length).tolist()

    def _described(self) -> str:
        return f"{super()._described()} target {self.target_length}"

    def _batch_of(self, rows: list[list[int]]) -> Batch:
        """``encoder_mask`` where there is one example a sample, document ids where there are several."""
        inputs = np.full((len(rows), self.sequence_length), self._padding_id, dtype=np.int64)
        written = np.full((len(rows), self.target_length), self._padding_id, dtype=np.int64)
        labels = np.full(written.shape, IGNORED_LABEL, dtype=np.int64)
        # What fills a row of targets counts to its last example: attention to nothing has no value.
        read_of, written_of = np.zeros_like(inputs), np.zeros_like(written)
        mask = np.zeros(inputs.shape, dtype=np.bool_)
        mask[:, 0] = True
        for row, chosen in enumerate(rows):
            source_end = target_end = 0
            for document, example in enumerate(chosen):
                ids, scored = self.examples.example(example)
                source, target = ids[~scored], ids[scored]
                place = slice(source_end, source_end + len(source))
                inputs[row, place], mask[row, place], read_of[row, place] = source, True, document
                place = slice(target_end, target_end + len(target))
                labels[row, place] = target
                written[row, place] = [self._start_id, *target[:-1]]
                written_of[row, target_end:] = document
                source_end, target_end = source_end + len(source), place.stop
            read_of[row, max(1, source_end) :] = len(chosen)
        batch = Batch(
            torch.from_numpy(inputs),
            torch.from_numpy(labels),
            decoder_input_ids=torch.from_numpy(written),
        )
        if self.packs:
            batch.document_ids = torch.from_numpy(read_of)
            batch.decoder_document_ids = torch.from_numpy(written_of)
        else:
            batch.encoder_mask = torch.from_numpy(mask)
        return batch
