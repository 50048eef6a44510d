"""The rule by which a rank steps before it knows the norm: what it may bet on, and that others can tell how it bet."""

from __future__ import annotations

import random
from math import inf, isfinite, nan, sqrt

import pytest
import torch

from trilith.optim.clip import clip_factor
from trilith.topology import Group
from trilith.zero.postvalidate import GuessRule, Move, SquaresGather, norm_of

CLIPS, CHECKS, BOTH, NEITHER = (
    GuessRule(1.0, False),
    GuessRule(0.0, True),
    GuessRule(1.0, True),
    GuessRule(0.0, False),
)


@pytest.mark.parametrize(
    ("rule", "own", "last_was_plain", "move"),
    [
        (CLIPS, 0.5, True, Move.STEP),
        (CLIPS, 0.0, True, Move.STEP),
        (CLIPS, 1.0, True, Move.WAIT),  # the factor 1 / (1 + 1e-6) is below 1
        (CLIPS, 1.5, True, Move.WAIT),
        (CLIPS, 0.5, False, Move.WAIT),
        (CLIPS, inf, True, Move.WAIT),
        (CLIPS, nan, True, Move.WAIT),
        (CHECKS, 1e30, True, Move.STEP),
        (CHECKS, 1e30, False, Move.WAIT),
        (CHECKS, inf, True, Move.SKIP),
        (CHECKS, nan, False, Move.SKIP),
        (BOTH, 0.5, True, Move.STEP),
        (BOTH, 1.5, True, Move.WAIT),
        (BOTH, inf, True, Move.SKIP),
        (BOTH, 0.5, False, Move.WAIT),
        (NEITHER, 1e30, False, Move.STEP),
        (NEITHER, nan, False, Move.STEP),
    ],
)
def test_move(rule: GuessRule, own: float, last_was_plain: bool, move: Move) -> None:
    assert rule.move(own, last_was_plain) is move


@pytest.mark.parametrize("rule", [CLIPS, CHECKS, BOTH, NEITHER])
def test_only_a_bet_can_be_wrong(rule: GuessRule) -> None:
    """Skips are always right; a step is wrong exactly where the true one is skipped or scaled; and bets are won, too."""
    draw = random.Random(3)
    won = lost = 0
    for _ in range(2000):
        norms = [draw.choice((0.3, 0.6, 0.9, 1.1, inf if rule.checks_overflow else 0.1)) for _ in range(4)]
        norm = sqrt(sum(own * own for own in norms))
        skipped = rule.checks_overflow and not isfinite(norm)
        for own in norms:
            move = rule.move(own, last_was_plain=True)
            if move is Move.SKIP:
                assert skipped
            if move is Move.STEP:
                right = not skipped and clip_factor(norm, rule.max_norm) == 1.0
                assert right is rule.is_plain(norm)
                won, lost = won + right, lost + (not right)
    assert won > 0 and (lost > 0) is rule.can_fail


def test_a_rank_alone_never_loses() -> None:
    for rule in (CLIPS, CHECKS, BOTH, NEITHER):
        for own in (0.0, 0.999, 1.0 - 1e-6, 1.0, 1.1, 1e30, inf, nan):
            assert rule.move(own, True) is not Move.STEP or rule.is_plain(own)


def test_norms_from_the_exchange() -> None:
    """A group of one: the global norm is the rank's own, up to the last bits of another order of sums."""
    squares = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gather = SquaresGather(squares, Group("pp", (0,), 0))
    assert gather.own_norms() == [norm_of(squares.tolist())]
    assert gather.norm() == float(squares.sum().sqrt()) == pytest.approx(gather.own_norms()[0], rel=1e-14)


@pytest.mark.parametrize("value", [inf, nan])
def test_what_is_not_finite_comes_through(value: float) -> None:
    assert not isfinite(norm_of([1.0, value, 2.0]))
