"""trilith.initialize at stages 0 to 3: what real modules do with their parts, against a plain loop in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import trilith
from tests.harness import assert_close_named, run_ranks
from tests.parallel.test_initialize import BATCH, IN, Layer, adamw, batch_of
from tests.parallel.test_initialize import Case as SmallCase
from trilith.zero.module import Engine

HIDDEN, STEPS, CLIPPING = 9, 4, 1.0


class Fork(nn.Module):
    """Two outputs, of which the second is often not used."""

    def __init__(self, random: Any) -> None:
        super().__init__()
        self.inner = Layer(random(HIDDEN, HIDDEN), random(HIDDEN))
        self.aside = random(HIDDEN)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        """(B, H) to a dict of (B, H)."""
        return {"x": self.inner(x) * scale, "more": [x * self.aside, 3]}


class Net(nn.Module):
    """Blocks that are frozen, tied, called twice, not at all or now and then; weights of the model between them."""

    def __init__(self, recompute: str = "none", frozen: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)

        def random(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) * 0.4)

        self.recompute = recompute
        self.enter, self.between = random(HIDDEN, IN), random(HIDDEN, HIDDEN)
        self.blocks = nn.ModuleList(Fork(random) for _ in range(5))
        self.blocks[3].inner.weight = self.blocks[1].inner.weight
        self.blocks[0].requires_grad_(not frozen)
        self.blocks[2].inner.requires_grad_(not frozen)
        self.unused, self.sometimes = Layer(random(3, 3), random(3)), Layer(random(HIDDEN, HIDDEN), random(HIDDEN))
        self.head = Layer(random(HIDDEN, HIDDEN), random(HIDDEN))
        self.shift: Tensor
        self.register_buffer("shift", torch.randn(HIDDEN, generator=generator))

    def call(self, block: nn.Module, x: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """A block's outputs, computed again in backward if so asked."""

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            made = block(x, scale=scale)
            return made["x"], made["more"][0]

        if self.recompute == "none":
            return run(x)
        made: tuple[Tensor, Tensor] = checkpoint(run, x, use_reentrant=self.recompute == "reentrant")
        return made

    def forward(self, batch: Tensor, detour: bool = False) -> Tensor:
        """Mean over the batch of a made-up loss of (B, IN)."""
        x = batch @ self.enter.T + self.shift.to(batch.dtype)
        for number, block in enumerate(self.blocks):
            x = self.call(block, x, 0.5)[0] @ self.between
            if number == 3 and detour:
                x = self.sometimes(x)
        x = x + self.call(self.blocks[1], x)[1]
        return torch.tanh(self.head(x) * self.between[0]).square().sum(-1).mean()


@dataclass(frozen=True)
class Case:
    """One way to train. `detours`: the steps that use one module more; `evaluates`: between steps, and inside of them."""

    stage: int
    accumulation: int = 1
    recompute: str = "none"
    max_live: int | None = None
    prefetch: int = 50_000_000
    detours: tuple[int, ...] = ()
    evaluates: bool = False
    pairs: bool = False
    world_size: int = 2
    replicate: int = 1
    interval: str = "microbatch"

    def config(self) -> dict[str, Any]:
        """A DeepSpeed-like configuration."""
        zero: dict[str, Any] = {
            "stage": self.stage,
            "reduce_bucket_size": 0,
            "overlap_comm": self.recompute != "reentrant",
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": self.prefetch,
            "reduce_interval": self.interval,
        }
        if self.max_live is not None:
            zero["stage3_max_live_parameters"] = self.max_live
        return {
            **SmallCase(accumulation=self.accumulation, clipping=CLIPPING).config(self.world_size),
            "zero_optimization": zero,
            "parallel": {"replicate": self.replicate},
        }


def loss_of(call: Any, case: Case, batch: Tensor, step: int) -> Tensor:
    """The loss of a microbatch (B, IN), as one forward or as the mean of two."""
    parts = batch.chunk(2) if case.pairs else (batch,)
    losses = [call(part, detour=step in case.detours) for part in parts]
    return torch.stack(losses).mean()


def evaluate(engine: Engine, batch: Tensor) -> float:
    engine.eval()
    with torch.no_grad():
        value = float(engine(batch))
    engine.train()
    return value


def train(engine: Engine, case: Case) -> tuple[list[tuple[float, float]], list[float]]:
    """(loss of this rank's share, norm) of every step, and what evaluations gave."""
    rank, found, values = engine.topology.data_index, [], []
    for step in range(STEPS):
        total = 0.0
        for number, microbatch in enumerate(batch_of(step).view(case.accumulation, case.world_size, -1, IN)):
            loss = loss_of(engine, case, microbatch[rank], step)
            if case.evaluates and step in (1, 3) and number == step // 2:
                values.append(evaluate(engine, batch_of(99)))
            engine.backward(loss)
            engine.step()
            total += float(loss.detach()) / case.accumulation
        assert engine.global_grad_norm is not None
        found.append((total, engine.global_grad_norm))
        if case.evaluates:
            values.append(evaluate(engine, batch_of(99)))
    return found, values


def on_ranks(rank: int, world_size: int, case: Case) -> tuple[Any, ...]:
    net = Net(case.recompute)
    engine = trilith.initialize(net, case.config())
    steps, values = train(engine, case)
    peak = engine.sharded.gatherer.peak_bytes if engine.sharded.gatherer is not None else 0
    engine.close()
    return steps, values, {name: t.clone() for name, t in net.state_dict().items()}, peak


def plain(case: Case) -> tuple[Any, ...]:
    """The whole batch in one process."""
    net = Net("none").double()
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer, norms, values = adamw(trained), [], []
    for step in range(STEPS):
        for p in trained:
            p.grad = torch.zeros_like(p)
        for number, microbatch in enumerate(batch_of(step).chunk(case.accumulation)):
            if case.evaluates and step in (1, 3) and number == step // 2:
                values.append(float(net(batch_of(99)).detach()))
            (loss_of(net, case, microbatch, step) / case.accumulation).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, CLIPPING)))
        optimizer.step()
        if case.evaluates:
            values.append(float(net(batch_of(99)).detach()))
    return norms, values, {name: tensor.detach() for name, tensor in net.state_dict().items()}


def check(case: Case) -> None:
    norms, values, weights = plain(case)
    whole = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    for steps, found, state, window in run_ranks(case.world_size, on_ranks, case):
        assert case.max_live != 0 or window <= 0.6 * whole, (window, whole)
        assert [norm for _, norm in steps] == pytest.approx(norms, rel=1e-10)
        assert found == pytest.approx(values, rel=1e-10)
        assert_close_named({n: (state[n], w) for n, w in weights.items()}, rtol=1e-10, atol=1e-12)


def name(case: Case) -> str:
    return "-".join(f"{k}={v}" for k, v in vars(case).items() if v != getattr(Case(0), k) or k == "stage")


CASES = [
    *(Case(stage, accumulation) for stage in (0, 1, 2, 3) for accumulation in (1, 3)),
    *(Case(3, accumulation, max_live=0) for accumulation in (1, 3)),
    *(Case(3, 3, max_live=200, prefetch=200) for _ in range(1)),
    *(Case(stage, 1, how) for stage in (0, 2, 3) for how in ("reentrant", "not reentrant")),
    *(Case(3, 3, how, max_live=0) for how in ("reentrant", "not reentrant")),
    *(Case(3, 2, detours=(1, 2), max_live=live) for live in (None, 0)),
    Case(2, 2, detours=(1, 2)),
    *(Case(3, 3, evaluates=True, max_live=live) for live in (None, 0)),
    *(Case(stage, pairs=True) for stage in (2, 3)),
    Case(3, 1, world_size=4, replicate=2),
    Case(3, 3, interval="step"),
    Case(3, 1, world_size=3),
]


@pytest.mark.parametrize("case", CASES, ids=name)
def test_equals_one_process(case: Case) -> None:
    assert BATCH % (case.accumulation * case.world_size) == 0
    check(case)
