"""The executor in one process: hand-offs on one rank, ranks as threads over strict in-memory channels, and refusals."""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch

from trilith.errors import ScheduleError
from trilith.pipeline.action import Schedule, parse
from trilith.pipeline.executor import Executor, Recorder, StepResult
from trilith.pipeline.passes import complete
from trilith.pipeline.schedules import make_schedule
from trilith.pipeline.stage import NullParameters, PipelineStage

B, H = 3, 5
BOUNDARY = {"hidden": ((B, H), torch.float64)}
TIMEOUT_S = 20.0


@dataclass
class Meeting:
    """A handle of one end of a message: over when both ends have come (a send is not buffered)."""

    event: threading.Event
    finish: Callable[[], None] = lambda: None

    @property
    def done(self) -> bool:
        return self.event.is_set()

    def wait(self) -> None:
        assert self.event.wait(TIMEOUT_S), "deadlock"
        self.finish()


@dataclass
class Wire:
    """A directed channel in memory: the n-th send meets the n-th receive, nothing is buffered."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    sent: list[torch.Tensor] = field(default_factory=list)
    received: list[torch.Tensor] = field(default_factory=list)
    events: defaultdict[int, threading.Event] = field(default_factory=lambda: defaultdict(threading.Event))

    def join(self, tensor: torch.Tensor, ends: list[torch.Tensor]) -> Meeting:
        with self.lock:
            ends.append(tensor)
            index = len(ends) - 1
            if min(len(self.sent), len(self.received)) > index:
                assert self.sent[index].shape == self.received[index].shape
                self.received[index].copy_(self.sent[index])
                self.events[index].set()
            return Meeting(self.events[index])


class MemoryChannels:
    """`Channels` of one rank among threads."""

    device = torch.device("cpu")

    def __init__(self, wires: dict[tuple[int, int], Wire], rank: int) -> None:
        self.wires, self.rank = wires, rank
        self.most_open = 0

    def send(self, tensor: torch.Tensor, peer: int) -> Meeting:
        wire = self.wires[self.rank, peer]
        meeting = wire.join(tensor.detach(), wire.sent)
        self.most_open = max(self.most_open, len(wire.sent) - len(wire.received))
        return meeting

    def receive(self, tensor: torch.Tensor, peer: int) -> Meeting:
        return self.wires[peer, self.rank].join(tensor, self.wires[peer, self.rank].received)


class Layers:
    """Stage `index` of `num_stages`: its share of eight square layers, a loss at the end."""

    def __init__(self, index: int, num_stages: int) -> None:
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(H, H, generator=generator, dtype=torch.float64) for _ in range(8)]
        size = 8 // num_stages
        self.weights = [w.requires_grad_() for w in weights[index * size : (index + 1) * size]]
        self.is_last = index == num_stages - 1

    def __call__(self, inputs: dict[str, torch.Tensor], microbatch: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = inputs.get("hidden", microbatch)
        for weight in self.weights:
            hidden = torch.tanh(hidden @ weight)
        return {"loss": hidden.square().sum()} if self.is_last else {"hidden": hidden}


class Calls(NullParameters):
    """Writes down what the executor asks of a stage's parameters."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def begin_backward(self, final: bool) -> None:
        self.calls.append("final" if final else "backward")

    def reduce(self) -> None:
        self.calls.append("reduce")

    def tie_reduce(self) -> None:
        self.calls.append("tie_reduce")


def stages_of(schedule: Schedule, rank: int) -> dict[int, PipelineStage]:
    count = schedule.num_stages
    return {
        index: PipelineStage(index, Layers(index, count), Calls(), index == 0, index == count - 1)
        for index in schedule.stages_of(rank)
    }


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(B, H, generator=generator, dtype=torch.float64) for _ in range(count)]


def run_threads(schedule: Schedule, work: Callable[[int, Executor, dict[int, PipelineStage]], Any]) -> list[Any]:
    """`work` on every rank of the schedule, each a thread."""
    wires = {pair: Wire() for pair in schedule.channels()}

    def rank_main(rank: int) -> Any:
        stages = stages_of(schedule, rank)
        return work(rank, Executor(schedule, stages, MemoryChannels(wires, rank)), stages)

    with ThreadPoolExecutor(schedule.num_ranks) as pool:
        return [future.result(TIMEOUT_S) for future in [pool.submit(rank_main, r) for r in range(schedule.num_ranks)]]


def train(schedule: Schedule, loss_seed: torch.Tensor | float = 1.0) -> tuple[StepResult, list[torch.Tensor]]:
    """(result of the last rank, gradients of the eight layers)."""

    def work(rank: int, executor: Executor, stages: dict[int, PipelineStage]) -> Any:
        return executor.run(batches(schedule.num_microbatches), BOUNDARY, loss_seed), stages

    by_stage: dict[int, PipelineStage] = {}
    for result, stages in run_threads(schedule, work):
        by_stage.update(stages)
        if result.losses:
            last = result
    return last, [w.grad for _, stage in sorted(by_stage.items()) for w in stage.module.weights]


def one_process(count: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    model, losses = Layers(0, 1), []
    for batch in batches(count):
        losses.append(model({}, batch)["loss"])
        losses[-1].backward()
    return [loss.detach() for loss in losses], [w.grad for w in model.weights]


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
    assert result.loss() == sum(loss.item() for loss in losses)
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
    schedule = complete(make_schedule("interleaved_1f1b", 2, 2, 3), ties=True)

    def work(rank: int, executor: Executor, stages: dict[int, PipelineStage]) -> dict[int, list[str]]:
        executor.run(batches(3), BOUNDARY)
        return {index: stage.parameters.calls for index, stage in stages.items()}

    first, second = run_threads(schedule, work)
    common = ["backward", "backward", "final", "reduce"]
    assert first[0] == second[3] == [*common, "tie_reduce"]
    assert first[2] == second[1] == common


def test_an_executor_runs_step_after_step_and_records() -> None:
    schedule = complete(make_schedule("1f1b", 2, 1, 2))

    def work(rank: int, executor: Executor, stages: dict[int, PipelineStage]) -> Recorder:
        records: Recorder = []
        recording = Executor(schedule, stages, executor._channels, records)
        for runner in (executor, recording, executor):
            runner.run(batches(2), BOUNDARY)
            assert runner.position() == "between steps"
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

    first, last = run_threads(complete(make_schedule("forward_only", 2, 2, 5)), work)
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
    assert result.loss() == sum(batch.sum().item() for batch in batches(2))


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


@pytest.mark.parametrize("text", ["F0.0 I0.0 W0.0", "F0.0 F0.1&B0.0 B0.1"])
def test_split_and_overlapped_backwards_are_refused(text: str) -> None:
    actions = tuple(parse(word) for word in text.split())
    schedule = complete(Schedule("mine", 1, 1, text.count("F"), (0,), (actions,)))
    with pytest.raises(ScheduleError, match="whole backwards only"):
        Executor(schedule, stages_of(schedule, 0), MemoryChannels({}, 0))


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
