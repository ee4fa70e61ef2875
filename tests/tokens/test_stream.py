import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.tokens.blends import data_config, numbered_documents, write_tokens

from mtnlg.config.data import DataConfig
from mtnlg.config.errors import DataError
from mtnlg.tokens.prefetch import prefetch
from mtnlg.tokens.stream import BatchStream


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Two corpora of numbered tokens: 60 short documents, and 9 longer ones."""
    folder = tmp_path_factory.mktemp("corpora")
    random = np.random.default_rng(5)
    short = numbered_documents(random.integers(1, 12, 60).tolist())
    long = numbered_documents(random.integers(50, 200, 9).tolist(), first=10_000)
    return write_tokens(folder / "short", short), write_tokens(folder / "long", long)


def stream(corpora, split="train", seed=3, sequence_length=8, **settings) -> BatchStream:
    weights = settings.pop("weights", [0.3, 0.7])
    data = data_config(
        *corpora, weights=weights, split="80,10,10", sequence_length=sequence_length, **settings
    )
    return BatchStream(data, split, seed)


def test_labels_are_the_next_tokens(corpora):
    batch = stream(corpora).batch(0, 40)
    assert batch.input_ids.shape == batch.labels.shape == (40, 8)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert torch.equal(batch.input_ids[:, 1:], batch.labels[:, :-1])
    assert batch.position_ids is None
    assert batch.document_ids is None
    assert batch.num_valid_tokens == 320


def test_corpora_take_turns_by_weight(corpora):
    batch = stream(corpora).batch(0, 1000)
    from_long = torch.cumsum(batch.input_ids[:, 0] >= 10_000, 0)
    ideal = 0.7 * torch.arange(1, 1001)
    assert (from_long - ideal).abs().max() <= 1


def test_no_token_of_an_epoch_is_dropped_or_repeated(corpora):
    data = stream(corpora)
    for index, (packed, part) in enumerate(zip(data._packed, data.parts)):
        inputs = []
        for number in range(packed.samples_before(3)):
            begins, lengths = packed.runs(number)
            tokens = [data.corpora[index].tokens[b : b + n] for b, n in zip(begins, lengths)]
            inputs += np.concatenate(tokens)[:-1].tolist()
        counts = np.unique(inputs, return_counts=True)[1]
        assert len(counts) == part.num_tokens
        assert counts.min() == 3
        assert (counts - 3).sum() < 8  # the last sample goes on into the fourth epoch


@given(st.integers(0, 500), st.integers(1, 40), st.integers(1, 7), st.integers(1, 9))
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_samples_do_not_depend_on_replicas_or_batch_size(corpora, position, count, replicas, step):
    data = stream(corpora)
    whole = data.batch(position, count)
    shares = [data.batch(position, count, replica, replicas) for replica in range(replicas)]
    steps = [
        data.batch(p, min(step, position + count - p)) for p in range(position, position + count, step)
    ]
    for pieces in (shares, steps):
        assert torch.equal(torch.cat([piece.input_ids for piece in pieces]), whole.input_ids)
        assert torch.equal(torch.cat([piece.labels for piece in pieces]), whole.labels)


def test_deterministic_by_seed(corpora):
    first, again, other = (stream(corpora, seed=seed).batch(0, 64).input_ids for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("split", ["validation", "test", "all", "train"])
def test_a_fixed_split_predicts_each_token_once(corpora, split):
    data = data_config(*corpora, split="80,10,10", sequence_length=8)
    fixed = BatchStream(data, split, shuffle=False)
    labels = fixed.batch(0, fixed.num_samples).labels
    seen = labels[labels >= 0].tolist()
    assert len(seen) == len(set(seen)) == sum(part.num_tokens - 1 for part in fixed.parts)
    past = fixed.batch(fixed.num_samples - 1, 4)
    assert past.labels.shape == (4, 8)
    assert past[1:].num_valid_tokens == 0


def test_splits_share_no_token(corpora):
    seen = []
    for split in ("train", "valid", "test"):
        fixed = BatchStream(
            data_config(*corpora, split="80,10,10", sequence_length=8), split, shuffle=False
        )
        batch = fixed.batch(0, fixed.num_samples)
        seen.append(set(batch.labels[batch.labels >= 0].tolist()))
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


def test_validation_is_the_same_for_every_seed_and_can_be_shortened(corpora):
    data = data_config(*corpora, split="80,10,10", sequence_length=8)
    one, two = BatchStream(data, "valid", seed=1), BatchStream(data, "valid", seed=2, num_samples=5)
    assert torch.equal(one.batch(0, 5).labels, two.batch(0, 5).labels)
    assert two.num_samples == 5
    assert two.batch(5, 2).num_valid_tokens == 0
    assert one.fingerprint == two.fingerprint


def test_one_big_document_has_a_validation_split(tmp_path):
    prefix = write_tokens(tmp_path / "book", numbered_documents([5000]))
    data = data_config(prefix, split="98,1,1", sequence_length=16)
    assert BatchStream(data, "valid").batch(0, 4).num_valid_tokens == 49
    train = BatchStream(data, "train").batch(0, 306).input_ids
    assert train.max() < 4900


def test_a_corpus_smaller_than_one_sample(tmp_path):
    prefix = write_tokens(tmp_path / "tiny", numbered_documents([3, 2, 4]))
    data = data_config(prefix, split="1,0,0", sequence_length=40)
    batch = BatchStream(data).batch(0, 9)
    assert np.bincount(batch.input_ids.flatten()).tolist() == [40] * 9


def test_reset_at_document_boundaries(corpora):
    plain = stream(corpora).batch(0, 50)
    reset = stream(corpora, reset_at_document_boundaries=True).batch(0, 50)
    assert torch.equal(plain.input_ids, reset.input_ids)
    assert torch.equal(plain.labels, reset.labels)
    assert reset.document_ids is not None
    assert reset.position_ids is not None
    # Numbered tokens: a document goes on exactly where the next token is the next number... or where
    # two neighbours of the file follow each other, which the ids then still tell apart.
    jumps = plain.input_ids[:, 1:] != plain.input_ids[:, :-1] + 1
    new = reset.document_ids[:, 1:] != reset.document_ids[:, :-1]
    assert (jumps <= new).all()
    assert (reset.position_ids[:, 1:][new] == 0).all()
    going_on = reset.position_ids[:, 1:] == reset.position_ids[:, :-1] + 1
    assert (going_on == ~new).all()
    assert (reset.position_ids[:, 0] == 0).all()


def test_state_resumes_and_survives_json(corpora):
    data = stream(corpora)
    state = json.loads(json.dumps(data.state(123)))
    assert set(state) == {"fingerprint", "position"}
    assert stream(corpora).check(state) == 123


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sequence_length": 9}, "data.sequence_length was 8 and is 9"),
        ({"seed": 4}, "the seed was 3 and is 4"),
        ({"weights": [0.4, 0.7]}, "the weight of .*short was 0.3 and is 0.4"),
        ({"split": "all"}, "the split was train and is all"),
    ],
)
def test_changed_settings_are_refused(corpora, changed, message):
    state = stream(corpora).state(5)
    with pytest.raises(DataError, match=message):
        stream(corpora, **changed).check(state)


def test_changed_files_are_refused_and_moved_ones_are_not(corpora, tmp_path):
    state = stream(corpora).state(5)
    moved = []
    for prefix in corpora:
        for suffix in (".bin", ".idx"):
            shutil.copy(f"{prefix}{suffix}", tmp_path)
        moved.append(str(tmp_path / Path(prefix).name))
    assert stream(moved).check(state) == 5
    with open(f"{moved[0]}.bin", "r+b") as file:
        file.write(b"\x07\x07")
    with pytest.raises(DataError, match=r"the tokens of .*short .*changed"):
        stream(moved).check(state)
    with pytest.raises(DataError, match="the blend had 2 corpora and has 1"):
        stream(moved[:1], weights=[1.0]).check(state)
    write_tokens(tmp_path / "short", numbered_documents([50] * 12))
    with pytest.raises(DataError, match="had 60 documents and has 12"):
        stream(moved).check(state)


@pytest.mark.parametrize("broken", [{}, {"fingerprint": 3, "position": 1}, {"fingerprint": None}])
def test_broken_states_are_refused(corpora, broken):
    with pytest.raises(DataError, match="cannot be read"):
        stream(corpora).check(broken)
    with pytest.raises(DataError, match="-1"):
        stream(corpora).check(stream(corpora).state(-1))


def test_epochs(corpora):
    data = stream(corpora)
    epochs = data.epochs(1000)
    assert epochs[corpora[0]] == pytest.approx(300 * 8 / data.parts[0].num_tokens)
    assert epochs[corpora[1]] == pytest.approx(700 * 8 / data.parts[1].num_tokens)
    assert stream(corpora, "valid").epochs(10**6) == {corpora[0]: 1.0, corpora[1]: 1.0}


def test_what_cannot_be_read_is_said(corpora, tmp_path):
    with pytest.raises(DataError, match=r"data\.blend names no token files"):
        BatchStream(DataConfig())
    with pytest.raises(DataError, match=r"missing\.idx does not exist"):
        BatchStream(data_config(str(tmp_path / "missing")))
    with pytest.raises(DataError, match=r"validation split of .* holds no tokens"):
        BatchStream(data_config(*corpora, split="1,0,0"), "valid")
    empty = write_tokens(tmp_path / "empty", [np.arange(0)])
    with pytest.raises(DataError, match="holds no tokens"):
        BatchStream(data_config(empty))
    with pytest.raises(DataError, match="token id"):
        BatchStream(data_config(*corpora), vocab_size=600)
    with pytest.raises(ValueError, match="no batch at position"):
        stream(corpora).batch(-1, 4)


def test_prefetch_reads_the_same_and_passes_errors_on(corpora):
    data = stream(corpora)
    requests = [(0, 4), (4, 8), (12, 2)]
    for batch, (position, count) in zip(prefetch(data, requests), requests, strict=True):
        assert torch.equal(batch.input_ids, data.batch(position, count).input_ids)
    endless = prefetch(data, ((4 * step, 4) for step in range(10**9)), replica=1, num_replicas=2)
    assert torch.equal(next(endless).input_ids, data.batch(0, 4, 1, 2).input_ids)
    endless.close()
    with pytest.raises(ValueError, match="no batch at position"):
        next(prefetch(data, [(-1, 4)]))
