"""Where records go: JSON lines, TensorBoard, CSV. A sink that fails is dropped with one warning; training goes on."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, Protocol, TextIO

from trilith.monitor.metrics import EvalRecord, StepRecord

Record = StepRecord | EvalRecord


class Sink(Protocol):
    """Takes records one at a time; may raise anything."""

    def write(self, record: Record) -> None:
        """Take one record."""

    def close(self) -> None:
        """Flush and release."""


class JsonLines:
    """`metrics.jsonl`: one JSON object a line. On resume, lines of later steps than `resume_step` are dropped first.

    A figure that is NaN or infinite (a norm that overflowed) stands as null: JSON has no word for it.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self._file = _reopen(path, resume_step, lambda line: int(json.loads(line)["step"]))

    def write(self, record: Record) -> None:
        """Append one line; it reaches the file system at once."""
        figures = {key: value if _is_json(value) else None for key, value in record.to_json().items()}
        self._file.write(json.dumps(figures, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _is_json(value: Any) -> bool:
    return not isinstance(value, float) or isfinite(value)


def _reopen(path: Path, resume_step: int, step_of: Callable[[str], int]) -> TextIO:
    """`path` open to append, holding what an earlier run wrote up to `resume_step` (0: nothing).

    A line that a kill cut short, and what follows it, is dropped: those steps are taken, and written, again. The file
    is replaced whole, so that a kill in here loses nothing.
    """
    kept = []
    if resume_step and path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            try:
                if not line.endswith("\n") or step_of(line) > resume_step:
                    break
            except (ValueError, KeyError, TypeError):
                break
            kept.append(line)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_text("".join(kept), encoding="utf-8")
    draft.replace(path)
    return path.open("a", encoding="utf-8")


def _points(record: Record) -> Iterable[tuple[str, float]]:
    """DeepSpeed's monitor tags for a record."""
    if isinstance(record, EvalRecord):
        yield "Eval/Samples/eval_loss", record.eval_loss
        return
    yield "Train/Samples/train_loss", record.loss
    yield "Train/Samples/lr", record.lr
    if record.grad_norm is not None:
        yield "Train/Samples/grad_norm", record.grad_norm
    yield "Train/Samples/tokens_per_s", record.tokens_per_s
    if record.loss_scale is not None:
        yield "Train/Samples/loss_scale", record.loss_scale


class TensorBoard:
    """TensorBoard events with DeepSpeed's tags; the x-axis is consumed samples, of evaluations too."""

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory))  # type: ignore[no-untyped-call]
        self._samples = 0

    def write(self, record: Record) -> None:
        """Write every scalar of the record."""
        if isinstance(record, StepRecord):
            self._samples = record.consumed_samples
        for tag, value in _points(record):
            self._writer.add_scalar(tag, value, self._samples)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()  # type: ignore[no-untyped-call]


class CsvFile:
    """One CSV with a row per step (DeepSpeed's csv_monitor). On resume, rows of later steps are dropped first."""

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self._file = _reopen(path, resume_step, lambda line: 0 if line.startswith("step,") else int(line.split(",")[0]))
        with path.open(encoding="utf-8") as file:
            self._header = next(csv.reader(file), [])
        self._writer = csv.writer(self._file, lineterminator="\n")

    def write(self, record: Record) -> None:
        """Append a row; evaluation records go to the JSON lines only."""
        if isinstance(record, StepRecord):
            row: dict[str, Any] = record.to_json()
            if not self._header:
                self._header = list(row)
                self._writer.writerow(self._header)
            self._writer.writerow(row.get(name, "") for name in self._header)
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Sinks:
    """Fans records out; what raises is dropped and named once on stderr."""

    def __init__(self, makers: Iterable[tuple[str, Callable[[], Sink]]]) -> None:
        self._sinks: list[tuple[str, Sink]] = []
        for name, make in makers:
            self._guard(name, partial(self._add, name, make))

    def _add(self, name: str, make: Callable[[], Sink]) -> None:
        self._sinks.append((name, make()))

    def write(self, record: Record) -> None:
        """Give a record to every sink that still works."""
        for name, sink in list(self._sinks):
            if not self._guard(name, partial(sink.write, record)):
                self._sinks = [item for item in self._sinks if item[1] is not sink]

    def close(self) -> None:
        """Close all sinks."""
        for name, sink in self._sinks:
            self._guard(name, sink.close)
        self._sinks = []

    @staticmethod
    def _guard(name: str, action: Callable[[], object]) -> bool:
        try:
            action()
        except Exception as error:
            print(f"warning: {name} is off from here on, training goes on: {error!r}", file=sys.stderr)
            return False
        return True
