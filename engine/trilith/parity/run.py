"""Runs both sides on this machine, each recorded in a private temporary directory, and compares what they wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from trilith.data.batch import prepare_data
from trilith.errors import ConfigError, TrilithError, Violation
from trilith.parity.compare import SIDES, compare_recordings
from trilith.parity.recording import Recording
from trilith.parity.result import Result
from trilith.parity.side import Side, check_comparable
from trilith_launcher import launch as launch_here

TARGET = "trilith.parity:record_rank"
INTERRUPTED = 130


class Launch(Protocol):
    """Starts the ranks of a run and waits for them, as `trilith_launcher.launch` does; returns the exit code."""

    def __call__(
        self, target: str, args: Mapping[str, Any], num_ranks: int, *, threads_per_rank: int, preload: Sequence[str]
    ) -> int:
        """Call `target` with `args` in each rank."""


def compare(
    a: Side,
    b: Side,
    *,
    steps: int = 2,
    rtol: float | None = None,
    launch: Launch = launch_here,
    report: Callable[[str], None] | None = None,
) -> Result:
    """Run A, then B with A's weights at the beginning of each step, and find the first tensor that leaves tolerance.

    `rtol`: relative to a tensor's largest value (None: 1e-10 in fp64, 1e-4 in fp32, 2e-2 in half precision, the looser
    of both sides). `report` is told what runs. What is recorded takes disk space: per step and rank its activations,
    gradients and weights.

    Raises ConfigError if a config is wrong or the two cannot be compared, TrilithError if a run fails.
    """
    tell = report or (lambda text: None)
    plans = [side.plan() for side in (a, b)]
    tolerance = check_comparable(plans, steps, rtol)
    described = (a.describe(plans[0]), b.describe(plans[1]))
    with TemporaryDirectory(prefix="trilith-parity-") as root:
        recordings: list[Recording] = []
        for letter, plan, text in zip(SIDES, plans, described, strict=True):
            prepare_data(plan.config.data, report)
            tell(f"running {letter}: {text}")
            directory = Path(root, letter)
            directory.mkdir()
            code = launch(
                TARGET,
                {
                    "config": plan.resolved.to_json()["config"],
                    "directory": str(directory),
                    "steps": steps,
                    "leader": str(recordings[0].directory) if recordings else None,
                },
                plan.world_size,
                threads_per_rank=plan.config.run.threads,
                preload=("torch", "trilith.parity"),
            )
            if code == INTERRUPTED:
                raise KeyboardInterrupt
            if code:
                raise TrilithError(f"{letter} ({text}) failed with exit code {code}: there is nothing to compare")
            recordings.append(Recording(directory))
        tell("comparing")
        one, other = recordings
        if one.data != other.data:
            rule = f"the samples differ (fingerprints {one.data} and {other.data}), though the keys are the same"
            raise ConfigError([Violation("data", plans[0].config.data.cache_directory, rule)], "A and B")
        return compare_recordings((one, other), plans[0], steps, tolerance, described)
