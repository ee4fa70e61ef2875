import numpy as np

from mtnlg.tokens.index_column import IndexColumn


def unaligned(values: list[int], dtype: str) -> np.ndarray:
    raw = b"\0\0" + np.array(values, dtype=dtype).tobytes()
    column = np.frombuffer(raw, dtype=np.uint8)[2:].view(dtype)
    return column


def test_looks_like_the_array_it_reads():
    values = [0, 4, 10, 2**40, 6]
    column = IndexColumn(unaligned(values, "<i8"), divisor=2)
    expected = np.array(values) // 2
    assert len(column) == 5
    assert column[3] == 2**39
    assert np.array_equal(np.asarray(column), expected)
    assert np.array_equal(np.asarray(column[1:4]), expected[1:4])
    chosen = np.array([4, 0, 0, 3], dtype=np.int32)
    assert np.array_equal(column[chosen], expected[chosen])
    assert np.array_equal(column[1:][chosen - chosen], expected[1:][chosen - chosen])
    assert np.asarray(column[2:2]).size == 0
    assert np.asarray(column).flags.aligned


def test_lengths_are_widened():
    picked = IndexColumn(unaligned([7, 2**31 - 1], "<i4"))[np.array([1, 0])]
    assert picked.dtype == np.int64
    assert picked.tolist() == [2**31 - 1, 7]
