"""What a pipeline step costs: every schedule beside torch.distributed.pipelining's, and beside its own simulation.

`python -m benchmarks.pipeline [--json FILE]`. Two ranks with one thread each, 8 microbatches of 4, GPT with hidden 256, 4
and 8 layers, vocabulary 2048, sequence 128, fp32, untied head (torch's runtime knows no ties). A step is forward and
backward of all microbatches, without the optimizer, on both sides; same weights, samples and cut into stages. Equal
losses and gradient norms come first; then engine and torch take steps in turn, in the same two processes.

The limit is what no schedule can beat: two independent copies of the model, one a rank, with half the microbatches each
and no message between them. Goal: ratio at most 1.00.

The second row of each schedule holds a step's measured makespan against the simulation of the schedule with the action
times of the same step: the mean per stage and kind, and the median time of a message. Goal: 3 % of the makespan.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import trilith_launcher
from benchmarks.harness import Benchmark, Result, arguments, interleave, matmul_flops_per_s
from benchmarks.plain_gpt import Shape
from benchmarks.step import canonical_weights
from benchmarks.torch_pipelining import PlainStage, TorchPipeline, mean_loss
from trilith import preflight
from trilith.models.base import train_flops_per_token
from trilith.pipeline.simulate import simulate
from trilith.pipeline.timeline import Record
from trilith.pipeline.trace import measured_costs, measured_step
from trilith.process_groups import join_world, leave_world
from trilith.trainer import Place, Trainer

GOAL, GOAL_POINTS, RTOL = 1.00, 3.0, 2e-5
NUM_RANKS, MICROBATCHES, SIZE = 2, 8, 4
HIDDEN, HEADS, VOCABULARY, SEQUENCE = 256, 4, 2048, 128
RECORDED_STEPS = 9
OFF_SIMULATION = "makespan off simulation"


@dataclass(frozen=True)
class Case:
    """One of our schedules beside one of torch's; `peer` is empty where torch has none like it."""

    schedule: str
    stages_per_rank: int
    peer: str = ""
    note: str = ""


CASES = (
    Case("gpipe", 1, "GPipe"),
    Case("1f1b", 1, "1F1B"),
    Case("interleaved_1f1b", 2, "Interleaved1F1B"),
    Case("zb_h1", 1, "InterleavedZeroBubble", "torch's with one stage a rank, which is ZB-H1"),
    Case("zb_v", 2, "InterleavedZeroBubble", "two stages a rank and split backwards on both sides; ours is V-shaped"),
    Case("zb_v", 2, "ZBVZeroBubble"),
    Case("dualpipe_v", 2, "DualPipeV"),
    Case("zb_h2", 1),
    Case("v_half", 2),
    Case("v_min", 2),
)


def config(case: Case, num_layers: int) -> dict[str, Any]:
    """The engine's config of a case; every stage has the same number of layers, on both sides."""
    num_stages = NUM_RANKS * case.stages_per_rank
    return {
        "model": {"family": "gpt2", "num_layers": num_layers, "hidden_size": HIDDEN, "num_heads": HEADS,
                  "sequence_length": SEQUENCE, "vocab_size": VOCABULARY, "dropout": 0.0, "tie_embeddings": False},
        "data": {"corpus": "synthetic"},
        "train_micro_batch_size_per_gpu": SIZE,
        "gradient_accumulation_steps": MICROBATCHES,
        "parallel": {"pipeline": NUM_RANKS},
        "pipeline": {"schedule": case.schedule, "virtual_stages": case.stages_per_rank,
                     "partition": [num_layers // num_stages] * num_stages},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "training": {"steps": 1000, "seed": 5},
    }  # fmt: skip


class Engine:
    """One rank of the engine on the samples of step 0, which every step takes again."""

    def __init__(self, content: dict[str, Any], rank: int) -> None:
        self.trainer = Trainer(preflight.plan(content), Place(rank, NUM_RANKS))
        self.records: list[Record] = []

    def samples(self) -> tuple[Tensor, Tensor]:
        """Tokens and labels of the step, (all samples, S), read anew: the engine reads them in every step, too."""
        sample = self.trainer.feed.train_data.samples(range(MICROBATCHES * SIZE))
        return torch.from_numpy(sample.tokens), torch.from_numpy(sample.labels)

    def step(self) -> float:
        """Forward and backward of all microbatches, reductions included; the sum of this rank's losses."""
        accumulated = self.trainer.accumulate()
        self.trainer.model.finish()
        self.records = accumulated.records
        return sum(float(loss) for loss in accumulated.losses)

    def sum_of_squares(self) -> float:
        """Of this rank's gradients."""
        units = self.trainer.model.units
        return sum(float(unit.gradient.double().square().sum()) for unit in units)


def total(value: float) -> float:
    """The sum over the ranks."""
    tensor = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(tensor)
    return float(tensor)


def gather_weights(engine: Engine) -> dict[str, Tensor]:
    """Every canonical tensor of the model, on every rank."""
    everyone: list[Any] = [None] * NUM_RANKS
    dist.all_gather_object(everyone, canonical_weights(engine.trainer))
    return {name: tensor for weights in everyone for name, tensor in weights.items()}


def check_equal(engine: Engine, peer: TorchPipeline) -> float:
    """The relative difference of loss and gradient norm, the larger of the two; asserted to be rounding."""
    ours = total(engine.step()), sqrt(total(engine.sum_of_squares()))
    theirs = total(peer.step(*engine.samples()) or 0.0), sqrt(total(peer.sum_of_squares()))
    worst = max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))
    assert worst < RTOL, f"results differ by {worst:.1e}: (loss, gradient norm) {ours}, torch {theirs}"
    return worst


def independent_copy(shape: Shape, weights: dict[str, Tensor], tokens: Tensor, labels: Tensor) -> Any:
    """A step of the whole model on half of the microbatches, one after the other, with no other rank in it."""
    whole = PlainStage(shape, 0, shape.num_layers)
    whole.load_canonical(weights)
    loss_fn = mean_loss(labels.numel())
    half = MICROBATCHES // NUM_RANKS * SIZE

    def step() -> None:
        whole.zero_grad()
        for x, y in zip(tokens[:half].split(SIZE), labels[:half].split(SIZE), strict=True):
            loss_fn(whole(x), y).backward()

    return step


def together(action: Any) -> Any:
    """`action`, over when every rank has done it."""

    def run() -> None:
        action()
        dist.barrier()

    return run


def simulation_row(name: str, engine: Engine) -> Result:
    """Makespan of recorded steps against the simulation with each step's own action times; medians over the steps."""
    found = []
    for _ in range(RECORDED_STEPS):
        dist.barrier()
        engine.step()
        rows: list[Any] = [None] * NUM_RANKS
        dist.all_gather_object(rows, engine.records)
        schedule, records = engine.trainer.plan.schedule, dict(enumerate(rows))
        measured = measured_step(records, schedule.num_stages).makespan_s
        simulated = simulate(schedule, measured_costs(records, schedule.num_stages)).makespan_s
        found.append((100 * abs(measured - simulated) / measured, measured * 1e3, simulated * 1e3))
    points, measured_ms, simulated_ms = (statistics.median(column) for column in zip(*found, strict=True))
    return Result(
        name,
        OFF_SIMULATION,
        "%",
        points,
        None,
        "simulation",
        goal=GOAL_POINTS,
        met=points <= GOAL_POINTS,
        rounds=RECORDED_STEPS,
        note=f"measured {measured_ms:.1f} ms, simulated {simulated_ms:.1f} ms",
    )


def measure_rank(
    *,
    rank: int,
    world_size: int,
    store_path: str,
    context: Any,
    case: dict[str, Any],
    layers: int,
    rounds: int,
    to: str,
) -> None:
    """One rank of a case; rank 0 writes its rows to the file `to`."""
    torch.set_num_threads(1)
    join_world(rank, world_size, store_path, 120)
    this = Case(**case)
    engine = Engine(config(this, layers), rank)
    benchmark = Benchmark("pipeline")
    name = f"{this.schedule}, {layers} layers"
    rate = matmul_flops_per_s(torch.float32, torch.device("cpu"))
    flops = train_flops_per_token(engine.trainer.plan.units, causal=True) * MICROBATCHES * SIZE * SEQUENCE
    ideal_s = flops / NUM_RANKS / rate
    for _ in range(2):
        engine.step()
    if this.peer:
        shape = Shape(layers, HIDDEN, HEADS, VOCABULARY, SEQUENCE)
        size = layers // (NUM_RANKS * this.stages_per_rank)
        peer = TorchPipeline(this.peer, shape, [(lo, lo + size) for lo in range(0, layers, size)], MICROBATCHES)
        weights = gather_weights(engine)
        peer.load_canonical(weights)
        worst = check_equal(engine, peer)
        copy = independent_copy(shape, weights, *engine.samples())
        pairs = interleave(together(copy), together(copy), 3, 1)
        benchmark.compare(
            name,
            together(engine.step),
            together(lambda: peer.step(*engine.samples())),
            peer_name=f"torch {this.peer}",
            limit=statistics.median(time for pair in pairs for time in pair),
            goal=GOAL,
            rounds=rounds,
            note="; ".join(
                filter(None, (this.note, f"equal to {worst:.0e}", f"matrix products alone {ideal_s * 1e3:.0f} ms"))
            ),
        )
    benchmark.results.append(simulation_row(name, engine))
    if rank == 0:
        Path(to).write_text(json.dumps([asdict(result) for result in benchmark.results]))
    engine.trainer.close()
    leave_world()


def measure(cases: Sequence[tuple[Case, int]], rounds: int) -> list[Result]:
    """The rows of all cases, each measured by two ranks of its own."""
    rows: list[Result] = []
    with tempfile.TemporaryDirectory() as directory:
        for case, layers in cases:
            to = Path(directory) / "rows.json"
            code = trilith_launcher.launch(
                "benchmarks.pipeline:measure_rank",
                {"case": asdict(case), "layers": layers, "rounds": rounds, "to": str(to)},
                num_ranks=NUM_RANKS,
                threads_per_rank=1,
                preload=("torch", "trilith.trainer"),
            )
            if code:
                sys.exit(code)
            known = {(row.case, row.metric) for row in rows if row.metric == OFF_SIMULATION}
            found = [Result(**row) for row in json.loads(to.read_text())]
            rows.extend(row for row in found if (row.case, row.metric) not in known)
            print(f"{case.schedule}, {layers} layers: done", flush=True)
    return rows


def main() -> None:
    """Measure every schedule with 4 and with 8 layers."""
    options = arguments(__doc__ or "")
    torch.set_num_threads(1)
    benchmark = Benchmark("pipeline", config={str(layers): config(CASES[0], layers) for layers in (4, 8)})
    benchmark.results = measure([(case, layers) for layers in (4, 8) for case in CASES], options.rounds)
    benchmark.finish(options.json)


if __name__ == "__main__":
    main()
