"""trilith.initialize: any module trained data-parallel equals a plain loop in one process, in float64 to 1e-12."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import trilith
from tests.harness import assert_close_named, run_ranks
from trilith.errors import ConfigError, TrilithError
from trilith.zero.declared import Declared
from trilith.zero.module import Engine

IN, HIDDEN, BATCH, STEPS, LR = 6, 9, 12, 4, 0.05


class Net(nn.Module):
    """What real models have: repeated blocks, a shared weight, a frozen layer, an unused one, a buffer, a scalar."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) * 0.4)

        self.enter = random(HIDDEN, IN)
        self.blocks = nn.ModuleList(Layer(random(HIDDEN, HIDDEN), random(HIDDEN)) for _ in range(3))
        self.blocks[2].weight = self.blocks[0].weight
        self.blocks[1].bias.requires_grad_(False)
        self.never = random(2, 2)
        self.scale = random()
        self.head = Layer(random(HIDDEN, HIDDEN), random(HIDDEN))
        self.shift: Tensor
        self.register_buffer("shift", torch.randn(HIDDEN, generator=generator))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: Tensor) -> Tensor:
        """Mean over the batch of a made-up loss of (B, IN)."""
        x = batch @ self.enter.T + self.shift.to(batch.dtype)
        for block in self.blocks:
            x = block(x)
        return (self.head(x) * self.scale).square().sum(-1).mean()


class Layer(nn.Module):
    """x + tanh(x W^T + b)."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """(B, H) to (B, H)."""
        return x + torch.tanh(nn.functional.linear(x, self.weight, self.bias))


@dataclass(frozen=True)
class Case:
    """One way to train."""

    stage: int = 1
    accumulation: int = 1
    clipping: float = 0.0
    dtype: str = "fp64"
    optimizer: dict[str, Any] = field(
        default_factory=lambda: {"type": "AdamW", "params": {"lr": LR, "weight_decay": 0.1, "eps": 1e-3}}
    )
    scheduler: dict[str, Any] | None = None
    device: str = "cpu"

    def config(self, world_size: int) -> dict[str, Any]:
        """A DeepSpeed-like configuration."""
        fp16 = {"fp16": {"enabled": True, "initial_scale_power": 10, "hysteresis": 1}} if self.dtype == "fp16" else {}
        return {
            "train_batch_size": BATCH,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clipping,
            "data_types": {"param_dtype": self.dtype},
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "run": {"device": self.device},
            "zero_optimization": {"stage": self.stage, "reduce_bucket_size": 0},
            **fp16,
        }


def batch_of(step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn((BATCH, IN), generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)


def train(engine: Engine, case: Case, steps: int = STEPS, dtype: torch.dtype = torch.float64) -> list[float]:
    """Norm after each step; every rank takes its part of each microbatch."""
    dp, norms = engine.topology.dp, []
    for step in range(steps):
        batch = batch_of(step, dtype).to(engine.topology.device)
        for microbatch in batch.view(case.accumulation, dp.size, -1, IN):
            engine.backward(engine(microbatch[dp.index]))
            engine.step()
        assert engine.global_grad_norm is not None
        norms.append(engine.global_grad_norm)
    return norms


def on_ranks(rank: int, world_size: int, case: Case) -> tuple[list[float], dict[str, Tensor]]:
    net = Net(seed=rank)  # rank 0's values are what counts
    engine = trilith.initialize(net, case.config(world_size))
    assert net.blocks[0].weight is net.blocks[2].weight
    norms = train(engine, case)
    engine.close()
    return norms, {name: tensor.cpu().clone() for name, tensor in net.state_dict().items()}


def plain(
    case: Case, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], lrs: list[float] | None = None
) -> tuple[list[float], dict[str, Tensor]]:
    """The whole batch in one process."""
    net = Net(0).double()
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = make(trained)
    norms = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = lrs[step] if lrs else group["lr"]
        for p in trained:
            p.grad = torch.zeros_like(p)  # an unused weight is decayed all the same
        net(batch_of(step)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, case.clipping or float("inf"))))
        optimizer.step()
    return norms, {name: tensor.detach() for name, tensor in net.state_dict().items()}


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LR, eps=1e-3, foreach=False)


def check(case: Case, world_size: int, expected: tuple[list[float], dict[str, Tensor]]) -> None:
    alone = world_size == 1 and case.device == "cpu"
    results = [on_ranks(0, 1, case)] if alone else run_ranks(world_size, on_ranks, case, device=case.device)
    for norms, weights in results:
        assert norms == pytest.approx(expected[0], rel=1e-12)
        assert_close_named({n: (weights[n], w) for n, w in expected[1].items()}, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_equals_one_process(world_size: int, stage: int) -> None:
    case = Case(stage=stage, clipping=1.0, accumulation=2 if world_size < 3 else 1)
    check(case, world_size, plain(case, adamw))


@pytest.mark.gpu
@pytest.mark.parametrize("world_size", [1, 2])
def test_equals_one_process_on_cuda(world_size: int) -> None:
    case = Case(clipping=1.0, accumulation=2, device="cuda")
    check(case, world_size, plain(case, adamw))


def test_other_optimizers_and_a_schedule() -> None:
    warm = {"warmup_max_lr": LR, "warmup_num_steps": 4, "warmup_type": "linear"}
    sgd = Case(
        accumulation=3,
        optimizer={"type": "SGD", "params": {"lr": 9.0, "momentum": 0.9}},
        scheduler={"type": "WarmupLR", "params": warm},
    )
    # DeepSpeed's rates: iterations -1, 0, 1, 2 of the warm-up.
    lrs = [0.0, 0.0, LR / 4, LR / 2]
    check(sgd, 2, plain(sgd, lambda ps: torch.optim.SGD(ps, lr=LR, momentum=0.9, foreach=False), lrs))


def own_optimizer(rank: int, world_size: int) -> tuple[list[float], dict[str, Tensor]]:
    case = Case(clipping=1.0)
    net = Net(seed=rank)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.NAdam(trained[:3], lr=LR)
    optimizer.add_param_group({"params": trained[3:], "lr": LR / 2})
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    engine = trilith.initialize(net, case.config(world_size), optimizer=optimizer, lr_scheduler=scheduler)
    norms = train(engine, case)
    assert engine.lr == pytest.approx(LR / 4)
    return norms, {name: tensor.clone() for name, tensor in net.state_dict().items()}


def test_an_own_optimizer_and_scheduler() -> None:
    net = Net(0).double()
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.NAdam(trained[:3], lr=LR)
    optimizer.add_param_group({"params": trained[3:], "lr": LR / 2})
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for step in range(STEPS):
        for p in trained:
            p.grad = torch.zeros_like(p)
        net(batch_of(step)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
    for _, weights in run_ranks(2, own_optimizer):
        pairs = {n: (weights[n], w.detach()) for n, w in net.state_dict().items()}
        assert_close_named(pairs, rtol=1e-12, atol=1e-13)


def overflow(rank: int, world_size: int) -> list[Any]:
    case = Case(dtype="fp16", scheduler={"type": "Constant", "params": {"warmup_num_steps": 10}})
    net = Net(0)
    engine = trilith.initialize(net, case.config(world_size))
    before = net.enter.detach().clone()
    bad = batch_of(0, torch.float16).view(world_size, -1, IN)[rank].clone()
    if rank == 1:
        bad[0, 0] = float("inf")
    engine.backward(engine(bad))
    engine.step()
    same, lr = torch.equal(before, net.enter), engine.lr
    train(engine, case, 2, torch.float16)
    moved = not torch.equal(before, net.enter)
    return [same, moved, lr, engine.lr, engine.skipped_steps, engine.global_steps, engine.sharded.loss_scale]


def test_an_overflow_on_one_rank_skips_the_step_on_all() -> None:
    for found in run_ranks(2, overflow):
        assert found == [True, True, pytest.approx(LR / 10), pytest.approx(3 * LR / 10), 1, 3, 512.0]


def test_half_precision_has_exact_masters_and_buffers_of_their_own_dtype() -> None:
    net = Net(0)
    exact = net.enter.detach().clone()
    engine = trilith.initialize(net, Case(dtype="bf16").config(1))
    assert net.enter.dtype == torch.bfloat16 and net.shift.dtype == torch.float32
    assert net.count.dtype == torch.int64 and net.blocks[1].bias.dtype == torch.bfloat16
    masters = {spec.name: (spec, t) for role, spec, t in engine.sharded.state_entries() if role == "master"}
    spec, storage = masters["enter"]
    assert torch.equal(storage[spec.pieces[0].offset :][: exact.numel()].view_as(exact), exact)


def test_gradients_set_to_none_or_replaced_by_the_user_are_not_lost() -> None:
    results = []
    for meddle in (False, True):
        net = Net(0)
        engine = trilith.initialize(net, Case().config(1))
        for step in range(3):
            if meddle:
                net.zero_grad(set_to_none=True)
            engine.backward(engine(batch_of(step)))
            engine.step()
        results.append({n: p.detach().clone() for n, p in net.named_parameters()})
    assert_close_named({n: (results[1][n], w) for n, w in results[0].items()}, rtol=0, atol=0)


def twice_in_reentrant_checkpoints(rank: int, world_size: int) -> str:
    net = Net(0)
    engine = trilith.initialize(net, Case().config(world_size))
    x = batch_of(0)[:, :1].expand(-1, HIDDEN).clone().requires_grad_()
    for _ in range(2):
        x = checkpoint(net.head, x, use_reentrant=True)
    try:
        engine.backward(x.square().mean())
    except TrilithError as error:
        return str(error)
    return "nothing was refused"


def test_a_gradient_that_arrives_twice_is_refused_by_name() -> None:
    for message in run_ranks(2, twice_in_reentrant_checkpoints):
        assert "unit head" in message and "overlap_comm" in message


def test_units_are_blocks_and_top_level_children() -> None:
    net, body = nn.Module(), nn.Module()
    net.add_module("body", body)
    body.add_module("layers", nn.ModuleList([Net(0)]))
    body.add_module("norm", nn.LayerNorm(2))
    net.register_parameter("bias", nn.Parameter(torch.zeros(1)))
    units = {parameter.name: parameter.flat_unit for parameter in Declared(net).local_parameters}
    assert units["body.layers.0.blocks.1.weight"] == "body.layers.0"
    assert units["body.norm.weight"] == "body.norm"
    assert units["bias"] == "root"


def test_using_it_wrongly_is_refused_with_the_fix() -> None:
    base = Case().config(1)
    with pytest.raises(ConfigError, match="train_batch_size"):
        trilith.initialize(Net(0), {})
    with pytest.raises(ConfigError, match="no multiple"):
        trilith.initialize(Net(0), {**base, "parallel": {"tensor": 2}})
    with pytest.raises(TrilithError, match="nothing to train"):
        trilith.initialize(Net(0).requires_grad_(False), base)
    with pytest.raises(TrilithError, match="enter was on the meta device"):
        with torch.device("meta"):
            net = Net(0)
        trilith.initialize(net, base)
    with pytest.raises(TrilithError, match="LBFGS"):
        net = Net(0)
        trilith.initialize(net, base, optimizer=torch.optim.LBFGS(net.parameters()))
    with pytest.raises(TrilithError, match="in no parameter group"):
        net = Net(0)
        trilith.initialize(net, base, optimizer=torch.optim.SGD([net.enter], lr=0.1))
    with pytest.raises(TrilithError, match="lr_scheduler"):
        trilith.initialize(Net(0), base, lr_scheduler=object())
    engine = trilith.initialize(Net(0), base)
    engine.backward(engine(batch_of(0)))
    with pytest.raises(TrilithError, match="twice on the last microbatch"):
        engine.backward(engine(batch_of(0)))


def test_a_function_of_the_step_may_be_the_schedule() -> None:
    engine = trilith.initialize(Net(0), Case().config(1), lr_scheduler=lambda step: 0.5 / (step + 1))
    assert engine.lr == 0.5 and engine.global_grad_norm is None
    train(engine, Case(), 1)
    assert engine.lr == 0.25
    assert engine.eval().module.training is False and engine.train().module.training is True


SCRIPT = """
import sys
import torch, trilith
from torch import nn
torch.manual_seed(0)
def main():
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    engine = trilith.initialize(net, {"train_batch_size": 8, "run": {"device": "cpu"}})
    engine.backward(engine(torch.ones(4, 4)).square().mean())
    engine.step()
    assert engine.topology.world_size == 2 and engine.global_grad_norm > 0
    if sys.argv[1] == "close":
        engine.close()
    return engine if sys.argv[1] == "keep the engine" else net
if sys.argv[1] == "let everything go":
    main()
else:
    kept = main()
"""


@pytest.mark.parametrize(
    "ending",
    [
        "close",
        "let everything go",
        *(pytest.param(e, marks=pytest.mark.slow) for e in ("keep the engine", "keep the model")),
    ],
)
def test_under_torchrun_it_makes_the_process_group_and_ends_in_peace(tmp_path: Path, ending: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), ending]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_public_names_load_torch_only_when_used() -> None:
    code = "import sys, trilith; trilith.Config; assert 'torch' not in sys.modules; trilith.initialize"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        trilith.nothing  # noqa: B018
