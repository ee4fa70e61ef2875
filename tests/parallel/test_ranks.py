import os

import pytest
from tests.parallel import workers
from tests.ranks import RankError, RankPool


def test_every_rank_answers_and_processes_are_reused(ranks: RankPool) -> None:
    assert ranks.run(2, workers.sum_of_ranks, 10) == [11, 11]
    assert ranks.run(2, workers.process_id) == ranks.run(2, workers.process_id)
    assert ranks.run(1, workers.process_id) == [os.getpid()]


def test_failing_rank_fails_the_call_with_all_traces_and_the_pool_recovers() -> None:
    pool = RankPool()
    try:
        with pytest.raises(RankError, match="rank one has had enough") as caught:
            pool.run(2, workers.fail_on_rank_one)
        assert "barrier" in str(caught.value), "where the other rank waits is told"
        with pytest.raises(RankError, match=r"still running at(.|\n)*hang_on_rank_one"):
            pool.run(2, workers.hang_on_rank_one, timeout=5)
        with pytest.raises(RankError, match="ended with code -9"):
            pool.run(2, workers.die_on_rank_one)
        assert pool.run(2, workers.sum_of_ranks, 1) == [2, 2]
    finally:
        pool.close()


def test_a_mesh_is_cut_once(ranks: RankPool) -> None:
    """torch takes milliseconds for it, and the gradient norm asks for every weight."""
    assert ranks.run(2, workers.axes_are_cut_once) == [True, True]
