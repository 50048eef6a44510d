"""Recording one rank of a run: activations as stages compute them, gradients before clipping, weights after each step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from trilith import preflight
from trilith.models.batch import Microbatch
from trilith.models.decoder import vocabulary_shard
from trilith.models.decoder_declaration import HEAD
from trilith.models.stage import StageModel
from trilith.parity.recording import ACTIVATION, GRADIENT, GRADIENT_NORM, LOSS, WEIGHT, Key, Part, Recording
from trilith.process_groups import join_world, leave_world
from trilith.sharding import Box, Piece, ShardSpec, whole
from trilith.trainer import Place, Trainer


class Context(Protocol):
    """How a rank tells its launcher where it is."""

    def position(self, step: int | None = None, stage: int | None = None, phase: str | None = None) -> None:
        """Note step, stage and phase."""


def record_rank(
    *,
    rank: int,
    world_size: int,
    store_path: str | None,
    context: Context,
    config: dict[str, Any],
    directory: str,
    steps: int,
    leader: str | None,
) -> None:
    """The launcher's target: one rank of a run, recorded as in `record`. `config` is the resolved config as JSON."""
    plan = preflight.plan(config, world_size=world_size)
    torch.set_num_threads(plan.config.run.threads)
    context.position(phase="start")
    device = plan.config.run.device
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    here = join_world(rank, world_size, store_path, plan.config.parallel.timeout_s, device)
    trainer = Trainer(plan, Place(rank, world_size, here))
    context.position(stage=trainer.topology.coordinate("pp"), phase="parity")
    record(trainer, Path(directory), steps, None if leader is None else Path(leader), context)
    trainer.close()
    leave_world()


def record(
    trainer: Trainer, directory: Path, steps: int, leader: Path | None = None, context: Context | None = None
) -> None:
    """Train `steps` steps from the trainer's initial weights and write down this rank's part of every tensor.

    Every rank of the world must call it, with the same directory. `leader`: the recording of another run of as many
    steps, whose weights each step begins with.
    """
    recorder = _Recorder(trainer, directory)
    leading = None if leader is None else Recording(leader)
    recorder.weights(0)
    for step in range(1, steps + 1):
        if context is not None:
            context.position(step=step - 1)
        if leading is not None:
            _take_over(trainer, leading, step - 1)
        recorder.step(step)
    recorder.close()


def _take_over(trainer: Trainer, leading: Recording, step: int) -> None:
    """Give every local parameter the value that it had after `step` steps of the recorded run; padding is zero."""
    for index, stage in trainer.stages.items():
        for parameter in stage.local_parameters:
            flat = torch.zeros(parameter.numel, dtype=trainer.policy.master_dtype)
            for spec in parameter.specs:
                leading.fill(Key(WEIGHT, step, spec.name), spec, flat)
            trainer.model.assign(index, parameter.name, flat.view(parameter.shape))


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file, by its name there; `largest` is its largest finite magnitude."""

    file: str
    name: str
    largest: float


class _Recorder:
    """Writes one rank's files. What is recorded leaves memory at once; the index follows at the end."""

    def __init__(self, trainer: Trainer, directory: Path) -> None:
        self._trainer, self._directory, self._rank = trainer, directory, trainer.topology.rank
        self._parts: list[Part] = []
        self._lrs: list[float] = []
        self._now = 0
        self._stage_of = {
            spec.name: index
            for index, stage in trainer.stages.items()
            for parameter in stage.local_parameters
            for spec in parameter.specs
        }
        for index, stage in trainer.stages.items():
            stage.observer = partial(self._activation, index, stage)

    def step(self, number: int) -> None:
        """Train step `number`, counted from 1, and record it."""
        self._now, loss_scale = number, self._trainer.model.loss_scale
        accumulated = self._trainer.accumulate()
        self._trainer.model.finish()
        self._gradients(loss_scale)
        result = self._trainer.update(accumulated)
        self._lrs.append(result.lr)
        assert result.grad_norm is not None, "a synchronous step has a norm"
        self._scalars({LOSS: result.loss, GRADIENT_NORM: result.grad_norm})
        self.weights(number)

    def weights(self, step: int) -> None:
        """Record the weights with which this rank computes after `step` steps; all ranks must."""
        with self._trainer.model.gathered():
            for index, stage in self._trainer.stages.items():
                named = dict(stage.named_parameters(remove_duplicate=False))
                tensors = {p.name: named[p.name].detach().reshape(-1) for p in stage.local_parameters}
                stored = self._store(f"weights-stage{index}", step, tensors)
                for parameter in stage.local_parameters:
                    for spec in parameter.specs:
                        self._note(Key(WEIGHT, step, spec.name), index, None, stored[parameter.name], spec)

    def close(self) -> None:
        """Stop observing and write the index."""
        for stage in self._trainer.stages.values():
            stage.observer = None
        index = {
            "rank": self._rank,
            "lrs": self._lrs,
            "data": self._trainer.feed.train_data.fingerprint,
            "parts": [part.to_json() for part in self._parts],
        }
        (self._directory / f"rank-{self._rank:05d}.json").write_text(json.dumps(index))

    def _activation(self, index: int, stage: StageModel, unit: str, output: Tensor, batch: Microbatch) -> None:
        """The observer of stage `index`: `unit`'s output for one microbatch."""
        config = self._trainer.config
        size, dp = config.train_micro_batch_size_per_gpu, self._trainer.topology.data_size
        samples = [int(sample) for sample in batch.sample_ids]
        microbatch = (samples[0] - (self._now - 1) * config.train_batch_size) // (size * dp)
        stored = self._store(f"{unit}-microbatch{microbatch}", self._now, {unit: output.detach().reshape(-1)})
        for place, sample in enumerate(samples):
            spec = activation_spec(stage, unit, tuple(output.shape), batch, place)
            self._note(Key(ACTIVATION, self._now, unit, sample), index, microbatch, stored[unit], spec)

    def _gradients(self, loss_scale: float) -> None:
        entries = self._trainer.model.gradient_entries()
        names = {id(tensor): str(number) for number, (_, _, tensor) in enumerate(entries)}
        tensors = {names[id(tensor)]: tensor / loss_scale for _, _, tensor in entries}
        stored = self._store("gradients", self._now, tensors)
        for _, spec, tensor in entries:
            key = Key(GRADIENT, self._now, spec.name)
            self._note(key, self._stage_of[spec.name], None, stored[names[id(tensor)]], spec)

    def _scalars(self, values: Mapping[str, float]) -> None:
        """What every rank reports of a step."""
        tensors = {name: torch.tensor([value], dtype=torch.float64) for name, value in values.items()}
        stored = self._store("scalars", self._now, tensors)
        for name in values:
            spec = ShardSpec(name, (), (Piece(whole(()), 0, ()),), name)
            self._note(Key(name, self._now, name), min(self._trainer.stages), None, stored[name], spec)

    def _store(self, what: str, step: int, tensors: Mapping[str, Tensor]) -> dict[str, _Stored]:
        """Write 1-D tensors to a new file of this rank."""
        file = f"step{step}-{what}-rank{self._rank:05d}.safetensors"
        assert not (self._directory / file).exists(), file
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, self._directory / file)
        return {name: _Stored(file, name, _largest(tensor)) for name, tensor in tensors.items()}

    def _note(self, key: Key, stage: int, microbatch: int | None, stored: _Stored, spec: ShardSpec) -> None:
        if spec.pieces:
            self._parts.append(Part(key, self._rank, stage, microbatch, stored.file, stored.name, stored.largest, spec))


def activation_spec(stage: StageModel, unit: str, shape: Sequence[int], batch: Microbatch, place: int) -> ShardSpec:
    """Which positions and features of sample number `place` of the microbatch a unit's output of `shape` holds here.

    The canonical tensor is (S, H), for the head (S, V); its local storage is the flattened output.
    """
    placement, model, length = stage.settings.placement, stage.settings.model, batch.positions.shape[0]
    if unit == HEAD:
        shard = vocabulary_shard(model, placement.group)
        positions, columns, width = batch.positions, (shard.first, shard.end), model.vocab_size
    else:
        positions, columns = batch.positions[placement.region_slice(length)], (0, model.hidden_size)
        width = model.hidden_size
    rows, row = shape[1:]
    assert rows == positions.shape[0], (unit, shape, positions.shape)
    pieces = []
    for start, stop, at in _runs(positions.tolist()):
        if columns[0] < columns[1]:
            box = Box((start, columns[0]), (stop, columns[1]))
            pieces.append(Piece(box, (place * rows + at) * row, (row, 1)))
    return ShardSpec(unit, (model.sequence_length, width), tuple(pieces), ACTIVATION)


def _runs(positions: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first position, end, place of the first in `positions`) of every run of consecutive positions."""
    starts = [i for i, at in enumerate(positions) if i == 0 or at != positions[i - 1] + 1]
    stops = [*starts[1:], len(positions)]
    return [(positions[a], positions[a] + b - a, a) for a, b in zip(starts, stops, strict=True)]


def _largest(tensor: Tensor) -> float:
    magnitude = tensor.abs()
    return float(magnitude.masked_fill(~magnitude.isfinite(), 0.0).max()) if tensor.numel() else 0.0
