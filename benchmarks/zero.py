"""What a data-parallel step costs: every ZeRO stage beside DeepSpeed, torch FSDP2 and DDP, and beside no exchange at all.

`python -m benchmarks.zero [--json FILE] [--only TEXT]`. Two ranks with one thread each over gloo, GPT with hidden 256, 4
layers, vocabulary 2048, sequence 128, fp32, AdamW with clipping; a rank has 4 microbatches of 4 in a step, or 1 of 1,
where nothing hides the exchange. All candidates begin with the same weights and read the same samples; losses and
gradient norms of the first steps must be equal. Then engine and peer take whole optimizer steps in turn, in the same two
processes; a step begins after a barrier and lasts as long as the slower rank needs.

The limit is the twin: two independent copies of the plain loop, one a rank, that exchange nothing. The twin's own limit
is the time of the model's matrix products at the rate that both ranks reach together in the same run.

Every setting of the engine meets peers that keep as much as it does: `keep` leaves the weights whole from their first use
in a step to its end, `reshard` at most two blocks at a time.
"""

from __future__ import annotations

import gc
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import trilith_launcher
from benchmarks.harness import Benchmark, Result, matmul_flops_per_s, option_parser
from benchmarks.plain_gpt import BETAS, PlainGPT, Shape
from benchmarks.step import canonical_weights
from benchmarks.zero_peers import (
    CLIP,
    DDP,
    FSDP2,
    LR,
    WEIGHT_DECAY,
    DeepSpeed,
    Microbatches,
    MissingPeer,
    Peer,
    PeerSpec,
    Twin,
)
from trilith import preflight
from trilith.data.sampler import microbatch_ids
from trilith.models.base import train_flops_per_token
from trilith.process_groups import join_world, leave_world
from trilith.trainer import Place, Trainer

NUM_RANKS, CHECKED_STEPS, RTOL = 2, 5, 2e-5
SHAPE = Shape(num_layers=4, hidden_size=256, num_heads=4, vocab_size=2048, sequence_length=128)
BLOCK_NUMEL = 12 * SHAPE.hidden_size**2 + 13 * SHAPE.hidden_size
# The keys that engine and DeepSpeed share mean the same in both.
STAGE3 = {"stage": 3, "stage3_param_persistence_threshold": 1000}
# Two blocks and the token embedding, which FSDP2 keeps whole from forward to backward, too.
TWO_BLOCKS = {"stage3_max_live_parameters": 2 * BLOCK_NUMEL + SHAPE.vocab_size * SHAPE.hidden_size}


@dataclass(frozen=True)
class Case:
    """A step's work on one rank. The twin's goal depends on the setting."""

    microbatches: int
    size: int
    twin_goals: Mapping[str, float] = field(default_factory=dict)
    peers_have_goals: bool = False

    @property
    def name(self) -> str:
        """How rows call it."""
        return f"{self.microbatches} x {self.size}"


@dataclass(frozen=True)
class Setting:
    """The engine's `zero_optimization`, and what it is held against; `goals` by peer, where the case has them."""

    name: str
    zero: Mapping[str, Any]
    peers: Callable[[Case], Sequence[PeerSpec]]
    goals: Mapping[str, float] = field(default_factory=dict)


CASES = (
    Case(4, 4, {"stage 1": 1.03, "stage 2": 1.05, "stage 3 reshard": 1.12}),
    Case(1, 1, peers_have_goals=True),
)


def deepspeed(case: Case, stage: int, **zero: Any) -> PeerSpec:
    """DeepSpeed at `stage`, with further keys of its `zero_optimization`; the others are the fastest that were found."""
    if stage == 3:
        best: dict[str, Any] = {"overlap_comm": True}
    elif case.microbatches == 1:
        best = {"overlap_comm": True, "reduce_bucket_size": 1_000_000}
    else:
        best = {"overlap_comm": False}
    zero = {"stage": stage, **best, **zero}
    settings = ", ".join(f"{key} {value}" for key, value in best.items())
    return PeerSpec(f"DeepSpeed {stage}", lambda model, count: DeepSpeed(model, count, case.size, zero), settings)


def fsdp2(*, reshard: bool, reduce_each: bool) -> PeerSpec:
    """FSDP2, which keeps weights or reshards them, and reduces gradients after each microbatch or once a step."""
    return PeerSpec(
        f"FSDP2 {'reshard' if reshard else 'keep'}",
        lambda model, _: FSDP2(model, reshard=reshard, reduce_each=reduce_each),
        f"gradients reduced {'after each microbatch' if reduce_each else 'once a step'}",
    )


ddp = PeerSpec("torch DDP", DDP)
SETTINGS = (
    Setting("stage 0", {"stage": 0}, lambda _: [ddp]),
    Setting(
        "stage 1",
        {"stage": 1},
        lambda case: [ddp, fsdp2(reshard=False, reduce_each=False), deepspeed(case, 1)],
        {"FSDP2 keep": 1 / 1.8, "DeepSpeed 1": 1 / 1.6},
    ),
    Setting(
        "stage 2",
        {"stage": 2, "reduce_interval": "microbatch"},
        lambda case: [fsdp2(reshard=False, reduce_each=True), deepspeed(case, 2)],
        {"FSDP2 keep": 1 / 1.8, "DeepSpeed 2": 1 / 1.6},
    ),
    Setting(
        "stage 3 reshard",
        {**STAGE3, **TWO_BLOCKS, "reduce_interval": "microbatch"},
        lambda case: [fsdp2(reshard=True, reduce_each=True), deepspeed(case, **STAGE3, **TWO_BLOCKS)],
        {"FSDP2 reshard": 1 / 2, "DeepSpeed 3": 1 / 2},
    ),
    Setting(
        "stage 3 keep",
        {**STAGE3, "reduce_interval": "microbatch"},
        lambda case: [fsdp2(reshard=False, reduce_each=True), deepspeed(case, **STAGE3)],
        {"FSDP2 keep": 1 / 2, "DeepSpeed 3": 1 / 2},
    ),
)


def config(case: Case, zero: Mapping[str, Any], num_ranks: int = NUM_RANKS) -> dict[str, Any]:
    """The engine's config of a case; on one rank it serves for the initial weights."""
    return {
        "model": {"family": "gpt2", "num_layers": SHAPE.num_layers, "hidden_size": SHAPE.hidden_size,
                  "num_heads": SHAPE.num_heads, "sequence_length": SHAPE.sequence_length,
                  "vocab_size": SHAPE.vocab_size, "dropout": 0.0},
        "data": {"corpus": "synthetic"},
        "train_micro_batch_size_per_gpu": case.size,
        "gradient_accumulation_steps": case.microbatches,
        "gradient_clipping": CLIP,
        "parallel": {"data": num_ranks},
        "zero_optimization": dict(zero),
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "betas": list(BETAS), "weight_decay": WEIGHT_DECAY}},
        "training": {"steps": 1_000_000, "seed": 5},
    }  # fmt: skip


def initial_weights(case: Case) -> dict[str, Tensor]:
    """Every canonical tensor before the first step: the same in every layout. Call it before the ranks join."""
    trainer = Trainer(preflight.plan(config(case, {"stage": 0}, num_ranks=1)), Place())
    weights = canonical_weights(trainer)
    trainer.close()
    return weights


def mean_over_ranks(value: float) -> float:
    """The mean over the ranks."""
    tensor = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(tensor)
    return float(tensor) / NUM_RANKS


def timed_by_the_slower(action: Callable[[], Any]) -> float:
    """Seconds from a barrier until the last rank has done `action`; the same on all ranks."""
    dist.barrier()
    start = time.perf_counter()
    action()
    elapsed = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
    dist.all_reduce(elapsed, dist.ReduceOp.MAX)
    return float(elapsed)


class Candidate:
    """A peer that reads its samples itself in every step, as the engine does."""

    def __init__(self, peer: Peer, case: Case, engine: Trainer) -> None:
        self.peer, self._case, self._at = peer, case, 0
        self._data, self._rank = engine.feed.train_data, engine.topology.rank

    def step(self) -> tuple[float, float]:
        """(mean loss of this rank's tokens, gradient norm) of the next step."""
        first = self._at * self._case.microbatches * self._case.size * NUM_RANKS
        self._at += 1
        batches: Microbatches = []
        for index in range(self._case.microbatches):
            sample = self._data.samples(microbatch_ids(first, index, self._case.size, self._rank, NUM_RANKS))
            batches.append((torch.from_numpy(sample.tokens), torch.from_numpy(sample.labels)))
        return self.peer.step(batches)

    def difference(self, reference: Sequence[tuple[float, float]]) -> float:
        """The largest relative difference of loss and gradient norm from the engine's first steps.

        The twin's ranks part ways at the first update, and each knows its own norm only: its first loss must do.
        """
        alone = isinstance(self.peer, Twin)
        worst = 0.0
        for index, (loss, norm) in enumerate(reference):
            mine, my_norm = self.step()
            mine = mean_over_ranks(mine)
            if not alone or index == 0:
                worst = max(worst, abs(mine / loss - 1))
            if not alone:
                worst = max(worst, abs(my_norm / norm - 1))
        assert worst < RTOL, f"results differ by {worst:.1e} from {reference}"
        return worst


@dataclass
class Rank:
    """One rank of the engine in one setting, and the rows of its comparisons."""

    case: Case
    setting: Setting
    engine: Trainer
    weights: Mapping[str, Tensor]
    reference: Sequence[tuple[float, float]]
    rounds: int
    products_s: float
    twin_s: float | None = None
    benchmark: Benchmark = field(default_factory=lambda: Benchmark("zero"))

    def compare(self, spec: PeerSpec, goal: float | None) -> None:
        """Add the row of a peer."""
        name = f"{self.case.name}, {self.setting.name}"
        model = PlainGPT(SHAPE)
        model.load_canonical(self.weights)
        try:
            candidate = Candidate(spec.make(model, self.case.microbatches), self.case, self.engine)
        except MissingPeer as why:
            self.benchmark.missing(name, spec.name, str(why))
            return
        worst = candidate.difference(self.reference)
        limit = self.products_s if self.twin_s is None else self.twin_s
        products = f"matrix products alone {self.products_s * 1e3:.1f} ms"
        row = self.benchmark.compare(
            name,
            self.engine.train_step,
            candidate.step,
            peer_name=spec.name,
            limit=limit,
            goal=goal,
            rounds=self.rounds,
            timed=timed_by_the_slower,
            note="; ".join(filter(None, (spec.note, f"equal to {worst:.0e}", products))),
        )
        if self.twin_s is None:
            self.twin_s = row.peer
        candidate.peer.close()
        gc.collect()

    def compare_all(self) -> None:
        """The twin first, whose time is the limit of the others."""
        self.compare(PeerSpec("twin", Twin), self.case.twin_goals.get(self.setting.name))
        for spec in self.setting.peers(self.case):
            self.compare(spec, self.setting.goals.get(spec.name) if self.case.peers_have_goals else None)


def measure_rank(
    *, rank: int, world_size: int, store_path: str, context: Any, case: int, setting: int, rounds: int, to: str
) -> None:
    """One rank of one setting; rank 0 writes the rows to the file `to`."""
    torch.set_num_threads(1)
    this, zero = CASES[case], SETTINGS[setting]
    weights = initial_weights(this)
    join_world(rank, world_size, store_path, 120)
    engine = Trainer(preflight.plan(config(this, zero.zero)), Place(rank, world_size))
    dist.barrier()
    rate = matmul_flops_per_s(torch.float32, torch.device("cpu"))
    tokens = this.microbatches * this.size * SHAPE.sequence_length
    products_s = train_flops_per_token(engine.plan.units, causal=True) * tokens / rate
    reference = []
    for _ in range(CHECKED_STEPS):
        record = engine.train_step()
        assert record.grad_norm is not None and math.isfinite(record.loss)
        reference.append((record.loss, record.grad_norm))
    runner = Rank(this, zero, engine, weights, reference, rounds, products_s)
    runner.compare_all()
    if rank == 0:
        Path(to).write_text(json.dumps([asdict(result) for result in runner.benchmark.results]))
    engine.close()
    leave_world()


def measure(rounds: int, only: str) -> list[Result]:
    """The rows of all cases and settings whose name contains `only`, each measured by two ranks of its own."""
    rows: list[Result] = []
    chosen = [(c, s) for c in range(len(CASES)) for s in range(len(SETTINGS))]
    with tempfile.TemporaryDirectory() as directory:
        for case, setting in chosen:
            name = f"{CASES[case].name}, {SETTINGS[setting].name}"
            if only not in name:
                continue
            to = Path(directory) / "rows.json"
            code = trilith_launcher.launch(
                "benchmarks.zero:measure_rank",
                {"case": case, "setting": setting, "rounds": rounds, "to": str(to)},
                num_ranks=NUM_RANKS,
                threads_per_rank=1,
                preload=("torch", "trilith.trainer"),
            )
            if code:
                sys.exit(code)
            rows.extend(Result(**row) for row in json.loads(to.read_text()))
            print(f"{name}: done", flush=True)
    return rows


def main() -> None:
    """Measure every setting in every case."""
    parser = option_parser(__doc__ or "")
    parser.add_argument("--only", default="", help="measure only rows whose case contains this text, as in 'stage 1'")
    options = parser.parse_args()
    torch.set_num_threads(1)
    configs = {case.name: {s.name: config(case, s.zero) for s in SETTINGS} for case in CASES}
    benchmark = Benchmark("zero", config=configs)
    benchmark.results = measure(options.rounds, options.only)
    benchmark.finish(options.json)


if __name__ == "__main__":
    main()
