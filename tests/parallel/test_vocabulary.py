import itertools

import pytest
from tests.parallel import workers
from tests.ranks import RankPool


@pytest.mark.parametrize(("vocab_size", "ranks_used"), [(7, 2), (3, 4)])
def test_split_loss_is_the_plain_loss(ranks: RankPool, vocab_size: int, ranks_used: int) -> None:
    # 3 entries on 4 ranks: the last one holds nothing. 100 bytes of logits: several chunks.
    for gathers, split_sequence, at_once in itertools.product((False, True), (False, True), (100, 2**20)):
        found = ranks.run(ranks_used, workers.split_loss, vocab_size, gathers, split_sequence, at_once)
        assert max(max(differences) for differences in found) < 1e-5
