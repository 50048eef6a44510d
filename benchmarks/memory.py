"""What each ZeRO stage, with and without offload, keeps on the device, and what that costs in time.

`python -m benchmarks.memory [--json FILE] [--rounds N] [--degrees 2 4 8] [--dtypes fp32 bf16]`. GPT with hidden 256, 4
layers, vocabulary 2048, sequence 64, AdamW with clipping, 2 microbatches of 1 a rank; data degrees 2, 4 and 8 over gloo,
ranks as processes of one thread each. 8 ranks share the machine's cores, so that times say what stages cost beside each
other in the same processes, and nothing of how they scale. On a machine without a GPU "device" and "host" are one memory,
kept apart by the engine's accounts; a copy between them is one inside it.

State is held against the formulas for model states in bytes per parameter, ZeRO's (Rajbhandari et al. 2020, section 3)
with fp32 gradients: `param + grad + optimizer`, each over N from its stage on. They must agree to 2 %. The window is what
is there beyond the state at one time: whole gradients of units, whole weights at stage 3. Bytes moved in a step are held
against gradients down and weights up; their limit in time is that of one copy of as many bytes at the rate measured here.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import trilith_launcher
from benchmarks.harness import Benchmark, Result, option_parser, ratio_interval
from trilith import preflight
from trilith.models.base import num_parameters
from trilith.process_groups import join_world, leave_world
from trilith.trainer import Place, Trainer
from trilith.zero.auto_placement import device_bytes

DEGREES, DTYPES, MICROBATCHES, TOLERANCE = (2, 4, 8), ("fp32", "bf16"), 2, 0.02
HIDDEN = 256
TWO_BLOCKS = 2 * (12 * HIDDEN**2 + 13 * HIDDEN)
STAGE3 = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": TWO_BLOCKS}
CPU = {"device": "cpu"}


@dataclass(frozen=True)
class Setting:
    """One row of `zero_optimization`. `kept`: of what the device keeps, (whole, one Nth): parts of `BYTES`; `host`: of
    what host memory keeps, one Nth."""

    name: str
    zero: Mapping[str, Any]
    kept: tuple[str, str]
    host: str = ""


# p weights, g gradients, m master weights where they are apart, o the optimizer's moments.
SETTINGS = (
    Setting("stage 0", {"stage": 0}, ("pgmo", "")),
    Setting("stage 1", {"stage": 1}, ("pg", "mo")),
    Setting("stage 2", {"stage": 2}, ("p", "gmo")),
    Setting("stage 2 + offload", {"stage": 2, "offload_optimizer": CPU}, ("p", ""), "gMo"),
    Setting("stage 3", STAGE3, ("", "pgmo")),
    Setting("stage 3 + offload", {**STAGE3, "offload_optimizer": CPU, "offload_param": CPU}, ("", ""), "pgMo"),
)
BYTES = {
    "fp32": {"p": 4, "g": 4, "m": 0, "M": 4, "o": 8},
    "bf16": {"p": 2, "g": 4, "m": 4, "M": 4, "o": 8},
}


def per_parameter(setting: Setting, dtype: str, degree: int) -> tuple[float, float]:
    """Bytes per parameter that the formula says of (device, host)."""
    whole, parts, host = (sum(BYTES[dtype][part] for part in text) for text in (*setting.kept, setting.host))
    return whole + parts / degree, host / degree


def undercuts_from(dtype: str) -> int:
    """The first data degree at which the state of stage 3 is below that of stage 2 + offload, by the formulas."""
    offload, stage3 = (next(s for s in SETTINGS if s.name == name) for name in ("stage 2 + offload", "stage 3"))
    return next(n for n in range(1, 1000) if per_parameter(stage3, dtype, n)[0] < per_parameter(offload, dtype, n)[0])


def config(setting: Setting, dtype: str, degree: int) -> dict[str, Any]:
    """The engine's config of a row."""
    return {
        "model": {"family": "gpt2", "num_layers": 4, "hidden_size": HIDDEN, "num_heads": 4, "sequence_length": 64,
                  "vocab_size": 2048, "dropout": 0.0},
        "data": {"corpus": "synthetic"},
        "data_types": {"param_dtype": dtype},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICROBATCHES,
        "gradient_clipping": 1.0,
        "parallel": {"data": degree},
        "zero_optimization": dict(setting.zero),
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}},
        "training": {"steps": 1_000_000, "seed": 5},
    }  # fmt: skip


def copy_bytes_per_s() -> float:
    """The rate of a large copy in memory, with all ranks copying at once."""
    source, target = torch.ones(1 << 24), torch.empty(1 << 24)
    return source.nbytes / min(timed_by_the_slowest(lambda: target.copy_(source)) for _ in range(5))


def timed_by_the_slowest(action: Any) -> float:
    """Seconds from a barrier until the last rank has done `action`; the same on all ranks."""
    dist.barrier()
    start = time.perf_counter()
    action()
    elapsed = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
    dist.all_reduce(elapsed, dist.ReduceOp.MAX)
    return float(elapsed)


class Candidate:
    """A trainer of one setting, with its times and the bytes that its last step moved."""

    def __init__(self, setting: Setting, dtype: str, place: Place) -> None:
        self.setting, self.dtype, self.degree = setting, dtype, place.world_size
        self.trainer = Trainer(preflight.plan(config(setting, dtype, place.world_size)), place)
        self.times_s: list[float] = []
        self.moved_bytes = 0

    def step(self) -> None:
        """Train one step; it is timed."""
        before = self._moved()
        self.times_s.append(timed_by_the_slowest(self.trainer.train_step))
        self.moved_bytes = self._moved() - before

    def _moved(self) -> int:
        moved = self.trainer.model.offload.moved
        return moved.device_to_host + moved.host_to_device

    def moved_by_formula(self) -> float:
        """Gradients down after every microbatch; weights up once a step, or at stage 3 a share with every gather."""
        plan, element = self.trainer.plan, BYTES[self.dtype]["p"]
        own = num_parameters(plan.units) / self.degree
        gathered = plan.gathers[0].gathered_numel / self.degree if plan.gathers else own
        return MICROBATCHES * own * self.trainer.policy.reduce_dtype.itemsize + gathered * element

    def rows(self, base: Candidate, rate: float) -> list[Result]:
        """This rank's rows; `base` is stage 0, `rate` that of a copy."""
        memory, count = self.trainer.model.memory_bytes(), num_parameters(self.trainer.plan.units)
        case = f"{self.dtype}, data {self.degree}, {self.setting.name}"
        device, host = per_parameter(self.setting, self.dtype, self.degree)
        on_host = sum(found for name, found in memory.items() if name.startswith("host_"))
        window = memory["gather_window"] / count
        found = [
            _beside_formula(case, "state", device_bytes(memory) / count, device),
            Result(case, "window", "B/param", window, None, "-", note="at one time, besides the state"),
        ]
        if host:
            found.append(_beside_formula(case, "host", on_host / count, host))
            limit_s = self.moved_bytes / rate
            note = f"copied at {rate / 1e9:.1f} GB/s they take {limit_s * 1e3:.2f} ms of a step"
            formula = self.moved_by_formula() / count
            found.append(_beside_formula(case, "moved a step", self.moved_bytes / count, formula, note))
        low, high, ratio = ratio_interval([a / b for a, b in zip(self.times_s, base.times_s, strict=True)])
        ours, peer = statistics.median(self.times_s), statistics.median(base.times_s)
        about = {"ratio": ratio, "ratio_ci": (low, high), "rounds": len(self.times_s)}
        note = f"{self.degree} ranks share {os.cpu_count()} cores"
        found.append(Result(case, "time", "s", ours, peer, "stage 0", note=note, **about))
        return found


def _beside_formula(case: str, metric: str, ours: float, formula: float, note: str = "") -> Result:
    """A row that must agree with its formula to the tolerance; nothing is nothing."""
    ratio = ours / formula if formula else None
    met = ours == 0 if ratio is None else abs(ratio - 1) <= TOLERANCE
    about: dict[str, Any] = {"ratio": ratio, "ratio_ci": None if ratio is None else (ratio, ratio)}
    return Result(case, metric, "B/param", ours, formula, "formula", goal=1 + TOLERANCE, met=met, note=note, **about)


def measure_rank(
    *, rank: int, world_size: int, store_path: str, context: Any, dtype: str, rounds: int, to: str
) -> None:
    """One rank of all settings; rank 0 writes the rows to the file `to`."""
    torch.set_num_threads(1)
    join_world(rank, world_size, store_path, 300)
    candidates = [Candidate(setting, dtype, Place(rank, world_size)) for setting in SETTINGS]
    rate = copy_bytes_per_s()
    for index in range(rounds + 2):
        if index == 2:  # the first two rounds are for warming up
            for candidate in candidates:
                candidate.times_s.clear()
        for offset in range(len(candidates)):
            candidates[(index + offset) % len(candidates)].step()
    rows = [row for candidate in candidates for row in candidate.rows(candidates[0], rate)]
    if rank == 0:
        Path(to).write_text(json.dumps([asdict(row) for row in rows]))
    for candidate in candidates:
        candidate.trainer.close()
    leave_world()


def measure(dtype: str, degree: int, rounds: int) -> list[Result]:
    """The rows of all settings at one data degree."""
    with tempfile.TemporaryDirectory() as directory:
        to = Path(directory) / "rows.json"
        code = trilith_launcher.launch(
            "benchmarks.memory:measure_rank",
            {"dtype": dtype, "rounds": rounds, "to": str(to)},
            num_ranks=degree,
            threads_per_rank=1,
            preload=("torch", "trilith.trainer"),
        )
        if code:
            sys.exit(code)
        return [Result(**row) for row in json.loads(to.read_text())]


def crossing(rows: Sequence[Result], dtype: str, degrees: Sequence[int]) -> Result:
    """From which data degree on stage 3 keeps less on the device than stage 2 + offload: by formula and as measured,
    there with both windows."""
    used = {(row.case, row.metric): row.ours or 0.0 for row in rows}

    def total(degree: int, name: str) -> float:
        case = f"{dtype}, data {degree}, {name}"
        return used[case, "state"] + used[case, "window"]

    below = [n for n in degrees if total(n, "stage 3") < total(n, "stage 2 + offload")]
    totals = ", ".join(
        f"{n}: {total(n, 'stage 3'):.2f} and {total(n, 'stage 2 + offload'):.2f} B/param" for n in degrees
    )
    return Result(
        *(f"{dtype}, stage 3 undercuts stage 2 + offload from", "data degree", "ranks"),
        float(min(below)) if below else None,
        float(undercuts_from(dtype)),
        "formula of the state",
        note=f"with windows at data {totals}",
    )


def main() -> None:
    """Measure every setting at every degree."""
    parser = option_parser(__doc__ or "")
    parser.add_argument("--degrees", type=int, nargs="+", default=DEGREES, help="data degrees (default 2 4 8)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="dtypes of the weights")
    options = parser.parse_args()
    torch.set_num_threads(1)
    configs = {s.name: config(s, "fp32", 2)["zero_optimization"] for s in SETTINGS}
    benchmark = Benchmark("memory", config={"zero_optimization": configs, **config(SETTINGS[0], "fp32", 2)["model"]})
    for dtype in options.dtypes:
        rows: list[Result] = []
        for degree in options.degrees:
            rows += measure(dtype, degree, options.rounds)
            print(f"{dtype}, data {degree}: done", flush=True)
        benchmark.results += [*rows, crossing(rows, dtype, options.degrees)]
    benchmark.finish(options.json)


if __name__ == "__main__":
    main()
