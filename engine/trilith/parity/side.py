"""The two sides of a comparison: their configs, whether they can be compared, and how closely."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from trilith import preflight
from trilith.config import Config
from trilith.errors import ConfigError, Violation
from trilith.precision import DTYPES
from trilith.preflight import Plan

DEFAULT_RTOL: Mapping[str, float] = MappingProxyType({"fp64": 1e-10, "fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2})
# What decides the numbers of a run beside layout and precision: equal on both sides, but for the keys that are free.
SHARED = (
    "model",
    "data",
    "train_batch_size",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "training.seed",
    "training.steps",
)
FREE = frozenset({"data.cache_directory"})
ONE_PROCESS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "parallel": MappingProxyType(
            {"data": 1, "pipeline": 1, "tensor": 1, "context": 1, "replicate": 1, "sequence_parallel": False}
        ),
        "pipeline": MappingProxyType({"schedule": "1f1b", "virtual_stages": 1, "partition": "cost"}),
        "run": MappingProxyType({"threads": "auto"}),
    }
)


@dataclass(frozen=True)
class Side:
    """One run: a config (a file, or its content) with overrides such as "parallel.tensor=2", and what to call it."""

    config: Path | Mapping[str, Any]
    overrides: tuple[str, ...] = ()
    name: str = ""

    def plan(self) -> Plan:
        """The plan of this run. Raises ConfigError."""
        return preflight.plan(self.config, self.overrides)

    def describe(self, plan: Plan) -> str:
        """This side in a line: what it is called, and its layout."""
        config, parallel = plan.config, plan.config.parallel
        ranks = f"{plan.world_size} rank{'s' if plan.world_size > 1 else ''}"
        sequence = ", sequence parallel" if parallel.sequence_parallel else ""
        return (
            f"{self.name or self.config}: {ranks} = data {parallel.data} x pipeline {parallel.pipeline} x tensor "
            f"{parallel.tensor}{sequence}, {config.pipeline.schedule}, {len(plan.cuts)} stages, "
            f"ZeRO-{config.zero_optimization.stage}, {config.gradient_accumulation_steps} microbatches of "
            f"{config.train_micro_batch_size_per_gpu}, {config.data_types.param_dtype}"
        )


@dataclass(frozen=True)
class Tolerance:
    """`rtol`: largest error relative to a tensor's scale; `rounding`: of one operation in the coarser of the dtypes."""

    rtol: float
    rounding: float


def other_side(a: Path, b: Path | None, overrides: Sequence[str] = (), overrides_b: Sequence[str] = ()) -> Side:
    """The side to compare A with: config `b`, or where that is None, A itself on one process.

    One process: all degrees and virtual stages 1, the same global batch and microbatch size. `overrides` are for both
    sides, `overrides_b` for this one, after all others: with them A may be compared with any other layout of itself.
    Raises ConfigError if A cannot run.
    """
    if b is not None:
        return Side(b, (*overrides, *overrides_b))
    content = Side(a, tuple(overrides)).plan().resolved.to_json()["config"]
    for section, keys in ONE_PROCESS.items():
        content[section] |= keys
    content["gradient_accumulation_steps"] = "auto"
    return Side(content, tuple(overrides_b), f"{a} on one process" if not overrides_b else f"{a} with --set-b")


def check_comparable(plans: Sequence[Plan], steps: int, rtol: float | None) -> Tolerance:
    """How closely A and B must agree; `rtol` None: what the coarser of their formats allows.

    Raises ConfigError naming every key in which they are not runs of the same training.
    """
    a, b = (plan.config for plan in plans)
    found = list(_contradictions(a, b))
    if not 1 <= steps <= a.training.steps:
        rule = f"must be from 1 to training.steps {a.training.steps}"
        found.append(Violation("--steps", steps, rule))
    if rtol is not None and not (isfinite(rtol) and rtol >= 0.0):
        found.append(Violation("--rtol", rtol, "must be a number of at least 0"))
    if found:
        raise ConfigError(found, "A and B cannot be compared")
    dtypes = [config.data_types.param_dtype for config in (a, b)]
    default = max(DEFAULT_RTOL[dtype] for dtype in dtypes)
    return Tolerance(default if rtol is None else rtol, max(torch.finfo(DTYPES[dtype]).eps for dtype in dtypes))


def _contradictions(a: Config, b: Config) -> Iterator[Violation]:
    """Every key of SHARED in which the resolved configs differ."""
    leaves_a, leaves_b = (dict(_leaves(config.model_dump(mode="json"), "")) for config in (a, b))
    for path in dict.fromkeys([*leaves_a, *leaves_b]):
        shared = any(path == key or path.startswith(f"{key}.") for key in SHARED) and path not in FREE
        if shared and (path not in leaves_a or path not in leaves_b or leaves_a[path] != leaves_b[path]):
            rule = f"is {leaves_a.get(path)!r} in A; both sides must train the same model on the same batches"
            yield Violation(path, leaves_b.get(path), rule, "Use --set to give both sides one value.")


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict):
        yield path, tree
        return
    for name, value in tree.items():
        yield from _leaves(value, f"{path}.{name}" if path else name)
