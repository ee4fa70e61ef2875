"""Batches of examples by position: the same sample whatever the ranks, batch sizes and restarts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mtnlg.config import DataError
from mtnlg.tokens.batch import IGNORED_LABEL, Batch
from mtnlg.tuning.example_file import ExampleFile
from mtnlg.tuning.packing import epoch_rows, fixed_rows


class ExampleStream:
    """Samples of one or several examples each.

    An example of n tokens takes n - 1 places of a sample: its last token is only predicted. Where
    samples are packed, each example has positions of its own and sees no other.

    Args:
        examples: of one split.
        sequence_length: places of a sample.
        packs: put several examples into a sample.
        padding_id: what fills the places that are left.
        seed: of the shuffles.
        is_endless: training's: shuffled anew in every epoch. The others are read once, in fixed order.
        num_samples: end after so many samples.
    """

    num_samples: int | None

    def __init__(
        self,
        examples: ExampleFile,
        sequence_length: int,
        packs: bool = True,
        padding_id: int = 0,
        seed: int = 0,
        is_endless: bool = True,
        num_samples: int | None = None,
    ) -> None:
        self.examples, self.sequence_length, self.packs = examples, sequence_length, packs
        self._padding_id, self._seed = padding_id, seed
        self._widths = self._places()
        self._digest = examples.digest
        self._key = self._described()
        self._epochs: list[list[list[int]]] = []
        self._starts = [0]  # first sample of each epoch
        self.num_samples = None
        if not is_endless:
            self._add(fixed_rows(self._widths, sequence_length, packs))
            total = self._starts[-1]
            self.num_samples = total if num_samples is None else min(total, num_samples)

    @property
    def samples_per_epoch(self) -> int:
        """Samples of the first epoch; the others have about as many."""
        self._epoch_of(0)
        return self._starts[1]

    def batch(self, position: int, count: int, replica: int = 0, num_replicas: int = 1) -> Batch:
        """This replica's share of the samples ``position`` to ``position + count``.

        Replica r of R takes rows ``count * r // R`` to ``count * (r + 1) // R``. Rows past the end of a
        stream that ends have only ignored labels.

        Returns:
            tensors [rows, sequence_length]; document and position ids where samples are packed.
        """
        first, stop = count * replica // num_replicas, count * (replica + 1) // num_replicas
        return self._batch_of([self._row(number) for number in range(position + first, position + stop)])

    def _places(self) -> list[int]:
        """Places of a sample that each example takes."""
        return (self.examples.lengths - 1).tolist()

    def _described(self) -> str:
        """What decides the samples."""
        return f"{self._digest} {self.sequence_length} {self.packs} {self._seed}"

    def _batch_of(self, rows: list[list[int]]) -> Batch:
        """Samples of the examples with these numbers."""
        shape = (len(rows), self.sequence_length)
        inputs = np.full(shape, self._padding_id, dtype=np.int64)
        labels = np.full(shape, IGNORED_LABEL, dtype=np.int64)
        documents, positions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for row, chosen in enumerate(rows):
            end = 0
            for document, example in enumerate(chosen):
                ids, scored = self.examples.example(example)
                place = slice(end, end + len(ids) - 1)
                inputs[row, place] = ids[:-1]
                labels[row, place] = np.where(scored[1:], ids[1:], IGNORED_LABEL)
                documents[row, place] = document
                positions[row, place] = np.arange(len(ids) - 1)
                end = place.stop
            documents[row, end:] = len(chosen)
            positions[row, end:] = np.arange(self.sequence_length - end)
        batch = Batch(torch.from_numpy(inputs), torch.from_numpy(labels))
        if self.packs:
            batch.position_ids, batch.document_ids = (
                torch.from_numpy(positions),
                torch.from_numpy(documents),
            )
        return batch

    def state(self, position: int) -> dict[str, Any]:
        """What a checkpoint keeps: no layout and no batch size is in it."""
        return {"examples": self._digest, "key": self._key, "position": position}

    def check(self, state: dict[str, Any]) -> int:
        """The position in ``state``.

        Raises:
            DataError: the conversations, or how they are written or packed, are not those of ``state``.
        """
        if state.get("examples") != self._digest:
            raise DataError(
                "the conversations, or how they are written, have changed since the run was begun. Put "
                "them back to go on with it, or use another run_dir."
            )
        if state.get("key") != self._key:
            raise DataError(
                "data.sequence_length, tuning.packing or the seed has changed since the run was begun: use "
                "the old values to go on, or another run_dir."
            )
        return int(state["position"])

    def _row(self, number: int) -> list[int]:
        """The examples of sample ``number``; none past the end."""
        if self.num_samples is not None:
            return self._epochs[0][number] if number < self.num_samples else []
        epoch = self._epoch_of(number)
        if not self._epochs[epoch]:  # forgotten: somebody goes back
            self._epochs[epoch] = self._make(epoch)
        return self._epochs[epoch][number - self._starts[epoch]]

    def _epoch_of(self, number: int) -> int:
        while number >= self._starts[-1]:
            epoch = len(self._epochs)
            if epoch > 1:
                self._epochs[epoch - 2] = []  # long over
            self._add(self._make(epoch))
        return int(np.searchsorted(self._starts, number, side="right")) - 1

    def _make(self, epoch: int) -> list[list[int]]:
        return epoch_rows(self._widths, self.sequence_length, self.packs, self._key, epoch)

    def _add(self, rows: list[list[int]]) -> None:
        self._epochs.append(rows)
        self._starts.append(self._starts[-1] + len(rows))
