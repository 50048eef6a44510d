"""Offload device "auto": the first steps run with everything in host memory and are measured; what fits then moves up.

After Fang et al. 2022 (Colossal-AI's Gemini, arXiv 2108.05818): what a step needs besides its states follows from the first
ones, and the rest of the device is theirs. Here the unit of placement is ZeRO's, and it does not change afterwards.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trilith import comm
from trilith.monitor.activations import ActivationMeter
from trilith.zero.flat import FlatUnit
from trilith.zero.placement import ON_DEVICE, Placement, Tier, UnitBytes, settle

if TYPE_CHECKING:
    from trilith.zero.sharded import ShardedModel

LOGGER = logging.getLogger(__name__)
MEASURED_STEPS = 2


class FirstSteps:
    """Measures the first steps of a model, then places its units."""

    def __init__(self, model: ShardedModel, zero: Any, limit_bytes: int) -> None:
        self._model, self._zero, self._limit_bytes = model, zero, limit_bytes
        self._meter: ActivationMeter | None = None
        self._left = MEASURED_STEPS
        self._peak_bytes = 0

    @classmethod
    def of(cls, config: Any, model: ShardedModel) -> FirstSteps | None:
        """For a model of a resolved config; None where nothing is placed automatically."""
        zero, limit_bytes = config.zero_optimization, config.pipeline.memory_limit_bytes
        if "auto" not in (zero.offload_optimizer.device, zero.offload_param.device):
            return None
        assert limit_bytes is not None, "a rule of the config"
        return cls(model, zero, limit_bytes)

    def begin(self) -> None:
        """A step begins, or begins anew."""
        if self._meter is None:
            self._meter = ActivationMeter(self._model.weight_buffers())
            self._meter.__enter__()
            if self._model.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self._model.device)

    def end(self) -> bool:
        """The step is over; tells whether it was the last to be measured, and its units are placed."""
        if self._meter is None:
            return False
        self._meter.__exit__(None, None, None)
        model, window = self._model, self._model.memory_bytes()["gather_window"]
        self._peak_bytes = max(self._peak_bytes, self._meter.peak_bytes + window)
        if model.device.type == "cuda":
            kept = device_bytes(model.memory_bytes())
            self._peak_bytes = max(self._peak_bytes, torch.cuda.max_memory_allocated(model.device) - kept)
        self._meter, self._left = None, self._left - 1
        if self._left:
            return False
        self._place()
        return True

    def _place(self) -> None:
        """Move up what the limit holds; all ranks that step the same units together decide alike."""
        model = self._model
        sizes = [_unit_bytes(unit, state) for unit, state in zip(model.units, model.optimizer.state, strict=True)]
        needed, sizes = self._agree(self._peak_bytes, device_bytes(model.memory_bytes()), sizes)
        peak = needed[0]
        before = [unit.placement for unit in model.units]
        after = settle(before, sizes, max(self._limit_bytes - sum(needed), 0), self._zero)
        for index, placement in enumerate(after):
            self._move(index, placement)
        model.optimizer.rebind(model.partitions())
        model.offload.regroup()
        LOGGER.info("%s", describe(model, peak, self._limit_bytes))

    def _agree(self, peak: int, kept: int, sizes: Sequence[UnitBytes]) -> tuple[tuple[int, int], list[UnitBytes]]:
        """The largest figures of all ranks that step these units together."""
        topology, numbers = self._model.topology, [peak, kept]
        for size in sizes:
            numbers += [size.weights, size.states, size.masters]
        largest = torch.tensor(numbers, dtype=torch.int64, device=self._model.device)
        for group in (topology.dp, topology.replicate, topology.tp):
            comm.all_reduce(largest, group, op="max").wait()
        peak, kept, *rest = largest.tolist()
        return (peak, kept), [UnitBytes(*rest[i : i + 3]) for i in range(0, len(rest), 3)]

    def _move(self, index: int, placement: Placement) -> None:
        """Bring a unit's parts to the device where `placement` has them and they are not there."""
        model = self._model
        unit, device = model.units[index], model.device
        if placement.weights is Tier.DEVICE and unit.placement.weights is Tier.HOST:
            assert unit.shard is not None
            unit.shard = _up(unit.shard, device)
        # Where rounding changes no bit, the module's own weights are the master weights.
        if placement == ON_DEVICE and unit.master.dtype == unit.weight.dtype:
            unit.master = unit.own_weight
        elif placement.states is Tier.DEVICE:
            unit.master = unit.master.to(device)
        if placement.states is Tier.DEVICE and unit.placement.states is Tier.HOST:
            state = model.optimizer.state[index]
            state.update({role: _up(tensor, device) for role, tensor in state.items()})
            unit.optimizer_gradient = unit.rounded = None
            if not unit.has_whole_gradient:
                unit.gradient = _up(unit.gradient, device)
        unit.placement = placement


def _up(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, copy=True)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _unit_bytes(unit: FlatUnit, state: dict[str, Tensor]) -> UnitBytes:
    """What a unit's parts take on the device; gradients are where the states are."""
    states = sum(map(_bytes, state.values())) + (0 if unit.has_whole_gradient else _bytes(unit.gradient))
    masters = _bytes(unit.master)
    if unit.master.dtype != unit.weight.dtype:
        states, masters = states + masters, 0
    return UnitBytes(0 if unit.shard is None else _bytes(unit.shard), states, masters)


def device_bytes(memory: dict[str, int]) -> int:
    """Of a `memory_bytes()`, what is on the device all the time."""
    return sum(count for name, count in memory.items() if not name.startswith(("host_", "disk_", "gather_")))


def describe(model: ShardedModel, peak_bytes: int, limit_bytes: int) -> str:
    """The placement in one line."""
    counts = {
        what: {tier: sum(getattr(unit.placement, what) is tier for unit in model.units) for tier in Tier}
        for what in ("states", "weights")
    }
    text = "; ".join(
        f"{what} of {found[Tier.DEVICE]} units on the device, {found[Tier.HOST]} in host memory, {found[Tier.DISK]} on disk"
        for what, found in counts.items()
    )
    kept = device_bytes(model.memory_bytes())
    return (
        f"offload auto: a step needs {peak_bytes} bytes besides what is kept, of a limit of {limit_bytes}; {text}; "
        f"{kept} bytes are kept on the device"
    )
