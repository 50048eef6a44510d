"""What a comparison found, as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

NAMES_SHOWN = 8


@dataclass(frozen=True)
class Value:
    """One element of a tensor: on which side, and what rank computed it, in which stage and microbatch."""

    side: str
    rank: int
    stage: int
    microbatch: int | None
    value: float

    def __str__(self) -> str:
        microbatch = "" if self.microbatch is None else f", microbatch {self.microbatch}"
        return f"{self.side} {self.value!r} (rank {self.rank}, stage {self.stage}{microbatch})"


@dataclass(frozen=True)
class Difference:
    """The first tensor that leaves tolerance, at its worst element.

    `is_replica`: ranks of one side hold different values of the same element; `values` are then the one that is further
    from the other side, the one that it should equal, and the other side's. Otherwise `values` are A's and B's.
    `relative_error` is `absolute_error` over the `scale` of the tensor.
    """

    kind: str
    name: str
    step: int
    sample: int | None
    index: tuple[int, ...]
    values: tuple[Value, ...]
    absolute_error: float
    relative_error: float
    is_replica: bool = False

    def title(self) -> str:
        """The tensor in words."""
        return title(self.kind, self.name, self.step, self.sample)


@dataclass(frozen=True)
class Phase:
    """All tensors of one kind in one step. `differing`: those that leave tolerance, in the order of computation.

    `worst`: largest relative error between the sides, `worst_replica`: between ranks of one side.
    """

    step: int
    kind: str
    num_tensors: int
    differing: tuple[str, ...]
    worst: float
    worst_replica: float


@dataclass(frozen=True)
class Result:
    """What was compared, up to the first phase in which something differs. `sides`: A and B in words."""

    sides: tuple[str, str]
    rtol: float
    phases: tuple[Phase, ...]
    first: Difference | None

    @property
    def equal(self) -> bool:
        """Whether every tensor of both sides agrees within tolerance."""
        return self.first is None

    def to_json(self) -> dict[str, Any]:
        """This result as one JSON object; numbers that are not finite are strings."""
        first = None if self.first is None else asdict(self.first)
        content = {
            "equal": self.equal,
            "a": self.sides[0],
            "b": self.sides[1],
            "rtol": self.rtol,
            "phases": [asdict(phase) for phase in self.phases],
            "first_difference": first,
        }
        plain: dict[str, Any] = _plain(content)
        return plain

    def describe(self) -> str:
        """This result as text: a table, then the first difference."""
        lines = [
            f"A  {self.sides[0]}",
            f"B  {self.sides[1]}",
            f"tolerance {self.rtol:g} of a tensor's largest value",
            "",
        ]
        lines.append(f"{'step':>4}  {'what':<14}{'tensors':>8}{'differ':>8}{'worst A-B':>12}{'between ranks':>15}")
        for phase in self.phases:
            lines.append(
                f"{phase.step:>4}  {phase.kind:<14}{phase.num_tensors:>8}{len(phase.differing):>8}"
                f"{phase.worst:>12.1e}{phase.worst_replica:>15.1e}"
            )
        lines.append("")
        if self.first is None:
            lines.append(f"equal: {sum(phase.num_tensors for phase in self.phases):,} tensors")
        else:
            lines += _first_difference(self.first, self.phases[-1].differing)
        return "\n".join(lines)


def title(kind: str, name: str, step: int, sample: int | None) -> str:
    """A tensor in words: what it is, and when."""
    what = f"{kind} {name}" if name != kind else kind
    when = f"step {step}" if step else "step 0 (initial values)"
    return f"{what}, {when}" + ("" if sample is None else f", sample {sample}")


def _first_difference(first: Difference, differing: Sequence[str]) -> list[str]:
    where = f"at {list(first.index)}: " if first.index else ""
    lines = [f"first difference: {first.title()}"]
    if first.is_replica:
        lines += [
            "  ranks of one side that hold the same element disagree",
            f"  {where}{first.values[0]}",
            f"  its replica: {first.values[1]}",
            f"  other side:  {first.values[2]}",
        ]
    else:
        lines.append(f"  largest {where}" + ", ".join(str(value) for value in first.values))
    lines.append(f"  absolute error {first.absolute_error:.3e}, relative error {first.relative_error:.3e}")
    if len(differing) > 1:
        more = f" and {len(differing) - NAMES_SHOWN} more" if len(differing) > NAMES_SHOWN else ""
        lines.append(f"differing, in the order of computation: {'; '.join(differing[:NAMES_SHOWN])}{more}")
    return lines


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(child) for name, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(child) for child in value]
    return value if not isinstance(value, float) or isfinite(value) else str(value)
