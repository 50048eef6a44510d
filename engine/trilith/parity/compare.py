"""Compares two recordings tensor by tensor in the order of computation, and stops after the first kind that differs.

The error of an element is measured against its tensor's largest value: sums that cancel leave small elements whose own
digits are noise. A whole gradient may be such noise (that of a key bias is zero in exact arithmetic), so a weight's or
gradient's measure is never less than a share of its unit's largest, about 64 roundings over the tolerance.

Adam divides a gradient by its own size: where a gradient is all noise, a step of the learning rate goes in a random
direction. A weight may therefore differ by what the differences of its gradients, each within tolerance, explain. Both
sides begin a step with the same weights, so this does not reach the next step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

from trilith.config.training_keys import AdamConfig, AdamWConfig
from trilith.optim.groups import multipliers
from trilith.parity.recording import (
    ACTIVATION,
    GRADIENT,
    GRADIENT_NORM,
    LOSS,
    WEIGHT,
    Key,
    Part,
    Recording,
    Whole,
    difference,
    unravel,
)
from trilith.parity.result import Difference, Phase, Result, Value
from trilith.parity.side import Tolerance
from trilith.preflight import Plan

SIDES = ("A", "B")
ROUNDINGS = 64
# Elements that are compared at a time: bounds the memory of the comparison beside the two tensors.
CHUNK = 1 << 20


def compare_recordings(
    recordings: tuple[Recording, Recording], plan: Plan, steps: int, tolerance: Tolerance, sides: tuple[str, str]
) -> Result:
    """The comparison of A's and B's recordings of `steps` steps. `plan` is A's; what is read of it is the same in B's."""
    return _Comparison(recordings, plan, steps, tolerance).run(sides)


@dataclass(frozen=True)
class _Verdict:
    """One tensor: relative error between the sides and between ranks of a side, and the difference that counts."""

    error: float
    replica_error: float
    difference: Difference | None


class _Comparison:
    def __init__(self, recordings: tuple[Recording, Recording], plan: Plan, steps: int, tolerance: Tolerance) -> None:
        self._recordings, self._steps, self._tolerance = recordings, steps, tolerance
        self._config = plan.config
        self._units = [unit.name for unit in plan.units]
        tensors = [(t, u) for u in plan.units for p in u.parameters if p.tie_copy == 0 for t in p.tensors]
        self._unit_of = {tensor.name: unit.name for tensor, unit in tensors}
        self._lr_mult = multipliers(self._config.optimizer.param_groups)
        self._largest: dict[tuple[str, int, str], float] = {}
        for recording in recordings:
            for key, parts in recording.parts.items():
                if key.kind in (GRADIENT, WEIGHT):
                    group = (key.kind, key.step, self._unit_of[key.name])
                    self._largest[group] = max(self._largest.get(group, 0.0), *(part.largest for part in parts))

    def run(self, sides: tuple[str, str]) -> Result:
        phases: list[Phase] = []
        for keys in self._order():
            verdicts = [self._judge(key) for key in keys]
            found = [verdict.difference for verdict in verdicts if verdict.difference is not None]
            phases.append(
                Phase(
                    keys[0].step,
                    keys[0].kind,
                    len(keys),
                    tuple(one.title() for one in found),
                    max(verdict.error for verdict in verdicts),
                    max(verdict.replica_error for verdict in verdicts),
                )
            )
            if found:
                return Result(sides, self._tolerance.rtol, tuple(phases), found[0])
        return Result(sides, self._tolerance.rtol, tuple(phases), None)

    def _order(self) -> Iterator[list[Key]]:
        """The tensors of each phase, in the order in which a run computes them."""
        names, batch = list(self._unit_of), self._config.train_batch_size
        yield [Key(WEIGHT, 0, name) for name in names]
        for step in range(1, self._steps + 1):
            samples = range((step - 1) * batch, step * batch)
            yield [Key(ACTIVATION, step, unit, sample) for unit in self._units for sample in samples]
            yield [Key(LOSS, step, LOSS)]
            yield [Key(GRADIENT, step, name) for name in reversed(names)]
            yield [Key(GRADIENT_NORM, step, GRADIENT_NORM)]
            yield [Key(WEIGHT, step, name) for name in names]

    def _judge(self, key: Key) -> _Verdict:
        a, b = (recording.assemble(key) for recording in self._recordings)
        assert a.values.shape == b.values.shape, (key, a.values.shape, b.values.shape)
        scale = self._scale(key, a.values, b.values)
        error, at = worst_element(a.values, b.values)
        if _ratio(error, scale) > self._tolerance.rtol and self._updated_by_adam(key):
            error, at = worst_element(a.values, b.values, self._explained(key))
        replica_errors = [_ratio(w.disagreement.error if w.disagreement else 0.0, scale) for w in (a, b)]
        verdict = _Verdict(_ratio(error, scale), max(replica_errors), None)
        if verdict.replica_error > self._tolerance.rtol:
            side = replica_errors.index(verdict.replica_error)
            return replace(verdict, difference=_replica_difference(key, (a, b), side, verdict.replica_error))
        if verdict.error > self._tolerance.rtol:
            index = unravel(at, a.values.shape)
            values = tuple(_value(s, w.holder(index), float(w.values[index])) for s, w in enumerate((a, b)))
            absolute = float(difference(a.values[index], b.values[index]))
            relative = _ratio(absolute, scale)
            found = Difference(key.kind, key.name, key.step, key.sample, index, values, absolute, relative)
            return replace(verdict, difference=found)
        return verdict

    def _scale(self, key: Key, a: Tensor, b: Tensor) -> float:
        """What the errors of a tensor are measured against: its largest finite value, but see the module's text."""
        own = max(_largest_finite(a), _largest_finite(b))
        if key.kind not in (GRADIENT, WEIGHT):
            return own
        rtol = self._tolerance.rtol
        share = min(ROUNDINGS * self._tolerance.rounding / rtol, 1.0) if rtol else 0.0
        return max(own, share * self._largest[key.kind, key.step, self._unit_of[key.name]])

    def _updated_by_adam(self, key: Key) -> bool:
        return key.kind == WEIGHT and key.step > 0 and isinstance(self._config.optimizer, (AdamConfig, AdamWConfig))

    def _explained(self, key: Key) -> Tensor:
        """By how much each element of a weight may differ because its gradients, up to this step, do: float64, flat.

        A step moves an element by about lr at most; gradients of size g that differ by d move that by d / (g + eps) of
        it.
        """
        optimizer, lr_mult = self._config.optimizer, self._lr_mult(key.name, True)[0]
        assert isinstance(optimizer, (AdamConfig, AdamWConfig))
        apart = size = torch.zeros(())
        for step in range(1, key.step + 1):
            a, b = (r.assemble(Key(GRADIENT, step, key.name)).values.flatten().double() for r in self._recordings)
            apart = torch.maximum(apart, difference(a, b))
            size = torch.maximum(size, torch.maximum(a.abs(), b.abs()))
        share = (4.0 * apart / (size + optimizer.params.eps)).nan_to_num(nan=0.0, posinf=2.0).clamp_(max=2.0)
        return self._recordings[0].lrs[key.step - 1] * lr_mult * share


def worst_element(a: Tensor, b: Tensor, allowed: Tensor | None = None) -> tuple[float, int]:
    """(largest |a - b|, less what is `allowed` per element, and the flat index of that element)."""
    a, b = a.flatten(), b.flatten()
    worst, at = 0.0, 0
    for start in range(0, a.numel(), CHUNK):
        error = difference(a[start : start + CHUNK], b[start : start + CHUNK])
        if allowed is not None:
            error = (error - allowed[start : start + CHUNK]).clamp_(min=0.0)
        place = int(error.argmax())
        if float(error[place]) > worst:
            worst, at = float(error[place]), start + place
    return worst, at


def _replica_difference(key: Key, wholes: tuple[Whole, Whole], side: int, relative: float) -> Difference:
    found, other = wholes[side].disagreement, wholes[1 - side]
    assert found is not None
    truth = float(other.values[found.index])
    pair = [_value(side, found.part, found.value), _value(side, found.first, found.first_value)]
    pair.sort(key=lambda value: -float(difference(torch.tensor(value.value), torch.tensor(truth))))
    values = (*pair, _value(1 - side, other.holder(found.index), truth))
    return Difference(key.kind, key.name, key.step, key.sample, found.index, values, found.error, relative, True)


def _value(side: int, part: Part, value: float) -> Value:
    return Value(SIDES[side], part.rank, part.stage, part.microbatch, value)


def _ratio(error: float, scale: float) -> float:
    if error == 0.0:
        return 0.0
    return error / scale if scale > 0.0 else inf


def _largest_finite(tensor: Tensor) -> float:
    flat = tensor.flatten()
    largest = 0.0
    for chunk in flat.split(CHUNK):
        magnitude = chunk.abs()
        largest = max(largest, float(magnitude.masked_fill(~magnitude.isfinite(), 0.0).max()))
    return largest
