"""A PipelineModel at ZeRO stages 2 and 3 equals a plain loop in float64, whoever meets which shapes when."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trilith
from tests.harness import assert_close_named, run_ranks
from tests.layer_cases import Batch, Data, Plain, model
from tests.parallel.test_pipeline_engine import CLIPPING, Case, require_calls, state_of, whole
from tests.parallel.test_pipeline_engine_state import trained
from trilith.pipeline.action import Kind

SHAPES = ((0, 0, 1), (0, 1, 2))  # by data rank and step: a kind of input is new to both, to one of them, or to neither
STEPS = len(SHAPES[0])
SMALL, NOTHING_KEPT = ("stage3_param_persistence_threshold", 0), ("stage3_max_live_parameters", 0)
NO_PREFETCH = ("stage3_prefetch_bucket_size", 0)
LOPSIDED = (("stage3_param_persistence_threshold", 70),)  # the convolution of the first stage alone is parted
PARTED, CAPPED = (SMALL,), (SMALL, NOTHING_KEPT, NO_PREFETCH)
OFFLOADED = (SMALL, ("offload_optimizer", {"device": "cpu"}), ("offload_param", {"device": "cpu"}))


@dataclass(frozen=True)
class Ragged(Data):
    """The two data ranks have inputs of different shapes."""

    lengths: tuple[int, ...] = (5, 3, 4)

    def microbatch(self, step: int, number: int, data_rank: int) -> Batch:
        """Tokens and labels (B, S)."""
        return super().microbatch(SHAPES[data_rank][step % STEPS], number, data_rank)


@dataclass(frozen=True)
class RaggedCase(Case):
    """Over two data ranks."""

    data: int = 2
    zero: int = 3

    @property
    def batches(self) -> Data:
        return Ragged(self.microbatches)


def on_ranks(rank: int, world_size: int, cases: list[Case]) -> list[dict[str, Any]]:
    """Losses, norms, and what evaluations in between found, of some steps of each case, one engine after the other."""
    return [of_case(case) for case in cases]


def of_case(case: Case) -> dict[str, Any]:
    """One case on this rank."""
    engine = trilith.initialize(model(case.frozen, case.partition), case.config())
    before, found, evaluated, data_rank = state_of(engine), [], [], engine.topology.dp.index
    reads = engine.is_first_stage or engine.is_last_stage
    source = case.batches.stream(data_rank) if reads else None
    for step in range(STEPS):
        loss = engine.train_batch(source)
        found.append((loss, engine.global_grad_norm))
        evaluated.append(engine.eval_batch(case.batches.stream(data_rank, step) if reads else None))
    after, gathers = state_of(engine), gathers_of(engine)
    engine.close()
    left = engine.module.state_dict()
    assert all(torch.equal(left[key], after[key]) for key in after) and left.keys() == after.keys()
    return {"before": before, "after": after, "steps": found, "evaluated": evaluated, "gathers": gathers}


def gathers_of(engine: Any) -> tuple[int, int]:
    """GATHER actions of the schedule that this rank trains with, and gathers of its plan; the executor runs that one."""
    executor, plans = engine._running.steps._executor, engine.sharded._gather_plans
    num_actions = sum(action.kind is Kind.GATHER for action in executor._actions)
    if plans is None:
        return num_actions, 0
    known, plan = plans._plans[id(executor._schedule)]
    assert known is executor._schedule
    return num_actions, plan.num_gathers


def check(case: Case, results: list[dict[str, Any]]) -> None:
    """Everything equals the plain loop."""
    plain = Plain(case.frozen, whole(results, "before"))
    for step in range(STEPS):
        plain.module.train()
        loss = plain.gradients(case.batches, case.data, step)
        norm = float(torch.nn.utils.clip_grad_norm_(plain.trained, CLIPPING))
        plain.optimizer.step()
        plain.module.eval()
        with torch.no_grad():
            losses = [
                float(plain.loss(case.batches.microbatch(step, number, data_rank)))
                for data_rank, number in itertools.product(range(case.data), range(case.microbatches))
            ]
        for result in results:
            assert result["steps"][step] == pytest.approx((loss, norm), rel=1e-10), (case, step)
            assert result["evaluated"][step] == pytest.approx(sum(losses) / len(losses), rel=1e-10), (case, step)
    state = {key: value for key, value in plain.module.state_dict().items() if not key.endswith("calls")}
    after = whole(results, "after")
    assert_close_named({key: (after[key], state[key]) for key in sorted(state)}, rtol=1e-10, atol=1e-12)
    require_calls(case, after)
    for result in results:
        num_actions, num_gathers = result["gathers"]
        assert (num_actions > 0) == (num_gathers > 0) == (case.zero == 3 and SMALL in case.zero_keys), case


V_SHAPED = {"virtual_stages": 2, "partition": (1, 3, 4, 2)}
ON_FOUR: list[Case] = [
    RaggedCase(zero=2),
    RaggedCase(),
    RaggedCase(zero_keys=PARTED),
    RaggedCase(zero_keys=CAPPED),
    RaggedCase(zero_keys=PARTED, recompute="full"),
    RaggedCase(zero_keys=PARTED, frozen=True, partition=(2, 8)),
    RaggedCase(zero_keys=PARTED, frozen=True, partition="uniform"),
    RaggedCase(zero_keys=OFFLOADED),
]
ON_FOUR_VIRTUAL: list[Case] = [
    RaggedCase("interleaved_1f1b", virtual_stages=2, zero=2),
    RaggedCase("interleaved_1f1b", virtual_stages=2, zero_keys=PARTED, recompute="full"),
    RaggedCase("interleaved_1f1b", virtual_stages=2, zero_keys=CAPPED, frozen=True, partition=(1, 1, 4, 4)),
    RaggedCase("zb_v", **V_SHAPED, zero=2),
    RaggedCase("zb_v", **V_SHAPED, zero_keys=PARTED),
    RaggedCase("zb_v", **V_SHAPED, zero_keys=CAPPED, recompute="full"),
    RaggedCase("zb_v", virtual_stages=2, zero_keys=PARTED, frozen=True, partition=(2, 1, 5, 2)),
    RaggedCase("zb_v", **V_SHAPED, zero_keys=PARTED, optimizer_sync="postvalidate"),
]
ON_TWO: list[Case] = [
    RaggedCase(pipeline=1, zero=2),
    RaggedCase(pipeline=1, zero_keys=PARTED),
    RaggedCase("zb_v", pipeline=1, virtual_stages=2, partition=(4, 6), zero_keys=CAPPED),
]


@pytest.mark.parametrize("cases", [ON_TWO, ON_FOUR, ON_FOUR_VIRTUAL], ids=["two", "four", "virtual"])
def test_equals_a_plain_loop(cases: list[Case]) -> None:
    results = run_ranks(cases[0].world_size, on_ranks, cases)
    for number, case in enumerate(cases):
        check(case, [result[number] for result in results])


# ---- checkpoints ----------------------------------------------------------------------------------------------------

PARTED_CASE = Case("zb_v", **V_SHAPED, data=2, zero=3, zero_keys=PARTED)
WHOLE_CASE = Case("1f1b", data=2, zero=1, partition=(4, 6))


@pytest.mark.parametrize("saves, loads", [(PARTED_CASE, WHOLE_CASE), (WHOLE_CASE, PARTED_CASE)], ids=["from", "to"])
def test_a_checkpoint_knows_no_stage(saves: Case, loads: Case, tmp_path: Path) -> None:
    first = run_ranks(4, trained, saves, str(tmp_path), 2, 0, 3)
    expected = whole(first, "after")
    for case in (saves, loads):
        results = run_ranks(4, trained, case, str(tmp_path), 0, 2, 3)
        exact = case is saves
        found = whole(results, "after")
        assert_close_named(
            {key: (found[key], expected[key]) for key in expected},
            rtol=0.0 if exact else 1e-10,
            atol=0.0 if exact else 1e-12,
        )


# ---- errors ---------------------------------------------------------------------------------------------------------


def broken(good: list[Batch], how: str) -> Iterator[Batch]:
    """The data of one step, and of none after it."""
    yield from good
    if how == "raises":
        raise ValueError("no such shard")


def fails_within_a_span(rank: int, world_size: int, case: Case) -> list[tuple[str, str]]:
    """In the second step the first stage of data rank 1 has no data; data rank 0 has some of a new kind. Then all go on."""
    engine = trilith.initialize(model(), case.config())
    assert (engine.sharded.gatherer is not None) == (engine.is_first_stage or SMALL in case.zero_keys)
    data_rank, found = engine.topology.dp.index, list[tuple[str, str]]()
    batches = [case.batches.microbatch(0, number, data_rank) for number in range(case.microbatches)]
    for length, how in enumerate(("ends", "raises"), 6):
        new = Data(case.microbatches, (length,)).stream(0)
        bad = data_rank == 1 and engine.is_first_stage
        source: Iterator[Batch] = broken(batches, how) if bad else itertools.chain(batches, new)
        try:
            for _ in engine.train_batches(source, 2):
                pass
        except Exception as error:
            found.append((type(error).__name__, str(error)))
        engine.eval_batch(Data(case.microbatches, (length + data_rank,)).stream(0))
    engine.train_batch(iter(batches))
    assert engine.global_steps == 3
    engine.close()
    return found


@pytest.mark.parametrize("keys", [PARTED, LOPSIDED], ids=["all", "lopsided"])
def test_every_data_rank_hears_of_an_error_within_a_span(keys: tuple[tuple[str, Any], ...]) -> None:
    case = RaggedCase(zero_keys=keys, microbatches=2)
    results = run_ranks(4, fails_within_a_span, case)
    for rank, (ended, failed) in enumerate(results):
        assert ended[0] in ("TrilithError", "_Ended") and "data_iter: ended" in ended[1]
        if rank == 1:
            assert failed == ("ValueError", "no such shard")
        else:
            assert failed[0] == "TrilithError" and "rank of the first stage could not read" in failed[1]


def test_weights_are_whole_after_the_end() -> None:
    """What is left after `close` computes without the engine."""
    outputs = run_ranks(2, computes_afterwards, RaggedCase(pipeline=1, zero_keys=PARTED, frozen=True))
    assert torch.equal(*outputs)


def computes_afterwards(rank: int, world_size: int, case: Case) -> Tensor:
    engine = trilith.initialize(model(case.frozen), case.config())
    engine.train_batch(case.batches.stream(rank))
    engine.close()
    engine.close()
    hidden = engine.module["1"](engine.module["0"](torch.arange(5)[None]))
    return engine.module["8"](hidden).detach()
