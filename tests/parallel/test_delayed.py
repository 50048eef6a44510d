"""The asynchronous schedules on ranks, in float64, against their one-process simulations (`tests.delayed_reference`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import delayed_reference as reference
from tests import runs
from tests.cells import Cell, config
from tests.harness import assert_close_named, run_ranks
from trilith import preflight
from trilith.precision import LossScaler
from trilith.sharding import ShardSpec
from trilith.trainer import Place, Trainer

SPANS = (1, 6, 13)  # 20 steps, with a drain after each span
BAR = 1e-10
GROWING_SCALE = {"enabled": True, "initial_scale_power": 15, "loss_scale_window": 1, "hysteresis": 1}


def content_of(cell: Cell, **changes: Any) -> dict[str, Any]:
    """The config of a cell, with a learning rate that changes from step to step; clipping where the schedule has it."""
    content = config(cell)
    content["scheduler"] = {"type": "Constant", "params": {"warmup_num_steps": 12}}
    # The gradient of a key bias is zero in exact arithmetic: a smaller eps would let Adam blow up its rounding.
    content["optimizer"]["params"] |= {"lr": 2e-3, "eps": 1e-6}
    content["gradient_clipping"] = 0.0 if cell.schedule == "pipedream" else 0.3
    content.update(changes)
    return content


def simulated_content(content: dict[str, Any]) -> dict[str, Any]:
    """What the simulation depends on: the layout without its tensor ranks and partitions."""
    plain = json.loads(json.dumps(content))
    plain["parallel"] |= {"tensor": 1, "sequence_parallel": False}
    plain["zero_optimization"] = {"stage": 0}
    plain["activation_checkpointing"] = {"recompute": "none"}
    return plain


@cache
def _simulated(text: str, spans: tuple[int, ...]) -> reference.Result:
    content = json.loads(text)
    if content["pipeline"]["schedule"] == "pipedream":
        return reference.pipedream(content, spans)
    return reference.pipedream_2bw(content, sum(spans))


def simulated(content: dict[str, Any], spans: tuple[int, ...] = SPANS) -> reference.Result:
    """The one-process simulation of a config."""
    return _simulated(json.dumps(simulated_content(content), sort_keys=True), spans)


@dataclass(frozen=True)
class Order:
    """What a rank does: resume (""), train spans, save under a root after the spans (""), train more spans."""

    spans: Sequence[int]
    resume: str = ""
    save: str = ""
    more: Sequence[int] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of it. `scales`: loss scale of each step, and whether it was skipped. `modules` and `states`: (spec, 1-D
    tensor) of the modules' weights and of all that is saved."""

    losses: list[float]
    lrs: list[float]
    norms: list[float | None]
    scales: list[tuple[float | None, bool]]
    modules: list[tuple[ShardSpec, Tensor]]
    states: list[tuple[ShardSpec, Tensor]]
    memory_bytes: dict[str, int]
    numel: int
    saved: str
    evaluation: float


def train(rank: int, world_size: int, content: dict[str, Any], order: Order) -> Outcome:
    """One rank of a run."""
    trainer = Trainer(preflight.plan(content), Place(rank, world_size))
    if order.resume:
        trainer.resume(Path(order.resume))
    records = [record for span in order.spans for record in trainer.train(span)]
    saved = str(trainer.save(Path(order.save))) if order.save else ""
    records += [record for span in order.more for record in trainer.train(span)]
    evaluation = trainer.evaluate().eval_loss
    modules = []
    for stage in trainer.stages.values():
        named = dict(stage.named_parameters())
        for p in stage.local_parameters:
            modules += [(spec, named[p.name].detach().flatten().clone()) for spec in p.specs]
    states = [(spec.with_role(role), tensor.clone()) for role, spec, tensor in trainer.model.state_entries()]
    numel = sum(unit.layout.numel for unit in trainer.model.units)
    memory = trainer.model.memory_bytes()
    trainer.close()
    assert [r.step for r in records] == list(range(trainer.state.step - len(records) + 1, trainer.state.step + 1))
    losses, lrs, norms = [r.loss for r in records], [r.lr for r in records], [r.grad_norm for r in records]
    scales = [(r.loss_scale, r.skipped) for r in records]
    return Outcome(losses, lrs, norms, scales, modules, states, memory, numel, saved, evaluation)


def run(content: dict[str, Any], order: Order) -> list[Outcome]:
    """The outcome of every rank; they agree on the figures of every step."""
    outcomes: list[Outcome] = run_ranks(preflight.plan(content).world_size, train, content, order, timeout_s=120)
    assert len({repr(_figures(outcome)) for outcome in outcomes}) == 1  # NaN is not equal to itself
    return outcomes


def _figures(outcome: Outcome) -> tuple[Any, ...]:
    return outcome.losses, outcome.lrs, outcome.norms, outcome.scales, outcome.evaluation


def states_of(outcomes: Sequence[Outcome], role: str) -> reference.Weights:
    """Whole tensors of one role."""
    return reference.whole([(s, t) for o in outcomes for s, t in o.states if s.role == role])


# -------------------------------------------------------------------------------------------- against the simulation

SLOW = pytest.mark.slow  # in `make matrix` only
CELLS = [
    Cell(1, 2, 1, "pipedream", 1, 2, 0, False, False, "none", 0.1, "gpt2"),
    Cell(2, 2, 2, "pipedream", 1, 5, 1, False, True, "full", 0.1, "llama", True, True),
    pytest.param(Cell(1, 3, 2, "pipedream", 1, 3, 0, False, False, "selective", 0.1, "gpt2"), marks=SLOW),
    Cell(2, 3, 1, "pipedream", 1, 7, 1, False, False, "none", 0.1, "llama"),
    pytest.param(Cell(2, 4, 1, "pipedream", 1, 4, 0, False, False, "full", 0.1, "gpt2"), marks=SLOW),
    pytest.param(Cell(1, 4, 2, "pipedream", 1, 5, 1, False, True, "none", 0.1, "gpt2", False, True), marks=SLOW),
    Cell(2, 2, 1, "pipedream_2bw", 1, 3, 0, True, False, "none", 0.1, "gpt2"),
    Cell(1, 2, 2, "pipedream_2bw", 1, 2, 1, False, True, "full", 0.1, "llama", True, True),
    Cell(1, 3, 1, "pipedream_2bw", 1, 7, 0, True, False, "none", 0.1, "gpt2"),
    pytest.param(
        Cell(2, 3, 1, "pipedream_2bw", 1, 3, 1, True, False, "selective", 0.1, "llama", False, True), marks=SLOW
    ),
    pytest.param(Cell(1, 4, 2, "pipedream_2bw", 1, 4, 0, True, True, "none", 0.1, "gpt2", True), marks=SLOW),
    Cell(2, 4, 1, "pipedream_2bw", 1, 5, 1, False, False, "full", 0.1, "gpt2"),
]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_training_equals_the_one_process_simulation(cell: Cell) -> None:
    content = content_of(cell)
    expected = simulated(content)
    outcomes = run(content, Order(SPANS))
    assert outcomes[0].losses == pytest.approx(expected.losses, rel=BAR, abs=0)
    for found in (states_of(outcomes, "weight"), reference.whole([pair for o in outcomes for pair in o.modules])):
        assert_close_named({name: (found[name], w) for name, w in expected.weights.items()}, rtol=BAR, atol=1e-12)
    stages = [cell.pipeline - rank // (cell.data * cell.tensor) for rank in range(cell.num_ranks)]
    for outcome, behind in zip(outcomes, stages, strict=True):
        versions, gradients = (behind, 1) if cell.schedule == "pipedream" else (2, 2)
        assert outcome.memory_bytes["parameters"] == 8 * outcome.numel * versions
        assert outcome.memory_bytes["gradients"] == 8 * outcome.numel * gradients
    if cell.schedule == "pipedream":
        assert set(outcomes[0].norms) == {None}
    else:
        assert all(norm is not None and norm > content["gradient_clipping"] for norm in outcomes[0].norms)


def test_spans_shorter_than_the_pipeline() -> None:
    """Two microbatches on four stages: no span gets far enough to reuse a version, and the next begins with the newest."""
    content = content_of(Cell(1, 4, 1, "pipedream", 1, 2, dropout=0.1))
    expected, outcomes = simulated(content, (1, 2, 1)), run(content, Order((1, 2, 1)))
    assert outcomes[0].losses == pytest.approx(expected.losses, rel=BAR, abs=0)
    found = reference.whole([pair for o in outcomes for pair in o.modules])
    assert_close_named({name: (found[name], w) for name, w in expected.weights.items()}, rtol=BAR, atol=1e-12)


# ---------------------------------------------------------------------------------------- the simulation by itself


WRONG_STASHING = {
    "a version too old": lambda k, s, p: max(0, k - (p - s)),
    "a version too new": lambda k, s, p: max(0, k - max(0, p - 2 - s)),
    "vertical sync": lambda k, s, p: max(0, k - (p - 1)),
    "no delay": lambda k, s, p: k,
}


@pytest.mark.parametrize("name", WRONG_STASHING)
def test_another_rule_of_stashing_is_seen(name: str) -> None:
    """A runtime that broke the rule would be far outside the bar: already one version more or less is."""
    content = content_of(Cell(pipeline=3, schedule="pipedream", microbatches=4, dropout=0.1))
    right = simulated(content, (3,))
    wrong = reference.pipedream(content, (3,), WRONG_STASHING[name])
    assert max(abs(a - b) for a, b in zip(right.losses, wrong.losses, strict=True)) > 1e-4


def test_another_place_of_the_drains_is_seen() -> None:
    content = content_of(Cell(pipeline=3, schedule="pipedream", microbatches=4, dropout=0.1))
    assert simulated(content, (1, 2)).losses[0] == simulated(content, (3,)).losses[0]
    assert abs(simulated(content, (1, 2)).losses[1] - simulated(content, (3,)).losses[1]) > 1e-4


@pytest.mark.parametrize("delay", [0, 2])
def test_another_delay_of_double_buffering_is_seen(delay: int) -> None:
    content = content_of(Cell(pipeline=3, schedule="pipedream_2bw", microbatches=3, dropout=0.1))
    right = simulated(content, (5,))
    wrong = reference.pipedream_2bw(content, 5, lambda t, s, p: max(0, t - delay))
    assert max(abs(a - b) for a, b in zip(right.losses, wrong.losses, strict=True)) > 1e-4


def test_without_delays_both_simulations_are_synchronous_training() -> None:
    """The parts of the simulation that the rules do not touch agree with the engine on one process."""
    whole = content_of(Cell(pipeline=2, schedule="pipedream_2bw", microbatches=2, dropout=0.1, tied=True))
    undelayed = reference.pipedream_2bw(whole, 6, lambda t, s, p: t)
    plain = content_of(Cell(schedule="1f1b", microbatches=2, dropout=0.1, tied=True))
    plain["training"]["steps"] = 6
    assert undelayed.losses == pytest.approx([loss for loss, _ in runs.reference(plain)], rel=1e-12, abs=0)
    each = content_of(Cell(pipeline=2, schedule="pipedream", microbatches=2, dropout=0.1), scheduler=None)
    undelayed = reference.pipedream(each, (3,), lambda k, s, p: k)
    plain = content_of(Cell(schedule="1f1b", microbatches=1, dropout=0.1), scheduler=None, gradient_clipping=0.0)
    plain["training"]["steps"] = 6
    losses = [loss for loss, _ in runs.reference(plain)]
    assert undelayed.losses == pytest.approx([(a + b) / 2 for a, b in zip(losses[::2], losses[1::2], strict=True)])


# ----------------------------------------------------------------------------------------------------- checkpoints


RESUMED = [
    (Cell(1, 3, 1, "pipedream", 1, 4, 0, dropout=0.1), "fp64"),
    (Cell(2, 2, 1, "pipedream", 1, 3, 1, dropout=0.1), "bf16"),
    (Cell(2, 2, 1, "pipedream_2bw", 1, 3, 1, True, dropout=0.1), "fp64"),
    (Cell(1, 2, 2, "pipedream_2bw", 1, 2, 0, dropout=0.1), "bf16"),
    (Cell(1, 2, 1, "pipedream_2bw", 1, 2, 0, dropout=0.1), "fp16"),
]


@pytest.mark.parametrize(("cell", "dtype"), RESUMED, ids=str)
def test_a_resumed_run_equals_the_uninterrupted_one(cell: Cell, dtype: str, tmp_path: Path) -> None:
    """With the same drains, bit for bit: losses, norms, evaluation, masters, moments, and the older weights."""
    content = content_of(cell, data_types={"param_dtype": dtype})
    content["bf16"] = {"enabled": dtype == "bf16", "check_grad_overflow": False}
    content["fp16"] = GROWING_SCALE | {"enabled": dtype == "fp16"}
    whole = run(content, Order((2, 3), save=str(tmp_path), more=(1, 4)))
    resumed = run(content, Order((1, 4), resume=whole[0].saved))
    for a, b in zip(whole, resumed, strict=True):
        assert repr((a.losses[5:], a.lrs[5:], a.norms[5:], a.scales[5:], a.evaluation)) == repr(_figures(b))
        assert [spec for spec, _ in a.states] == [spec for spec, _ in b.states]
        for (spec, left), (_, right) in zip(a.states, b.states, strict=True):
            assert torch.equal(left, right), (spec.role, spec.name)
    roles = {spec.role for spec, _ in whole[0].states}
    assert ("previous" in roles) == (cell.schedule == "pipedream_2bw")
    assert ("weight" if dtype == "fp64" else "master") in roles


def test_the_older_weights_are_part_of_the_state(tmp_path: Path) -> None:
    """A drain changes nothing with double buffering: a resumed run still follows the uninterrupted simulation."""
    content = content_of(Cell(1, 2, 1, "pipedream_2bw", 1, 2, dropout=0.1))
    saved = run(content, Order((3,), save=str(tmp_path)))[0].saved
    resumed = run(content, Order((3,), resume=saved))
    assert resumed[0].losses == pytest.approx(simulated(content, (6,)).losses[3:], rel=BAR, abs=0)
    newest, older = states_of(resumed, "weight"), states_of(resumed, "previous")
    before = simulated(content, (5,)).weights
    assert_close_named({name: (older[name], w) for name, w in before.items()}, rtol=BAR, atol=1e-12)
    assert not any(torch.equal(newest[name], older[name]) for name in newest)


# ------------------------------------------------------------------------------------------------------- loss scale


def test_skipped_steps_are_steps_of_zero() -> None:
    """With fp16 a skipped step makes W(t+1) = W(t), and its scale is that of the time when its weights were made."""
    cell = Cell(1, 2, 1, "pipedream_2bw", 1, 2, dropout=0.1)
    content = content_of(cell, data_types={"param_dtype": "fp16"}, fp16=GROWING_SCALE)
    (trained, *_) = run(content, Order((12,)))
    skipped = [skip for _, skip in trained.scales]
    scaler = LossScaler.from_config(preflight.plan(content).config)
    expected = [scaler.loss_scale] * 2
    for skip in skipped:
        scaler.update(skip)
        expected.append(scaler.loss_scale)
    assert [scale for scale, _ in trained.scales] == expected[:12]
    assert torch.tensor(trained.losses).isfinite().all()
    first = skipped.index(True)
    assert first > 1 and not all(skipped[first:])
    before, after = run(content, Order((first,))), run(content, Order((first + 1,)))
    unchanged = states_of(after, "master")
    assert all(torch.equal(unchanged[name], w) for name, w in states_of(before, "master").items())
    newest = reference.whole([pair for outcome in after for pair in outcome.modules])
    assert all(torch.equal(newest[name], w) for name, w in states_of(after, "previous").items())
