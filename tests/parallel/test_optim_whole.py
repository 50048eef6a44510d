"""LAMB and Muon on several tensor ranks and owners, driven directly, against plain versions in one process."""

from __future__ import annotations

import pytest
import torch

from tests.harness import run_ranks
from tests.unit.test_optim_whole import OPTIONS
from tests.whole_cases import Place, check, expected, maker, model, partitions, plain_of, tied_copy
from trilith.process_groups import build_topology
from trilith.topology import Degrees


def one_layout(rank: int, world_size: int, data: int, tensor: int, device: str) -> int:
    """Every optimizer on this rank's part of the model, its tied copy included."""
    where = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    topology = build_topology(Degrees(shard=data, tensor=tensor), where, 60)
    place = Place(topology.tp.index, tensor, topology.dp.index, data)
    count = 0
    for name, options in OPTIONS.items():
        wanted = expected(model(), plain_of(options), 3.7, torch.float64)
        for parameters in (model(), tied_copy(model()), tied_copy(model(), tensor + 1)):
            parts = partitions(parameters, place, torch.float64, torch.float64, where)
            worst, count = check(maker(options, topology.tp), parts, wanted, 3.7)
            assert worst < 1e-12, (name, place)
    return count


@pytest.mark.parametrize(("data", "tensor"), [(1, 2), (2, 2), (1, 3)])
def test_every_layout_steps_as_one_process(data: int, tensor: int) -> None:
    counts = run_ranks(data * tensor, one_layout, data, tensor, "cpu")
    assert sum(counts) >= sum(t.numel for parameter in model() for t in parameter.tensors)


@pytest.mark.gpu
def test_every_layout_steps_as_one_process_on_cuda() -> None:
    run_ranks(1, one_layout, 1, 1, "cuda", device="cuda")
    run_ranks(4, one_layout, 2, 2, "cuda", device="cuda")
