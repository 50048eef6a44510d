"""Checkpoints that a synchronous schedule writes and an asynchronous one reads, and the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import delayed_reference as reference
from tests.cells import Cell
from tests.harness import assert_close_named, run_ranks
from tests.parallel import test_delayed
from tests.parallel.test_delayed import BAR, Order, run, simulated_content, states_of
from tests.parallel.test_pipeline_engine import Case, whole
from tests.parallel.test_pipeline_engine_state import trained
from trilith import preflight
from trilith.optim.lr import make_lr

# Two layouts with the same samples in a step.
SYNCHRONOUS = Cell(1, 3, 1, "1f1b", 1, 6, 0, True, dropout=0.1)
DOUBLE = Cell(2, 2, 1, "pipedream_2bw", 1, 3, 1, True, dropout=0.1)
CHANGES = {
    # step -> version of the weights that its gradients are taken with
    "to double buffering": (SYNCHRONOUS, DOUBLE, lambda t, s, p: t if t <= 3 else t - 1),
    "from double buffering": (DOUBLE, SYNCHRONOUS, lambda t, s, p: max(0, t - 1) if t < 3 else t),
}


def content_of(cell: Cell, **changes: Any) -> dict[str, Any]:
    """The config of a cell, with one model for all."""
    content = test_delayed.content_of(cell, **changes)
    content["model"]["num_layers"] = 3
    return content


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_goes_on_under_another_schedule(name: str, tmp_path: Path) -> None:
    """Three steps under one schedule and four under another, in another layout, equal the one-process simulation."""
    before, after, rule = CHANGES[name]
    first = run(content_of(before), Order((3,), save=str(tmp_path)))
    second = run(content_of(after), Order((1, 3), resume=first[0].saved))
    expected = reference.pipedream_2bw(simulated_content(content_of(after)), 7, rule)
    assert [*first[0].losses, *second[0].losses] == pytest.approx(expected.losses, rel=BAR, abs=0)
    found = states_of(second, "weight")
    assert_close_named({name: (found[name], w) for name, w in expected.weights.items()}, rtol=BAR, atol=1e-12)


def in_bf16(cell: Cell) -> dict[str, Any]:
    """The config of a cell with fp32 masters of bf16 weights."""
    return content_of(cell, data_types={"param_dtype": "bf16"}, bf16={"enabled": True, "check_grad_overflow": False})


def test_both_versions_are_the_rounded_masters(tmp_path: Path) -> None:
    saved = run(in_bf16(SYNCHRONOUS), Order((2,), save=str(tmp_path)))[0].saved
    outcomes = run(in_bf16(DOUBLE), Order((), resume=saved))
    masters, previous = states_of(outcomes, "master"), states_of(outcomes, "previous")
    newest = reference.whole([pair for outcome in outcomes for pair in outcome.modules])
    assert masters.keys() == previous.keys() == newest.keys()
    for name, master in masters.items():
        assert torch.equal(previous[name], master.bfloat16()) and torch.equal(newest[name], previous[name]), name


def test_the_learning_rate_follows_the_steps_through_every_schedule(tmp_path: Path) -> None:
    """Under pipedream the optimizer counts an update for each of six microbatches; what comes after counts steps."""
    schedules = ("1f1b", "pipedream", "zb_h1", "pipedream_2bw", "pipedream", "1f1b")
    saved, found = "", list[float]()
    for schedule in schedules:
        content = content_of(Cell(1, 2, 1, schedule, 1, 6, dropout=0.1))
        outcome = run(content, Order((1, 2), resume=saved, save=str(tmp_path)))[0]
        saved, found = outcome.saved, [*found, *outcome.lrs]
    config = preflight.plan(content).config
    lr = make_lr(config.scheduler, config.optimizer.params.lr)
    assert found == [lr(step) for step in range(3 * len(schedules))]
    assert len(set(found)) > 9


def test_a_stage_that_nothing_trains_in_counts_the_updates_of_the_others(tmp_path: Path) -> None:
    """The count that is saved is that of rank 0, which is asked for none; Adam's corrections depend on it."""
    case = Case("pipedream", frozen=True, partition=(2, 8), clipping=0.0)
    uninterrupted = whole(run_ranks(2, trained, case, str(tmp_path), 2, 0, 3), "after")
    resumed = whole(run_ranks(2, trained, case, str(tmp_path), 0, 2, 3), "after")
    assert resumed.keys() == uninterrupted.keys()
    for name, tensor in resumed.items():
        assert torch.equal(tensor, uninterrupted[name]), name
