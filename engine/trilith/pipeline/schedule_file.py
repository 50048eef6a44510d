"""Schedules as text files. No torch.

    # a comment
    name: mine                       (optional; without it, the file's name)
    microbatches: 2
    placement: 0 1                   the pipeline rank of each stage
    rank 0: F0.0 F0.1 B0.0 B0.1      what a rank does, in order, on as many lines as it takes
    rank 1: F1.0 B1.0 F1.1 B1.1

Actions are written as `str(action)` does: F, B, I, W and pairs like F0.2&B0.1. Messages (SF, SB, RF, RB) and reductions
(RD, TR) may be given or left to `passes.complete`; then none of the kind may be there. What shares weights, and what is
frozen, is the model's affair and no part of a file.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from trilith.errors import ScheduleError
from trilith.pipeline.action import COMPUTE, MESSAGES, NO_MICROBATCH, PER_UPDATE, Action, Kind, Schedule, parse

WRITTEN = COMPUTE | MESSAGES | PER_UPDATE  # the kinds that a file may hold
_NUMBER = re.compile(r"[0-9]{1,9}")
_RANK = re.compile(r"rank\s+([0-9]{1,9})")
_HEADERS = ("name", "microbatches", "placement")
_LINE_WIDTH = 120


def write_schedule(schedule: Schedule, path: str | Path) -> None:
    """Write a schedule, complete or not, so that `read_schedule` gives it back, but for its ties and frozen stages.

    Raises ScheduleError for an asynchronous schedule, which a file cannot say, and for kinds of action outside `WRITTEN`.
    """
    if schedule.update_every:
        raise ScheduleError(f"schedule {schedule.name} is asynchronous: a file holds the actions of one step")
    for rank, action in schedule.parts():
        if action.kind not in WRITTEN:
            raise ScheduleError(f"schedule {schedule.name}: rank {rank}: {action.describe()} has no place in a file")
    lines = [
        f"name: {schedule.name}",
        f"microbatches: {schedule.num_microbatches}",
        f"placement: {' '.join(str(rank) for rank in schedule.placement)}",
    ]
    for rank, actions in enumerate(schedule.actions):
        head = f"rank {rank}: "
        text = " ".join(str(action) for action in actions)
        lines += [head + line for line in textwrap.wrap(text, _LINE_WIDTH - len(head), break_on_hyphens=False)]
    Path(path).write_text("\n".join(lines) + "\n")


def read_schedule(path: str | Path) -> Schedule:
    """The schedule in a file, as it is written there; `passes.complete` adds what is left out, `check.check` proves it.

    Raises ScheduleError naming file, line, action and rule where a line cannot be read, an action stands twice, on a
    wrong rank or outside of stages and microbatches, or a computation is missing.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ScheduleError(f"schedule file {path}: cannot be read: {error}") from error
    reader = _Reader(path)
    for number, line in enumerate(text.splitlines(), start=1):
        reader.line = number
        content = line.partition("#")[0].strip()
        if content:
            reader.read(content)
    return reader.schedule()


@dataclass
class _Reader:
    """A file being read, line by line; `line` is where it stands."""

    path: Path
    line: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    placement: tuple[int, ...] = ()
    microbatches: int = 0
    rows: list[list[Action]] = field(default_factory=list)
    seen: dict[Action, int] = field(default_factory=dict)  # every action (of a pair, both) -> its line

    def read(self, content: str) -> None:
        """Take in a line that is not empty."""
        key, colon, value = (part.strip() for part in content.partition(":"))
        of_rank = _RANK.fullmatch(key)
        if colon and of_rank:
            self._read_actions(int(of_rank[1]), value.split())
        elif colon and key in _HEADERS:
            self._read_header(key, value)
        else:
            self._refuse(f"{content!r} is neither a header ({', '.join(_HEADERS)}) nor actions, as in 'rank 0: F0.0'")

    def schedule(self) -> Schedule:
        """What was read; every forward and every backward must have been there."""
        self._require_headers("is missing")
        for stage, rank in enumerate(self.placement):
            for m in range(self.microbatches):
                for kinds in self._computations(stage, m):
                    action = Action(kinds, stage, m)
                    if action not in self.seen:
                        raise ScheduleError(f"schedule file {self.path}: rank {rank}: {action.describe()} is missing")
        return Schedule(
            self.headers.get("name", self.path.stem),
            len(self.rows),
            len(self.placement),
            self.microbatches,
            self.placement,
            tuple(tuple(row) for row in self.rows),
        )

    def _computations(self, stage: int, m: int) -> tuple[Kind, ...]:
        """What a stage computes of a microbatch: its backward in one or, where half of it is there, in two."""
        halves = (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
        is_split = any(Action(kind, stage, m) in self.seen for kind in halves)
        return (Kind.FORWARD, *(halves if is_split else (Kind.BACKWARD,)))

    def _read_header(self, key: str, value: str) -> None:
        if key in self.headers:
            self._refuse(f"header '{key}:' is there twice")
        if self.seen:
            self._refuse(f"header '{key}:' must stand before the first actions")
        words = value.split()
        if key != "name" and not all(_NUMBER.fullmatch(word) for word in words):
            self._refuse(f"'{key}: {value}': must be whole numbers")
        if not words or (key != "placement" and len(words) != 1):
            self._refuse(f"'{key}: {value}': needs one value" + (" per stage" if key == "placement" else ""))
        self.headers[key] = value
        if key == "microbatches":
            self.microbatches = int(value)
            if not self.microbatches:
                self._refuse("'microbatches: 0': must be at least 1")
        elif key == "placement":
            self.placement = tuple(int(word) for word in words)
            for rank in range(max(self.placement)):
                if rank not in self.placement:
                    self._refuse(f"'placement: {value}': rank {rank} holds no stage")
            self.rows = [[] for _ in range(max(self.placement) + 1)]

    def _require_headers(self, text: str) -> None:
        for key in ("microbatches", "placement"):
            if key not in self.headers:
                self._refuse(f"header '{key}:' {text}")

    def _read_actions(self, rank: int, words: list[str]) -> None:
        self._require_headers("must stand before the first actions")
        if rank >= len(self.rows):
            self._refuse(f"rank {rank}: the placement has ranks 0..{len(self.rows) - 1}")
        for word in words:
            try:
                action = parse(word)
            except ScheduleError as error:
                self._refuse(f"rank {rank}: {error}")
            for part in action.parts():
                self._check_action(rank, part)
                self.seen[part] = self.line
            self.rows[rank].append(action)

    def _check_action(self, rank: int, action: Action) -> None:
        what = f"rank {rank}: {action.describe()}"
        if action.kind not in WRITTEN or (action.kind in PER_UPDATE and action.microbatch != NO_MICROBATCH):
            self._refuse(
                f"{what} has no place in a file: it holds the computations, messages and reductions of one step"
            )
        if action.stage >= len(self.placement):
            self._refuse(f"{what}: stages are 0..{len(self.placement) - 1}")
        if action.microbatch >= self.microbatches:
            self._refuse(f"{what}: microbatches are 0..{self.microbatches - 1}")
        if self.placement[action.stage] != rank:
            self._refuse(f"{what}: stage {action.stage} lies on rank {self.placement[action.stage]}")
        if action in self.seen:
            self._refuse(f"{what} is there twice, first on line {self.seen[action]}")

    def _refuse(self, text: str) -> NoReturn:
        raise ScheduleError(f"schedule file {self.path}, line {self.line}: {text}")
