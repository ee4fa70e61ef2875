"""Pieces of prompts are as large as may be where that costs others little, and short elsewhere."""

from __future__ import annotations

from mtnlg.generation.piece_budget import FEWEST, STRETCH, PieceBudget


def after(step_seconds: float, token_seconds: float) -> PieceBudget:
    budget = PieceBudget(256)
    for _ in range(3):
        budget.note(step_seconds, 0, 8)
        budget.note(step_seconds + 100 * token_seconds, 100, 4)
    return budget


def test_nobody_waits_for_whole_chunks_where_tokens_take_their_time() -> None:
    budget = after(step_seconds=0.016, token_seconds=0.0005)
    assert budget.room(8, 1) == STRETCH * 0.016 / 0.0005 // FEWEST * FEWEST == 48
    assert budget.room(2, 6) == 3 * 48  # more wait for their first token than for their next
    assert budget.room(0, 6) == budget.room(1, 100) == 256
    assert after(0.016, 0.5).room(8, 1) == FEWEST  # prompts get on all the same


def test_pieces_are_whole_where_they_cost_nothing_or_nothing_is_known() -> None:
    assert after(step_seconds=0.01, token_seconds=1e-6).room(8, 1) == 256
    assert PieceBudget(256).room(8, 1) == 256
    assert PieceBudget(4).room(8, 1) == 4


def test_one_slow_step_changes_little() -> None:
    budget = after(0.016, 0.0005)
    budget.note(60.0, 0, 8)
    assert 48 <= budget.room(8, 1) <= 1.4 * 48
    budget = after(0.016, 0.0005)
    budget.note(60.0, 100, 8)
    assert 32 <= budget.room(8, 1) <= 48
