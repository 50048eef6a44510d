"""A user's layers on stages equal a plain loop in one process, in float64, under every kind of schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import trilith
from tests.harness import assert_close_named, run_ranks
from tests.layer_cases import LR, Data, Plain, model
from trilith.kernels import library
from trilith.sharding import contiguous_strides

STEPS, CLIPPING = 3, 0.5


@dataclass(frozen=True)
class Case:
    """One layout."""

    schedule: str = "1f1b"
    pipeline: int = 2
    data: int = 1
    virtual_stages: int = 1
    microbatches: int = 4
    zero: int = 0
    zero_keys: tuple[tuple[str, Any], ...] = ()
    frozen: bool = False
    lengths: tuple[int, ...] = (5,)
    partition: Any = "uniform"
    recompute: str = "none"
    optimizer_sync: str = "step"
    dtype: str = "fp64"
    clipping: float = CLIPPING

    @property
    def world_size(self) -> int:
        return self.pipeline * self.data

    @property
    def batches(self) -> Data:
        return Data(self.microbatches, self.lengths)

    def config(self) -> dict[str, Any]:
        """A DeepSpeed-like configuration."""
        return {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": self.microbatches,
            "gradient_clipping": self.clipping,
            "data_types": {"param_dtype": self.dtype},
            "parallel": {"pipeline": self.pipeline},
            "pipeline": {
                "schedule": self.schedule,
                "virtual_stages": self.virtual_stages,
                "optimizer_sync": self.optimizer_sync,
            },
            "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": 0.1, "eps": 1e-3}},
            "zero_optimization": {"stage": self.zero, "reduce_bucket_size": 0, **dict(self.zero_keys)},
            "activation_checkpointing": {"recompute": self.recompute},
        }


def name(case: Case) -> str:
    differs = [f"{k}={v}" for k, v in vars(case).items() if v != getattr(Case(), k) and k != "schedule"]
    return "-".join([case.schedule, *differs]).replace(" ", "")


def state_of(engine: Any) -> dict[str, Tensor]:
    with engine.sharded.gathered():
        return {key: tensor.detach().cpu().clone() for key, tensor in engine.module.state_dict().items()}


def gradients_of(engine: Any) -> dict[str, Tensor]:
    """This rank's gradients of the step that is over, as clipped, by canonical name; those that it holds as a whole."""
    found = {}
    for _, spec, tensor in engine.sharded.gradient_entries():
        if spec.pieces[0].box.shape == spec.shape:
            offset = spec.pieces[0].offset + tensor.storage_offset()
            found[spec.name] = tensor.as_strided(spec.shape, contiguous_strides(spec.shape), offset).clone()
    return found


def on_ranks(rank: int, world_size: int, case: Case) -> dict[str, Any]:
    """Initial and final state of this rank's layers, losses and norms of some steps."""
    engine, optimizer, _, _ = trilith.initialize(model=model(case.frozen, case.partition), config=case.config())
    assert optimizer is engine.optimizer
    before, found, gradients = state_of(engine), [], []
    data_rank = engine.topology.dp.index
    source = case.batches.stream(data_rank) if engine.is_first_stage or engine.is_last_stage else None
    for _ in range(STEPS):
        loss = engine.train_batch(source)
        found.append((loss, engine.global_grad_norm))
        gradients.append(gradients_of(engine))
    evaluated = engine.eval_batch(case.batches.stream(data_rank) if source is not None else None)
    after = state_of(engine)
    engine.close()
    return {"before": before, "after": after, "steps": found, "gradients": gradients, "evaluated": evaluated}


def whole(results: list[dict[str, Any]], key: str) -> dict[str, Tensor]:
    """The state of all ranks together; what several hold is equal to the bit."""
    found: dict[str, Tensor] = {}
    for result in results:
        for tensor_name, tensor in result[key].items():
            assert torch.equal(found.setdefault(tensor_name, tensor), tensor), tensor_name
    return dict(sorted(found.items()))


def require_calls(case: Case, state: dict[str, Tensor]) -> None:
    """Layers that count count every microbatch of a data rank once, or twice where they run again in backward."""
    expected = STEPS * case.microbatches * (2 if case.recompute == "full" else 1)
    assert {key: int(count) for key, count in state.items() if key.endswith("calls")} == {
        f"{layer}.calls": expected for layer in (3, 4)
    }


def check(case: Case, results: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Everything equals the plain loop; returns the initial weights."""
    before = whole(results, "before")
    plain = Plain(case.frozen, before)
    for step in range(STEPS):
        loss = plain.gradients(case.batches, case.data, step)
        named = {key: p.grad for key, p in plain.module.named_parameters() if p.grad is not None}
        # The native optimizer clips as it reads and leaves gradients as they came; torch's changes them.
        gradients = {key: grad.clone() for key, grad in named.items()} if library.CPU else named
        norm = float(torch.nn.utils.clip_grad_norm_(plain.trained, CLIPPING))
        seen = {key for result in results for key in result["gradients"][step]}
        assert case.zero or len(seen) == len({id(g) for g in named.values()})
        for result in results:
            found = result["gradients"][step]
            assert_close_named({key: (found[key], gradients[key]) for key in sorted(found)}, rtol=1e-10, atol=1e-13)
        plain.optimizer.step()
        for result in results:
            assert result["steps"][step] == pytest.approx((loss, norm), rel=1e-10), step
    state = {key: value for key, value in plain.module.state_dict().items() if not key.endswith("calls")}
    after = whole(results, "after")
    assert_close_named({key: (after[key], state[key]) for key in sorted(state)})
    require_calls(case, after)
    with torch.no_grad():
        plain.module.eval()
        losses = [
            float(plain.loss(case.batches.microbatch(0, n, r)))
            for r in range(case.data)
            for n in range(case.microbatches)
        ]
    assert results[0]["evaluated"] == pytest.approx(sum(losses) / len(losses), rel=1e-10)
    return before


SYNCHRONOUS = [
    Case("gpipe"),
    Case("gpipe", data=2, zero=1),
    Case("1f1b"),
    Case("1f1b", data=2, zero=1),
    Case("interleaved_1f1b", virtual_stages=2, microbatches=5),
    Case("interleaved_1f1b", virtual_stages=2, data=2, zero=1, lengths=(4, 6)),
    Case("zb_h1"),
    Case("zb_h1", data=2, zero=1),
    Case("zb_h2", microbatches=5),
    Case("zb_v", virtual_stages=2, partition=(1, 3, 4, 2)),
    Case("zb_v", virtual_stages=2, data=2, zero=1),
    Case("v_min", virtual_stages=2, partition="parameters"),
    Case("v_half", virtual_stages=2, data=2),
    Case("dualpipe_v", virtual_stages=2, microbatches=5, partition=(1, 3, 4, 2)),
    Case("dualpipe_v", virtual_stages=2, data=2, zero=1, partition="type:linear|embedding"),
]
SPECIAL = [
    Case("1f1b", pipeline=1, data=2, zero=1),
    Case("zb_v", pipeline=1, virtual_stages=2, partition=(4, 6)),
    Case("1f1b", pipeline=3, zero=1, data=2, partition="parameters"),
    Case("zb_h1", pipeline=3, partition=(2, 4, 4)),
    Case("1f1b", frozen=True, partition=(2, 8), data=2, zero=1),
    Case("zb_h1", frozen=True, pipeline=3, partition=(2, 4, 4)),
    Case("interleaved_1f1b", virtual_stages=2, frozen=True, partition=(1, 1, 4, 4)),
    Case("zb_v", virtual_stages=2, frozen=True, partition=(2, 1, 5, 2), zero=1, data=2),
    Case("zb_h1", lengths=(5, 3, 4), data=2),
    Case("zb_h1", recompute="full", zero=1, data=2),
    Case("zb_v", virtual_stages=2, optimizer_sync="postvalidate", zero=1, data=2),
]


@pytest.mark.parametrize("case", [*SYNCHRONOUS, *SPECIAL], ids=name)
def test_equals_a_plain_loop(case: Case) -> None:
    check(case, run_ranks(case.world_size, on_ranks, case))


def test_initial_values_do_not_depend_on_the_layout() -> None:
    first = whole(run_ranks(2, initial, Case("1f1b")), "before")
    for case in (Case("zb_v", virtual_stages=2, partition="parameters"), Case("1f1b", pipeline=1)):
        other = whole(run_ranks(case.world_size, initial, case), "before")
        assert all(torch.equal(first[key], other[key]) for key in first) and first.keys() == other.keys()
    assert torch.equal(first["0.weight"], first["9.weight"]) and not torch.equal(first["3.up.bias"], first["4.up.bias"])


def initial(rank: int, world_size: int, case: Case) -> dict[str, Any]:
    torch.manual_seed(rank)
    engine = trilith.initialize(model(case.frozen, case.partition), case.config())
    state = state_of(engine)
    engine.close()
    return {"before": state}


# ---- asynchronous schedules -----------------------------------------------------------------------------------------


def in_a_span(rank: int, world_size: int, case: Case) -> dict[str, Any]:
    """Two spans: two steps without a drain between, then one."""
    engine = trilith.initialize(model(case.frozen, case.partition), case.config())
    before, data_rank = state_of(engine), engine.topology.dp.index
    losses = list(engine.train_batches(case.batches.stream(data_rank), 2))
    losses.append(engine.train_batch(case.batches.stream(data_rank, 2)))
    after = state_of(engine)
    engine.close()
    return {"before": before, "after": after, "losses": losses}


def compare(case: Case, plain: Plain, results: list[dict[str, Any]], losses: list[float]) -> None:
    state = {key: value for key, value in plain.module.state_dict().items() if not key.endswith("calls")}
    after = whole(results, "after")
    assert_close_named({key: (after[key], state[key]) for key in sorted(state)})
    require_calls(case, after)
    for result in results:
        assert result["losses"] == pytest.approx(losses, rel=1e-10)


def plain_of(case: Case, results: list[dict[str, Any]]) -> Plain:
    return Plain(case.frozen, whole(results, "before"))


@pytest.mark.parametrize("data", [1, 2])
def test_double_buffered_weights_equal_their_simulation(data: int) -> None:
    """W(t+1) = W(t) - step(gradient at W(t-1)); ties over ranks, clipping and a drain included."""
    case = Case("pipedream_2bw", data=data, zero=data - 1)
    results = run_ranks(case.world_size, in_a_span, case)
    plain, losses = plain_of(case, results), []
    newest = [p.detach().clone() for p in plain.trained]
    before = newest
    for step in range(3):
        put(plain.trained, before)
        losses.append(plain.gradients(case.batches, case.data, step))
        torch.nn.utils.clip_grad_norm_(plain.trained, CLIPPING)
        put(plain.trained, newest)
        plain.optimizer.step()
        before, newest = newest, [p.detach().clone() for p in plain.trained]
    compare(case, plain, results, losses)


def test_stashed_weights_equal_their_simulation() -> None:
    """Stage s runs microbatch k, counted from the last drain, with the weights after max(0, k - (p-1-s)) updates."""
    case = Case("pipedream", frozen=True, partition=(6, 4), clipping=0.0)
    results = run_ranks(case.world_size, in_a_span, case)
    plain, losses = plain_of(case, results), []
    first = [p for layer in plain.layers[:6] if isinstance(layer, torch.nn.Module) for p in layer.parameters()]
    first = [p for p in first if p.requires_grad]
    for steps in ((0, 1), (2,)):
        versions = [[p.detach().clone() for p in first]]
        for step in steps:
            total = 0.0
            for number in range(case.microbatches):
                put(first, versions[max(0, len(versions) - 2)])
                plain.optimizer.zero_grad()
                loss = plain.loss(case.batches.microbatch(step, number, 0))
                loss.backward()
                put(first, versions[-1])
                plain.optimizer.step()
                versions.append([p.detach().clone() for p in first])
                total += float(loss.detach()) / case.microbatches
            losses.append(total)
    compare(case, plain, results, losses)


def put(parameters: list[torch.nn.Parameter], values: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
