"""Live progress: a rich bar on a terminal, plain lines in a log. Only the rank that prints makes one."""

from __future__ import annotations

import sys
import time
from typing import Any

from trilith.monitor.metrics import EvalRecord, StepRecord


def human_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def human_count(value: float) -> str:
    """1234567 -> '1.23M'."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5 or unit == "T":
            return f"{value:.3g}{unit}"
        value /= 1000
    raise AssertionError("unreachable")


def human_time(seconds: float) -> str:
    """3725 -> '1:02:05'."""
    whole = int(seconds + 0.5)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


class Progress:
    """Shows records as they come. `total_steps` and the first step give the time left."""

    def __init__(self, total_steps: int, first_step: int = 0, interval: int = 1) -> None:
        self._total, self._first, self._interval = total_steps, first_step, max(interval, 1)
        self._began = time.monotonic()
        self._bar: Any = None
        self._task: Any = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("step"), MofNCompleteColumn(), BarColumn(24), TextColumn("{task.description}")
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=total_steps, completed=first_step)

    def step(self, record: StepRecord) -> None:
        """Show a training step."""
        text = self._line(record)
        if self._bar is not None:
            self._bar.update(self._task, completed=record.step, description=text)
        elif record.step % self._interval == 0 or record.step in (self._first + 1, self._total):
            print(f"step {record.step:>{len(str(self._total))}}/{self._total}  {text}", flush=True)

    def evaluation(self, record: EvalRecord) -> None:
        """Show an evaluation."""
        self.say(f"eval at step {record.step}: eval_loss {record.eval_loss:.4f} over {record.eval_tokens} tokens")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _line(self, record: StepRecord) -> str:
        done = record.step - self._first
        left = (time.monotonic() - self._began) / max(done, 1) * (self._total - record.step)
        parts = [
            f"loss {record.loss:.4f}",
            f"lr {record.lr:.2e}",
            *([] if record.grad_norm is None else [f"grad_norm {record.grad_norm:.3f}"]),
            f"{human_count(record.tokens_per_s)} tokens/s",
            f"{human_count(record.model_flops_per_s_causal)}FLOP/s causal "
            f"({human_count(record.model_flops_per_s_noncausal)} non-causal)",
        ]
        if record.mfu_causal is not None and record.mfu_noncausal is not None:
            parts.append(f"MFU {record.mfu_causal:.1%} causal ({record.mfu_noncausal:.1%} non-causal)")
        if record.loss_scale is not None:
            parts.append(f"loss_scale {record.loss_scale:g}")
        if record.skipped:
            parts.append("SKIPPED (overflow)")
        parts += [f"mem {human_bytes(record.memory_peak_bytes)}", f"left {human_time(left)}"]
        return "  ".join(parts)
