"""The calls that DeepSpeed's users know, on any module: checkpoints, accumulation, whole weights, empty weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import trilith
from tests.harness import run_ranks
from trilith.errors import TrilithError
from trilith.zero.module import Engine

IN, HIDDEN, BATCH = 6, 8, 4


class Net(nn.Module):
    """Blocks between two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(IN, HIDDEN)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Dropout(0.1)) for _ in range(3)
        )
        self.leave = nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = x + block(x)
        return self.leave(x).square().mean()


def config(zero: int, **others: Any) -> dict[str, Any]:
    section = {"stage": zero, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
    section |= others.pop("zero_optimization", {})
    return {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": 2,
        "data_types": {"param_dtype": "fp64"},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.05, "weight_decay": 0.1}},
        "zero_optimization": section,
        "run": {"device": "cpu"},
        **others,
    }


def made(content: dict[str, Any], **handed_in: Any) -> Engine:
    torch.manual_seed(3)
    engine: Engine = trilith.initialize(Net().double(), content, **handed_in)
    return engine


def batch_of(step: int, microbatch: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + 10 * microbatch + rank)
    return torch.randn(BATCH, IN, generator=generator, dtype=torch.float64)


def train(engine: Engine, steps: range) -> list[float]:
    """Losses of this rank's first microbatches."""
    losses = []
    for step in steps:
        for microbatch in range(2):
            torch.manual_seed(1000 * step + microbatch)
            loss = engine(batch_of(step, microbatch, engine.topology.data_index))
            engine.backward(loss)
            engine.step()
            if microbatch == 0:
                losses.append(loss.item())
    return losses


def weights_of(engine: Engine) -> dict[str, Tensor]:
    with engine.gathered_parameters():
        return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def with_own_optimizer(zero: int) -> Engine:
    torch.manual_seed(3)
    net = Net().double()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    engine: Engine = trilith.initialize(net, config(zero), optimizer=optimizer, lr_scheduler=scheduler)
    return engine


def resumes(rank: int, world_size: int, directory: str, zero: int, own: bool) -> None:
    make = (lambda: with_own_optimizer(zero)) if own else (lambda: made(config(zero)))
    engine = make()
    train(engine, range(2))
    path = engine.save_checkpoint(directory, client_state={"epoch": 7})
    expected = (train(engine, range(2, 4)), weights_of(engine))
    again = make()
    loaded, client = again.load_checkpoint(directory)
    assert (loaded, client, again.global_steps) == (path, {"epoch": 7}, 2)
    found = (train(again, range(2, 4)), weights_of(again))
    assert found[0] == expected[0] and same(found[1], expected[1])
    assert not own or again.lr == engine.lr == pytest.approx(0.05 / 16)


@pytest.mark.parametrize("own", [False, True], ids=["config's optimizer", "own optimizer"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_resumed_engine_has_the_same_bits(zero: int, own: bool, tmp_path: Path) -> None:
    run_ranks(2, resumes, str(tmp_path), zero, own)


def saves(rank: int, world_size: int, directory: str) -> dict[str, Tensor]:
    engine = made(config(3))
    train(engine, range(2))
    engine.save_checkpoint(directory, tag="best")
    return weights_of(engine)


def test_one_rank_reads_what_two_wrote(tmp_path: Path) -> None:
    (expected, _) = run_ranks(2, saves, str(tmp_path))
    engine = made(config(1))
    engine.load_checkpoint(tmp_path, tag="best", load_module_only=True)
    assert same(weights_of(engine), expected) and engine.global_steps == 0


# ---- accumulation ---------------------------------------------------------------------------------------------------


def accumulates(rank: int, world_size: int, zero: int) -> None:
    plain, other = made(config(zero)), made(config(zero, gradient_accumulation_steps=1))
    for engine in (plain, other):
        engine.eval()
    train(plain, range(1))
    with other.no_sync():
        other.backward(other(batch_of(0, 0, rank)) / 2)
        with pytest.raises(TrilithError, match="no_sync"):
            other.step()
    other.backward(other(batch_of(0, 1, rank)) / 2)
    other.step()
    mine, theirs = weights_of(plain), weights_of(other)
    assert all(torch.allclose(mine[name], theirs[name], rtol=1e-10, atol=1e-13) for name in mine)
    other.set_gradient_accumulation_boundary(False)
    other.backward(other(batch_of(1, 0, rank)))
    other.step()
    assert other.global_steps == 1
    other.set_gradient_accumulation_boundary(True)
    other.backward(other(batch_of(1, 1, rank)))
    other.step()
    assert other.global_steps == 2 and other.get_global_grad_norm() is not None
    assert other.get_lr() == [0.05] and other.train_micro_batch_size_per_gpu() == BATCH


@pytest.mark.parametrize("zero", [0, 1])
def test_gradients_are_added_up_without_a_word(zero: int) -> None:
    run_ranks(2, accumulates, zero)


def refuses(rank: int, world_size: int) -> None:
    with pytest.raises(TrilithError, match=r"no_sync: at zero_optimization\.stage 2"), made(config(2)).no_sync():
        pass


def test_no_sync_needs_whole_gradients() -> None:
    run_ranks(2, refuses)


def reads(rank: int, world_size: int) -> list[list[int]]:
    data = list(range(16))
    engine = made(config(0), training_data=data)
    loader = engine.training_dataloader
    assert loader is not None
    return [[int(i) for batch in loader for i in batch] for _ in range(2)]


def test_ranks_read_parts_of_a_data_set_in_an_order_of_the_epoch() -> None:
    (first, again), (second, _) = run_ranks(2, reads)
    assert sorted([*first, *second]) == list(range(16)) and first != again


# ---- whole weights --------------------------------------------------------------------------------------------------


def changes(rank: int, world_size: int, zero: int, offload: str) -> dict[str, Tensor]:
    sections = {"zero_optimization": {"offload_optimizer": {"device": offload}}} if zero else {}
    engine = made(config(zero, **sections))
    with engine.gathered_parameters(modifier_rank=0):
        if rank == 0:
            nn.init.constant_(engine.module.leave.weight, 0.25)
    assert bool((weights_of(engine)["leave.weight"] == 0.25).all())
    train(engine, range(1))
    state = engine.module_state_dict()
    assert (len(state) > 0) == (rank == 0)
    return weights_of(engine)


@pytest.mark.parametrize(("zero", "offload"), [(0, "none"), (1, "cpu"), (3, "none"), (3, "cpu")])
def test_what_one_rank_changes_goes_to_all(zero: int, offload: str) -> None:
    first, second = run_ranks(2, changes, zero, offload)
    alone = run_ranks(2, changes, 0, "none")[0]
    assert same(first, second)
    assert all(torch.allclose(first[name], alone[name], rtol=1e-10, atol=1e-13) for name in first)


def exports(rank: int, world_size: int, directory: str) -> dict[str, Tensor]:
    engine = made(config(3))
    with pytest.raises(TrilithError, match="stage3_gather_16bit_weights_on_model_save"):
        engine.save_16bit_model(directory)
    engine = made(config(3, zero_optimization={"stage3_gather_16bit_weights_on_model_save": True}))
    engine.save_16bit_model(directory)
    return weights_of(engine)


def test_the_whole_model_in_16_bits(tmp_path: Path) -> None:
    weights = run_ranks(2, exports, str(tmp_path))[0]
    found = load_file(tmp_path / "model.safetensors")
    assert same(found, {name: value.to(torch.bfloat16) for name, value in weights.items()})


# ---- empty weights --------------------------------------------------------------------------------------------------


def empties(rank: int, world_size: int, zero: int) -> tuple[dict[str, Tensor], list[float]]:
    with trilith.empty_weights():
        net = Net().double()
    assert all(p.is_meta for p in net.parameters())
    engine: Engine = trilith.initialize(net, config(zero))
    weights = weights_of(engine)
    assert all(bool(value.isfinite().all()) and bool((value != 0).any()) for value in weights.values())
    return weights, train(engine, range(2))


def test_empty_weights_are_initialised_alike_in_every_layout() -> None:
    alone = run_ranks(1, empties, 0)[0]
    for zero in (0, 1, 3):
        first, second = run_ranks(2, empties, zero)
        assert same(first[0], alone[0]) and same(second[0], alone[0])


def recomputes(rank: int, world_size: int, zero: int) -> None:
    plain = made(config(zero))
    again = made(config(zero, activation_checkpointing={"recompute": "full"}))
    assert train(plain, range(3)) == train(again, range(3))
    assert same(weights_of(plain), weights_of(again))


@pytest.mark.parametrize("zero", [0, 3])
def test_recompute_of_blocks_changes_no_bit(zero: int) -> None:
    run_ranks(2, recomputes, zero)
