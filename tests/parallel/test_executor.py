"""The executor over real ranks and channels, in float64, against the same layers in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.harness import assert_close_named, run_ranks
from trilith.errors import ScheduleError
from trilith.pipeline.action import Schedule
from trilith.pipeline.executor import Executor
from trilith.pipeline.passes import complete
from trilith.pipeline.schedules import forward_only, make_schedule
from trilith.pipeline.stage import NullParameters, PipelineStage
from trilith.pipeline.step import Recorder
from trilith.pipeline.transport import GroupChannels
from trilith.process_groups import build_topology
from trilith.topology import Degrees, Topology

B, H, LAYERS = 4, 6, 8
# Activations, a tensor that passes every stage unchanged and is read by the last, and integers without gradient.
BOUNDARY = {"hidden": ((B, H), torch.float64), "skip": ((B, H), torch.float64), "ids": ((B,), torch.int64)}
CASES = tuple(
    (name, v, m)
    for name, v in (("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 1), ("interleaved_1f1b", 2))
    for m in (1, 3, 4, 5)
)


class Stage(torch.nn.Module):
    """The share of `LAYERS` layers that stage `index` of `num_stages` holds; a loss at the end."""

    def __init__(self, index: int, num_stages: int) -> None:
        super().__init__()
        size = LAYERS // num_stages
        self.numbers = range(index * size, (index + 1) * size)
        self.is_last = index == num_stages - 1
        self.layers = torch.nn.ModuleList()
        for number in self.numbers:
            torch.manual_seed(number)
            self.layers.append(torch.nn.Linear(H, H, dtype=torch.float64))

    def forward(self, inputs: dict[str, torch.Tensor], batch: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Any]:
        tokens, ids = batch
        if 0 in self.numbers:
            hidden = skip = tokens * self.layers[0].bias
        else:
            hidden, skip, ids = inputs["hidden"], inputs["skip"], inputs["ids"]
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        if self.is_last:
            return {"loss": ((hidden - skip).square() * ids[:, None]).mean()}
        return {"hidden": hidden, "skip": skip, "ids": ids}

    def gradients(self) -> dict[str, torch.Tensor]:
        """By the layer's number in the whole model."""
        found = {}
        for number, layer in zip(self.numbers, self.layers, strict=True):
            for name, parameter in layer.named_parameters():
                assert parameter.grad is not None
                found[f"layers.{number}.{name}"] = parameter.grad
        return found


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [(torch.randn(B, H, generator=generator, dtype=torch.float64), torch.arange(B) + m) for m in range(count)]


def make_stages(schedule: Schedule, rank: int, device: torch.device | None = None) -> dict[int, PipelineStage]:
    count = schedule.num_stages
    return {
        index: PipelineStage(index, Stage(index, count).to(device), NullParameters(), index == 0, index == count - 1)
        for index in schedule.stages_of(rank)
    }


def make_topology(world_size: int, schedules: list[Schedule]) -> Topology:
    channels = {pair for schedule in schedules for pair in schedule.channels()}
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_initialized() else torch.device("cpu")
    return build_topology(Degrees(pipeline=world_size), device, 30.0, channels=channels)


def moved(batch: tuple[torch.Tensor, torch.Tensor], device: torch.device) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.to(device) for tensor in batch)


def train_cases(rank: int, world_size: int, cases: tuple[tuple[str, int, int], ...]) -> list[tuple[list[float], dict]]:
    """(losses, gradients) of this rank for every case, all over the same channels."""
    schedules = [complete(make_schedule(name, world_size, v, m)) for name, v, m in cases]
    topology = make_topology(world_size, schedules)
    results = []
    for schedule in schedules:
        stages = make_stages(schedule, rank, topology.device)
        data = [moved(batch, topology.device) for batch in batches(schedule.num_microbatches)]
        result = Executor(schedule, stages, GroupChannels(topology)).run(data, BOUNDARY)
        assert all(loss.dtype == torch.float64 for loss in result.losses)
        gradients = {name: g for stage in stages.values() for name, g in stage.module.gradients().items()}
        results.append(([loss.item() for loss in result.losses], gradients))
    return results


def one_process(count: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    model, losses = Stage(0, 1), []
    for batch in batches(count):
        loss = model({}, batch)["loss"]
        loss.backward()
        losses.append(loss.item())
    return losses, model.gradients()


def compare(world_size: int, cases: tuple[tuple[str, int, int], ...], device: str, tolerance: float) -> None:
    by_rank = run_ranks(world_size, train_cases, cases, timeout_s=120, device=device)
    seen: dict[tuple[int, int], tuple[list[float], dict]] = {}
    for index, (name, v, m) in enumerate(cases):
        losses = by_rank[world_size - 1][index][0]
        gradients = {key: g for results in by_rank for key, g in results[index][1].items()}
        expected_losses, expected = one_process(m)
        assert losses == pytest.approx(expected_losses, rel=tolerance), (name, v, m)
        assert all(results[index][0] == [] for results in by_rank[:-1])
        assert gradients.keys() == expected.keys()
        pairs = {f"{name} v={v} m={m}: {key}": (gradients[key], expected[key]) for key in expected}
        assert_close_named(pairs, rtol=tolerance, atol=tolerance)
        first = seen.setdefault((v, m), (losses, gradients))
        assert losses == first[0], "the loss of one partition is bit-equal in every schedule"
        assert all(torch.equal(gradients[key], first[1][key]) for key in expected)


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_schedule_equals_one_process(world_size: int) -> None:
    compare(world_size, CASES, "cpu", 1e-12)


@pytest.mark.gpu
def test_every_schedule_equals_one_process_on_a_gpu() -> None:
    compare(2, CASES, "cuda", 1e-10)


def evaluate(rank: int, world_size: int) -> list[float]:
    """Train on three microbatches, then evaluate seven of another size on the same stages, then train again."""
    training = complete(make_schedule("interleaved_1f1b", world_size, 2, 3))
    evaluation = complete(forward_only(training.placement, 7))
    topology = make_topology(world_size, [training, evaluation])
    stages, channels = make_stages(training, rank), GroupChannels(topology)
    trainer, evaluator = Executor(training, stages, channels), Executor(evaluation, stages, channels)
    trainer.run(batches(3), BOUNDARY)
    small = {name: ((2, *shape[1:]), dtype) for name, (shape, dtype) in BOUNDARY.items()}
    halves = [(tokens[:2], ids[:2]) for tokens, ids in batches(7)]
    outputs = evaluator.run(halves, small).outputs
    records: Recorder = []
    Executor(training, stages, channels).run(batches(3), BOUNDARY, recorder=records)
    assert len(records) == 2 * (3 + 3 + 1)
    return [output["loss"].item() for output in outputs]


def test_evaluation_has_its_own_shapes() -> None:
    found = run_ranks(2, evaluate)
    model = Stage(0, 1)
    assert found[0] == []
    assert found[1] == pytest.approx([model({}, (t[:2], ids[:2]))["loss"].item() for t, ids in batches(7)], rel=1e-12)


def fail_on_rank_2(rank: int, world_size: int) -> None:
    schedule = complete(make_schedule("1f1b", world_size, 1, 4))
    topology = make_topology(world_size, [schedule])
    stages = make_stages(schedule, rank)
    if rank == 2:
        module, seen = stages[2].module, []

        def broken(inputs: dict[str, torch.Tensor], batch: Any) -> dict[str, torch.Tensor]:
            seen.append(batch)
            if len(seen) == 3:
                raise ScheduleError("out of luck")
            return module(inputs, batch)

        stages[2] = PipelineStage(2, broken, NullParameters(), False, False)
    Executor(schedule, stages, GroupChannels(topology)).run(batches(4), BOUNDARY)


def test_a_failing_rank_names_its_action() -> None:
    with pytest.raises(AssertionError) as caught:
        run_ranks(4, fail_on_rank_2, timeout_s=30)
    assert "rank 2 of 4 failed first" in str(caught.value)
    assert "on pipeline rank 2, in forward of stage 2, microbatch 2 (F2.2)" in str(caught.value)
