"""Tensor and sequence parallelism against one process, in float64: loss, every canonical gradient, logits, dropout."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness import assert_close_named, run_ranks
from tests.model_cases import gradients, make_stage, microbatch, small, tensor_topology, whole_gradients
from trilith.layers.embedding import VocabularyShard
from trilith.layers.loss import vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy
from trilith.models.base import Split
from trilith.topology import Group


@dataclass(frozen=True)
class Variant:
    """One model to compare, with `changes` to `small(family)`."""

    family: str
    recompute: str = "none"
    changes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.family} {self.recompute} {self.changes}"


def variants(degree: int) -> list[Variant]:
    """Both families, tied and not, with the heads that suit `degree`: regular, grouped, and shared irregularly."""
    heads = 8 if degree == 4 else 6
    shared = {2: 3, 3: 2, 4: 2}[degree]  # K that the degree does not divide, or the degree no multiple of K
    size = {"num_heads": heads, "hidden_size": 4 * heads}
    return [
        Variant("gpt2", "none", {**size, "num_kv_heads": heads}),
        Variant("gpt2", "full", {**size, "num_kv_heads": shared, "tie_embeddings": False}),
        Variant("llama", "selective", {**size, "num_kv_heads": shared}),
        Variant("llama", "full", {**size, "num_kv_heads": shared, "tie_embeddings": True, "linear_bias": True}),
        Variant("llama", "none", {**size, "num_kv_heads": 1, "vocab_size": 5}),
    ]


Outcome = tuple[float, dict[str, Any], Tensor]


def outcomes(degree: int, sequence_parallel: bool, of: list[Variant], device: str = "cpu") -> list[Outcome]:
    """(loss, local gradients, local logits in evaluation mode) of each variant on this rank."""
    topology = tensor_topology(degree, device)
    found = []
    for variant in of:
        model = small(variant.family, **variant.changes)
        stage = make_stage(model, topology, recompute=variant.recompute, sequence_parallel=sequence_parallel)
        batch = microbatch(model, device=device)
        loss = stage({}, batch)["loss"]
        loss.backward()
        with torch.no_grad():
            logits = stage.eval()({}, replace(batch, labels=None))["logits"]
        found.append((loss.item(), gradients(stage), logits.cpu()))
    return found


def on_rank(rank: int, world_size: int, sequence_parallel: bool, device: str) -> list[Outcome]:
    return outcomes(world_size, sequence_parallel, variants(world_size), device)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["plain", "sequence_parallel"])
@pytest.mark.parametrize("degree", [2, 3, 4])
def test_equals_one_process(degree: int, sequence_parallel: bool, device: str) -> None:
    """Dropout 0.1, masked labels, a vocabulary that does not divide, shared key/value heads, every recompute."""
    ranks = run_ranks(degree, on_rank, sequence_parallel, device, device=device)
    plain = [Variant(v.family, "none", v.changes) for v in variants(degree)]
    for index, (variant, expected) in enumerate(zip(variants(degree), outcomes(1, False, plain), strict=True)):
        loss, local, logits = expected
        pairs = {f"{variant}: loss": (torch.tensor([r[index][0] for r in ranks]), torch.tensor([loss] * degree))}
        truth = whole_gradients([local])
        actual = whole_gradients([r[index][1] for r in ranks])
        assert actual.keys() == truth.keys()
        pairs |= {f"{variant}: {name}": (actual[name], truth[name]) for name in truth}
        gathered = torch.cat([r[index][2] for r in ranks], dim=-1)[..., : logits.shape[-1]]
        pairs[f"{variant}: logits"] = (gathered, logits)
        assert_close_named(pairs, rtol=1e-10, atol=1e-12)


def cross_entropy_on_rank(rank: int, world_size: int, vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return local_cross_entropy(tensor_topology(world_size).tp, vocab_size, dtype)


def logits_and_labels(vocab_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits far from 0, labels, mask, and the gradient of each token's loss."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn((2, 7, vocab_size), generator=generator, dtype=torch.float64) * 30 + 200
    labels = torch.randint(0, vocab_size, (2, 7), generator=generator)
    mask = torch.rand((2, 7), generator=generator) > 0.3
    labels[~mask] = -100  # a label that does not count may be anything
    return logits, labels, mask, torch.randn((2, 7), generator=generator, dtype=torch.float64)


def local_cross_entropy(group: Group, vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Token losses and gradient of this rank's logits; padding columns hold what must not count."""
    logits, labels, mask, weights = logits_and_labels(vocab_size)
    first, end, rows = Split(0, vocab_size, "padded").held(group.index, group.size)
    local = torch.full((2, 7, rows), 1e4, dtype=dtype)
    local[..., : end - first] = logits[..., first:end].to(dtype)
    local.requires_grad_()
    losses = vocab_parallel_cross_entropy(local, labels, mask, VocabularyShard(first, end, rows, vocab_size), group)
    losses.backward(weights.to(losses.dtype))
    assert local.grad is not None
    assert (local.grad[..., end - first :] == 0).all()
    return losses.detach(), local.grad[..., : end - first]


@pytest.mark.parametrize(("degree", "vocab_size"), [(1, 61), (2, 61), (3, 61), (4, 5)])
def test_cross_entropy(degree: int, vocab_size: int) -> None:
    """Losses and gradients equal torch's over the whole vocabulary, with a rank that holds no row (5 over 4) too."""
    if degree == 1:
        ranks = [local_cross_entropy(tensor_topology().tp, vocab_size, torch.float64)]
    else:
        ranks = run_ranks(degree, cross_entropy_on_rank, vocab_size, torch.float64)
    logits, labels, mask, weights = logits_and_labels(vocab_size)
    logits.requires_grad_()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    losses.backward(weights)
    assert logits.grad is not None
    pairs = {f"losses of rank {index}": (rank[0], losses.detach()) for index, rank in enumerate(ranks)}
    pairs["gradient"] = (torch.cat([rank[1] for rank in ranks], dim=-1), logits.grad)
    assert_close_named(pairs, rtol=1e-10, atol=1e-12)
    assert (ranks[0][0][~mask] == 0).all()


def product_and_labels(vocab_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden, weight, labels and mask."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn((2, 150, 8), generator=generator, dtype=torch.float64)
    weight = torch.randn((vocab_size, 8), generator=generator, dtype=torch.float64)
    labels = torch.randint(0, vocab_size, (2, 150), generator=generator)
    mask = torch.rand((2, 150), generator=generator) > 0.3
    labels[~mask] = -100
    return hidden, weight, labels, mask


def product_on_rank(rank: int, world_size: int, vocab_size: int) -> tuple[Tensor, ...]:
    return local_product(tensor_topology(world_size).tp, vocab_size)


def local_product(group: Group, vocab_size: int) -> tuple[Tensor, ...]:
    """Sum of the losses, this rank's part of the gradient of hidden, and that of its rows of the weight."""
    hidden, weight, labels, mask = product_and_labels(vocab_size)
    first, end, rows = Split(0, vocab_size, "padded").held(group.index, group.size)
    local = torch.full((rows, 8), 1e4, dtype=torch.float64)
    local[: end - first] = weight[first:end]
    hidden.requires_grad_(), local.requires_grad_()
    shard = VocabularyShard(first, end, rows, vocab_size)
    total = vocab_parallel_linear_cross_entropy(hidden, local, (labels, mask), shard, group, 0.25)
    (total * 0.25).backward()
    assert hidden.grad is not None and local.grad is not None and not local.grad[end - first :].any()
    return total.detach(), hidden.grad, local.grad[: end - first]


@pytest.mark.parametrize(("degree", "vocab_size"), [(1, 61), (3, 61), (4, 5)])
def test_product_and_cross_entropy(degree: int, vocab_size: int) -> None:
    """In three chunks of tokens, between whose parts ranks communicate: as from logits made whole by one process."""
    if degree == 1:
        ranks = [local_product(tensor_topology().tp, vocab_size)]
    else:
        ranks = run_ranks(degree, product_on_rank, vocab_size)
    hidden, weight, labels, _ = product_and_labels(vocab_size)
    logits = (hidden.requires_grad_() @ weight.requires_grad_().mT).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum", ignore_index=-100)
    (expected * 0.25).backward()
    assert hidden.grad is not None and weight.grad is not None
    pairs = {f"sum of rank {index}": (rank[0], expected.detach()) for index, rank in enumerate(ranks)}
    pairs["hidden"] = (torch.stack([rank[1] for rank in ranks]).sum(0), hidden.grad)
    pairs["weight"] = (torch.cat([rank[2] for rank in ranks]), weight.grad)
    assert_close_named(pairs, rtol=1e-10, atol=1e-12)


def test_cross_entropy_of_half_logits_is_computed_in_float32() -> None:
    losses, gradient = local_cross_entropy(tensor_topology().tp, 61, torch.bfloat16)
    logits, labels, _, _ = logits_and_labels(61)
    exact = torch.nn.functional.cross_entropy(
        logits.to(torch.bfloat16).float().transpose(1, 2), labels, reduction="none", ignore_index=-100
    )
    assert losses.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    torch.testing.assert_close(losses, exact, rtol=1e-5, atol=1e-5)
