"""The engine of a PipelineModel in one process: what it refuses, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trilith
from trilith.errors import CheckpointError, ConfigError, TrilithError
from trilith.models.pipeline_model import LayerSpec, PipelineModel
from trilith.pipeline_engine import feed
from trilith.pipeline_engine.engine import PipelineEngine

ZB = {"schedule": "zb_v", "virtual_stages": 2}
TEXT = "rank 0: F0.0 F1.0 F0.1 F1.1 I1.0 W1.0 I0.0 W0.0 I1.1 W1.1 I0.1 W0.1"


def mean(output: Tensor, labels: Tensor) -> Tensor:
    return (output - labels).square().mean()


def config(**sections: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "data_types": {"param_dtype": "fp64"},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "run": {"device": "cpu"},
        **sections,
    }


def layers() -> list[Any]:
    return [nn.Linear(3, 4), torch.tanh, LayerSpec(nn.BatchNorm1d, 4), nn.Linear(4, 3)]


def engine_of(given: list[Any] | None = None, **sections: Any) -> PipelineEngine:
    return trilith.initialize(PipelineModel(given or layers(), mean), config(**sections))


def stream(count: int, rows: int = 2) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        yield torch.randn(rows, 3, generator=generator).double(), torch.randn(rows, 3, generator=generator).double()


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"parallel": {"tensor": 2}}, "parallel"),
        ({"pipeline": {"schedule": "auto"}}, r"pipeline.schedule = 'auto': costs are measured only"),
        ({"pipeline": {"partition": "auto"}}, r"pipeline.partition = 'auto': costs are measured only"),
        ({"activation_checkpointing": {"recompute": "selective"}}, "attention core"),
        ({"pipeline": {"memory_limit_bytes": 1000}}, r"memory_limit_bytes = 1000: .*not predicted"),
        ({"pipeline": {"schedule": "zb_v", "virtual_stages": 3}}, r"pipeline.virtual_stages = 3: .*2 stages per rank"),
        ({"pipeline": {"schedule": "zb_v"}, "parallel": {"pipeline": 2}}, "world size"),
    ],
)
def test_what_the_config_cannot_ask_for(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        engine_of(**sections)


def test_what_the_model_cannot_ask_for() -> None:
    with pytest.raises(TrilithError, match="1 layers for 2 stages"):
        engine_of([nn.Linear(3, 3)], pipeline=ZB)
    with pytest.raises(TrilithError, match="nothing to train"):
        engine_of([nn.Linear(3, 3).requires_grad_(False)])
    with pytest.raises(TrilithError, match=r"weight is on the meta device and has no values"):
        engine_of([nn.Linear(3, 3), nn.Linear(3, 3, device="meta")])
    model = PipelineModel(layers(), mean)
    with pytest.raises(TrilithError, match=r"optimizer = SGD: .*config section"):
        trilith.initialize(model, config(), torch.optim.SGD(layers()[0].parameters(), 0.1))  # type: ignore[call-overload]
    with pytest.raises(TrilithError, match="lr_scheduler = float"):
        trilith.initialize(model, config(), lr_scheduler=0.1)  # type: ignore[call-overload]


@pytest.mark.parametrize("pipeline", [{}, ZB], ids=["one stage", "two stages"])
def test_data_that_does_not_fit_is_named(pipeline: dict[str, Any]) -> None:
    engine = engine_of(pipeline=pipeline)
    with pytest.raises(TrilithError, match="data_iter: ended"):
        engine.train_batch(stream(1))
    with pytest.raises(TrilithError, match="data_iter = None"):
        engine.train_batch()
    with pytest.raises(TrilithError, match=r"yielded a Tensor; a microbatch is \(inputs, labels\)"):
        engine.train_batch([torch.zeros(2, 3)] * 2)
    with pytest.raises(TrilithError, match="yielded a tuple of 3"):
        engine.train_batch([(torch.zeros(2, 3),) * 3] * 2)
    with pytest.raises(TrilithError, match=r"microbatch 1 of the step has inputs .*drop_last"):
        engine.train_batch([*stream(1), *stream(1, rows=3)])
    assert engine.global_steps == 0
    engine.train_batch(stream(2))  # nothing of all that is left behind
    assert engine.global_steps == 1
    engine.close()
    with pytest.raises(TrilithError, match="is closed"):
        engine.train_batch(stream(2))


def test_evaluation_counts_its_own_microbatches() -> None:
    """From a list as from an iterator; in evaluation mode, without a step."""
    engine = engine_of(pipeline=ZB)
    engine.train_batch(list(stream(2)))
    batches, state = list(stream(3)), {name: t.clone() for name, t in engine.module.state_dict().items()}
    found = engine.eval_batch(batches, num_microbatches=3)
    with torch.no_grad():
        outputs = [(engine.module["2"](torch.tanh(engine.module["0"](x))), y) for x, y in batches]
        losses = [float(mean(engine.module["3"](hidden), y)) for hidden, y in outputs]
    assert not engine.module["2"].training and found == pytest.approx(sum(losses) / 3, rel=1e-14)
    assert (
        all(torch.equal(state[name], t) for name, t in engine.module.state_dict().items()) and engine.global_steps == 1
    )


def test_schedules_come_from_files_too(tmp_path: Path) -> None:
    path = tmp_path / "schedule.txt"
    path.write_text(f"microbatches: 2\nplacement: 0 0\n{TEXT}\n")
    torch.manual_seed(0)
    from_file = engine_of(pipeline={"schedule": "file", "schedule_file": str(path)})
    torch.manual_seed(0)
    named = engine_of(pipeline=ZB)
    for _ in range(2):
        assert from_file.train_batch(stream(2)) == named.train_batch(stream(2))
    path.write_text(f"microbatches: 2\nplacement: 0 0\n{TEXT.replace(' W0.1', '')}\n")
    with pytest.raises(ConfigError, match=r"pipeline.schedule_file .*Mend the file"):
        engine_of(pipeline={"schedule": "file", "schedule_file": str(path)})
    path.write_text(f"microbatches: 2\nplacement: 0 0\n{TEXT}\n")
    with pytest.raises(ConfigError, match="gradient_accumulation_steps = 3: must be as in"):
        engine_of(pipeline={"schedule": "file", "schedule_file": str(path)}, gradient_accumulation_steps=3)
    with pytest.raises(ConfigError, match=r"pipeline.virtual_stages = 1: must be as in .*, which has 2"):
        engine_of(pipeline={"schedule": "file", "schedule_file": str(path), "virtual_stages": 1})


def test_finding_shapes_changes_nothing() -> None:
    """The chain of forwards at the first step of a shape leaves generators and running statistics as they were."""
    found = []
    for pipeline in ({}, ZB):
        torch.manual_seed(0)
        engine = engine_of([*layers()[:3], nn.Dropout(0.5), layers()[3]], pipeline=pipeline)
        torch.manual_seed(1)
        losses = [engine.train_batch(stream(2)), engine.train_batch(stream(2, rows=3))]
        norm = dict(engine.module.named_buffers())
        found.append((losses, int(norm["2.num_batches_tracked"]), torch.rand(1)))
        engine.close()
    assert found[0] == found[1] and found[0][1] == 4


def test_linears_wait_for_their_weight_gradients_and_a_model_serves_twice() -> None:
    model = PipelineModel([nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)), nn.Linear(4, 3)], mean)
    seen: list[int] = []
    for _ in range(2):
        engine = trilith.initialize(model, config(pipeline=ZB))
        queues = {linear.queue for linear in engine._deferred}
        assert len(engine._deferred) == 3 and len(queues) == 2 and None not in queues
        seen.clear()
        for queue in queues:
            assert queue is not None
            queue.tracker = lambda tensor: seen.append(tensor.numel())
        engine.train_batch(stream(2))
        assert len(seen) == 2 * 3 * 2  # two tensors of three linears for two microbatches
        engine.close()
    assert not trilith.initialize(model, config())._deferred


def test_the_module_outlives_the_engine() -> None:
    engine = engine_of(pipeline=ZB)
    engine.train_batch(stream(2))
    module = engine.module
    engine.close()
    engine.close()
    x = torch.ones(2, 3, dtype=torch.float64)
    module["3"](torch.tanh(module["0"](x))).sum().backward()
    assert all(module[name].weight.grad is not None for name in ("0", "3"))


def test_the_engine_unpacks_as_deepspeeds_does() -> None:
    engine, optimizer, loader, lr = trilith.initialize(PipelineModel(layers(), mean), config())
    assert optimizer is engine.optimizer and loader is None and lr(0) == engine.lr == 0.1
    plain, optimizer, _, _ = trilith.initialize(nn.Linear(3, 3), config())
    assert optimizer is plain.sharded.optimizer
    scheduled = trilith.initialize(PipelineModel(layers(), mean), config(), lr_scheduler=lambda step: 0.5 / (step + 1))
    scheduled.train_batch(stream(2))
    assert scheduled.lr == 0.25


def test_frozen_layers_stay_and_train_nothing() -> None:
    frozen = nn.Linear(3, 4).requires_grad_(False)
    before = frozen.weight.detach().clone().double()
    engine = engine_of([frozen, *layers()[1:]], pipeline={**ZB, "partition": [1, 3]})
    assert engine.layout.schedule.frozen == {0}
    engine.train_batch(stream(2))
    assert torch.equal(engine.module.state_dict()["0.weight"], before) and "0.weight" not in {
        u.layout.name for u in engine.sharded.units
    }


def test_checkpoints_of_other_models_are_refused(tmp_path: Path) -> None:
    engine = engine_of()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        engine.load_checkpoint(tmp_path)
    engine.train_batch(stream(2))
    engine.save_checkpoint(tmp_path, {"epoch": 3})
    directory, client = engine.load_checkpoint(tmp_path, step=1)
    assert directory.parent == tmp_path and client == {"epoch": 3}
    with pytest.raises(CheckpointError, match=r"parameter 2.bias has shape \[4\] in the checkpoint, \[3\] in this"):
        engine_of([*layers()[:2], *layers()[3:]]).load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="step-00000002"):
        engine.load_checkpoint(tmp_path, step=2)


# ---- spans of steps ---------------------------------------------------------------------------------------------------

ASYNCHRONOUS = {"schedule": "pipedream_2bw"}


def test_shapes_are_fixed_inside_a_span() -> None:
    engine = engine_of(pipeline=ASYNCHRONOUS)
    with pytest.raises(TrilithError, match=r"step 2: .*steps of one shape until the pipeline is drained"):
        list(engine.train_batches([*stream(2), *stream(2, rows=3)], 2))
    with pytest.raises(TrilithError, match="go on with a new engine"):
        engine.train_batch(stream(2))


@pytest.mark.parametrize("overlap", [ASYNCHRONOUS, {"optimizer_sync": "postvalidate"}])
def test_a_span_with_overlap_must_be_exhausted(overlap: dict[str, Any], tmp_path: Path) -> None:
    engine = engine_of(pipeline=overlap)
    losses = engine.train_batches(stream(6), 3)
    next(losses)
    calls: list[Callable[[], object]] = [
        lambda: engine.train_batch(stream(2)),
        lambda: engine.eval_batch(stream(2)),
        lambda: engine.save_checkpoint(tmp_path),
        lambda: engine.load_checkpoint(tmp_path),
    ]
    for call in calls:
        with pytest.raises(TrilithError, match=r"was left before its end. Take all of its losses first"):
            call()
    assert len(list(losses)) == 2
    engine.train_batch(stream(2))
    for _ in engine.train_batches(stream(4), 2):
        break
    with pytest.raises(TrilithError, match="go on with a new engine, from a checkpoint"):
        engine.train_batch(stream(2))
    fresh = engine_of(pipeline=overlap)
    with pytest.raises(TrilithError, match="data_iter: ended"):
        fresh.train_batch(stream(1))
    fresh.train_batch(stream(2))  # nothing was under way


def test_a_span_without_overlap_may_be_closed() -> None:
    engine = engine_of()
    losses = engine.train_batches(stream(6), 3)
    next(losses)
    with pytest.raises(TrilithError, match="or close it"):
        engine.eval_batch(stream(2))
    losses.close()  # type: ignore[attr-defined]
    engine.train_batch(stream(2))
    assert engine.global_steps == 2


def test_kinds_of_input_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers among the inputs that differ in every step must not fill the memory; what was forgotten is found anew."""
    monkeypatch.setattr(feed, "KINDS_KEPT", 2)
    engine = engine_of([lambda pair: pair[0] + 0.0 * pair[1], *layers()], pipeline=ZB)
    agreement = engine._running.feed._agreement
    (x, y), *_ = stream(1)
    first = engine.eval_batch([((x, 0), y)] * 2)
    for number, next_number in ((1, 2), (1, 2), (2, 3), (0, 4), (2, 4), (1, 5)):
        assert engine.eval_batch([((x, number), y)] * 2) == first
        assert agreement._next_number == next_number
        assert set(agreement._known) == set(agreement._numbers.values()) == {next_number - 2, next_number - 1}


def test_an_asynchronous_schedule_is_said_and_its_rate_follows_the_step(caplog: pytest.LogCaptureFixture) -> None:
    sections = {"pipeline": {"schedule": "pipedream"}, "gradient_clipping": 0.0}
    scheduled = trilith.initialize(
        PipelineModel(layers(), mean), config(**sections), lr_scheduler=lambda step: 0.5 / (step + 1)
    )
    assert any("pipedream changes the mathematics" in record.message for record in caplog.records)
    list(scheduled.train_batches(stream(4), 2))
    assert scheduled.sharded.optimizer.num_steps == 4 and scheduled.lr == 0.5 / 3


def test_a_weight_used_twice_has_the_bits_of_a_whole_backward() -> None:
    """The gradients of both uses are summed before those of other microbatches are added to them."""
    found = []
    for schedule in ("1f1b", "zb_h1"):
        torch.manual_seed(0)
        tied: list[Any] = [nn.Linear(5, 5), torch.tanh, nn.Linear(5, 5), nn.Sequential(nn.Linear(5, 5), nn.Tanh())]
        model = PipelineModel([nn.Linear(3, 5), *tied, nn.Linear(5, 3)], mean, ties=[("1.weight", "3.weight")])
        sections = {"pipeline": {"schedule": schedule}, "data_types": {"param_dtype": "fp32"}}
        engine = trilith.initialize(model, config(**sections, gradient_accumulation_steps=4))
        batches = [(x.float(), y.float()) for x, y in stream(12)]
        losses = list(engine.train_batches(batches, 3))
        assert len(engine._deferred) == (3 if schedule == "zb_h1" else 0)
        found.append((losses, {name: t.clone() for name, t in engine.module.state_dict().items()}))
        engine.close()
    assert found[0][0] == found[1][0] and all(torch.equal(t, found[1][1][name]) for name, t in found[0][1].items())
