"""What the engine costs: one training step at world size 1 beside a hand-written loop of the same model and optimizer.

`python -m benchmarks.step [--json FILE]`. Same initial weights, same data, same AdamW with clipping, fp32. Equal losses and
gradient norms over several steps come first; then engine and loop take steps in turn. The limit is the time of the model's
matrix products alone at the best rate this machine reaches in the same run. Goal: ratio at most 1.03 with dropout 0; at
dropout 0.1 the cost is printed only, because the streams differ (ours does not depend on the layout).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Benchmark, arguments, matmul_flops_per_s
from benchmarks.plain_gpt import PlainGPT, PlainTrainer, Shape
from trilith import preflight
from trilith.models.base import train_flops_per_token
from trilith.trainer import Place, Trainer

GOAL = 1.03
CHECKED_STEPS, RTOL = 5, 2e-5
CASES = (
    ("GPT H256 L4 S128, 1 x 8", 256, 4, 8, 1),
    ("GPT H256 L4 S128, 4 x 4", 256, 4, 4, 4),
    ("GPT H512 L4 S128, 2 x 4", 512, 4, 4, 2),
)


def config(hidden: int, layers: int, micro: int, count: int, dropout: float) -> dict[str, Any]:
    """The engine's config of a case: `count` microbatches of `micro` samples."""
    return {
        "model": {"family": "gpt2", "num_layers": layers, "hidden_size": hidden, "num_heads": hidden // 32,
                  "sequence_length": 128, "vocab_size": 2048, "dropout": dropout},
        "data": {"corpus": "synthetic"},
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": count,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "training": {"steps": 1000, "seed": 5},
    }  # fmt: skip


def canonical_weights(trainer: Trainer) -> dict[str, Tensor]:
    """Every canonical tensor of a one-process trainer, as a copy."""
    found = {}
    for _, spec, tensor in trainer.model.state_entries():
        if spec.role in ("weight", "master"):
            (piece,) = [p for p in spec.pieces if p.box.shape == spec.shape]
            found[spec.name] = tensor.as_strided(spec.shape, piece.strides, piece.offset).clone()
    return found


class Pair:
    """The engine and the hand-written loop, on the same samples."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.engine = Trainer(preflight.plan(content), Place())
        model = self.engine.config.model
        shape = Shape(
            model.num_layers, model.hidden_size, model.num_heads, model.vocab_size, model.sequence_length, model.dropout
        )
        plain = PlainGPT(shape)
        plain.load_canonical(canonical_weights(self.engine))
        self.plain = PlainTrainer(plain, lr=1e-3, weight_decay=0.1, clip=1.0)
        self.at = 0

    def plain_step(self) -> tuple[float, float]:
        """The loop's next step: it reads its samples itself, as the engine does."""
        size, count = self.engine.config.train_micro_batch_size_per_gpu, self.engine.config.gradient_accumulation_steps
        batches = []
        for index in range(count):
            first = (self.at * count + index) * size
            sample = self.engine.feed.train_data.samples(range(first, first + size))
            batches.append((torch.from_numpy(sample.tokens), torch.from_numpy(sample.labels)))
        self.at += 1
        return self.plain.step(batches)

    def check_equal(self) -> float:
        """The largest relative difference of loss and gradient norm over the first steps."""
        worst = 0.0
        for _ in range(CHECKED_STEPS):
            record, (loss, norm) = self.engine.train_step(), self.plain_step()
            assert record.grad_norm is not None
            worst = max(worst, abs(record.loss / loss - 1), abs(record.grad_norm / norm - 1))
        return worst


def main() -> None:
    """Measure every case with and without dropout."""
    options = arguments(__doc__ or "")
    torch.set_num_threads(1)
    benchmark = Benchmark("step")
    rate = matmul_flops_per_s(torch.float32, torch.device("cpu"))
    print(f"matrix products reach {rate / 1e9:.1f} GFLOP/s on one thread")
    for name, hidden, layers, micro, count in CASES:
        for dropout in (0.0, 0.1):
            pair = Pair(config(hidden, layers, micro, count, dropout))
            worst = pair.check_equal()
            if dropout == 0.0:
                print(f"{name}: loss and gradient norm agree to {worst:.1e} relative over {CHECKED_STEPS} steps")
                assert worst < RTOL, f"results differ: {worst}"
            tokens = micro * count * 128
            benchmark.compare(
                f"{name}, dropout {dropout:g}",
                pair.engine.train_step,
                pair.plain_step,
                peer_name="hand-written loop",
                limit=train_flops_per_token(pair.engine.plan.units, causal=True) * tokens / rate,
                goal=GOAL if dropout == 0.0 else None,
                rounds=options.rounds,
            )
    benchmark.finish(options.json)


if __name__ == "__main__":
    main()
