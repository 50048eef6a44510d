"""Weights that several stages share: two copies on one rank, others elsewhere, several ties crossing each other."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.harness import run_ranks
from trilith.config import load_config, resolve
from trilith.models.base import LocalParameter
from trilith.optim.groups import multipliers
from trilith.optim.sgd import SGD, SGDOptions
from trilith.pipeline.action import NO_MICROBATCH
from trilith.precision import PrecisionPolicy
from trilith.process_groups import build_topology
from trilith.sharding import Piece, ShardSpec, contiguous_strides, whole
from trilith.topology import Degrees
from trilith.zero.sharded import ShardedModel, Sharding

PLACEMENT = (0, 1, 1, 0)  # V-shaped: two stages on each of two pipeline ranks
# Unit -> stages. `a` lies twice on rank 0 and once on rank 1; `a` and `z` come in another order on each rank; `own` lies
# on rank 0 only; `free` is not shared.
HELD = {"a": (0, 1, 3), "z": (0, 2), "m": (1, 3), "own": (0, 3), "free": (2,)}
TIED = {name: stages for name, stages in HELD.items() if len(stages) > 1}
SHAPE, LR, STEPS = (3, 7), 0.5, 2


class Shared(nn.Module):
    """The weights of one stage, named after their units."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        names = [name for name, stages in HELD.items() if stage in stages]
        self.weights = nn.ParameterDict({name: nn.Parameter(start(name)) for name in names})
        self.local_parameters = tuple(declared(name, HELD[name].index(stage)) for name in names)


def declared(name: str, copy: int) -> LocalParameter:
    spec = ShardSpec(name, SHAPE, (Piece(whole(SHAPE), 0, contiguous_strides(SHAPE), copy),))
    return LocalParameter(f"weights.{name}", SHAPE, (spec,), (), name, True, (), 0)


def values(*what: object) -> Tensor:
    """Numbers in multiples of 1/8: their sums are exact in any order."""
    generator = torch.Generator().manual_seed(sum(ord(c) * (i + 1) for i, c in enumerate(repr(what))))
    return torch.randint(-64, 64, SHAPE, generator=generator).double() / 8


def start(name: str) -> Tensor:
    return values("weight", name)


def gradient(name: str, stage: int, data_rank: int, step: int) -> Tensor:
    return values("gradient", name, stage, data_rank, step)


def pipeline_ranks(placement: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The ties that need a group."""
    found = {name: tuple(sorted({placement[stage] for stage in stages})) for name, stages in TIED.items()}
    return {name: ranks for name, ranks in found.items() if len(ranks) > 1}


def on_ranks(rank: int, world_size: int, placement: tuple[int, ...], data: int, zero: int) -> dict[str, Any]:
    """Norms and every copy of every weight here after some steps, for each order of the rank's TIE_REDUCE actions."""
    degrees = Degrees(pipeline=max(placement) + 1, shard=data)
    topology = build_topology(degrees, torch.device("cpu"), 20, ties=pipeline_ranks(placement))
    text = {
        "train_batch_size": 1,
        "gradient_clipping": 0.0,
        "data_types": {"param_dtype": "fp64"},
        "zero_optimization": {"stage": zero, "reduce_bucket_size": 0},
    }
    config = resolve(load_config(text), 1, needs="engine").config
    here = [stage for stage, owner in enumerate(placement) if owner == topology.coordinate("pp")]
    stages = {stage: Shared(stage) for stage in here}
    sharding = Sharding(tuple(HELD), frozenset(TIED), multipliers(), lambda parts: SGD(parts, SGDOptions()))
    model = ShardedModel(stages, topology, PrecisionPolicy.from_config(config), config, sharding)
    norms = []
    for step in range(STEPS):
        for stage, module in stages.items():
            model.stage(stage).begin_backward(0, True)
            pairs = [(w, gradient(name, stage, topology.dp.index, step)) for name, w in module.weights.items()]
            sum(((w * g).sum() for w, g in pairs), torch.zeros((), dtype=torch.float64)).backward()
            model.stage(stage).reduce(NO_MICROBATCH)
        order = list(permutations(here))[step % 2] if len(here) > 1 else here
        for stage in order:
            model.stage(stage).tie_reduce(NO_MICROBATCH)
        norms.append(model.step(LR).grad_norm)
    weights = {(s, name): w.detach().clone() for s, module in stages.items() for name, w in module.weights.items()}
    return {"norms": norms, "weights": weights}


def expected(data: int) -> tuple[list[float], dict[str, Tensor]]:
    """What one process that holds each weight once computes."""
    weights, norms = {name: start(name) for name in HELD}, []
    for step in range(STEPS):
        sums = {
            name: sum((gradient(name, stage, rank, step) for stage in stages for rank in range(data)), torch.zeros(()))
            for name, stages in HELD.items()
        }
        norms.append(float(torch.cat([g.flatten() for g in sums.values()]).norm()))
        for name, total in sums.items():
            weights[name] -= LR * total
    return norms, weights


@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize("data", [1, 2])
@pytest.mark.parametrize("placement", [PLACEMENT, (0, 0, 1, 1), (0, 0, 0, 0), (0, 1, 2, 0)], ids=str)
def test_every_copy_gets_the_sum_of_all(placement: tuple[int, ...], data: int, zero: int) -> None:
    norms, weights = expected(data)
    for result in run_ranks((max(placement) + 1) * data, on_ranks, placement, data, zero):
        assert result["norms"] == pytest.approx(norms, rel=1e-14)
        for (stage, name), weight in result["weights"].items():
            assert torch.equal(weight, weights[name]), (stage, name)


def unfinished(rank: int, world_size: int) -> str:
    """A tie that was never summed is noticed, not left wrong."""
    topology = build_topology(Degrees(pipeline=2), torch.device("cpu"), 20, ties={"a": (0, 1)})
    config = resolve(load_config({"train_batch_size": 1, "data_types": {"param_dtype": "fp64"}}), 1, needs="engine")
    module = Shared(0 if rank == 0 else 1)
    sharding = Sharding(tuple(HELD), frozenset(("a",)), multipliers(), lambda parts: SGD(parts, SGDOptions()))
    policy = PrecisionPolicy.from_config(config.config)
    model = ShardedModel({rank: module}, topology, policy, config.config, sharding)
    model.stage(rank).reduce(NO_MICROBATCH)
    try:
        model.step(LR)
    except AssertionError as error:
        return str(error)
    return "nothing was noticed"


def test_a_tie_that_was_not_summed_is_noticed() -> None:
    assert run_ranks(2, unfinished) == ["a was not summed with its copies"] * 2
