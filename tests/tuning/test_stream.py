"""Samples of packed examples: nothing lost, nothing seen of others, the same in every layout."""

import numpy as np
import pytest
import torch

from mtnlg.config import DataError
from mtnlg.model import IGNORED_LABEL
from mtnlg.tuning.example_file import ExampleFile
from mtnlg.tuning.packing import best_fit, epoch_rows
from mtnlg.tuning.rendering import Example
from mtnlg.tuning.stream import ExampleStream

LENGTH = 20


def examples(count=30, seed=0):
    random = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        length = int(random.integers(3, LENGTH + 2))
        ids = random.integers(1, 99, length).tolist()
        made.append(Example(ids, (random.random(length) < 0.5).tolist()))
    return made


def test_rows_are_filled_and_never_overfilled():
    widths = [len(example.ids) - 1 for example in examples(300)]
    rows = best_fit(widths, LENGTH, list(range(300)))
    assert sorted(number for row in rows for number in row) == list(range(300))
    assert all(sum(widths[number] for number in row) <= LENGTH for row in rows)
    assert sum(widths) / (len(rows) * LENGTH) > 0.9
    assert epoch_rows(widths, LENGTH, True, "key", 0) != epoch_rows(widths, LENGTH, True, "key", 1)


@pytest.mark.parametrize("packs", [True, False])
def test_an_epoch_holds_every_scored_token_once_beside_its_own_past(packs):
    made = examples()
    stream = ExampleStream(ExampleFile.of(made), LENGTH, packs, padding_id=0)
    batch = stream.batch(0, stream.samples_per_epoch)
    found = []
    for row in range(len(batch)):
        numbers = batch.document_ids[row] if packs else torch.zeros(LENGTH, dtype=torch.long)
        for document in numbers.unique().tolist():
            place = numbers == document
            ids, labels = batch.input_ids[row][place], batch.labels[row][place]
            if packs:
                assert batch.position_ids[row][place].tolist() == list(range(int(place.sum())))
            found.append((ids.tolist(), labels.tolist()))
    for example in made:
        inputs = example.ids[:-1]
        labels = [i if s else IGNORED_LABEL for i, s in zip(example.ids[1:], example.scored[1:])]
        padding = [] if packs else [0] * (LENGTH - len(inputs))
        assert (inputs + padding, labels + [IGNORED_LABEL] * len(padding)) in found
    assert batch.num_valid_tokens == sum(example.num_scored for example in made)


def test_replicas_and_restarts_see_the_same_samples():
    file = ExampleFile.of(examples())
    stream = ExampleStream(file, LENGTH, seed=5)
    whole = stream.batch(0, 64)  # several epochs
    for replica in range(2):
        part = ExampleStream(file, LENGTH, seed=5).batch(0, 64, replica, 2)
        assert torch.equal(part.labels, whole.labels[32 * replica : 32 * (replica + 1)])
    again = ExampleStream(file, LENGTH, seed=5).batch(50, 14)
    assert torch.equal(again.input_ids, whole.input_ids[50:])
    assert torch.equal(stream.batch(0, 4).input_ids, whole.input_ids[:4])  # and back
    assert not torch.equal(ExampleStream(file, LENGTH, seed=6).batch(0, 64).input_ids, whole.input_ids)


def test_evaluation_reads_everything_once_and_ends_in_rows_without_labels():
    made = examples()
    stream = ExampleStream(ExampleFile.of(made), LENGTH, is_endless=False)
    batch = stream.batch(0, stream.num_samples + 3)
    assert batch.num_valid_tokens == sum(example.num_scored for example in made)
    assert (batch.labels[-3:] == IGNORED_LABEL).all()
    assert ExampleStream(ExampleFile.of(made), LENGTH, is_endless=False, num_samples=2).num_samples == 2


def test_a_position_is_of_these_examples_only():
    file = ExampleFile.of(examples())
    state = ExampleStream(file, LENGTH, seed=5).state(7)
    assert ExampleStream(file, LENGTH, seed=5).check(state) == 7
    with pytest.raises(DataError, match="conversations, or how they are written, have changed"):
        ExampleStream(ExampleFile.of(examples(seed=1)), LENGTH, seed=5).check(state)
    with pytest.raises(DataError, match=r"tuning.packing or the seed has changed"):
        ExampleStream(file, LENGTH, packs=False, seed=5).check(state)


def test_examples_come_back_from_their_file(tmp_path):
    file = ExampleFile.of(examples())
    file.write(tmp_path / "train.safetensors")
    again = ExampleFile.read(tmp_path / "train.safetensors")
    assert again.digest == file.digest and len(again) == 30
    assert again.scored_counts.tolist() == [example.num_scored for example in examples()]
    (tmp_path / "train.safetensors").write_bytes(b"no")
    with pytest.raises(DataError, match="cannot be read"):
        ExampleFile.read(tmp_path / "train.safetensors")
