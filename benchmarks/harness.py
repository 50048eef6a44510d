"""How Trilith measures: equal results first, then candidates interleaved A B A B, then the ratio with its interval.

A claim is the median over rounds of the paired ratio ours / peer; its 95 % interval comes from the order statistics of
the ratios (no assumption on their distribution). `met` is true or false where the interval lies wholly on one side of
the goal, and null where it straddles it. Ratios of times are below 1 where ours is faster.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

MIN_ROUNDS = 20


@dataclass(frozen=True)
class Result:
    """One row. `limit` is what physics allows in the same unit, `goal` the largest ratio wanted (None: no goal)."""

    case: str
    metric: str
    unit: str
    ours: float | None
    peer: float | None
    peer_name: str
    ratio: float | None = None
    ratio_ci: tuple[float, float] | None = None
    limit: float | None = None
    goal: float | None = None
    met: bool | None = None
    rounds: int = 0
    note: str = ""


@dataclass
class Benchmark:
    """Collects rows; writes the table and the JSON. `config`: what was run, where the rows' names do not say it all."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)

    def compare(self, case: str, ours: Callable[[], Any], peer: Callable[[], Any], **about: Any) -> Result:
        """Time the two in turn (`rounds` pairs after `warmup`), add a row. `about`: peer_name, limit, goal, note, timed."""
        rounds, warmup = about.pop("rounds", MIN_ROUNDS), about.pop("warmup", 3)
        pairs = interleave(ours, peer, rounds, warmup, about.pop("timed", timed))
        low, high, ratio = ratio_interval([a / b for a, b in pairs])
        goal = about.get("goal")
        met = None if goal is None or low <= goal < high else high <= goal
        if rounds < MIN_ROUNDS:
            about["note"] = (about.get("note", "") + f" {rounds} rounds").strip()
        result = Result(
            case=case,
            metric=about.pop("metric", "time"),
            unit="s",
            ours=statistics.median(a for a, _ in pairs),
            peer=statistics.median(b for _, b in pairs),
            ratio=ratio,
            ratio_ci=(low, high),
            met=met,
            rounds=rounds,
            **about,
        )
        self.results.append(result)
        return result

    def missing(self, case: str, peer_name: str, why: str) -> None:
        """A row that says that a peer could not be measured."""
        self.results.append(Result(case, "time", "s", None, None, peer_name, note=why))

    def finish(self, path: Path | None = None) -> None:
        """Print the table and, where asked, write the JSON."""
        print(table(self.results))
        if path is not None:
            path.write_text(json.dumps(self.to_json(), indent=1) + "\n")

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        return {
            "benchmark": self.name,
            "commit": commit(),
            "machine": machine(),
            **({"config": self.config} if self.config else {}),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "results": [asdict(result) for result in self.results],
        }


def timed(action: Callable[[], Any]) -> float:
    """Seconds that `action` takes."""
    synchronize()
    start = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - start


def interleave(
    a: Callable[[], Any],
    b: Callable[[], Any],
    rounds: int,
    warmup: int = 3,
    timed: Callable[[Callable[[], Any]], float] = timed,
) -> list[tuple[float, float]]:
    """Seconds of `a` and `b`, called in turn, by `timed`; which goes first alternates from round to round."""
    pairs = []
    for index in range(warmup + rounds):
        first, second = (a, b) if index % 2 == 0 else (b, a)
        one, two = timed(first), timed(second)
        if index >= warmup:
            pairs.append((one, two) if index % 2 == 0 else (two, one))
    return pairs


def synchronize() -> None:
    """Wait for the CUDA device where there is one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def ratio_interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """(low, high, median) of paired ratios: the 95 % interval of the median by order statistics (binomial)."""
    ordered = sorted(ratios)
    n = len(ordered)
    tail, k = 0.0, 0
    while k < n // 2:
        tail += math.comb(n, k) / 2**n
        if tail > 0.025:
            break
        k += 1
    k = max(k - 1, 0)
    return ordered[k], ordered[n - 1 - k], statistics.median(ordered)


def matmul_flops_per_s(dtype: torch.dtype, device: torch.device, size: int = 1024) -> float:
    """The best rate of a square matrix product here and now: the ceiling of anything made of matrix products."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = min(timed(lambda: a @ b) for _ in range(12))
    return 2 * size**3 / best


def table(results: Sequence[Result]) -> str:
    """The rows as aligned text."""
    rows = [["case", "metric", "ours", "peer", "ratio [95 %]", "limit", "goal", "met", "peer name", "note"]]
    for r in results:
        ratio = (
            "-"
            if r.ratio is None or r.ratio_ci is None
            else f"{r.ratio:.3f} [{r.ratio_ci[0]:.3f}, {r.ratio_ci[1]:.3f}]"
        )
        met = {True: "yes", False: "no", None: "-" if r.goal is None else "open"}[r.met]
        figures = [_figure(r.ours, r.unit), _figure(r.peer, r.unit), ratio, _figure(r.limit, r.unit)]
        goal = "-" if r.goal is None else f"{r.goal:.4g}"
        rows.append([r.case, r.metric, *figures, goal, met, r.peer_name, r.note])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _figure(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"{value * 1e3:.2f} ms" if unit == "s" else f"{value:.4g} {unit}"


def commit() -> str:
    """The checked-out commit, with `+` where files differ from it; empty outside a checkout."""
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    head = git("rev-parse", "--short", "HEAD")
    return head + ("+" if head and git("status", "--porcelain", "--untracked-files=no") else "")


def machine() -> dict[str, Any]:
    """What was measured on."""
    model = ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), "")
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {"cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def option_parser(description: str) -> argparse.ArgumentParser:
    """The options every benchmark has, for those that have more."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS, help=f"paired rounds (default {MIN_ROUNDS})")
    return parser


def arguments(description: str) -> argparse.Namespace:
    """The options every benchmark has, from the command line."""
    return option_parser(description).parse_args()
