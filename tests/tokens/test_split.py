import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtnlg.tokens.split import split_cuts, split_name, split_part

SHARES = (0.98, 0.01, 0.01)
SPLIT_NAMES = ("train", "validation", "test")


def parts(lengths, shares=SHARES):
    sizes = np.array(lengths, dtype=np.int32)
    begins = np.cumsum(sizes, dtype=np.int64) - sizes
    return [split_part(begins, sizes, int(sizes.sum()), shares, name) for name in SPLIT_NAMES]


def test_documents_are_cut_as_megatron_cuts():
    documents = [len(part.lengths) for part in parts([10] * 1234)]
    bounds = [0, round(0.98 * 1234), round(0.99 * 1234), 1234]
    assert documents == np.diff(bounds).tolist()
    assert all(part.by_documents for part in parts([10] * 1234))


def test_every_share_of_a_small_corpus_gets_a_document():
    small = parts([100] * 20)
    assert [len(part.lengths) for part in small] == [18, 1, 1]
    assert all(part.by_documents for part in small)


def test_without_a_share_no_document():
    assert [len(part.lengths) for part in parts([100] * 20, (0.9, 0.1, 0.0))] == [18, 2, 0]


@pytest.mark.parametrize("lengths", [[10_000], [5_000, 5_000], [9_990, 1, 1, 8]])
def test_too_few_documents_are_cut_by_tokens(lengths):
    train, validation, test = parts(lengths)
    assert (train.start, train.stop, validation.stop, test.stop) == (0, 9_800, 9_900, 10_000)
    assert not train.by_documents
    assert sum(len(part.lengths) for part in (train, validation, test)) >= len(lengths)


@given(
    st.lists(st.integers(0, 200), min_size=1, max_size=60).filter(sum),
    st.sampled_from([SHARES, (0.9, 0.1, 0.0), (0.5, 0.25, 0.25), (1.0, 0.0, 0.0), (0.8, 0.0, 0.2)]),
)
@settings(deadline=None, max_examples=200)
def test_the_parts_are_the_corpus(lengths, shares):
    pieces = parts(lengths, shares)
    covered = [
        token
        for part in pieces
        for begin, length in zip(np.array(part.begins), part.lengths)
        for token in range(begin, begin + length)
    ]
    assert covered == list(range(sum(lengths)))
    assert [part.num_tokens for part in pieces] == [int(part.lengths.sum()) for part in pieces]
    if sum(lengths) >= 100:
        assert all(part.num_tokens >= 2 for part, share in zip(pieces, shares) if share)
    assert all(part.num_tokens == 0 for part, share in zip(pieces, shares) if not share)


def test_all_is_everything():
    sizes = np.array([3, 4])
    assert split_part(np.array([0, 3]), sizes, 7, SHARES, "all").num_tokens == 7
    assert split_cuts(np.array([0, 3]), 7, (1.0, 0.0, 0.0)) == ([0, 7, 7, 7], True)


def test_names():
    assert split_name("valid") == "validation"
    with pytest.raises(ValueError, match="choose one of train, validation, test, all"):
        split_name("dev")
