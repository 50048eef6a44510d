"""ZeRO beside the other axes: gradients summed over tensor ranks, ties over stages, one norm over all of them.

The losses are made up: what each rank holds gets a known gradient, so that the canonical result is known, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.harness import assert_close_named, run_ranks
from trilith.config import load_config, resolve
from trilith.models.base import (
    Init,
    LocalParameter,
    ParameterDecl,
    Split,
    TensorDecl,
    UnitDecl,
    local_parameter,
)
from trilith.optim.adamw import Adam, AdamOptions
from trilith.optim.groups import multipliers
from trilith.pipeline.action import NO_MICROBATCH
from trilith.precision import PrecisionPolicy
from trilith.process_groups import build_topology
from trilith.topology import Degrees, Topology
from trilith.zero.partition import flat_unit_names, tied_flat_units
from trilith.zero.sharded import ShardedModel, Sharding

HEADS, KV_HEADS, WIDTH, HIDDEN, VOCABULARY, STEPS = 6, 2, 3, 5, 11, 3
OPTIONS, LR, CLIPPING = AdamOptions((0.8, 0.9), 1e-3, 0.1), 0.05, 0.5


def tensor(name: str, *shape: int, split: Split | None = None) -> TensorDecl:
    return TensorDecl(name, shape, Init("normal", 0.02), split)


def block(unit: str) -> UnitDecl:
    queries, keys = Split(0, HEADS), Split(0, KV_HEADS, "kv_heads", HEADS)
    stacked = (
        tensor(f"{unit}.q", HEADS * WIDTH, HIDDEN, split=queries),
        tensor(f"{unit}.k", KV_HEADS * WIDTH, HIDDEN, split=keys),
        tensor(f"{unit}.v", KV_HEADS * WIDTH, HIDDEN, split=keys),
    )
    return UnitDecl(
        unit,
        (
            ParameterDecl(f"{unit}.norm", (tensor(f"{unit}.norm", HIDDEN),), unit, False, True),
            ParameterDecl(f"{unit}.qkv", stacked, unit),
            ParameterDecl(f"{unit}.out", (tensor(f"{unit}.out", HIDDEN, HEADS * WIDTH, split=Split(1, HEADS)),), unit),
        ),
        0.0,
    )


def tokens(name: str, copy: int) -> ParameterDecl:
    whole = tensor("tokens", VOCABULARY, HIDDEN, split=Split(0, VOCABULARY, "padded"))
    return ParameterDecl(name, (whole,), "tokens", tie_copy=copy)


FIRST = (UnitDecl("embedding", (tokens("embedding.tokens", 0),), 0.0), block("layers.0"))
LAST = (block("layers.1"), UnitDecl("head", (tokens("head.tokens", 1),), 0.0))
UNITS = (*FIRST, *LAST)


class Holder(nn.Module):
    """A stage's parameters, by their declared names, on the meta device."""

    def __init__(self, units: Sequence[UnitDecl], topology: Topology) -> None:
        super().__init__()
        group = topology.tp
        self.local_parameters = tuple(
            local_parameter(p, group.index, group.size, True) for unit in units for p in unit.parameters
        )
        for p in self.local_parameters:
            path, _, leaf = p.name.rpartition(".")
            owner: nn.Module = self
            for part in path.split("."):
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            setattr(owner, leaf, nn.Parameter(torch.empty(p.shape, device="meta", dtype=torch.float64)))


def canonical(kind: str, spec_name: str, shape: tuple[int, ...], holder: int = 0) -> Tensor:
    """Known values of a whole tensor: `weight`, or the `step`-th gradient that one holder contributes."""
    generator = torch.Generator().manual_seed(sum(map(ord, f"{kind}{spec_name}")) * 31 + holder)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def local_value(parameter: LocalParameter, kind: str, holder: int) -> Tensor:
    """This rank's part of canonical values; padding is zero."""
    flat = torch.zeros(parameter.numel, dtype=torch.float64)
    for spec in parameter.specs:
        value = canonical(kind, spec.name, spec.shape, holder)
        for piece in spec.pieces:
            box = tuple(slice(a, b) for a, b in zip(piece.box.start, piece.box.stop, strict=True))
            flat.as_strided(piece.box.shape, piece.strides, piece.offset).copy_(value[box])
    return flat.view(parameter.shape)


def sharding() -> Sharding:
    return Sharding(flat_unit_names(UNITS), tied_flat_units(UNITS), multipliers(), lambda parts: Adam(parts, OPTIONS))


def config_of(stage: int) -> Any:
    text = {
        "train_batch_size": 1,
        "gradient_clipping": CLIPPING,
        "data_types": {"param_dtype": "fp64"},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 0},
    }
    return resolve(load_config(text), 1, needs="engine").config


def holder_of(rank: int, name: str, degrees: Degrees) -> int:
    """Which contribution a rank makes: every rank of a pipeline stage one of its own."""
    copy = 1000 if name == "head.tokens" else 0
    return copy + rank % (degrees.world_size // degrees.pipeline)


def on_ranks(rank: int, world_size: int, degrees: Degrees, stage: int) -> dict[str, Any]:
    """Norms, and this rank's pieces of the master weights, after some steps with made-up gradients."""
    ties = {"tokens": (0, 1)} if degrees.pipeline > 1 else {}
    topology = build_topology(degrees, torch.device("cpu"), timeout_s=20, ties=ties)
    cuts = {0: FIRST, 1: LAST}
    mine = {i: cuts[i] for i in cuts if degrees.pipeline == 1 or i == topology.coordinate("pp")}
    stages = {i: Holder(units, topology) for i, units in mine.items()}
    config = config_of(stage)
    model = ShardedModel(stages, topology, PrecisionPolicy.from_config(config), config, sharding())
    for i, module in stages.items():
        for p in module.local_parameters:
            model.assign(i, p.name, local_value(p, "weight", 0))
    norms = []
    for step in range(STEPS):
        for i, module in stages.items():
            stage_parameters = model.stage(i)
            named = dict(module.named_parameters())
            stage_parameters.begin_backward(0, True)
            loss = torch.zeros((), dtype=torch.float64)
            for p in module.local_parameters:
                gradient = local_value(p, f"step{step}", holder_of(rank, p.name, degrees))
                loss = loss + (named[p.name] * gradient).sum()
            loss.backward()
            stage_parameters.reduce(NO_MICROBATCH)
        for i in stages:
            if topology.tie("tokens").size > 1:
                model.stage(i).tie_reduce(NO_MICROBATCH)
        norms.append(model.step(LR).grad_norm)
    copies = {
        name: value.detach().clone()
        for module in stages.values()
        for name, value in module.named_parameters()
        if name.endswith("tokens")
    }
    return {"norms": norms, "copies": copies, "masters": [(s, t.clone()) for _, s, t in weights_of(model)]}


def weights_of(model: ShardedModel) -> list[Any]:
    return [entry for entry in model.state_entries() if entry[0] == "weight"]


def contributions(degrees: Degrees) -> dict[str, dict[int, Tensor]]:
    """For each whole tensor: contribution -> mask of the elements that its rank holds. They add up to the gradient."""
    masks: dict[str, dict[int, Tensor]] = {}
    for rank in range(degrees.world_size // degrees.pipeline):
        for decl in (p for unit in UNITS for p in unit.parameters):
            for spec in local_parameter(decl, rank % degrees.tensor, degrees.tensor, True).specs:
                empty = torch.zeros(spec.shape, dtype=torch.float64)
                mask = masks.setdefault(spec.name, {}).setdefault(holder_of(rank, decl.name, degrees), empty)
                for piece in spec.pieces:
                    mask[tuple(slice(lo, hi) for lo, hi in zip(piece.box.start, piece.box.stop, strict=True))] = 1.0
    return masks


def expected(degrees: Degrees) -> tuple[dict[str, Tensor], list[float]]:
    """Whole weights and norms, from torch's AdamW on the canonical tensors."""
    shapes = {t.name: t.shape for unit in UNITS for p in unit.parameters for t in p.tensors}
    weights = {name: nn.Parameter(canonical("weight", name, shape)) for name, shape in shapes.items()}
    groups = [
        {"params": [w for n, w in weights.items() if "norm" not in n], "weight_decay": OPTIONS.weight_decay},
        {"params": [w for n, w in weights.items() if "norm" in n], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=OPTIONS.betas, eps=OPTIONS.eps, foreach=False)
    masks = contributions(degrees)
    norms = []
    for step in range(STEPS):
        for name, weight in weights.items():
            weight.grad = torch.zeros_like(weight)
            for holder, mask in masks[name].items():
                weight.grad += mask * canonical(f"step{step}", name, shapes[name], holder)
        norms.append(float(torch.nn.utils.clip_grad_norm_(list(weights.values()), CLIPPING)))
        optimizer.step()
    return {name: weight.detach() for name, weight in weights.items()}, norms


LAYOUTS = [
    Degrees(tensor=3),
    Degrees(shard=2, tensor=3),
    Degrees(shard=2, tensor=2),
    Degrees(pipeline=2),
    Degrees(pipeline=2, shard=2, tensor=2),
]


@pytest.mark.parametrize("degrees", LAYOUTS, ids=lambda d: f"d{d.shard}p{d.pipeline}t{d.tensor}")
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_shared_heads_norms_and_ties_equal_one_process(stage: int, degrees: Degrees) -> None:
    weights, norms = expected(degrees)
    results = run_ranks(degrees.world_size, on_ranks, degrees, stage)
    found = {name: torch.full_like(weight, float("nan")) for name, weight in weights.items()}
    for result in results:
        assert result["norms"] == results[0]["norms"]
        assert result["norms"] == pytest.approx(norms, rel=1e-12)
        for spec, storage in result["masters"]:
            for piece in spec.pieces:
                box = tuple(slice(a, b) for a, b in zip(piece.box.start, piece.box.stop, strict=True))
                value = storage.as_strided(piece.box.shape, piece.strides, piece.offset)
                here = found[spec.name][box]
                if piece.replica == 0:
                    assert bool(here.isnan().all()), f"{spec.name} {piece.box} is owned twice"
                    here.copy_(value)
    assert_close_named({name: (found[name], weights[name]) for name in weights}, rtol=1e-12, atol=1e-13)
    by_tensor_rank: dict[int, list[Tensor]] = {}
    for rank, result in enumerate(results):
        by_tensor_rank.setdefault(rank % degrees.tensor, []).extend(result["copies"].values())
    for copies in by_tensor_rank.values():
        assert all(torch.equal(copy, copies[0]) for copy in copies)


def test_the_norm_does_not_depend_on_where_stages_lie() -> None:
    together = run_ranks(2, on_ranks, Degrees(shard=2), 1)
    apart = run_ranks(4, on_ranks, Degrees(pipeline=2, shard=2), 1)
    assert together[0]["norms"] == apart[0]["norms"]


def late_gradient(rank: int, world_size: int) -> str:
    """A gradient that arrives after its unit was reduced is refused, not lost."""
    topology = build_topology(Degrees(shard=world_size), torch.device("cpu"), timeout_s=20)
    config = config_of(1)
    stage = Holder(FIRST, topology)
    model = ShardedModel({0: stage}, topology, PrecisionPolicy.from_config(config), config, sharding())
    model.stage(0).begin_backward(0, True)
    weights = list(stage.parameters())
    sum((w.sum() for w in weights), torch.zeros((), dtype=torch.float64)).backward()
    try:
        weights[-1].sum().backward()
    except Exception as error:
        return str(error)
    return "nothing was refused"


def test_a_gradient_after_its_reduction_is_refused() -> None:
    for message in run_ranks(2, late_gradient):
        assert "layers.0" in message and "use_reentrant=False" in message
