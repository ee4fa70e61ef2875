"""The reference runner: its paged keys and values give what one pass over the whole text gives."""

from __future__ import annotations

import pytest
import torch

from mtnlg.generation.runner import PlainRunner, Row

TOKENS = torch.randint(0, 67, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["gpt", "llama", "no-positions"])
@pytest.mark.parametrize("page_size", [1, 7, 64])
def test_cached_logits_equal_uncached(make_model, family, page_size):
    model = make_model(family)
    per_row = -(-20 // page_size)
    runner = PlainRunner(model, 3 * per_row, page_size)
    pages = [list(range(number, 3 * per_row, 3)) for number in range(3)]
    found, start = [], 0
    for part in TOKENS.split([5, 1, 1, 9, 4], dim=1):
        count = part.shape[1]
        rows = [Row(ids.tolist(), start, pages[number], count) for number, ids in enumerate(part)]
        found.append(runner.run(rows).unflatten(0, (3, count)))
        start += count
    with torch.no_grad():
        whole = model(TOKENS).logits
    torch.testing.assert_close(torch.cat(found, dim=1), whole, atol=1e-4, rtol=1e-4)


def test_rows_of_different_lengths_share_a_beginning(make_model):
    model = make_model("llama")
    runner = PlainRunner(model, 8, 4)
    text = TOKENS[0].tolist()
    assert runner.run([Row(text[:8], 0, [0, 1], 0)]).shape == (0, 67)
    found = runner.run([Row(text[8:12], 8, [0, 1, 2], 1), Row([5, 6], 8, [0, 1, 3], 2)])
    with torch.no_grad():
        first = model(torch.tensor([text[:12]])).logits[0, -1:]
        second = model(torch.tensor([[*text[:8], 5, 6]])).logits[0, -2:]
    torch.testing.assert_close(found, torch.cat([first, second]), atol=1e-4, rtol=1e-4)


def test_a_copied_page_is_another(make_model):
    model = make_model()
    runner = PlainRunner(model, 4, 4)
    text = TOKENS[0].tolist()
    runner.run([Row(text[:3], 0, [0], 0)])
    runner.copy_pages([0], [1])
    runner.run([Row([9], 3, [1], 0)])
    found = runner.run([Row(text[3:5], 3, [0, 2], 1)])
    with torch.no_grad():
        expected = model(torch.tensor([text[:5]])).logits[0, -1:]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
