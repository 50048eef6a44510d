"""Steps taken before the global norm is known have the bits of steps that waited for it; without a restart they do not."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from tests.cells import Cell, config
from tests.harness import run_ranks
from trilith import preflight
from trilith.config import load_config, resolve
from trilith.models.base import LocalParameter
from trilith.optim.clip import clip_factor
from trilith.optim.groups import multipliers
from trilith.optim.make import make_optimizer
from trilith.precision import PrecisionPolicy
from trilith.process_groups import build_topology
from trilith.sharding import Piece, ShardSpec, contiguous_strides, whole
from trilith.stepping.postvalidated import PostvalidatedSteps
from trilith.topology import Degrees
from trilith.trainer import Place, Trainer
from trilith.zero.postvalidate import PostValidation
from trilith.zero.sharded import ShardedModel, Sharding

STEPS, WIDTH = 50, 37
BOUND, LATE_S = 1.0, 1.0


# ---- the two ways to end a step, on gradients that are made up --------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """How a made-up model is trained on 3 pipeline ranks x `data` ranks."""

    dtype: str = "fp32"
    clipping: float = BOUND
    zero: int = 1
    data: int = 2
    optimizer: str = "AdamW"
    overflows: bool = False
    loss_scale: float = 0.0


CASES = (
    Case(),
    Case(zero=0, data=1, optimizer="SGD"),
    Case(dtype="fp64", data=1),
    Case(dtype="bf16"),
    Case(dtype="fp16", overflows=True),
    Case(dtype="fp16", overflows=True, clipping=0.0, zero=0),
    Case(dtype="fp16", data=1, optimizer="SGD", loss_scale=1000.0),  # division by it rounds
)


class Weights(nn.Module):
    """A pipeline rank's stage: two units of one vector each."""

    def __init__(self, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        for name in names(rank):
            self.register_parameter(name, nn.Parameter(torch.zeros(WIDTH, dtype=dtype)))
        self.local_parameters = tuple(local(name) for name in names(rank))


def names(rank: int) -> tuple[str, str]:
    return f"a{rank}", f"b{rank}"


def local(name: str) -> LocalParameter:
    spec = ShardSpec(name, (WIDTH,), (Piece(whole((WIDTH,)), 0, contiguous_strides((WIDTH,))),))
    return LocalParameter(name, (WIDTH,), (spec,), (), name, True, (), 0)


def sharded(case: Case) -> tuple[Weights, ShardedModel]:
    content: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": case.clipping,
        "data_types": {"param_dtype": case.dtype},
        "zero_optimization": {"stage": case.zero},
        "optimizer": {"type": case.optimizer, "params": {"lr": 0.1, "weight_decay": 0.1}},
    }
    if case.optimizer == "SGD":
        content["optimizer"]["params"]["momentum"] = 0.9
    if case.dtype == "fp16":
        content["fp16"] = {
            "enabled": True,
            "loss_scale": case.loss_scale,
            "initial_scale_power": 10,
            "loss_scale_window": 7,
        }
    config = resolve(load_config(content), 1, needs="engine").config
    topology = build_topology(Degrees(pipeline=3, shard=case.data), torch.device("cpu"), timeout_s=30)
    policy = PrecisionPolicy.from_config(config)
    every = tuple(name for rank in range(3) for name in names(rank))
    sharding = Sharding(every, frozenset(), multipliers(), make_optimizer(config.optimizer))
    rank = topology.coordinate("pp")
    module = Weights(rank, policy.param_dtype)
    model = ShardedModel({rank: module}, topology, policy, config, sharding)
    for index, name in enumerate(names(rank)):
        model.assign(rank, name, torch.linspace(-1, 1, WIDTH, dtype=torch.float64) + index + rank)
    return module, model


def backward(module: Weights, model: ShardedModel, case: Case, step: int) -> None:
    """Give every weight a gradient whose norm depends on step and rank: below, about or above the bound, or infinite.

    Every fifth step rank 1 is above the bound by itself, every seventh the ranks only are together.
    """
    rank, data = model.topology.coordinate("pp"), model.topology.dp
    parameters = model.stage(rank)
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + data.index)
    size = 0.3 * BOUND
    if step % 5 == 4:
        size = 3 * BOUND if rank == 1 else size
    elif step % 7 == 6:
        size = 0.8 * BOUND
    if case.overflows and step % 6 == 3 and rank == 2:
        size = float("inf")
    parameters.begin_backward(0, True)
    for parameter in module.parameters():
        wanted = torch.randn(WIDTH, generator=generator, dtype=torch.float64)
        wanted *= size / (wanted.norm() * 2**0.5 * data.size)
        (parameter * (wanted * model.loss_scale).to(parameter.dtype)).sum().backward()
    parameters.reduce(-1)


def snapshot(module: Weights, model: ShardedModel) -> list[Tensor]:
    """Everything a step may change: weights, masters, moments, counts, the scale."""
    scalars = [*model.state_dict()["optimizer"].values(), *model.scaler.state_dict().values(), model.loss_scale]
    states = [tensor.clone() for _, _, tensor in model.state_entries()]
    return [*(p.detach().clone() for p in module.parameters()), *states, torch.tensor(scalars, dtype=torch.float64)]


def made_up(rank: int, world_size: int, case: Case) -> tuple[int, int, int, list[tuple[bool, bool]]]:
    """Train twin models, one waiting and one not; (guesses, rollbacks, restarts, (skipped, clipped) of each step)."""
    module, waiting = sharded(case)
    twin, model = sharded(case)
    validation, restarts, kinds = PostValidation(model), 0, []
    for step in range(STEPS):
        backward(module, waiting, case, step)
        outcome = waiting.step(0.1)
        backward(twin, model, case, step)
        validation.begin_step(0.1)
        restarts += not validation.validate()
        assert validation.outcome == outcome or outcome.grad_norm != outcome.grad_norm, (step, outcome)
        for expected, found in zip(snapshot(module, waiting), snapshot(twin, model), strict=True):
            assert torch.equal(expected, found), (step, rank)
        assert outcome.grad_norm is not None
        kinds.append((outcome.skipped, clip_factor(outcome.grad_norm, case.clipping) < 1))
    kept, states = model.memory_bytes()["rollback"], model.memory_bytes()["optimizer"]
    assert kept >= states or not case.clipping, "the copy is counted"
    for each in (waiting, model):
        each.close()
    return validation.num_guesses, validation.num_rollbacks, restarts, kinds


@pytest.mark.parametrize("case", CASES, ids=str)
def test_made_up_gradients(case: Case) -> None:
    results = run_ranks(3 * case.data, made_up, case)
    guesses, rollbacks, restarts, kinds = zip(*results, strict=True)
    assert len(set(restarts)) == 1 and 0 < restarts[0] < STEPS / 2, "all ranks agree"
    assert all(kind == kinds[0] for kind in kinds)
    assert any(skipped for skipped, _ in kinds[0]) is case.overflows
    assert any(clipped for _, clipped in kinds[0]) is (case.clipping > 0)
    assert sum(rollbacks) > 0 and all(g > 2 * r for g, r in zip(guesses, rollbacks, strict=True))
    assert len(set(zip(guesses, rollbacks, strict=True))) > 1, "some ranks knew better than others"


def late(rank: int, world_size: int) -> tuple[float, float]:
    """Seconds until a rank is through with a plain step that rank 2 comes late to: waiting, and on a guess."""
    case, found = Case(data=1), []
    for guesses in (False, True):
        module, model = sharded(case)
        validation = PostValidation(model)
        for step in range(3):
            backward(module, model, case, step)
            model.finish()
            if step == 2 and rank == 2:
                time.sleep(LATE_S)
            start_s = time.perf_counter()
            if guesses:
                validation.begin_step(0.1)
                ended_s = time.perf_counter()
                assert validation.validate()
            else:
                assert not model.step(0.1).skipped
                ended_s = time.perf_counter()
        assert validation.num_guesses == 2 * guesses, "the first step has nothing to go by"
        found.append(ended_s - start_s)
    return found[0], found[1]


def test_nobody_waits_for_a_late_rank() -> None:
    for waiting_s, guessing_s in run_ranks(3, late)[:2]:
        assert guessing_s < LATE_S / 2 < waiting_s


# ---- whole runs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """A run of 50 steps. `clipping` lies among its gradient norms; in fp16 the scale starts too high and keeps rising."""

    schedule: str
    pipeline: int
    microbatches: int
    clipping: float
    data: int = 1
    tensor: int = 1
    zero: int = 0
    dtype: str = "fp32"
    tied: bool = False


LAYOUTS = (
    Layout("1f1b", 3, 4, 1.25, data=2, zero=1, tied=True),
    Layout("zb_h2", 2, 3, 1.7, tensor=2),
    Layout("zb_v", 4, 8, 1.7, tied=True),
    Layout("zb_h2", 3, 5, 1.6, dtype="fp16"),
    Layout("zb_v", 2, 4, 1.8, data=2, zero=1, dtype="fp16"),
    Layout("1f1b", 2, 2, 1.8, tensor=2, data=2, zero=1, dtype="fp16"),
)


def content_of(layout: Layout, optimizer_sync: str) -> dict[str, Any]:
    """The config of a run."""
    v_shaped = layout.schedule == "zb_v"
    cell = Cell(
        layout.data,
        layout.pipeline,
        layout.tensor,
        layout.schedule,
        2 if v_shaped else 1,
        layout.microbatches,
        layout.zero,
        tied=layout.tied,
        dropout=0.1,
    )
    content = config(cell)
    content["data_types"] = {"param_dtype": layout.dtype}
    content["gradient_clipping"] = layout.clipping
    content["pipeline"]["optimizer_sync"] = optimizer_sync
    content["training"]["steps"] = STEPS
    content["scheduler"] = {"type": "Constant", "params": {"warmup_num_steps": 40}}  # skipped steps do not count
    if layout.dtype == "fp16":
        content["fp16"] = {"enabled": True, "initial_scale_power": 18, "loss_scale_window": 4, "hysteresis": 1}
    return content


@dataclass(frozen=True)
class Run:
    """What a rank saw: per step loss, norm, learning rate, scale and skip; its final states; its guesses and rollbacks."""

    steps: list[tuple[float, float | None, float, float | None, bool]]
    states: list[Tensor]
    guesses: int
    rollbacks: int


def run(rank: int, world_size: int, content: dict[str, Any], fault: str) -> Run:
    """Train in three spans. `fault`: "blind" ranks never mend a wrong guess; "stubborn" ones mend it and go on."""
    trainer, steps = Trainer(preflight.plan(content), Place(rank, world_size)), []
    guesses = rollbacks = 0
    validation = trainer.steps.validation if isinstance(trainer.steps, PostvalidatedSteps) else None
    if validation is not None and fault:
        true_validate = validation.validate

        def blind() -> bool:
            with patch.object(validation, "_restore"), patch.object(trainer.model, "apply"):
                return true_validate() or True

        vars(validation)["validate"] = blind if fault == "blind" else lambda: true_validate() or True
    for num_steps in (20, 1, 29):
        for r in trainer.train(num_steps):
            steps.append((r.loss, r.grad_norm, r.lr, r.loss_scale, r.skipped))
    if validation is not None:
        assert not validation.is_pending
        guesses, rollbacks = validation.num_guesses, validation.num_rollbacks
        assert trainer.model.memory_bytes()["rollback"] >= trainer.model.memory_bytes()["optimizer"]
    weights = [p.detach().clone() for stage in trainer.stages.values() for p in stage.parameters()]
    states = [tensor.clone() for _, _, tensor in trainer.model.state_entries()]
    trainer.close()
    return Run(steps, [*weights, *states], guesses, rollbacks)


def run_all(layout: Layout, optimizer_sync: str, fault: str = "") -> list[Run]:
    content = content_of(layout, optimizer_sync)
    return run_ranks(preflight.plan(content).world_size, run, content, fault, timeout_s=120)


def same(first: Run, second: Run) -> bool:
    """Bit for bit; a norm may be NaN on both sides."""
    if repr(first.steps) != repr(second.steps):
        return False
    return all(torch.equal(a, b) for a, b in zip(first.states, second.states, strict=True))


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, marks=[pytest.mark.slow] if index % 2 or layout.pipeline > 3 else [])
        for index, layout in enumerate(LAYOUTS)
    ],
    ids=str,
)
def test_whole_runs(layout: Layout) -> None:
    expected, found = run_all(layout, "step"), run_all(layout, "postvalidate")
    assert all(same(a, b) for a, b in zip(expected, found, strict=True))
    steps = found[0].steps
    assert all(run.steps == steps or repr(run.steps) == repr(steps) for run in found)
    skipped = [step[-1] for step in steps]
    norms = [float(step[1] or 0) for step, skip in zip(steps, skipped, strict=True) if not skip]
    assert any(skipped) is (layout.dtype == "fp16") and min(norms) < layout.clipping < max(norms)
    assert sum(run.rollbacks for run in found) > 0, "some guesses are wrong"
    assert sum(run.guesses - run.rollbacks for run in found) > 0, "some are right"


def test_without_mending_the_results_differ() -> None:
    layout = LAYOUTS[0]
    expected, found = run_all(layout, "step"), run_all(layout, "postvalidate", "blind")
    assert sum(run.rollbacks for run in found) > 0
    assert not any(same(a, b) for a, b in zip(expected, found, strict=True))


def test_autograd_refuses_to_go_on_without_the_restart() -> None:
    with pytest.raises(AssertionError, match="modified by an inplace operation"):
        run_all(LAYOUTS[0], "postvalidate", "stubborn")
