"""Where offload puts bytes, how many it moves, what "auto" does with a limit, and checkpoints between places."""

from __future__ import annotations

import copy
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

import trilith
from tests.cells import Cell
from tests.harness import run_ranks
from tests.layer_cases import model as layers
from tests.offload_cases import Trace, assert_same_bits, content, kept_on_device, limited, offloaded, states_of, trace
from tests.parallel.test_pipeline_engine import Case
from trilith import preflight
from trilith.trainer import Place, Trainer
from trilith.zero.placement import Sized, Tier, place_units

BYTES = {"fp64": 8, "fp32": 4, "bf16": 2}
MICROBATCHES = 2


# ---- memory and traffic ---------------------------------------------------------------------------------------------


def counted(rank: int, world_size: int, source: dict[str, Any], steps: int = 4) -> dict[str, Any]:
    """A rank's memory before any checkpoint, what each of its last steps moved, and the sizes of its units."""
    plan = preflight.plan(source)
    trainer = Trainer(plan, Place(rank, world_size))
    model, moved = trainer.model, list[dict[str, int]]()
    for _ in range(steps):
        before = dict(vars(model.offload.moved)), model.gatherer.gathered_numel if model.gatherer else 0
        trainer.train_step()
        after = dict(vars(model.offload.moved)), model.gatherer.gathered_numel if model.gatherer else 0
        moved.append({key: after[0][key] - before[0][key] for key in after[0]} | {"gathered": after[1] - before[1]})
    found = {
        "memory": model.memory_bytes(),
        "moved": moved,
        "own": [unit.stop - unit.start for unit in model.units],
        "numel": [unit.layout.numel for unit in model.units],
        "plan": plan.memory[0],
        "window": model.gatherer.peak_bytes if model.gatherer else 0,
        "gathered_by_plan": plan.gathers[0].gathered_numel if plan.gathers else 0,
        "parameters": sum(prod(p.shape) for s in trainer.stages.values() for p in s.local_parameters),
    }
    trainer.close()
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("zero", "optimizer", "param"),
    [
        (1, "cpu", "none"),
        (2, "cpu", "none"),
        (2, "nvme", "none"),
        (3, "cpu", "cpu"),
        (3, "nvme", "nvme"),
        (3, "none", "cpu"),
    ],
)
def test_bytes_are_those_of_the_formulas(zero: int, optimizer: str, param: str, dtype: str, tmp_path: Path) -> None:
    """Gradients down and weights up once a step, or with every microbatch, or every gather; states once each way."""
    plain = content(Cell(data=2, microbatches=MICROBATCHES, zero=zero), dtype)
    element, master, gradient, moments = BYTES[dtype], 4, 4, 2
    for found in run_ranks(2, counted, offloaded(plain, optimizer, param, str(tmp_path))):
        own, numel, memory, last = sum(found["own"]), sum(found["numel"]), found["memory"], found["moved"][-1]
        states = own * (moments + 1) * master
        tier = {"none": "", "cpu": "host_", "nvme": "disk_"}
        places = {f"{tier[optimizer]}optimizer": states, f"{tier[param]}parameters": own * element}
        if zero < 3:
            places["parameters"] = numel * element
        places["host_gradients" if optimizer != "none" else "gradients"] = own * gradient
        if zero == 1:
            places["gradients"] = numel * gradient
        names = ("host_swap", "gather_window")
        assert {name: count for name, count in memory.items() if count and name not in names} == places
        down = own * gradient * (1 if zero == 1 else MICROBATCHES) if optimizer != "none" else own * element
        gathered = last["gathered"] // 2 * element  # of two ranks each brings half
        up = gathered if param != "none" else own * element if optimizer != "none" else 0
        assert (last["device_to_host"], last["host_to_device"]) == (down, up)
        if param != "none":
            assert 0 <= last["gathered"] - found["gathered_by_plan"] <= 0.35 * found["gathered_by_plan"], "padding"
        written = states * (optimizer == "nvme") + own * element * (param == "nvme")
        read = states * (optimizer == "nvme") + gathered * (param == "nvme")
        assert (last["disk_written"], last["disk_read"]) == (written, read)


@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_no_more_units_in_host_memory_than_buffers(buffers: int, tmp_path: Path) -> None:
    plain = content(Cell(data=1, microbatches=2, zero=1), "bf16")
    plain["model"]["num_layers"] = 6
    (found,) = run_ranks(1, counted, offloaded(plain, "nvme", "none", str(tmp_path), buffer_count=buffers))
    largest = sorted((12 * own for own in found["own"]), reverse=True)
    assert largest[0] <= found["memory"]["host_swap"] <= sum(largest[:buffers]) < sum(largest)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_prediction_is_what_ranks_keep(zero: int, tmp_path: Path) -> None:
    for keys in ({}, {"ratio": 0.5}, {"param_max_in_cpu": 4000}):
        for optimizer, param in (("cpu", "none"), ("nvme", "nvme"), ("none", "cpu"))[: 3 if zero == 3 else 1]:
            plain = content(Cell(data=2, microbatches=2, zero=zero), "bf16")
            source = offloaded(plain, optimizer, param, str(tmp_path), **keys)
            for found in run_ranks(2, counted, source, 2):
                memory, plan = found["memory"], found["plan"]
                tiers = {"host": 0, "disk": 0}
                for name, count in memory.items():
                    if name.startswith(("host_", "disk_")) and name != "host_swap":
                        tiers[name[:4]] += count
                kept = sum(memory[name] for name in ("parameters", "gradients", "optimizer"))
                pairs = {
                    "device": (kept, plan.state_bytes),
                    "host": (tiers["host"], plan.host_bytes),
                    "disk": (tiers["disk"], plan.disk_bytes),
                    "window": (memory["gather_window"], plan.window_bytes),
                }
                # So small a model has a tenth of padding and more; the window may be smaller: buckets come and go.
                for name, (real, said) in pairs.items():
                    least = 0.5 if name == "window" else 1
                    assert least * said <= real <= 1.4 * said + 1, (name, real, said, optimizer, param, keys)


def placed(rank: int, world_size: int, sources: list[dict[str, Any]]) -> list[Any]:
    """The places of a rank's units, and where they would be if it went by its own part of them, by config."""
    found = []
    for source in sources:
        trainer = Trainer(preflight.plan(source), Place(rank, world_size))
        trainer.train_step()
        units, zero = trainer.model.units, trainer.config.zero_optimization
        alone = place_units([Sized(unit.stop - unit.start, unit.is_sharded) for unit in units], zero)
        found.append((tuple(unit.placement for unit in units), alone))
        trainer.close()
    return found


def test_owners_of_whole_tensors_place_units_alike(tmp_path: Path) -> None:
    """Muon deals out parameters whole: parts differ in size, and each rank alone would offload other units."""
    plain = content(Cell(data=3, microbatches=2, zero=1), "bf16", "Muon")
    ratios = [number / 10 for number in range(1, 10)]
    sources = [offloaded(plain, "cpu", "none", str(tmp_path), ratio=ratio) for ratio in ratios]
    one, *others = run_ranks(3, placed, sources)
    for other in others:
        assert [places for places, _ in other] == [places for places, _ in one]
    assert any(a != b for other in others for (_, a), (_, b) in zip(other, one, strict=True)), "else it proves nothing"


# ---- device "auto" --------------------------------------------------------------------------------------------------


def up(one: Trace, what: str) -> list[bool]:
    """Which units are on the device in the end."""
    return [getattr(place, what) is Tier.DEVICE for place in one.placements[-1]]


def measured(plain: dict[str, Any], param: str) -> tuple[int, int]:
    """Bytes that a run needs on the device with all it can offload in host memory, and what it offloads, of the rank
    with most."""
    source = offloaded(plain, "cpu", "none" if param == "none" else "cpu", "")
    found = assert_same_bits(plain, {"cpu": source})
    least = max(kept_on_device(result["cpu"]) + result["cpu"].peak_bytes for result in found)
    movable = max(kept_on_device(result["plain"]) - kept_on_device(result["cpu"]) for result in found)
    return max(least, max(rank.total_bytes for rank in preflight.plan(source).memory)), movable


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_auto_fills_the_limit_and_never_passes_it(zero: int, tmp_path: Path) -> None:
    plain = content(Cell(data=2, microbatches=2, zero=zero), "bf16", steps=6)
    param = "auto" if zero == 3 else "none"
    least, movable = measured(plain, param)
    rooms = {"none": 0.005, "some": 0.4, "most": 0.9, "all": 1.2, "states": 0.5, "weights": 0.5}
    others = {name: offloaded(plain, "auto", param, str(tmp_path)) for name in ("none", "some", "most", "all")}
    if zero == 3:
        others["states"] = offloaded(plain, "auto", "cpu", str(tmp_path))
        others["weights"] = offloaded(plain, "cpu", "auto", str(tmp_path))
    for name, source in others.items():
        source["pipeline"]["memory_limit_bytes"] = least + int(rooms[name] * movable)
    for result in assert_same_bits(plain, others):
        for name, source in others.items():
            one, limit = result[name], source["pipeline"]["memory_limit_bytes"]
            assert kept_on_device(one) + one.peak_bytes <= limit, name
            (line,) = one.log
            assert f"of a limit of {limit}" in line and f"{kept_on_device(one)} bytes are kept on the device" in line
            first, *later = one.placements
            assert all(Tier.DISK not in (place.states, place.weights) for place in first)
            assert not any(place.states is Tier.DEVICE for place in first)
            assert all(places == one.placements[-1] for places in later), "placed once, after two steps"
        assert not any(up(result["none"], "states")) and all(up(result["all"], "states"))
        assert sum(up(result["some"], "states")) < sum(up(result["most"], "states")) < sum(up(result["all"], "states"))
        if zero == 3:
            assert all(up(result["some"], "weights")), "weights come first"
            assert not any(up(result["states"], "weights")) and any(up(result["states"], "states"))
            assert all(up(result["weights"], "weights")) and not any(up(result["weights"], "states"))


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_four_times_what_the_device_holds(zero: int, tmp_path: Path) -> None:
    """What lies in host memory would need more than four times the room that the limit leaves beside the rest."""
    plain = content(Cell(data=2, microbatches=2, zero=zero), "bf16", steps=6)
    param = "auto" if zero == 3 else "none"
    least, movable = measured(plain, param)
    source = offloaded(plain, "auto", param, str(tmp_path))
    source["pipeline"]["memory_limit_bytes"] = limit = least + movable // 8
    for result in assert_same_bits(plain, {"auto": source}):
        one = result["auto"]
        used = kept_on_device(one) + one.peak_bytes
        assert used <= limit and kept_on_device(result["plain"]) > kept_on_device(one)
        assert movable > 4 * (limit - least)
        if zero == 3:  # where all states can lie elsewhere
            assert kept_on_device(result["plain"]) > 4 * (limit - one.peak_bytes)
        assert any(up(one, "states")) or any(up(one, "weights")), "what fits is used"


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def saved(rank: int, world_size: int, source: dict[str, Any], resume: str, steps: int, root: str) -> tuple[Trace, str]:
    """Train to step `steps`, perhaps from a checkpoint, and save; what was saved is left as it is."""
    trainer = Trainer(preflight.plan(source, world_size=world_size), Place(rank, world_size))
    if resume:
        trainer.resume(Path(resume))
    found = trace(trainer, steps)
    path = str(trainer.save(Path(root)))
    again = states_of(trainer)
    assert all(torch.equal(tensor, again[key]) for key, tensor in found.states.items())
    trainer.train_step()  # a run goes on after a save
    trainer.close()
    return found, path


KINDS = ("none none", "cpu cpu", "nvme nvme", "none nvme", "auto auto")


def test_checkpoints_between_all_places(tmp_path: Path) -> None:
    """Saved with one offload and resumed with another: the bits of a run that was never interrupted."""
    plain = content(Cell(data=2, microbatches=2, zero=3), "bf16", steps=9)
    disk = tmp_path / "disk"
    disk.mkdir()
    sources = {
        kind: plain if kind == KINDS[0] else offloaded(plain, *kind.split(), str(disk), ratio=0.5) for kind in KINDS
    }
    whole, _ = zip(*run_ranks(2, saved, plain, "", 8, str(tmp_path / "whole")), strict=True)
    for before, after in zip(KINDS, (*KINDS[1:], KINDS[0]), strict=True):
        root = tmp_path / before
        ((_, path), _) = run_ranks(2, saved, sources[before], "", 3, str(root))
        second = run_ranks(2, saved, sources[after], path, 8, str(root))
        for one, (other, _) in zip(whole, second, strict=True):
            assert not Trace(one.steps[3:], [], one.states).differences(replace(other, others=[])), (before, after)


# ---- frozen weights -------------------------------------------------------------------------------------------------


def with_frozen(rank: int, world_size: int, zero: dict[str, Any]) -> dict[str, Any]:
    """Train a user's layers of which some are frozen: losses, norms, states; the frozen ones' bytes on each tier."""
    case = Case(pipeline=1, data=2, zero=3, dtype="fp32")
    config = case.config()
    config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, **zero}
    engine, *_ = trilith.initialize(model=layers(True, "uniform"), config=config)
    steps = []
    for _ in range(4):
        loss = engine.train_batch(case.batches.stream(engine.topology.dp.index))
        steps.append((loss, engine.global_grad_norm))
    states = [(role, spec.name, tensor.clone()) for role, spec, tensor in engine.sharded.state_entries()]
    memory = engine.sharded.memory_bytes()
    frozen = sum(len(units) for units in engine.sharded._frozen.values())
    engine.train_batch(case.batches.stream(engine.topology.dp.index))
    engine.close()
    return {"steps": steps, "states": states, "memory": memory, "frozen": frozen}


def test_frozen_weights_are_offloaded_and_saved(tmp_path: Path) -> None:
    kinds = {
        "cpu": {"offload_param": {"device": "cpu"}},
        "nvme": {"offload_param": {"device": "nvme", "nvme_path": str(tmp_path), "max_in_cpu": 0}},
    }
    plain = run_ranks(2, with_frozen, {})
    assert plain[0]["frozen"] > 0
    for kind, zero in kinds.items():
        for one, other in zip(run_ranks(2, with_frozen, zero), plain, strict=True):
            assert one["steps"] == other["steps"] and other["memory"]["parameters"] > 0, kind
            assert one["memory"]["parameters"] == 0
            for (role, name, tensor), (_, _, expected) in zip(one["states"], other["states"], strict=True):
                assert torch.equal(tensor, expected), (kind, role, name)


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_check_refuses_what_the_machine_does_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = content(Cell(data=2, microbatches=2, zero=3))
    host, disk = (offloaded(plain, tier, tier, str(tmp_path)) for tier in ("cpu", "nvme"))
    needed = 2 * (preflight.plan(host).memory[0].host_bytes + preflight.plan(host).memory[0].total_bytes)
    on_disk = 2 * preflight.plan(disk).memory[0].disk_bytes
    for source in (host, disk):
        source["run"] = {"device": "cpu"}
    monkeypatch.setattr(preflight.host_memory, "total_bytes", lambda: needed)
    monkeypatch.setattr(preflight, "disk_budget", lambda path: on_disk)
    preflight.plan(host)
    preflight.plan(disk)
    monkeypatch.setattr(preflight.host_memory, "total_bytes", lambda: needed - 1)
    with pytest.raises(trilith.errors.ConfigError, match=r"offload_optimizer.device.*memory of this machine") as caught:
        preflight.plan(host)
    assert 'Use device "nvme"' in str(caught.value)
    monkeypatch.setattr(preflight, "disk_budget", lambda path: on_disk - 1)
    with pytest.raises(trilith.errors.ConfigError, match=r"nvme_path.*2 ranks put") as caught:
        preflight.plan(disk)
    missing = copy.deepcopy(disk)
    missing["zero_optimization"]["offload_param"]["nvme_path"] = str(tmp_path / "missing")
    monkeypatch.undo()
    with pytest.raises(trilith.errors.ConfigError, match=r"offload_param\.nvme_path"):
        preflight.plan(missing)
    assert limited(host, 0.5)["pipeline"]["memory_limit_bytes"] > 0
