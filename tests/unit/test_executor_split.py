"""Split and overlapped backwards, frozen stages, steps thrown away and runs in parts, with ranks as threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.pipeline_cases import (
    BOUNDARY,
    TIMEOUT_S,
    H,
    MemoryChannels,
    batches,
    one_process,
    run_threads,
    stages_of,
    train,
)
from trilith.kernels import ops
from trilith.kernels.weight_queue import WeightQueue
from trilith.monitor.activations import ActivationMeter
from trilith.pipeline.action import Action, Kind, Schedule, parse
from trilith.pipeline.check import check
from trilith.pipeline.delayed import pipedream_2bw, segments
from trilith.pipeline.executor import Executor
from trilith.pipeline.passes import complete, freeze
from trilith.pipeline.schedules import SCHEDULES, make_schedule
from trilith.pipeline.simulate import peak_bytes
from trilith.pipeline.stage import NullParameters, PipelineStage
from trilith.pipeline.timeline import Record

SPLIT = ("zb_h1", "zb_h2", "zb_v", "v_half", "v_min", "dualpipe_v")


def ranks_of(name: str) -> tuple[int, ...]:
    return (2, 4) if SCHEDULES[name].stages_per_rank == 1 else (1, 2, 4)


CASES = [(name, p) for name in SPLIT for p in ranks_of(name)]


def stages_per_rank(name: str) -> int:
    return SCHEDULES[name].stages_per_rank or 1


@pytest.mark.parametrize(("name", "p"), CASES)
@pytest.mark.parametrize("extra", [0, 1, 4])
def test_split_schedules_equal_one_process_bit_for_bit(name: str, p: int, extra: int) -> None:
    m = SCHEDULES[name].min_microbatches(p) + extra
    result, gradients = train(complete(make_schedule(name, p, stages_per_rank(name), m)))
    losses, expected = one_process(m)
    assert [loss.item() for loss in result.losses] == [loss.item() for loss in losses]
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def written(*ranks: str, placement: tuple[int, ...], m: int) -> Schedule:
    actions = tuple(tuple(parse(word) for word in text.split()) for text in ranks)
    return Schedule("mine", len(ranks), len(placement), m, placement, actions)


def test_the_queue_is_drained_first_in_first_out_and_announced() -> None:
    schedule = complete(written("F0.0 F0.1 I0.0 I0.1 W0.0 W0.1", placement=(0,), m=2))
    stages = stages_of(schedule, 0)
    Executor(schedule, stages, MemoryChannels({}, 0)).run(batches(2), BOUNDARY)
    assert stages[0].parameters.calls == [
        *("forward 0", "forward 1", "backward 0", "backward 1", "weights 8", "final weights 8", "reduce")
    ]


def test_a_whole_backward_in_a_split_schedule_defers_nothing() -> None:
    schedule = complete(written("F0.0 F0.1 I0.0 W0.0 B0.1", placement=(0,), m=2))
    stages = stages_of(schedule, 0)
    Executor(schedule, stages, MemoryChannels({}, 0)).run(batches(2), BOUNDARY)
    assert stages[0].parameters.calls[-3:] == ["weights 8", "final 1", "reduce"]
    assert all(torch.equal(w.grad, e) for w, e in zip(stages[0].module.weights, one_process(2)[1], strict=True))


@pytest.mark.parametrize("name", ["1f1b", "zb_h1", "gpipe"])
@pytest.mark.parametrize("frozen", [{0}, {0, 1}, {1}, {1, 2}, {3}, {0, 3}])
def test_frozen_stages_have_no_weight_gradients_and_need_no_backward(name: str, frozen: set[int]) -> None:
    schedule = complete(freeze(make_schedule(name, 4, 1, 5), frozenset(frozen)))
    check(schedule)
    result, gradients = train(schedule)
    losses, expected = one_process(5)
    assert [loss.item() for loss in result.losses] == [loss.item() for loss in losses]
    for layer, (mine, theirs) in enumerate(zip(gradients, expected, strict=True)):
        assert (mine is None) if layer // 2 in frozen else torch.equal(mine, theirs)


def split_work(schedule: Schedule, validate: dict[int, Callable[[], bool]]) -> list[Any]:
    def work(rank: int, executor: Executor, stages: dict[int, PipelineStage]) -> Any:
        result = executor.run(batches(schedule.num_microbatches), BOUNDARY, validate=validate[rank])
        return result, {index: stage.module.weights for index, stage in stages.items()}

    return run_threads(schedule, work)


@pytest.mark.parametrize(("name", "p"), [*CASES, ("1f1b", 4), ("gpipe", 3), ("interleaved_1f1b", 2)])
@pytest.mark.parametrize("is_right", [True, False])
def test_a_step_that_is_thrown_away_begins_anew(name: str, p: int, is_right: bool) -> None:
    """The correction that `validate` makes is seen by all forwards: here it halves wrong weights."""
    v = 2 if name == "interleaved_1f1b" else stages_per_rank(name)
    if 8 % (p * v):
        p = 2
    m = SCHEDULES[name].min_microbatches(p) + 2
    schedule = complete(make_schedule(name, p, v, m), validate=True)
    asked: list[int] = []

    def work(rank: int, executor: Executor, stages: dict[int, PipelineStage]) -> Any:
        weights = [weight for stage in stages.values() for weight in stage.module.weights]

        def validate() -> bool:
            asked.append(rank)
            if not is_right:
                with torch.no_grad():
                    for weight in weights:
                        weight.mul_(0.5)
            return is_right

        if not is_right:
            with torch.no_grad():
                for weight in weights:
                    weight.mul_(2)
        for step in range(2):  # the channels are clean again: a second step works
            result = executor.run(batches(m), BOUNDARY, validate=validate if step == 0 else None)
        return result, {index: stage.module.weights for index, stage in stages.items()}

    results = run_threads(schedule, work)
    assert sorted(asked) == list(range(p))
    losses, expected = one_process(m)
    (last,) = [result for result, _ in results if result.losses]
    assert [loss.item() for loss in last.losses] == [loss.item() for loss in losses]
    weights = dict(sorted((index, ws) for _, by_stage in results for index, ws in by_stage.items()))
    gradients = [weight.grad for ws in weights.values() for weight in ws]
    assert len(gradients) == len(expected) and all(g is not None for g in gradients)
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, 2 * theirs, rtol=1e-12, atol=1e-12)


def test_a_weight_that_is_used_twice_has_the_bits_of_a_whole_backward() -> None:
    """In fp32, where (a + b) + c and a + (b + c) differ."""
    found = []
    for text in ("F0.0 F0.1 B0.0 B0.1", "F0.0 F0.1 I0.0 I0.1 W0.0 W0.1"):
        schedule = complete(written(text, placement=(0,), m=2))
        queue = WeightQueue() if "W" in text else None
        weight = torch.randn(H, H, generator=torch.Generator().manual_seed(3)).requires_grad_()

        def module(
            inputs: Any, batch: torch.Tensor, weight: torch.Tensor = weight, queue: WeightQueue | None = queue
        ) -> dict[str, torch.Tensor]:
            hidden = batch.float()
            for _ in range(3):
                hidden = torch.tanh(ops.linear(hidden, weight, queue=queue))
            return {"loss": hidden.sum()}

        stages = {0: PipelineStage(0, module, NullParameters(), True, True, queue)}
        Executor(schedule, stages, MemoryChannels({}, 0)).run(batches(2), BOUNDARY)
        found.append(weight.grad)
    assert torch.equal(*found)


def test_a_run_in_parts_equals_a_run(name: str = "zb_h1") -> None:
    schedule = complete(make_schedule(name, 2, 1, 6))

    def work(rank: int, executor: Executor, stages: dict[int, PipelineStage]) -> Any:
        executor.begin(batches(6), BOUNDARY)
        for stop in range(0, len(schedule.actions[rank]), 3):
            executor.advance(stop)
        executor.advance()
        done = sorted(executor.losses)
        assert done == (list(range(6)) if rank == 1 else [])
        return executor.end()

    _, last = run_threads(schedule, work)
    assert [loss.item() for loss in last.losses] == [loss.item() for loss in one_process(6)[0]]


def test_a_short_window_goes_round_for_a_long_span() -> None:
    """Twelve steps in a window of seven: losses and gradients are those of 36 microbatches, numbered through."""
    p, m, turn, num_steps = 2, 3, 3, 12
    schedule = complete(pipedream_2bw(p, m, 2 * turn + 1))
    cuts, data = segments(schedule, m), batches(m * num_steps)
    asked: dict[int, list[int]] = {rank: [] for rank in range(p)}

    class Stream:
        def __init__(self, rank: int) -> None:
            self.rank = rank

        def __getitem__(self, microbatch: int, /) -> torch.Tensor:
            asked[self.rank].append(microbatch)
            return data[microbatch]

    def work(rank: int, executor: Executor, stages: dict[int, PipelineStage]) -> Any:
        losses, place = {}, 0
        executor.begin(Stream(rank), BOUNDARY)
        for index in range(num_steps):
            executor.advance(cuts[place][rank])
            losses.update(executor.losses)
            if place == turn and num_steps - 1 - index > turn:
                executor.rewind(cuts[place - 1][rank], m, (place + 1) * m)
            else:
                place += 1
        executor.end()
        return losses, [weight.grad for stage in stages.values() for weight in stage.module.weights]

    first, last = run_threads(schedule, work)
    losses, expected = one_process(m * num_steps)
    assert first[0] == {} and [last[0][k].item() for k in range(m * num_steps)] == [loss.item() for loss in losses]
    assert asked == {rank: list(range(m * num_steps)) for rank in range(p)}
    assert all(torch.equal(a, b) for a, b in zip([*first[1], *last[1]], expected, strict=True))


def test_the_loss_scale_is_asked_for_when_its_backward_begins() -> None:
    schedule = complete(make_schedule("1f1b", 2, 1, 3))
    _, gradients = train(schedule, lambda microbatch: 8.0)
    assert all(torch.equal(a, 8 * b) for a, b in zip(gradients, one_process(3)[1], strict=True))


class Sampler(list[Record]):
    """A recorder that reads the meter after every action."""

    def __init__(self, meter: ActivationMeter) -> None:
        super().__init__()
        self.meter, self.live_bytes = meter, [0]

    def append(self, record: Record) -> None:
        super().append(record)
        self.live_bytes.append(self.meter.live_bytes)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb_h1", "zb_h2"])
def test_peak_activation_bytes_are_those_of_the_live_microbatches(name: str) -> None:
    """Measured size after F and after I of one (stage, microbatch), summed over what the schedule keeps alive."""
    p, m = 2, 7
    schedule = complete(make_schedule(name, p, 1, m))

    def sizes(stage: PipelineStage) -> tuple[int, int]:
        """Bytes kept after the forward and after the first half of the backward, of a stage by itself."""
        with ActivationMeter(stage.module.weights) as meter:
            if stage.queue is not None:
                stage.queue.tracker = meter.track
            inputs = {} if stage.is_first else {"hidden": batches(1)[0].requires_grad_()}
            (output,) = stage.module(inputs, batches(1)[0]).values()
            after_forward = meter.live_bytes
            output.backward(torch.ones_like(output))
            del output
            items = [] if stage.queue is None else stage.queue.take()
            after_input = meter.live_bytes
            del items
        for weight in stage.module.weights:
            weight.grad = None
        return after_forward, after_input

    def work(rank: int, executor: Executor, stages: dict[int, PipelineStage]) -> Any:
        stage = stages[rank]
        measured = sizes(stage)
        with ActivationMeter(stage.module.weights) as meter:
            if stage.queue is not None:
                stage.queue.tracker = meter.track
            records = Sampler(meter)
            executor.run(batches(m), BOUNDARY, recorder=records)
        assert meter.live_bytes == 0
        return measured, max(records.live_bytes)

    found = run_threads(schedule, work)
    after_forward, after_input = zip(*(sizes for sizes, _ in found), strict=True)
    assert all(bytes_ > 0 for bytes_ in after_forward)
    expected = peak_bytes(schedule, after_forward, after_input)
    assert [peak for _, peak in found] == list(expected)


def test_waiting_is_announced() -> None:
    """`on_wait` hears which message a rank begins to wait for."""
    schedule = complete(make_schedule("zb_h1", 2, 1, 3))
    heard: dict[int, list[str]] = {0: [], 1: []}

    def work(rank: int, executor: Executor, stages: dict[int, PipelineStage]) -> None:
        executor.on_wait = heard[rank].append
        executor.run(batches(3), BOUNDARY)

    run_threads(schedule, work)
    assert any("waiting for receive backward of stage 0" in text for text in heard[0])


def test_actions_are_bracketed() -> None:
    """`around` brackets every action with its description."""
    schedule = complete(make_schedule("zb_h1", 2, 1, 3))
    heard: dict[int, list[str]] = {0: [], 1: []}

    def work(rank: int, executor: Executor, stages: dict[int, PipelineStage]) -> None:
        @contextmanager
        def around(text: str) -> Iterator[None]:
            heard[rank].append(text)
            yield
            heard[rank].append("end")

        executor.around = around
        executor.run(batches(3), BOUNDARY)

    run_threads(schedule, work)
    for rank, texts in heard.items():
        assert texts[::2] == [action.describe() for action in schedule.actions[rank]] and set(texts[1::2]) == {"end"}


def test_every_split_kind_is_in_the_table() -> None:
    kinds = {part.kind for name, p in CASES for _, part in make_schedule(name, p, stages_per_rank(name), 8).parts()}
    assert {Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT} <= kinds
    assert any(action.kind is Kind.OVERLAPPED for row in make_schedule("dualpipe_v", 2, 2, 8).actions for action in row)
    assert Action(Kind.UPDATE, 0, 1) == parse("U0.1") and TIMEOUT_S > 0
