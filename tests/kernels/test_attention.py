"""Native attention: every mask against the reference in float64 on every instruction set, layouts, threads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.native import native, require_same_bits
from trilith.errors import KernelError
from trilith.kernels import ops, reference
from trilith.kernels.mask import CAUSAL, FULL, AttentionMask, BlockLayout, document_mask

pytestmark = native
KEY = (7, 2**31 + 9)
B, N, K = 2, 4, 2


def mask(name: str, length: int) -> AttentionMask:
    """One of each kind for two samples of `length`."""
    generator = torch.Generator().manual_seed(length)
    slopes = torch.tensor([2.0 ** -(i + 1) for i in range(N)])
    shuffled = torch.stack([torch.randperm(length, generator=generator) for _ in range(B)])
    packed = torch.cat((torch.arange(length // 3), torch.arange(length - length // 3)))
    return {
        "causal": CAUSAL,
        "full": FULL,
        "window": AttentionMask(window=5),
        "wide_window": AttentionMask(window=70),
        "both_ways": AttentionMask(causal=False, window=9),
        "prefix": AttentionMask(prefix=torch.tensor([0, length // 2])),
        "alibi": AttentionMask(slopes=slopes),
        "alibi_full": AttentionMask(causal=False, slopes=slopes),
        "shuffled": AttentionMask(query_positions=shuffled, key_positions=shuffled),
        "keys_shuffled": AttentionMask(key_positions=shuffled),
        "ahead": AttentionMask(query_positions=torch.arange(length) + 4, key_positions=packed),
        "documents": document_mask(torch.stack([packed.diff(prepend=packed[:1]).lt(0).cumsum(0), shuffled[0] // 70])),
        "documents_full": document_mask(torch.arange(length) // 21, causal=False),
        "documents_alibi": replace(document_mask(torch.arange(length) // 50), slopes=slopes, window=30),
        "blocks": AttentionMask(blocks=blocks(length, 16, N)),
        "blocks_full": AttentionMask(causal=False, blocks=blocks(length, 48, 1)),
        "blocks_window": AttentionMask(window=40, slopes=slopes, blocks=blocks(length, 32, N)),
    }[name]


NAMES = (
    "causal",
    "full",
    "window",
    "wide_window",
    "both_ways",
    "prefix",
    "alibi",
    "alibi_full",
    "shuffled",
    "keys_shuffled",
    "ahead",
    "documents",
    "documents_full",
    "documents_alibi",
    "blocks",
    "blocks_full",
    "blocks_window",
)


def blocks(length: int, size: int, heads: int) -> BlockLayout:
    """A third of the blocks at random; no query of the last row sees anything."""
    count = -(-length // size)
    live = torch.rand((heads, count, count), generator=torch.Generator().manual_seed(size)) < 0.34
    live[:, -1] = False
    return BlockLayout(size, live)


def inputs(length: int, features: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length * features)
    shapes = ((B, length, N, features), (B, length, K, features), (B, length, K, features))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def run(function: Any, given: list[Tensor], **how: Any) -> list[Tensor]:
    """The output and the gradients of all inputs."""
    out = function(*given, **how)
    generator = torch.Generator().manual_seed(3)
    gradient = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, given, gradient)]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("length", [1, 8, 33, 150])
@pytest.mark.parametrize("name", NAMES)
def test_masks(name: str, length: int, p: float, instruction_set: str) -> None:
    given = inputs(length, 12, torch.float64)
    how: dict[str, Any] = {"mask": mask(name, length), "dropout_p": p}
    how |= {"key": KEY, "sample_ids": torch.tensor([3, 2**33 + 1]), "head_range": (5, 5 + N)}
    ours = run(ops.attention, given, **how)
    theirs = run(reference.attention, given, kv_index=(0, 0, 1, 1), **how)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_masks_on_torchs_own_ops(name: str) -> None:
    """Whatever torch's blocked attention cannot do is left to the reference."""
    given, how = inputs(33, 12, torch.float64), {"mask": mask(name, 33)}
    ours = run(ops.attention, given, backend="torch", **how)
    theirs = run(reference.attention, given, kv_index=(0, 0, 1, 1), **how)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_low_precision(name: str, dtype: torch.dtype, instruction_set: str) -> None:
    """At most twice the reference's error in the same dtype, gradients three times; in norm, for the largest is chance."""
    given = inputs(150, 12, dtype)
    exact = [x.detach().double().requires_grad_() for x in given]
    how = {"mask": mask(name, 150)}
    truths = run(reference.attention, exact, kv_index=(0, 0, 1, 1), **how)
    ours, plain = run(ops.attention, given, **how), run(reference.attention, given, kv_index=(0, 0, 1, 1), **how)
    for i, (value, other, truth) in enumerate(zip(ours, plain, truths, strict=True)):
        limit = (3 if i else 2) * float(torch.linalg.vector_norm(other.double() - truth))
        assert float(torch.linalg.vector_norm(value.double() - truth)) <= limit


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_threads_change_no_bit(p: float) -> None:
    given = inputs(150, 32, torch.float32)
    how: dict[str, Any] = {"dropout_p": p, "key": KEY, "sample_ids": torch.arange(B)}
    require_same_bits(lambda: run(ops.attention, given, **how))


def test_packed_equals_apart() -> None:
    """Heads one behind the other in one tensor: the same bits, and one gradient."""
    q, k, v = inputs(40, 8, torch.float32)
    qkv = torch.cat([x.detach().flatten(2) for x in (q, k, v)], dim=-1).requires_grad_()
    apart = run(ops.attention, [q, k, v])
    packed = run(lambda x: ops.packed_attention(x, N, head_dim=8), [qkv])
    assert torch.equal(packed[0], apart[0].flatten(2))
    assert torch.equal(packed[1], torch.cat([g.flatten(2) for g in apart[1:]], dim=-1))


def test_strides_need_no_copy() -> None:
    q, k, v = inputs(19, 8, torch.float64)
    moved = [x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in (q, k, v)]
    for one, two in zip(run(ops.attention, [q, k, v]), run(ops.attention, moved), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("shape", [(0, 5, 2, 4), (2, 0, 2, 4), (2, 5, 0, 4)])
def test_empty(shape: tuple[int, ...]) -> None:
    given = [torch.zeros(shape, requires_grad=True) for _ in range(3)]
    if shape[2] == 0:
        pytest.skip("no heads: there is no grouping of them")
    out = ops.attention(*given)
    assert out.shape == shape
    out.sum().backward()


def test_memory_is_linear_in_the_sequence() -> None:
    """Nothing that is kept for backward grows with S^2."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        ops.attention(*(torch.zeros(1, 512, 2, 8, requires_grad=True) for _ in range(3)))
    assert max(saved) == 512 * 2 * 8


def test_large_scores_stay_finite() -> None:
    given = [x.detach().mul(1e4).requires_grad_() for x in inputs(33, 12, torch.float32)]
    assert all(x.isfinite().all() for x in run(ops.attention, given))


def test_nan_comes_through() -> None:
    q, k, v = inputs(9, 4, torch.float32)
    q.data[0, 3] = float("nan")
    out = ops.attention(q, k, v)
    assert out[0, 3].isnan().all() and out[0, :3].isfinite().all() and out[1].isfinite().all()


ARGUMENTS = ([0, 0, 1, 1], True, 0, None, None, None, None, None, None, None, 0, 0.0, 0, 0, None, 0)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.trilith.attention.default, (*inputs(9, 4, torch.float32), *ARGUMENTS))


def test_compiles_whole() -> None:
    given = inputs(17, 8, torch.float32)

    def square(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q, k, v).square()

    for one, two in zip(
        run(torch.compile(square, fullgraph=True, backend="aot_eager"), given), run(square, given), strict=True
    ):
        torch.testing.assert_close(one, two)


def test_on_meta() -> None:
    q, k, v = (torch.empty(2, 5, n, 4, device="meta") for n in (N, K, K))
    assert ops.attention(q, k, v).shape == (2, 5, N, 4)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"mask": AttentionMask(window=0)}, "mask.window = 0"),
        ({"mask": AttentionMask(window=3, prefix=torch.zeros(B, dtype=torch.int64))}, "prefix goes with causal"),
        ({"mask": AttentionMask(prefix=torch.zeros(B))}, "mask.prefix is .2,. torch.float32"),
        ({"mask": AttentionMask(slopes=torch.zeros(3))}, "mask.slopes"),
        ({"mask": AttentionMask(key_begins=torch.zeros(6, dtype=torch.int64))}, "go together"),
        ({"mask": AttentionMask(blocks=BlockLayout(8, torch.ones(1, 1, 1).bool()))}, "blocks.size = 8"),
        ({"mask": AttentionMask(blocks=BlockLayout(16, torch.ones(1, 2, 1).bool()))}, "must be .1, 1, 1. or .4, 1, 1."),
        ({"kv_index": (0, 1)}, "kv_index has 2 entries"),
        ({"kv_index": (0, 1, 2, 0)}, "must name the 2 key/value heads"),
        ({"dropout_p": 0.1}, "needs the sample ids"),
    ],
)
def test_refusals(how: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        ops.attention(*inputs(6, 4, torch.float32), **how)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("causal", [True, False])
def test_parts_make_the_whole(causal: bool, backend: str, p: float) -> None:
    """Attention over three parts of the keys, of which a causal query sees none of some, and their gradients."""
    length = 70
    given = inputs(length, 12, torch.float64)
    places = torch.arange(length)
    dropout: dict[str, Any] = {
        "dropout_p": p,
        "key": KEY,
        "sample_ids": torch.tensor([3, 2**33 + 1]),
        "backend": backend,
    }
    whole = run(ops.attention, given, mask=AttentionMask(causal=causal), head_range=(5, 5 + N), **dropout)
    q, k, v = (x.detach() for x in given)
    parts = []
    for at in (slice(0, 30), slice(30, 31), slice(31, length)):
        mask = AttentionMask(causal=causal, query_positions=places, key_positions=places[at])
        parts.append((at, {"mask": mask, "first_head": 5, **dropout}))
    found = [ops.partial_attention(q, k[:, at], v[:, at], **how) for at, how in parts]
    out, lse = ops.combine_partials(found)
    torch.testing.assert_close(out, whole[0], rtol=0, atol=1e-13)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gradients = [ops.partial_attention_backward(upstream, q, k[:, at], v[:, at], out, lse, **how) for at, how in parts]
    dq = sum((part[0] for part in gradients), torch.zeros_like(q))
    dk, dv = (torch.cat([part[i] for part in gradients], dim=1) for i in (1, 2))
    for one, two in zip((dq, dk, dv), whole[1:], strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-13)


def test_a_query_that_sees_nothing_of_any_part() -> None:
    q, k, v = (x.detach() for x in inputs(20, 8, torch.float32))
    mask = AttentionMask(query_positions=torch.arange(20), key_positions=torch.arange(20) + 5)
    out, lse = ops.combine_partials([ops.partial_attention(q, k, v, mask=mask)] * 2)
    assert out[:, :5].eq(0.0).all() and lse[..., :5].isneginf().all() and out.isfinite().all()
