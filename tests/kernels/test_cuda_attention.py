"""Attention's CUDA kernels: on the processor, whose emulator has their matrix instructions, and on a GPU, if any.

Every mask, width and grouping of heads; error at most twice that of plain torch in the same dtype, gradients three times,
in norm; the same bits twice; what dropout keeps is what it keeps on the processor.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.emulated import Device
from tests.kernels.native import native
from tests.kernels.test_attention import KEY, NAMES, B, N, mask
from trilith.kernels import library, ops, reference
from trilith.kernels.mask import CAUSAL, AttentionMask

pytestmark = native


def inputs(lengths: tuple[int, int], heads: tuple[int, int], features: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths) * features)
    shapes = ((B, lengths[0], heads[0], features), *[(B, lengths[1], heads[1], features)] * 2)
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


def run(function: Any, given: list[Tensor], **how: Any) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in given]
    out = function(*leaves, **how)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def moved(mask: AttentionMask, device: Device) -> AttentionMask:
    """The mask with its tensors on the device."""
    changes: dict[str, Any] = {}
    for field in fields(mask):
        value = getattr(mask, field.name)
        if isinstance(value, Tensor):
            changes[field.name] = device.put(value)
        elif field.name == "blocks" and value is not None:
            changes[field.name] = replace(value, live=device.put(value.live))
    return replace(mask, **changes)


def check(
    device: Device, given: list[Tensor], kv_index: tuple[int, ...], mask: AttentionMask, twice: bool = False, **how: Any
) -> None:
    here, where = [device.put(x) for x in given], {"mask": moved(mask, device), "kv_index": kv_index, **how}
    if "sample_ids" in how:
        where["sample_ids"] = device.put(how["sample_ids"])
    ours = run(ops.attention, here, **where, backend=device.backend)
    again = run(ops.attention, here, **where, backend=device.backend) if device.where.type == "cuda" or twice else ours
    for one, two in zip(ours, again, strict=True):
        assert torch.equal(one, two), "other bits the second time: a race"
    assert library.LIBRARY is not None
    with pytest.MonkeyPatch.context() as patch:  # the processor's own decisions of dropout
        patch.setattr(library, "CPU", getattr(library.LIBRARY, library.LIBRARY.instruction_sets[0]))
        plain = run(reference.attention, given, mask=mask, kv_index=kv_index, **how)
        truths = run(reference.attention, [x.double() for x in given], mask=mask, kv_index=kv_index, **how)
    for name, mine, other, truth in zip(("out", "dq", "dk", "dv"), ours, plain, truths, strict=True):
        assert mine.isfinite().all(), name
        # Where plain torch is exact, a query that sees one key, ours is not: gradients are differences of equal sums.
        limit = (2 if name == "out" else 3) * float(torch.linalg.vector_norm(other.double() - truth)) + 1e-5
        assert float(torch.linalg.vector_norm(mine.cpu().double() - truth)) <= limit, (name, limit)


@pytest.mark.parametrize("name", NAMES)
def test_masks(name: str, device: Device) -> None:
    check(device, inputs((100, 100), (N, 2), 64, torch.bfloat16), (0, 0, 1, 1), mask(name, 100))


@pytest.mark.parametrize("name", ["causal", "shuffled", "blocks_window"])
def test_dropout_keeps_what_the_processor_keeps(name: str, device: Device) -> None:
    how: dict[str, Any] = {
        "dropout_p": 0.3,
        "key": KEY,
        "sample_ids": torch.tensor([3, 2**33 + 1]),
        "head_range": (5, 5 + N),
    }
    check(device, inputs((70, 70), (N, 2), 16, torch.bfloat16), (0, 0, 1, 1), mask(name, 70), **how)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("features", [8, 64, 72, 96, 128, 160, 256])
def test_features(features: int, dtype: torch.dtype, device: Device) -> None:
    check(device, inputs((40, 40), (2, 1), features, dtype), (0, 0), CAUSAL, twice=True)


@pytest.mark.parametrize("lengths", [(1, 1), (16, 16), (65, 65), (129, 300), (300, 129), (40, 1)])
def test_lengths(lengths: tuple[int, int], device: Device) -> None:
    is_causal = lengths[0] == lengths[1]
    check(device, inputs(lengths, (2, 2), 64, torch.bfloat16), (0, 1), AttentionMask(causal=is_causal))


@pytest.mark.parametrize("kv_index", [(0, 0, 0, 0, 0), (0, 1, 1, 0, 3), (2, 2, 0, 1, 3)])
def test_heads_of_any_grouping(kv_index: tuple[int, ...], device: Device) -> None:
    check(device, inputs((33, 33), (5, 4), 32, torch.bfloat16), kv_index, CAUSAL)


@pytest.fixture
def hopper(device: Device, monkeypatch: pytest.MonkeyPatch) -> Device:
    """A device of Hopper's generation, which has kernels of its own."""
    if device.where.type == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("not a Hopper GPU")
    monkeypatch.setenv("TRILITH_EMULATED_GENERATION", "9")
    return device


@pytest.mark.parametrize("name", NAMES)
def test_masks_on_hopper(name: str, hopper: Device) -> None:
    check(hopper, inputs((150, 150), (N, 2), 64, torch.bfloat16), (0, 0, 1, 1), mask(name, 150))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("features", [8, 64, 72, 96, 128, 160, 256])
def test_features_on_hopper(features: int, dtype: torch.dtype, hopper: Device) -> None:
    length = 150 if features <= 128 else 40
    check(hopper, inputs((length, length), (2, 1), features, dtype), (0, 0), CAUSAL, twice=True)


@pytest.mark.parametrize("lengths", [(1, 1), (128, 128), (129, 300), (300, 129), (40, 1)])
def test_lengths_on_hopper(lengths: tuple[int, int], hopper: Device) -> None:
    is_causal = lengths[0] == lengths[1]
    check(hopper, inputs(lengths, (2, 2), 64, torch.bfloat16), (0, 1), AttentionMask(causal=is_causal))


def test_dropout_on_hopper(hopper: Device) -> None:
    how: dict[str, Any] = {
        "dropout_p": 0.3,
        "key": KEY,
        "sample_ids": torch.tensor([3, 2**33 + 1]),
        "head_range": (5, 5 + N),
    }
    check(hopper, inputs((150, 150), (N, 2), 64, torch.bfloat16), (0, 0, 1, 1), mask("blocks_window", 150), **how)
