"""What a mask does to scores."""

import numpy as np
import pytest
import torch

from mtnlg.generation import constraint
from mtnlg.generation.constraint import MASK, empty_bitmask, rule_out

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


@pytest.fixture(params=["kernel", "numpy"])
def way(request, monkeypatch):
    if request.param == "kernel":
        if MASK.load() is None:
            pytest.skip("no C++ compiler")
    else:
        monkeypatch.setattr(constraint.MASK, "_loaded", [])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab", [1, 31, 64, 4999])
@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0], [1]])
def test_what_is_not_allowed_becomes_minus_infinity_and_nothing_else_changes(way, device, vocab, rows):
    generator = np.random.default_rng(vocab)
    allowed = generator.random((len(rows), vocab)) < 0.3
    words = empty_bitmask(len(rows), vocab)
    bits = np.packbits(np.pad(allowed, ((0, 0), (0, -vocab % 32))), axis=1, bitorder="little")
    words.numpy()[:] = bits.view(np.int32)
    scores = torch.randn(3, vocab, generator=torch.Generator().manual_seed(1))
    expected = scores.clone()
    for place, row in enumerate(rows):
        expected[row, torch.from_numpy(~allowed[place])] = float("-inf")
    scores = scores.to(device)
    rule_out(scores, rows, words)
    assert torch.equal(scores.cpu(), expected)
