"""ZB-H1, ZB-H2 and DualPipeV against their closed forms, for unit and for other costs."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from trilith.pipeline.action import COMPUTE, Kind, Schedule
from trilith.pipeline.simulate import Costs, action_times, simulate
from trilith.pipeline.zero_bubble import dualpipe_v, zb_h1, zb_h2

COSTS = tuple((draw.randint(1, 9), draw.randint(1, 9), draw.randint(1, 9)) for draw in map(random.Random, range(6)))


def idle(schedule: Schedule, forward: int, backward_input: int, backward_weight: int) -> float:
    """Longest span of a rank less the work of a rank; all ranks have the same work."""
    costs = Costs.uniform(schedule.num_stages, forward, backward_input, backward_weight)
    work = (
        schedule.num_microbatches
        * schedule.num_stages
        / schedule.num_ranks
        * sum((forward, backward_input, backward_weight))
    )
    return max(row[-1][2] - row[0][1] for row in action_times(schedule, costs)) - work


@pytest.mark.parametrize(("p", "m", "h1", "makespan"), [(4, 8, 0.111, 0.111), (8, 16, 0.127, 0.127)])
def test_check_values(p: int, m: int, h1: float, makespan: float) -> None:
    """The published bubbles; over the makespan of the whole step zb_h2 gains nothing on zb_h1 (the ramps remain)."""
    first, second = simulate(zb_h1(p, m), Costs.uniform(p)), simulate(zb_h2(p, m), Costs.uniform(p))
    assert first.bubble == pytest.approx(h1, abs=5e-4)
    assert second.bubble == 0
    assert first.bubble_makespan == pytest.approx(makespan, abs=5e-4)
    assert second.bubble_makespan == pytest.approx(makespan, abs=5e-4)
    assert first.peak_microbatches == (p,) * p
    assert second.peak_microbatches == (2 * p - 1,) * p


@pytest.mark.parametrize("p", range(1, 9))
def test_zb_h1_follows_its_closed_form(p: int) -> None:
    """Fewer microbatches than ranks included; every rank holds min(p, m)."""
    for m in range(1, 25):
        k = min(p, m)
        schedule = zb_h1(p, m)
        result = simulate(schedule, Costs.uniform(p))
        assert result.bubble == pytest.approx((2 * p - 1 - k) / (3 * m + 2 * p - 1 - k))
        assert result.peak_microbatches == (k,) * p
        for f, i, w in COSTS:
            assert idle(schedule, f, i, w) == (p - 1) * i + (p - k) * f + (k - 1) * max(0, f - w), (m, f, i, w)
        if m >= p:
            assert idle(schedule, 3, 2, 1) == (p - 1) * (3 + 2 - 1), "the paper's (p-1) (F + I - W)"


@pytest.mark.parametrize("p", range(1, 9))
def test_zb_h2_follows_its_closed_form(p: int) -> None:
    for m in range(2 * p - 1, 25):
        schedule = zb_h2(p, m)
        result = simulate(schedule, Costs.uniform(p))
        assert result.bubble == 0
        assert result.peak_microbatches == (2 * p - 1,) * p
        for f, i, w in COSTS:
            assert idle(schedule, f, i, w) == (p - 1) * max(0, f + i - 2 * w, i - f), (m, f, i, w)


@pytest.mark.parametrize("p", range(1, 9))
def test_dualpipe_v_follows_its_formula(p: int) -> None:
    """Bubble (p-1) (F&B + B - 3W) at F = I >= W, and 2p+1 (stage, microbatch) on every rank."""
    for m in range(2 * p, 25):
        schedule = dualpipe_v(p, m)
        result = simulate(schedule, Costs.uniform(2 * p))
        bubble = (p - 1) * (3 + 2 - 3 * 1)
        assert result.bubble == pytest.approx(bubble / (6 * m + bubble))
        assert result.peak_chunks == (2 * p + 1,) * p
        for f, w in ((3, 1), (5, 4)):
            assert idle(schedule, f, f, w) == (p - 1) * ((f + f + w) + (f + w) - 3 * w), (m, f, w)


@pytest.mark.parametrize("p", range(1, 9))
def test_dualpipe_v_runs_pairs_of_its_two_stages(p: int) -> None:
    """A pair is the forward of one stage and the whole backward of the other; only the ramp's forwards are alone."""
    for m in range(2 * p, 25):
        schedule = dualpipe_v(p, m)
        assert schedule.placement == (*range(p), *reversed(range(p)))
        for rank, actions in enumerate(schedule.actions):
            pairs = [action.parts() for action in actions if action.kind is Kind.OVERLAPPED]
            for forward, backward in pairs:
                assert (forward.kind, backward.kind) == (Kind.FORWARD, Kind.BACKWARD)
                assert {forward.stage, backward.stage} == set(schedule.stages_of(rank))
            alone = sum(action.kind is Kind.FORWARD for action in actions)
            assert alone == 2 * (p - 1 - rank) + 2 * (rank + 1) + (p - 1 - rank) + (rank == p - 1)
            assert len(pairs) == 2 * m - alone


@pytest.mark.parametrize("make", [zb_h1, zb_h2, dualpipe_v])
def test_generators_return_compute_actions_only(make: Callable[[int, int], Schedule]) -> None:
    assert {action.kind for _, action in make(3, 8).parts()} <= COMPUTE
