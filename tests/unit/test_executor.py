"""The executor in one process: hand-offs on one rank, ranks as threads over strict in-memory channels, and refusals."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from itertools import pairwise
from operator import add
from typing import Any

import pytest
import torch

from tests.pipeline_cases import (
    BOUNDARY,
    H,
    Layers,
    Meeting,
    MemoryChannels,
    batches,
    one_process,
    run_threads,
    stages_of,
    train,
)
from trilith.errors import ScheduleError
from trilith.pipeline.action import Schedule, parse
from trilith.pipeline.executor import Executor
from trilith.pipeline.passes import complete
from trilith.pipeline.schedules import forward_only, make_schedule
from trilith.pipeline.stage import NullParameters, PipelineStage
from trilith.pipeline.step import Recorder, StepResult


@pytest.mark.parametrize(
    ("name", "p", "v"),
    [
        ("1f1b", 1, 1),
        ("interleaved_1f1b", 1, 4),
        ("gpipe", 4, 1),
        ("1f1b", 4, 1),
        ("interleaved_1f1b", 2, 2),
        ("interleaved_1f1b", 4, 2),
    ],
)
@pytest.mark.parametrize("m", [1, 3, 9])
def test_equals_one_process_bit_for_bit(name: str, p: int, v: int, m: int) -> None:
    result, gradients = train(complete(make_schedule(name, p, v, m)))
    losses, expected = one_process(m)
    assert [loss.item() for loss in result.losses] == [loss.item() for loss in losses]
    assert result.loss() == reduce(add, (loss.item() for loss in losses))  # sum() compensates from Python 3.12 on
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("loss_seed", [8.0, torch.tensor(8.0)])
def test_loss_scale_seeds_the_backward(loss_seed: torch.Tensor | float) -> None:
    _, gradients = train(complete(make_schedule("1f1b", 2, 1, 3)), loss_seed)
    assert all(torch.equal(a, 8 * b) for a, b in zip(gradients, one_process(3)[1], strict=True))


def test_sends_in_flight_are_bounded() -> None:
    """The second rank takes its time; the first must not pile up its nine activations."""

    def work(rank: int, executor: Executor, stages: dict[int, PipelineStage]) -> int:
        if rank == 1:
            module, gate = stages[1].module, threading.Event()
            slow = lambda inputs, batch: (gate.wait(0.02), module(inputs, batch))[1]
            executor._stages[1] = PipelineStage(1, slow, stages[1].parameters, False, True)
        executor.run(batches(9), BOUNDARY)
        return executor._channels.most_open

    most = run_threads(complete(make_schedule("gpipe", 2, 1, 9)), work)
    assert 1 <= most[0] <= 4


def test_parameters_are_asked_in_order() -> None:
    schedule = complete(replace(make_schedule("interleaved_1f1b", 2, 2, 3), ties=((0, 3),)))

    def work(rank: int, executor: Executor, stages: dict[int, PipelineStage]) -> dict[int, list[str]]:
        executor.run(batches(3), BOUNDARY)
        return {index: stage.parameters.calls for index, stage in stages.items()}

    first, second = run_threads(schedule, work)
    backwards = {
        index: [call for call in calls if not call.startswith("forward")] for index, calls in (first | second).items()
    }
    common = ["backward 0", "backward 1", "final 2", "reduce"]
    assert backwards[0] == backwards[3] == [*common, "tie_reduce"]
    assert backwards[1] == backwards[2] == common


def test_an_executor_runs_step_after_step_and_records() -> None:
    schedule = complete(make_schedule("1f1b", 2, 1, 2))

    def work(rank: int, executor: Executor, stages: dict[int, PipelineStage]) -> Recorder:
        records: Recorder = []
        for recorder in (None, records, None):
            executor.run(batches(2), BOUNDARY, recorder=recorder)
            assert executor.position() == "between steps"
        return records

    for rank, records in enumerate(run_threads(schedule, work)):
        kinds = [record.kind.value for record in records]
        order = ["forward", "forward", "backward", "backward"] if rank == 0 else ["forward", "backward"] * 2
        assert kinds == [*order, "reduce"]
        assert all(record.stage == rank and record.start_s <= record.end_s for record in records)
        assert all(a.end_s <= b.start_s for a, b in pairwise(records))


def test_forward_only_returns_outputs_without_graph() -> None:
    def work(rank: int, executor: Executor, stages: dict[int, PipelineStage]) -> StepResult:
        return executor.run(batches(5), BOUNDARY)

    first, last = run_threads(complete(forward_only((0, 1, 0, 1), 5)), work)
    assert first.outputs == [] and first.losses == [] and first.loss() == 0.0
    expected = one_process(5)[0]
    assert [output["loss"].item() for output in last.outputs] == [loss.item() for loss in expected]
    assert not any(output["loss"].requires_grad for output in last.outputs)
    assert [loss.item() for loss in last.losses] == [loss.item() for loss in expected]


def single(module: Callable[..., dict[str, torch.Tensor]], num_stages: int = 1) -> Executor:
    """One rank that runs `module` as its last stage, after plain ones."""
    schedule = complete(make_schedule("interleaved_1f1b", 1, num_stages, 2))
    stages = stages_of(schedule, 0)
    last = num_stages - 1
    stages[last] = PipelineStage(last, module, NullParameters(), last == 0, True)
    return Executor(schedule, stages, MemoryChannels({}, 0))


def test_several_tensors_and_unused_inputs_cross_a_boundary() -> None:
    """Integers have no gradient, an unused tensor's gradient is zero, a tensor may pass a stage unchanged."""
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    boundary = {"a": ((2,), torch.float64), "unused": ((2,), torch.float64), "ids": ((2,), torch.int64)}
    ids = torch.tensor([3, 4])

    def first(inputs: dict[str, torch.Tensor], batch: Any) -> dict[str, torch.Tensor]:
        row = weight * torch.ones(2, dtype=torch.float64)
        return {"ids": ids, "a": row, "unused": row + 1}

    def last(inputs: dict[str, torch.Tensor], batch: Any) -> dict[str, torch.Tensor]:
        assert torch.equal(inputs["ids"], ids) and not inputs["ids"].requires_grad
        return {"loss": (inputs["a"] * inputs["ids"]).sum()}

    schedule = complete(make_schedule("interleaved_1f1b", 1, 3, 2))
    modules = (first, lambda inputs, batch: dict(inputs), last)
    stages = {i: PipelineStage(i, f, NullParameters(), i == 0, i == 2) for i, f in enumerate(modules)}
    Executor(schedule, stages, MemoryChannels({}, 0)).run([None, None], boundary)
    assert weight.grad is not None and weight.grad.item() == 2 * (3 + 4)


def test_an_output_is_let_go_once_it_is_passed_on() -> None:
    """Only its place in the graph is kept for the backward."""
    weight, outputs = torch.ones(H, H, dtype=torch.float64, requires_grad=True), []

    def first(inputs: dict[str, torch.Tensor], batch: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = batch @ weight
        outputs.append(weakref.ref(hidden))
        return {"hidden": hidden}

    def last(inputs: dict[str, torch.Tensor], batch: torch.Tensor) -> dict[str, torch.Tensor]:
        assert outputs[-1]() is None
        return {"loss": inputs["hidden"].sum()}

    schedule = complete(make_schedule("interleaved_1f1b", 1, 2, 2))
    stages = {i: PipelineStage(i, f, NullParameters(), i == 0, i == 1) for i, f in enumerate((first, last))}
    Executor(schedule, stages, MemoryChannels({}, 0)).run(batches(2), BOUNDARY)
    torch.testing.assert_close(weight.grad, sum(batches(2)).sum(0)[:, None].expand(H, H))


def test_a_model_without_trainable_parameters_runs() -> None:
    executor = single(lambda inputs, batch: {"loss": batch.sum()})
    result = executor.run(batches(2), BOUNDARY)
    assert result.loss() == reduce(add, (batch.sum().item() for batch in batches(2)))


def test_a_failure_names_its_action() -> None:
    def broken(inputs: dict[str, torch.Tensor], batch: torch.Tensor) -> dict[str, torch.Tensor]:
        raise ValueError("no")

    executor = single(broken, num_stages=2)
    with pytest.raises(ValueError, match="no") as caught:
        executor.run(batches(2), BOUNDARY)
    where = "forward of stage 1, microbatch 0 (F1.0)"
    assert caught.value.__notes__ == [f"on pipeline rank 0, in {where}"]
    assert executor.position() == where
    with pytest.raises(ScheduleError, match="broke off in forward of stage 1"):
        executor.run(batches(2), BOUNDARY)


def test_position_tells_what_a_rank_waits_for() -> None:
    class Never(MemoryChannels):
        def receive(self, tensor: torch.Tensor, peer: int) -> Meeting:
            def lost() -> None:
                raise ConnectionError("peer closed")

            event = threading.Event()
            event.set()
            return Meeting(event, lost)

    schedule = complete(make_schedule("1f1b", 2, 1, 1))
    executor = Executor(schedule, stages_of(schedule, 1), Never({}, 1))
    with pytest.raises(ConnectionError):
        executor.run(batches(1), BOUNDARY)
    assert executor.position() == (
        "forward of stage 1, microbatch 0 (F1.0), waiting for receive forward of stage 1, microbatch 0 (RF1.0<0) "
        "from pipeline rank 0"
    )


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (lambda inputs, batch: {"logits": batch}, "must return the microbatch's loss"),
        (lambda inputs, batch: {"loss": batch}, "a scalar"),
    ],
)
def test_a_last_stage_without_loss_is_refused(module: Callable[..., Any], words: str) -> None:
    with pytest.raises(ScheduleError, match=words):
        single(module).run(batches(2), BOUNDARY)


def test_a_stage_that_breaks_the_boundary_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"the boundary of the step is .*\(2, 5\)"):
        single(Layers(1, 2), num_stages=2).run(batches(2), {"hidden": ((2, 5), torch.float64)})


def test_an_unchecked_schedule_is_refused() -> None:
    schedule = make_schedule("1f1b", 2, 1, 2)
    with pytest.raises(ScheduleError, match="is missing"):
        Executor(schedule, stages_of(schedule, 0), MemoryChannels({}, 0))


def test_gather_and_release_reach_the_parameters() -> None:
    class Seen(NullParameters):
        def __init__(self) -> None:
            self.calls: list[str] = []

        def gather(self) -> None:
            self.calls.append("gather")

        def release(self) -> None:
            self.calls.append("release")

    actions = tuple(parse(word) for word in ("AG0", "F0.0", "B0.0", "FR0", "RD0"))
    parameters = Seen()
    stages = {0: PipelineStage(0, Layers(0, 1), parameters, True, True)}
    Executor(Schedule("mine", 1, 1, 1, (0,), (actions,)), stages, MemoryChannels({}, 0)).run(batches(1), BOUNDARY)
    assert parameters.calls == ["gather", "release"]
