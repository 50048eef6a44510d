"""ZeRO 0 to 2 on several ranks against one process, in float64: values, norms, skips, and what must not matter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.harness import assert_close_named, run_ranks
from tests.zero_cases import trained_by_torch
from trilith.config import load_config, resolve
from trilith.models.base import LocalParameter
from trilith.optim.adamw import Adam, AdamOptions
from trilith.optim.groups import multipliers
from trilith.pipeline.action import NO_MICROBATCH
from trilith.precision import PrecisionPolicy
from trilith.process_groups import build_topology
from trilith.sharding import Piece, ShardSpec, contiguous_strides, whole
from trilith.topology import Degrees, Topology
from trilith.zero.sharded import ShardedModel, Sharding

VOCABULARY, HIDDEN, BLOCKS, BATCH, STEPS = 7, 5, 3, 12, 3
LR, DECAY = 0.05, 0.1


@dataclass(frozen=True)
class Case:
    """One way to train the toy."""

    stage: int = 1
    microbatches: int = 1
    clipping: float = 0.0
    overlap: bool = True
    bucket: int = 0
    tied: bool = False
    dtype: str = "fp64"
    frozen: bool = False
    poisoned_step: int = -1
    communication: str = "auto"
    device: str = "cpu"


def empty(*shape: int, device: str, dtype: torch.dtype) -> nn.Parameter:
    """A parameter without values; torch's own layers would draw some, which on the meta device loads a compiler."""
    return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))


class Toy(nn.Module):
    """Embedding, blocks with a norm-like vector, an output (tied or not), and a weight that forward never uses."""

    def __init__(self, tied: bool, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding = empty(VOCABULARY, HIDDEN, device=device, dtype=dtype)
        self.blocks = nn.ModuleList(Block(device, dtype) for _ in range(BLOCKS))
        self.unused = empty(3, 2, device=device, dtype=dtype)
        self.output = self.embedding if tied else empty(VOCABULARY, HIDDEN, device=device, dtype=dtype)

    @property
    def local_parameters(self) -> tuple[LocalParameter, ...]:
        """One unit per block, one per other child."""
        return tuple(declared(name, p) for name, p in self.named_parameters())

    def forward(self, tokens: Tensor) -> Tensor:
        """Sum of squared logits against the next token's one-hot."""
        x = self.embedding[tokens]
        for block in self.blocks:
            x = block(x)
        target = nn.functional.one_hot((tokens + 1) % VOCABULARY, VOCABULARY).to(x.dtype)
        return (x @ self.output.T - target).square().sum()


class Block(nn.Module):
    """x + tanh(W (norm * (W x + b)) + b): W and b are used twice."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = empty(HIDDEN, device=device, dtype=dtype)
        self.weight = empty(HIDDEN, HIDDEN, device=device, dtype=dtype)
        self.bias = empty(HIDDEN, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H) to (B, H)."""
        inner = self.norm * nn.functional.linear(x, self.weight, self.bias)
        return x + torch.tanh(nn.functional.linear(inner, self.weight, self.bias))


def declared(name: str, parameter: Tensor) -> LocalParameter:
    """A parameter that is whole on every rank."""
    shape = tuple(parameter.shape)
    spec = ShardSpec(name, shape, (Piece(whole(shape), 0, contiguous_strides(shape)),))
    unit = ".".join(name.split(".")[: 2 if name.startswith("blocks") else 1])
    return LocalParameter(name, shape, (spec,), (), unit, len(shape) > 1, (), 0)


def config_of(case: Case) -> Any:
    section: dict[str, Any] = {"data_types": {"param_dtype": case.dtype}}
    if case.dtype == "fp16":
        section["fp16"] = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}
    return resolve(
        load_config(
            {
                "train_micro_batch_size_per_gpu": 1,
                "gradient_clipping": case.clipping,
                "communication_data_type": case.communication,
                "zero_optimization": {
                    "stage": case.stage,
                    "overlap_comm": case.overlap,
                    "reduce_bucket_size": case.bucket,
                },
                **section,
            }
        ),
        1,
        needs="engine",
    ).config


def sharding_of(toy: Toy) -> Sharding:
    units = tuple(dict.fromkeys(p.flat_unit for p in toy.local_parameters))
    options = AdamOptions((0.8, 0.9), 1e-3, DECAY)
    return Sharding(units, frozenset(), multipliers(), lambda partitions: Adam(partitions, options))


def initial(name: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5


def tokens_of(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, VOCABULARY, (BATCH,), generator=generator)


def make_model(case: Case, topology: Topology) -> tuple[Toy, ShardedModel]:
    config = config_of(case)
    policy = PrecisionPolicy.from_config(config)
    toy = Toy(case.tied, "meta", policy.param_dtype)
    if case.frozen:
        toy.blocks[1].weight.requires_grad_(False)
    model = ShardedModel({0: toy}, topology, policy, config, sharding_of(toy))
    for p in toy.local_parameters:
        model.assign(0, p.name, initial(p.name, p.shape))
    return toy, model


def train(model: ShardedModel, toy: Toy, case: Case, steps: range) -> list[tuple[float, bool, float]]:
    """(norm, skipped, loss scale) of each step; every data rank takes its part of each microbatch."""
    dp, stage = model.topology.dp, model.stage(0)
    outcomes = []
    for step in steps:
        parts = tokens_of(step).to(model.device).view(case.microbatches, dp.size, -1)
        for index, microbatch in enumerate(parts):
            stage.begin_backward(index, index == case.microbatches - 1)
            loss = toy(microbatch[dp.index]) / BATCH
            if step == case.poisoned_step and dp.index == dp.size - 1:
                loss = loss * float("inf")
            (loss.float() if case.dtype == "fp16" else loss).mul(model.loss_scale).backward()
            stage.end_backward(index, index == case.microbatches - 1)
        stage.reduce(NO_MICROBATCH)
        outcome = model.step(LR)
        outcomes.append((outcome.grad_norm, outcome.skipped, outcome.loss_scale))
    return outcomes


def on_ranks(rank: int, world_size: int, case: Case) -> dict[str, Any]:
    topology = build_topology(Degrees(shard=world_size), torch.device(case.device), timeout_s=20)
    toy, model = make_model(case, topology)
    outcomes = train(model, toy, case, range(STEPS))
    weights = {name: p.detach().clone() for name, p in toy.named_parameters()}
    hooks = sum(len(p._post_accumulate_grad_hooks or ()) for p in toy.parameters())
    memory = model.memory_bytes()
    model.close()
    assert not any(p._post_accumulate_grad_hooks for p in toy.parameters())
    assert all(p.grad is None for p in toy.parameters())
    return {"weights": weights, "outcomes": outcomes, "hooks": hooks, "memory": memory}


def reference(case: Case, steps: int = STEPS) -> tuple[dict[str, Tensor], list[float]]:
    """The same training in one process with torch's own optimizer: weights and norms."""
    toy = Toy(case.tied, "cpu", torch.float64)
    with torch.no_grad():
        for name, p in toy.named_parameters():
            p.copy_(initial(name, tuple(p.shape)))
    if case.frozen:
        toy.blocks[1].weight.requires_grad_(False)
    return trained_by_torch(toy, [tokens_of(step) for step in range(steps)], case.clipping, LR, DECAY)


def check_against_reference(case: Case, results: list[dict[str, Any]], rtol: float = 1e-12) -> None:
    weights, norms = reference(case)
    for result in results:
        assert [o[0] for o in result["outcomes"]] == pytest.approx(norms, rel=rtol)
        assert result["outcomes"] == results[0]["outcomes"]
        pairs = {n: (result["weights"][n].cpu(), w) for n, w in weights.items()}
        assert_close_named(pairs, rtol=rtol, atol=1e-13)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_equals_one_process(world_size: int, stage: int) -> None:
    case = Case(stage=stage, clipping=0.7, tied=world_size % 2 == 0, frozen=world_size == 3)
    if world_size == 1:
        check_against_reference(case, [on_ranks(0, 1, case)])
        return
    results = run_ranks(world_size, on_ranks, case)
    check_against_reference(case, results)
    for result in results[1:]:
        assert all(torch.equal(result["weights"][n], w) for n, w in results[0]["weights"].items())


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_equals_one_process_on_cuda(world_size: int, stage: int) -> None:
    case = Case(stage=stage, clipping=0.7, microbatches=2, device="cuda")
    check_against_reference(case, run_ranks(world_size, on_ranks, case, device="cuda"))


@pytest.mark.parametrize(
    "case",
    [
        Case(microbatches=3, clipping=0.7),
        Case(microbatches=2, overlap=False, frozen=True),
        Case(microbatches=6, stage=0, tied=True, clipping=100.0),
        Case(microbatches=2, bucket=10**9, tied=True, clipping=0.1),
        Case(microbatches=3, stage=2, tied=True, clipping=0.1),
        Case(microbatches=2, stage=2, overlap=False, frozen=True),
    ],
    ids=str,
)
def test_accumulation_equals_one_process(case: Case) -> None:
    check_against_reference(case, run_ranks(2, on_ranks, case))


def test_bucket_size_overlap_and_stage_do_not_change_a_bit() -> None:
    base = Case(stage=1, microbatches=2, dtype="fp32")
    variants = [
        base,
        replace(base, bucket=60),
        replace(base, bucket=10**9),
        replace(base, overlap=False),
        replace(base, stage=0),
        replace(base, stage=0, bucket=10**9),
    ]
    expected = run_ranks(3, on_ranks, base)[0]
    for case in variants[1:]:
        for result in run_ranks(3, on_ranks, case):
            for name, weight in expected["weights"].items():
                assert torch.equal(result["weights"][name], weight), (case, name)


def test_hooks_exist_only_where_they_are_needed() -> None:
    assert on_ranks(0, 1, Case())["hooks"] == 0
    assert on_ranks(0, 1, Case(dtype="bf16"))["hooks"] == len(list(Toy(False, "meta", torch.float32).parameters()))
    assert [r["hooks"] for r in run_ranks(2, on_ranks, Case(overlap=False))] == [0, 0]


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_lower_precision_follows_the_reference(stage: int, dtype: str) -> None:
    case = Case(stage=stage, dtype=dtype, microbatches=2, clipping=0.7)
    weights, norms = reference(case)
    for result in run_ranks(2, on_ranks, case):
        assert [o[0] for o in result["outcomes"]] == pytest.approx(norms, rel=1e-5 if dtype == "fp32" else 0.1)
        for name, weight in weights.items():
            limit = 1e-5 if dtype == "fp32" else 0.08
            assert float((result["weights"][name].double() - weight).abs().max()) < limit, name


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_one_overflow_anywhere_skips_the_step_everywhere(stage: int) -> None:
    case = Case(stage=stage, dtype="fp16", poisoned_step=1)
    results = run_ranks(2, on_ranks, case)
    for result in results:
        skips = [skipped for _, skipped, _ in result["outcomes"]]
        assert skips == [False, True, False]
        assert [scale for _, _, scale in result["outcomes"]] == [256.0, 256.0, 128.0]
        assert not isfinite(result["outcomes"][1][0]) and isfinite(result["outcomes"][2][0])
        assert all(bool(w.isfinite().all()) for w in result["weights"].values())
        assert all(torch.equal(result["weights"][n], w) for n, w in results[0]["weights"].items())


def test_reduction_in_another_dtype_rounds_and_nothing_else() -> None:
    exact = run_ranks(2, on_ranks, Case(dtype="fp32"))[0]
    rounded = run_ranks(2, on_ranks, Case(dtype="fp32", communication="bf16"))[0]
    norms = [(a[0], b[0]) for a, b in zip(exact["outcomes"], rounded["outcomes"], strict=True)]
    assert all(a != b and a == pytest.approx(b, rel=1e-2) for a, b in norms)


def test_bytes_are_counted() -> None:
    toy = Toy(False, "meta", torch.float32)
    num_parameters = sum(p.numel() for p in toy.parameters())
    for dtype, weight, moments in (("fp32", 4, 8), ("bf16", 2, 12)):
        for stage, shards in ((0, 1), (1, 4), (2, 4)):
            memory = run_ranks(4, on_ranks, Case(stage=stage, dtype=dtype))[3]["memory"]
            # The rest is padding: to 16 elements for each parameter, to 64 for each unit.
            slack = 16 * len(list(toy.parameters())) + 64 * (BLOCKS + 3)
            assert 0 <= memory["parameters"] - weight * num_parameters <= weight * slack
            whole = num_parameters / (shards if stage == 2 else 1)
            assert 0 <= memory["gradients"] - 4 * whole <= 4 * slack
            assert 0 <= memory["optimizer"] - moments * num_parameters / shards <= moments * slack / shards


def resume_on_ranks(rank: int, world_size: int, case: Case) -> bool:
    topology = build_topology(Degrees(shard=world_size), torch.device(case.device), timeout_s=20)
    toy, model = make_model(case, topology)
    train(model, toy, case, range(2))
    saved = [(role, spec, tensor.clone()) for role, spec, tensor in model.state_entries()]
    scalars = model.state_dict()
    expected = train(model, toy, case, range(2, 4))
    again, resumed = make_model(case, topology)
    entries = resumed.state_entries()
    assert [(role, spec) for role, spec, _ in entries] == [(role, spec) for role, spec, _ in saved]
    for (_, _, tensor), (_, _, value) in zip(entries, saved, strict=True):
        tensor.copy_(value)
    resumed.load_state_dict(scalars)
    resumed.after_load()
    assert train(resumed, again, case, range(2, 4)) == expected
    owned = {(spec.name, role): spec.numel for role, spec, _ in resumed.owned_entries()}
    if case.stage == 0:
        assert bool(owned) == (rank == 0)
    return all(torch.equal(a, b) for a, b in zip(toy.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("case", [Case(stage=0, dtype="fp16"), Case(stage=2, dtype="bf16"), Case(dtype="fp64")])
def test_saved_state_continues_bit_for_bit(case: Case) -> None:
    assert all(run_ranks(2, resume_on_ranks, replace(case, clipping=0.5, frozen=True)))


def gradients_on_ranks(rank: int, world_size: int, case: Case) -> dict[str, Any]:
    topology = build_topology(Degrees(shard=world_size), torch.device("cpu"), timeout_s=20)
    toy, model = make_model(case, topology)
    model.stage(0).begin_backward(0, True)
    (toy(tokens_of(0).view(world_size, -1)[rank]) / BATCH).backward()
    model.finish()
    found = [(spec, tensor.clone()) for _, spec, tensor in model.gradient_entries()]
    norm = model.grad_norm()
    model.finish()
    outcome = model.step(LR)
    return {"gradients": found, "norms": [norm, outcome.grad_norm]}


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_reduced_gradients_can_be_looked_at_before_the_step(stage: int) -> None:
    toy = Toy(False, "cpu", torch.float64)
    with torch.no_grad():
        for name, p in toy.named_parameters():
            p.copy_(initial(name, tuple(p.shape)))
    (toy(tokens_of(0)) / BATCH).backward()
    seen: set[str] = set()
    for result in run_ranks(2, gradients_on_ranks, Case(stage=stage)):
        assert result["norms"][0] == result["norms"][1]
        for spec, storage in result["gradients"]:
            whole_gradient = toy.get_parameter(spec.name).grad
            for piece in spec.pieces:
                box = tuple(slice(lo, hi) for lo, hi in zip(piece.box.start, piece.box.stop, strict=True))
                part = storage.as_strided(piece.box.shape, piece.strides, piece.offset)
                expected = torch.zeros_like(part) if whole_gradient is None else whole_gradient[box]
                assert_close_named({spec.name: (part, expected)}, rtol=1e-12)
                seen.add(spec.name)
    assert seen == {name for name, _ in toy.named_parameters()}
