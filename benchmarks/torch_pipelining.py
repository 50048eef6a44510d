"""The peer of `benchmarks.pipeline`: a plain-torch GPT cut into stage modules, run by torch.distributed.pipelining.

No code of the engine. The schedule classes are torch's own, with their defaults but one: the loss of a microbatch is
already its share of the step's mean, so gradients need no scaling at the end (`scale_grads=False` saves torch that pass).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, schedules
from torch.nn import functional

from benchmarks.plain_gpt import Block, Shape

ONE_STAGE = frozenset(("GPipe", "1F1B"))  # torch's single-stage schedules
V_SHAPED = frozenset(("ZBVZeroBubble", "DualPipeV"))


class PlainStage(nn.Module):
    """Layers `[lo, hi)` of a GPT with an untied head; the first stage embeds (B, S) tokens, the last gives logits.

    Between stages travels the hidden state (B, S, H).
    """

    def __init__(self, shape: Shape, lo: int, hi: int) -> None:
        super().__init__()
        self.first, self.is_first, self.is_last = lo, lo == 0, hi == shape.num_layers
        if self.is_first:
            self.tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
            self.positions = nn.Embedding(shape.sequence_length, shape.hidden_size)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(lo, hi))
        if self.is_last:
            self.norm = nn.LayerNorm(shape.hidden_size)
            self.head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, S) or hidden (B, S, H) to hidden or logits (B, S, V)."""
        if self.is_first:
            x = self.tokens(x) + self.positions.weight[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)) if self.is_last else x

    def load_canonical(self, weights: Mapping[str, Tensor]) -> None:
        """Take initial values by the engine's canonical tensor names."""
        with torch.no_grad():
            if self.is_first:
                self.tokens.weight.copy_(weights["embedding.tokens.weight"])
                self.positions.weight.copy_(weights["embedding.positions.weight"])
            for index, block in enumerate(self.blocks, self.first):
                assert isinstance(block, Block)
                block.load_canonical(weights, index)
            if self.is_last:
                self.norm.weight.copy_(weights["head.norm.weight"])
                self.norm.bias.copy_(weights["head.norm.bias"])
                self.head.weight.copy_(weights["head.output.weight"])


def mean_loss(num_tokens: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Loss of a microbatch as its share of the mean over `num_tokens` tokens of the step."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / num_tokens

    return loss


def stages_of(name: str, rank: int, num_ranks: int, stages_per_rank: int) -> list[int]:
    """The stages that torch's schedule `name` puts on `rank`."""
    if name in V_SHAPED:
        return [rank, 2 * num_ranks - 1 - rank]
    return [rank + chunk * num_ranks for chunk in range(stages_per_rank)]


class TorchPipeline:
    """One rank's stages under one of torch's schedules, on the default process group."""

    def __init__(self, name: str, shape: Shape, cuts: Sequence[tuple[int, int]], num_microbatches: int) -> None:
        """`cuts[stage]` are the layers `[lo, hi)` of a stage."""
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
        mine = stages_of(name, rank, num_ranks, len(cuts) // num_ranks)
        self.modules = [PlainStage(shape, *cuts[stage]) for stage in mine]
        cpu = torch.device("cpu")
        stages = [
            PipelineStage(module, index, len(cuts), cpu) for index, module in zip(mine, self.modules, strict=True)
        ]
        self.loss_fn = mean_loss(1)
        make: Any = schedules.get_schedule_class(name)
        self.schedule = make(
            stages[0] if name in ONE_STAGE else stages,
            num_microbatches,
            loss_fn=lambda logits, labels: self.loss_fn(logits, labels),
            scale_grads=False,
        )
        self.has_first, self.has_last = 0 in mine, len(cuts) - 1 in mine

    def load_canonical(self, weights: Mapping[str, Tensor]) -> None:
        """Take initial values by the engine's canonical tensor names."""
        for module in self.modules:
            module.load_canonical(weights)

    def step(self, tokens: Tensor, labels: Tensor) -> float | None:
        """Forward and backward of all microbatches; tokens and labels (all samples, S). The mean loss on the last stage.

        Every rank must call it.
        """
        for module in self.modules:
            module.zero_grad()
        self.loss_fn = mean_loss(labels.numel())
        losses: list[Tensor] = []
        args = (tokens,) if self.has_first else ()
        target = labels if self.has_last else None
        self.schedule.step(*args, target=target, losses=losses, return_outputs=False)
        return sum(float(loss.detach()) for loss in losses) if self.has_last else None

    def sum_of_squares(self) -> float:
        """Of this rank's gradients."""
        grads = [p.grad for module in self.modules for p in module.parameters()]
        return sum(float(grad.double().square().sum()) for grad in grads if grad is not None)
