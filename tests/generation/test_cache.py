from __future__ import annotations

import pytest
import torch

from mtnlg.generation import KeyValueCache, next_logits

TOKENS = torch.randint(0, 67, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["gpt", "llama", "no-positions"])
@pytest.mark.parametrize("capacity", [1, 7, 64])
def test_cached_logits_equal_uncached(make_model, family, capacity):
    model = make_model(family)
    cache = KeyValueCache.for_model(model, 3, capacity)
    with torch.no_grad():
        whole = model(TOKENS).logits
        parts = [model(part, cache=cache).logits for part in TOKENS.split([5, 1, 1, 9, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=1e-4)
    assert cache.length == 20


@pytest.mark.parametrize("family", ["gpt", "llama", "no-positions"])
def test_rows_of_different_lengths_equal_each_row_alone(make_model, family):
    model = make_model(family)
    lengths = [11, 3, 7]
    sequences = [TOKENS[row, :length].tolist() for row, length in enumerate(lengths)]
    cache = KeyValueCache.for_model(model, 3, capacity=4)
    with torch.no_grad():
        for _ in range(6):  # the first call is the ragged prompt, the others one token each
            together = next_logits(model, sequences, cache)
            for row, ids in enumerate(sequences):
                alone = model(torch.tensor([ids])).logits[0, -1]
                torch.testing.assert_close(together[row], alone, atol=1e-4, rtol=1e-4)
            for row, ids in enumerate(sequences):
                ids.append(int(TOKENS[row, len(ids)]))


def test_unused_memory_never_leaks_into_attention(make_model):
    """Columns behind a short row hold old numbers of cut or dropped tokens: none may be seen."""
    model = make_model("llama")
    cache = KeyValueCache.for_model(model, 2)
    with torch.no_grad():
        next_logits(model, [TOKENS[0].tolist(), TOKENS[1].tolist()], cache)
        cache.truncate([4, 9])
        sequences = [TOKENS[0, :5].tolist(), TOKENS[1, :10].tolist()]
        together = next_logits(model, sequences, cache)
        alone = [model(torch.tensor([ids])).logits[0, -1] for ids in sequences]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=1e-4)


def test_dropped_rows_leave_the_others_alone(make_model):
    model = make_model("gpt")
    cache = KeyValueCache.for_model(model, 3)
    with torch.no_grad():
        next_logits(model, [TOKENS[0, :6].tolist(), TOKENS[1, :9].tolist(), TOKENS[2, :2].tolist()], cache)
        cache.keep_rows([2, 0])
        assert cache.lengths == [2, 6]
        found = next_logits(model, [TOKENS[2, :3].tolist(), TOKENS[0, :7].tolist()], cache)
        expected = [model(TOKENS[2:3, :3]).logits[0, -1], model(TOKENS[0:1, :7]).logits[0, -1]]
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_grouped_queries_save_memory(make_model):
    sizes = {}
    for heads in (4, 2):
        model = make_model("llama", num_key_value_heads=heads)
        cache = KeyValueCache.for_model(model, 1, capacity=20)
        with torch.no_grad():
            model(TOKENS[:1], cache=cache)
        sizes[heads] = cache.num_bytes
    assert sizes[4] == 2 * sizes[2] == 2 * 3 * 4 * 20 * 8 * 4  # k and v, layers, heads, tokens, ...


def test_rows_cannot_be_truncated_to_more_than_they_hold(make_model):
    cache = KeyValueCache.for_model(make_model(), 2)
    with pytest.raises(ValueError, match="truncate"):
        cache.truncate([1, 0])
