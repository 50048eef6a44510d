"""Collectives that gradients pass through, each with its conjugate (Megatron-LM's f and g: Shoeybi et al. 2019;
their sequence-parallel forms: Korthikanti et al. 2022).

| function            | forward             | backward            |
|---------------------|---------------------|---------------------|
| `copy_to`           | identity            | sum over ranks      |
| `reduce_from`       | sum over ranks      | identity            |
| `gather_along`      | concatenate         | sum, then own part  |
| `scatter_sum_along` | sum, then own part  | concatenate         |
| `concat_along`      | concatenate         | own part            |
| `split_along`       | own part            | concatenate         |

Which one is right depends on what follows: `gather_along` where ranks go on with different work (their gradients add
up), `concat_along` where all go on with the same. Ranks of one group must call them, and run their backwards, in one
order. With one rank all return their input itself, with no node in the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trilith.comm.collectives import all_gather, all_reduced, reduce_scatter
from trilith.topology import Group


def _concatenated(part: Tensor, group: Group, dim: int) -> Tensor:
    """All ranks' parts along `dim`. Without a copy where the dims before it have one element."""
    gathered = part.new_empty(group.size, *part.shape)
    all_gather(gathered, part.detach().contiguous(), group)
    return gathered.movedim(0, dim).flatten(dim, dim + 1)


def _by_rank(whole: Tensor, group: Group, dim: int) -> Tensor:
    """(size, ..., extent / size along dim, ...): `whole` cut along `dim`, as a view."""
    extent = whole.shape[dim]
    assert extent % group.size == 0, (
        f"dim {dim} of {tuple(whole.shape)} must divide by the {group.size} ranks of {group.name}"
    )
    return whole.detach().unflatten(dim, (group.size, extent // group.size)).movedim(dim, 0)


def _own_part(whole: Tensor, group: Group, dim: int) -> Tensor:
    return _by_rank(whole, group, dim)[group.index].clone(memory_format=torch.contiguous_format)


def _own_sum(whole: Tensor, group: Group, dim: int) -> Tensor:
    """This rank's part along `dim` of the sum over ranks."""
    parts = _by_rank(whole, group, dim).contiguous()
    output = torch.empty_like(parts[0])
    reduce_scatter(output, parts, group)
    return output


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_reduced(gradient, ctx.group), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return all_reduced(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _GatherAlong(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _concatenated(x, group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _own_sum(gradient, ctx.group, ctx.dim), None, None


class _ScatterSumAlong(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _own_sum(x, group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _concatenated(gradient, ctx.group, ctx.dim), None, None


class _ConcatAlong(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _concatenated(x, group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _own_part(gradient, ctx.group, ctx.dim), None, None


class _SplitAlong(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _own_part(x, group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _concatenated(gradient, ctx.group, ctx.dim), None, None


def copy_to(x: Tensor, group: Group) -> Tensor:
    """`x` itself; its gradient is summed over the group. Before work that ranks share out (a column-parallel layer)."""
    return x if group.size == 1 else _CopyTo.apply(x, group)


def reduce_from(x: Tensor, group: Group) -> Tensor:
    """The sum of `x` over the group; the gradient passes. After work shared out (a row-parallel layer)."""
    return x if group.size == 1 else _ReduceFrom.apply(x, group)


def gather_along(x: Tensor, group: Group, dim: int) -> Tensor:
    """All ranks' `x` concatenated along `dim`; the gradient is summed over the group and cut."""
    return x if group.size == 1 else _GatherAlong.apply(x, group, dim % x.dim())


def scatter_sum_along(x: Tensor, group: Group, dim: int) -> Tensor:
    """This rank's part along `dim` of the sum of `x` over the group; the gradient is concatenated."""
    return x if group.size == 1 else _ScatterSumAlong.apply(x, group, dim % x.dim())


def split_along(x: Tensor, group: Group, dim: int) -> Tensor:
    """This rank's part of `x` along `dim`; the gradient is concatenated. `x` is the same on all ranks."""
    return x if group.size == 1 else _SplitAlong.apply(x, group, dim % x.dim())


def concat_along(x: Tensor, group: Group, dim: int) -> Tensor:
    """All ranks' `x` concatenated along `dim`; each rank takes its part of the gradient, the same on all ranks."""
    return x if group.size == 1 else _ConcatAlong.apply(x, group, dim % x.dim())
