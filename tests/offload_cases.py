"""Runs with and without offload, and what of them must be equal: every bit of losses, norms, weights and states."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cells import Cell, config
from tests.harness import run_ranks
from trilith import preflight
from trilith.monitor.activations import ActivationMeter
from trilith.runner import generate
from trilith.trainer import Place, Trainer
from trilith.zero.auto_placement import device_bytes
from trilith.zero.placement import Placement

STEPS, LOSS_SCALED_STEPS = 8, 20  # overflows must come at the start, and again in the middle
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 1e-2, "weight_decay": 0.1},
    "SGD": {"lr": 1e-2, "momentum": 0.9},
    "Lion": {"lr": 1e-3, "weight_decay": 0.1},
    "Adagrad": {"lr": 1e-2},
    "LAMB": {"lr": 1e-2, "weight_decay": 0.1},
    "Muon": {"lr": 1e-2, "weight_decay": 0.1},
}
DTYPES: dict[str, dict[str, Any]] = {
    "fp64": {"data_types": {"param_dtype": "fp64"}},
    "fp32": {"data_types": {"param_dtype": "fp32"}},
    "bf16": {"data_types": {"param_dtype": "bf16"}, "bf16": {"enabled": True, "check_grad_overflow": True}},
    # The scale begins too high, and is tried twice as high after every fourth step.
    "fp16": {
        "data_types": {"param_dtype": "fp16"},
        "fp16": {"enabled": True, "initial_scale_power": 18, "loss_scale_window": 4, "hysteresis": 1},
    },
}


def content(cell: Cell, dtype: str = "fp32", optimizer: str = "AdamW", steps: int = 0) -> dict[str, Any]:
    """The config of a cell's run without offload: a GPT of at least three layers, clipped, evaluated.

    `steps`: as many, not as many as the dtype needs.
    """
    steps = steps or (LOSS_SCALED_STEPS if dtype == "fp16" else STEPS)
    found = config(cell)
    del found["data_types"]
    found |= copy.deepcopy(DTYPES[dtype]) | {"optimizer": {"type": optimizer, "params": OPTIMIZERS[optimizer]}}
    found["model"]["num_layers"] = max(3, cell.pipeline * cell.virtual_stages)
    found["training"] |= {"steps": steps, "eval_batches": 1, "eval_batch_size": 2 * cell.data}
    found["gradient_clipping"] = 0.3
    return found


def offloaded(source: dict[str, Any], optimizer: str, param: str, path: str, **keys: Any) -> dict[str, Any]:
    """The same run with offload. `keys` are those of `offload_optimizer`; with `param_` before them, of `offload_param`;
    `checks`, `room`: that of `limited`."""
    found = copy.deepcopy(source)
    room, checks = keys.pop("room", 0.5), keys.pop("checks", False)
    param_keys = {key.removeprefix("param_"): keys.pop(key) for key in list(keys) if key.startswith("param_")}
    paths = {"nvme_path": path}
    found["zero_optimization"] |= {
        "offload_optimizer": {"device": optimizer, **(paths if optimizer == "nvme" else {}), **keys},
        "offload_param": {"device": param, **(paths if param == "nvme" else {}), "max_in_cpu": 0, **param_keys},
        "enable_sanity_checks": checks,
    }
    return limited(found, room) if "auto" in (optimizer, param) else found


def limited(source: dict[str, Any], room: float) -> dict[str, Any]:
    """The same run with a memory limit that holds what must be on the device, and about `room` of what need not."""
    found = copy.deepcopy(source)
    found["pipeline"]["memory_limit_bytes"] = 1 << 40
    memory = preflight.plan(found).memory
    most = max(rank.total_bytes for rank in memory)
    # A quarter more of the activations than predicted; the rest is padding of flat buffers, large beside so small ones.
    spare = max(rank.activation_bytes for rank in memory) // 4 + int(0.1 * max(rank.state_bytes for rank in memory))
    found["pipeline"]["memory_limit_bytes"] = most + spare + int(room * max(rank.host_bytes for rank in memory))
    return found


@dataclass
class Trace:
    """What a run did: (loss, norm, skipped, scale) of its steps, evaluations and a sample; its weights and states in the
    end; and bytes, places and log lines of its first rank's offload."""

    steps: list[tuple[Any, ...]] = field(default_factory=list)
    others: list[Any] = field(default_factory=list)
    states: dict[Any, Tensor] = field(default_factory=dict)
    placements: list[tuple[Placement, ...]] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    moved: list[dict[str, int]] = field(default_factory=list)
    peak_bytes: int = 0
    log: list[str] = field(default_factory=list)

    def differences(self, other: Trace) -> list[str]:
        """What is not equal to the bit."""
        found = [
            f"step {i + 1}: {a}, {b}"
            for i, (a, b) in enumerate(zip(self.steps, other.steps, strict=True))
            if repr(a) != repr(b)
        ]
        if repr(self.others) != repr(other.others):
            found.append(f"evaluation or sample: {self.others}, {other.others}")
        if self.states.keys() != other.states.keys():
            return [*found, f"states {sorted(map(str, self.states.keys() ^ other.states.keys()))}"]
        return found + [f"{key}" for key, t in self.states.items() if not torch.equal(t, other.states[key])]


class _Lines(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())


def states_of(trainer: Trainer) -> dict[Any, Tensor]:
    """Everything a step changes on this rank: the modules' weights, master weights and states."""
    model = trainer.model
    found: dict[Any, Tensor] = {}
    with model.gathered():
        for index, stage in trainer.stages.items():
            found |= {f"stage {index}: {name}": p.detach().clone() for name, p in stage.named_parameters()}
    for role, spec, tensor in model.state_entries():
        for number, piece in enumerate(spec.pieces):
            part = tensor.as_strided(piece.box.shape, piece.strides, tensor.storage_offset() + piece.offset)
            found[f"{spec.name} {role} {piece.box} {number}"] = part.clone()
    return found


def trace(trainer: Trainer, steps: int) -> Trace:
    """Train to step number `steps`; in the middle evaluate, and generate two tokens."""
    found, model = Trace(), trainer.model
    logger, handler = logging.getLogger("trilith.zero.auto_placement"), _Lines(found.log)
    logger.addHandler(handler)
    logger.setLevel("INFO")
    while trainer.state.step < steps:
        if trainer.state.step == steps - 1:
            meter = ActivationMeter(model.weight_buffers())
            with meter:
                records = list(trainer.train(1))
            found.peak_bytes = meter.peak_bytes + model.memory_bytes()["gather_window"]
        else:
            records = list(trainer.train(steps // 2 - trainer.state.step if _overlaps(trainer) else 1))
        for record in records:
            found.steps.append((record.loss, record.grad_norm, record.skipped, record.loss_scale, record.lr))
        found.placements.append(tuple(unit.placement for unit in model.units))
        found.moved.append(dict(vars(model.offload.moved)))
        if trainer.state.step == steps // 2:
            found.others += [trainer.evaluate().eval_loss, generate(trainer, [1, 2, 3], 2)]
    found.memory = model.memory_bytes()
    logger.removeHandler(handler)
    found.states = states_of(trainer)
    return found


def _overlaps(trainer: Trainer) -> bool:
    """Whether several steps must be trained in one go for their ends to overlap."""
    return (
        trainer.config.pipeline.optimizer_sync == "postvalidate"
        and trainer.state.step < trainer.config.training.steps // 2
    )


def trained(rank: int, world_size: int, source: dict[str, Any]) -> Trace:
    """One rank's whole run."""
    trainer = Trainer(preflight.plan(source, world_size=world_size), Place(rank, world_size))
    try:
        return trace(trainer, source["training"]["steps"])
    finally:
        trainer.close()


def compared(rank: int, world_size: int, plain: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """One rank's run of `plain`, and of the `others`, with what in them differs."""
    expected, found = trained(rank, world_size, plain), {}
    for name, source in others.items():
        one = trained(rank, world_size, source)
        found[name] = (one.differences(expected), one)
        one.states = {}
    expected.states = {}
    return {"plain": expected, **found}


def assert_same_bits(plain: dict[str, Any], others: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Run all, and fail where one of the `others` differs from `plain`. Returns each rank's traces by name."""
    num_ranks = preflight.plan(plain).world_size
    found = run_ranks(num_ranks, compared, plain, others, timeout_s=200)
    for rank, result in enumerate(found):
        for name in others:
            differences, one = result[name]
            assert not differences, (f"rank {rank}, {name}", differences[:5], one.placements[-1])
            result[name] = one
    return found


def kept_on_device(one: Trace) -> int:
    """Bytes on the device all the time."""
    return device_bytes(one.memory)


def left_in(directory: Path) -> list[Path]:
    """Files that something left."""
    return list(directory.iterdir())


def compared_on_the_way(rank: int, world_size: int, plain: dict[str, Any], source: dict[str, Any]) -> list[str]:
    """What differs between one rank's run of `plain` and that of `source`, whose weights are rounded on their way up, as
    from the page-locked memory of a machine with a GPU."""
    expected = trained(rank, world_size, plain)
    trainer = Trainer(preflight.plan(source, world_size=world_size), Place(rank, world_size))
    model = trainer.model
    for unit in model.units:
        unit.rounded = torch.full_like(unit.own_weight, torch.nan)
    model.optimizer.rebind(model.partitions())
    try:
        return trace(trainer, source["training"]["steps"]).differences(expected)
    finally:
        trainer.close()


def clipped_late(rank: int, world_size: int, source: dict[str, Any]) -> list[str]:
    """What differs where the update is queued before the norm is read, as on a GPU: by more than the factor's rounding."""
    expected = trained(rank, world_size, source)
    trainer = Trainer(preflight.plan(source, world_size=world_size), Place(rank, world_size))
    model = trainer.model
    model._clips_where_it_lies = lambda: model.optimizer.clips(model.offload.groups[0])  # type: ignore[method-assign]
    try:
        found = trace(trainer, source["training"]["steps"])
    finally:
        trainer.close()
    different = [
        f"step {i}: {ours} beside {theirs}"
        for i, (ours, theirs) in enumerate(zip(found.steps, expected.steps, strict=True))
        if ours[2:] != theirs[2:] or ours[:2] != pytest.approx(theirs[:2], rel=1e-12)
    ]
    return [
        *different,
        *(
            name
            for name, x in found.states.items()
            if not torch.allclose(x, expected.states[name], rtol=1e-9, atol=1e-12)
        ),
    ]
