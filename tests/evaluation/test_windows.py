from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtnlg.evaluation.windows import Window, cut_windows, make_batch


@given(lengths=st.lists(st.integers(0, 9), max_size=6), size=st.integers(1, 8), stride=st.integers(1, 8))
def test_every_token_is_scored_once_with_the_promised_context(lengths, size, stride):
    stride = min(stride, size)
    total = sum(lengths)
    pieces = np.split(np.arange(1, total + 1), np.cumsum(lengths)[:-1]) if lengths else []
    scored: list[int] = []
    for number, window in enumerate(cut_windows(pieces, 0, size, stride)):
        assert len(window.ids) - 1 <= size
        assert (np.diff(window.ids) == 1).all()  # contiguous
        assert window.ids[0] == number * stride
        new = window.ids[1 + window.num_context :].tolist()
        assert len(new) == window.num_scored > 0
        if number:
            assert new[0] - window.ids[0] > size - stride  # tokens of context, its own input included
        scored += new
    assert scored == list(range(1, total + 1))


def test_labels_follow_inputs_and_context_is_not_scored():
    batch = make_batch([Window(np.array([5, 6, 7, 8]), 0), Window(np.array([6, 7, 8]), 1)], None)
    assert batch.input_ids.tolist() == [[5, 6, 7], [6, 7, 0]]
    assert batch.labels.tolist() == [[6, 7, 8], [-100, 8, -100]]
    assert batch.position_ids is None


def test_documents_start_anew_after_their_end():
    end = 9
    batch = make_batch([Window(np.array([end, 1, 2, end, 3, 4, 5]), 0)], end)
    assert batch.document_ids.tolist() == [[0, 1, 1, 1, 2, 2]]
    assert batch.position_ids.tolist() == [[0, 0, 1, 2, 0, 1]]


@pytest.mark.parametrize("reset", [True, False])
def test_the_stream_of_training_counts_documents_alike(tmp_path, reset):
    """Where documents begin in a window is where training's batches have them begin."""
    from mtnlg.config import BlendEntry, DataConfig
    from mtnlg.tokens import TokenFileWriter
    from mtnlg.tokens.stream import BatchStream

    end, rows = 9, [[1, 2, 3, 9], [4, 9], [5, 6, 7, 8, 1, 9]]
    writer = TokenFileWriter(str(tmp_path / "x"), vocab_size=10)
    for row in rows:
        writer.add_document(np.array(row))
    writer.close()
    data = DataConfig(
        blend=[BlendEntry(str(tmp_path / "x"))], sequence_length=11, reset_at_document_boundaries=reset
    )
    expected = BatchStream(data, "all").batch(0, 1)
    joined = np.concatenate([np.array(row) for row in rows])
    found = make_batch([Window(joined, 0)], end if reset else None)
    assert torch.equal(found.input_ids, expected.input_ids)
    assert torch.equal(found.labels, expected.labels)
    if reset:
        assert torch.equal(found.document_ids, expected.document_ids)
        assert torch.equal(found.position_ids, expected.position_ids)
