"""Splits over tensor ranks, and that all ranks together hold every element once: for declarations of any family."""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trilith.models.base import (
    Init,
    LocalParameter,
    ParameterDecl,
    Split,
    TensorDecl,
    UnitDecl,
    local_parameter,
    local_shape,
    num_parameters,
    stage_parameters,
    train_flops_per_token,
)
from trilith.sharding import ShardSpec

NORMAL = Init("normal", 0.02)


def readers(kv_head: int, num_queries: int, num_kv: int, degree: int) -> list[int]:
    """Tensor ranks whose query heads read `kv_head`, from the definition: query q reads head q // (N / K)."""
    return sorted({q // (num_queries // degree) for q in range(num_queries) if q // (num_queries // num_kv) == kv_head})


def test_even_split() -> None:
    assert [Split(0, 6).held(rank, 3) for rank in range(3)] == [(0, 2, 2), (2, 4, 2), (4, 6, 2)]
    with pytest.raises(AssertionError):
        Split(0, 6).held(0, 4)


def test_padded_split() -> None:
    """61 rows on 4 ranks: 16 each, 3 of them padding on the last; a rank may hold padding only."""
    assert [Split(0, 61, "padded").held(r, 4) for r in range(4)] == [
        (0, 16, 16),
        (16, 32, 16),
        (32, 48, 16),
        (48, 61, 16),
    ]
    assert [Split(0, 5, "padded").held(r, 4) for r in range(4)] == [(0, 2, 2), (2, 4, 2), (4, 5, 2), (5, 5, 2)]
    assert [Split(0, 8, "padded").held(r, 4) for r in range(4)] == [(0, 2, 2), (2, 4, 2), (4, 6, 2), (6, 8, 2)]


def test_two_kv_heads_of_six_queries_on_three_ranks() -> None:
    """The middle rank's queries 2 and 3 read both heads."""
    split = Split(0, 2, "kv_heads", 6)
    assert [split.held(rank, 3) for rank in range(3)] == [(0, 1, 1), (0, 2, 2), (1, 2, 1)]


@pytest.mark.parametrize("degree", range(1, 13))
def test_a_rank_holds_the_kv_heads_its_queries_read(degree: int) -> None:
    checked = 0
    for num_queries in range(degree, 37, degree):
        for num_kv in (k for k in range(1, num_queries + 1) if num_queries % k == 0):
            split = Split(0, num_kv, "kv_heads", num_queries)
            for rank in range(degree):
                lo, hi, count = split.held(rank, degree)
                heads = [h for h in range(num_kv) if rank in readers(h, num_queries, num_kv, degree)]
                assert list(range(lo, hi)) == heads and count == len(heads)
                checked += 1
            if num_kv % degree == 0:
                assert [split.held(r, degree) for r in range(degree)] == [
                    Split(0, num_kv).held(r, degree) for r in range(degree)
                ]
    assert checked


def tensors(draw: random.Random, name: str, degree: int) -> tuple[TensorDecl, ...]:
    """One or more canonical tensors that a family would stack along dim 0, or one split along its last dim."""
    width, hidden = draw.randint(1, 3), draw.randint(1, 4)
    queries = degree * draw.randint(1, 3)
    num_kv = draw.choice([k for k in range(1, queries + 1) if queries % k == 0])
    kv = Split(0, num_kv, "kv_heads", queries)
    kind = draw.choice(["qkv", "kv", "vocabulary", "row", "column", "whole", "bias"])
    if kind in ("qkv", "kv", "bias"):
        splits = {"q": Split(0, queries), "k": kv, "v": kv}
        rest = () if kind == "bias" else (hidden,)
        return tuple(
            TensorDecl(f"{name}.{part}", (split.num_blocks * width, *rest), NORMAL, split)
            for part, split in splits.items()
            if kind != "kv" or part != "q"
        )
    if kind == "vocabulary":
        rows = draw.randint(1, 3 * degree)
        return (TensorDecl(name, (rows, hidden), NORMAL, Split(0, rows, "padded")),)
    if kind == "row":
        return (TensorDecl(name, (hidden, queries * width), NORMAL, Split(1, queries)),)
    if kind == "column":
        ffn = degree * width
        parts = ("gate", "up")[: draw.randint(1, 2)]
        return tuple(TensorDecl(f"{name}.{part}", (ffn, hidden), NORMAL, Split(0, ffn)) for part in parts)
    return (TensorDecl(name, (hidden, width), NORMAL),)


def declared(draw: random.Random, degree: int, tie_copy: int = 0) -> ParameterDecl:
    stacked = tensors(draw, "unit.parameter", degree)
    whole = all(tensor.split is None for tensor in stacked)
    return ParameterDecl(
        "unit.parameter", stacked, "unit", decay=False, in_sequence_region=whole, tie_copy=tie_copy if whole else 0
    )


def on_all_ranks(decl: ParameterDecl, degree: int, sequence_parallel: bool) -> list[LocalParameter]:
    return [local_parameter(decl, rank, degree, sequence_parallel) for rank in range(degree)]


def marked(ranks: Sequence[LocalParameter]) -> dict[str, torch.Tensor]:
    """How often each element of each canonical tensor is counted, over what all ranks hold of it."""
    counts: dict[str, torch.Tensor] = {}
    for local in ranks:
        for spec in local.specs:
            count = counts.setdefault(spec.name, torch.zeros(spec.shape, dtype=torch.int64))
            for piece in spec.pieces:
                box = tuple(slice(lo, hi) for lo, hi in zip(piece.box.start, piece.box.stop, strict=True))
                count[box] += piece.replica == 0
    return counts


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 8), st.booleans(), st.integers(0, 2**32))
def test_every_element_is_counted_once(degree: int, sequence_parallel: bool, seed: int) -> None:
    decl = declared(random.Random(seed), degree)
    ranks = on_all_ranks(decl, degree, sequence_parallel)
    counts = marked(ranks)
    assert set(counts) == {tensor.name for tensor in decl.tensors}
    assert all(bool((count == 1).all()) for count in counts.values())
    for rank, local in enumerate(ranks):
        shapes = [local_shape(tensor, rank, degree) for tensor in decl.tensors]
        assert local.shape == (sum(shape[0] for shape in shapes), *shapes[0][1:])
        assert [spec.shape for spec in local.specs] == [tensor.shape for tensor in decl.tensors]
        assert (local.name, local.flat_unit, local.decay) == (decl.name, decl.flat_unit, decl.decay)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 8), st.booleans(), st.integers(0, 2**32))
def test_places_are_distinct_and_inside(degree: int, sequence_parallel: bool, seed: int) -> None:
    """No two elements share a place in a local parameter, and each lies inside it; what is left is padding."""
    decl = declared(random.Random(seed), degree)
    for local in on_all_ranks(decl, degree, sequence_parallel):
        taken = torch.zeros(local.numel, dtype=torch.int64)
        for spec in local.specs:
            for piece in spec.pieces:
                taken.as_strided(piece.box.shape, piece.strides, piece.offset).add_(1)
        assert bool((taken <= 1).all())
        assert int(taken.sum()) == sum(spec.numel for spec in local.specs)
        if all(tensor.split is None or tensor.split.rule != "padded" for tensor in decl.tensors):
            assert int(taken.sum()) == local.numel


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 8), st.booleans(), st.integers(0, 2**32))
def test_summed_pieces_bring_equal_gradients(degree: int, sequence_parallel: bool, seed: int) -> None:
    """Each rank's part of a gradient, summed through the exchange area, gives every holder the whole sum.

    A shared element's parts are its holders', and every element that several ranks hold with parts of its gradient is
    summed: shared heads always, whole tensors of the sequence region under sequence parallelism.
    """
    decl = declared(random.Random(seed), degree)
    ranks = on_all_ranks(decl, degree, sequence_parallel)
    (exchange_numel,) = {local.exchange_numel for local in ranks}
    exchange = torch.zeros(exchange_numel, dtype=torch.int64)
    held = [local_parts(local, rank) for rank, local in enumerate(ranks)]
    for local, flat in zip(ranks, held, strict=True):
        used = torch.zeros(exchange_numel, dtype=torch.int64)
        for piece in local.summed:
            area = slice(piece.exchange_offset, piece.exchange_offset + piece.numel)
            exchange[area] += flat[piece.offset : piece.offset + piece.numel]
            used[area] += 1
        assert bool((used <= 1).all()), "a part of the exchange area is used twice"
    for local, flat in zip(ranks, held, strict=True):
        for piece in local.summed:
            area = slice(piece.exchange_offset, piece.exchange_offset + piece.numel)
            flat[piece.offset : piece.offset + piece.numel] = exchange[area]
    summed = decl.in_sequence_region and sequence_parallel
    assert exchange_numel == sum(num_exchanged(tensor, degree, summed) for tensor in decl.tensors)
    for index, tensor in enumerate(decl.tensors):
        check_sums(tensor, [(local.specs[index], flat) for local, flat in zip(ranks, held, strict=True)], summed)


def num_exchanged(tensor: TensorDecl, degree: int, region_summed: bool) -> int:
    """Elements of a tensor whose gradient is a sum over ranks: heads of several readers, and the sequence region."""
    if tensor.split is None:
        return tensor.numel if region_summed and degree > 1 else 0
    if tensor.split.rule != "kv_heads":
        return 0
    heads, queries = tensor.split.num_blocks, tensor.split.num_queries
    return tensor.numel // heads * sum(len(readers(head, queries, heads, degree)) > 1 for head in range(heads))


def local_parts(local: LocalParameter, rank: int) -> torch.Tensor:
    """A gradient part that tells element and rank: 10**9 x canonical index + 10**rank, 0 in padding."""
    flat = torch.zeros(local.numel, dtype=torch.int64)
    for spec in local.specs:
        canonical = torch.arange(prod(spec.shape)).view(spec.shape) * 10**9
        for piece in spec.pieces:
            box = tuple(slice(lo, hi) for lo, hi in zip(piece.box.start, piece.box.stop, strict=True))
            flat.as_strided(piece.box.shape, piece.strides, piece.offset).copy_(canonical[box] + 10**rank)
    return flat


def check_sums(tensor: TensorDecl, held: Sequence[tuple[ShardSpec, torch.Tensor]], region_summed: bool) -> None:
    total = torch.zeros(tensor.shape, dtype=torch.int64)
    number = torch.zeros(tensor.shape, dtype=torch.int64)
    pieces = [
        (rank, tuple(slice(lo, hi) for lo, hi in zip(p.box.start, p.box.stop, strict=True)), p, flat)
        for rank, (spec, flat) in enumerate(held)
        for p in spec.pieces
    ]
    canonical = torch.arange(tensor.numel).view(tensor.shape) * 10**9
    for rank, box, _, _ in pieces:
        total[box] += canonical[box] + 10**rank
        number[box] += 1
    for rank, box, piece, flat in pieces:
        found = flat.as_strided(piece.box.shape, piece.strides, piece.offset)
        if tensor.split is not None or region_summed:
            assert torch.equal(found, total[box]), (tensor, rank)
        else:
            assert torch.equal(found, canonical[box] + 10**rank), "a whole tensor is not summed: the parts are equal"
    if tensor.split is None:
        assert bool((number == len(held)).all())


def test_copies_of_a_tied_tensor_do_not_count() -> None:
    """Rank r of the copy n has replica n x degree + r of a whole tensor, n of a split one: 0 for one holder only."""
    for split in (None, Split(0, 6, "padded")):
        tensor = TensorDecl("w", (6, 2), NORMAL, split)
        numbers = [
            piece.replica
            for copy in range(3)
            for rank in range(2)
            for piece in local_parameter(ParameterDecl("w", (tensor,), "u", tie_copy=copy), rank, 2).specs[0].pieces
        ]
        assert numbers == (list(range(6)) if split is None else [0, 0, 1, 1, 2, 2])


def test_shared_heads_lie_along_dim_0() -> None:
    """The exchange area has rows as its unit: a declaration that would break it is refused, not summed wrongly."""
    tensor = TensorDecl("w", (4, 2), NORMAL, Split(1, 2, "kv_heads", 6))
    with pytest.raises(AssertionError, match="dim 0"):
        local_parameter(ParameterDecl("w", (tensor,), "u"), 0, 3)


def unit(name: str, *parameters: ParameterDecl, matmul: float = 0.0, attention: float = 0.0) -> UnitDecl:
    return UnitDecl(name, parameters, matmul, attention)


def test_stages_and_sizes() -> None:
    tokens = TensorDecl("tokens", (10, 4), NORMAL)
    first = ParameterDecl("embedding.weight", (tokens,), "embedding.tokens")
    copy = ParameterDecl("head.weight", (tokens,), "embedding.tokens", tie_copy=1)
    middle = ParameterDecl("layers.0.weight", (TensorDecl("layers.0.weight", (4, 4), NORMAL),), "layers.0")
    units = (unit("embedding", first), unit("layers.0", middle, matmul=32.0, attention=8.0), unit("head", copy))
    assert stage_parameters(units) == (first, middle)
    assert stage_parameters(units[1:]) == (middle, copy)
    assert num_parameters(units) == 56
    assert num_parameters(units[1:]) == 16
    assert train_flops_per_token(units, causal=False) == 3 * 40.0
    assert train_flops_per_token(units, causal=True) == 3 * 36.0
