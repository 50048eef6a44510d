"""A hand-written GPT-2 and training loop in plain torch: what the engine is compared with. No code of the engine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Shape:
    """Sizes of the model."""

    num_layers: int
    hidden_size: int
    num_heads: int
    vocab_size: int
    sequence_length: int
    dropout: float = 0.0


class Block(nn.Module):
    """Pre-norm attention and MLP. Input and output (B, S, H)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        h = shape.hidden_size
        self.num_heads, self.dropout = shape.num_heads, shape.dropout
        self.norm1, self.norm2 = nn.LayerNorm(h), nn.LayerNorm(h)
        self.qkv, self.out = nn.Linear(h, 3 * h), nn.Linear(h, h)
        self.up, self.down = nn.Linear(h, 4 * h), nn.Linear(4 * h, h)

    def forward(self, x: Tensor) -> Tensor:
        """One transformer block."""
        b, s, h = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, s, 3, self.num_heads, h // self.num_heads).unbind(2)
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), dropout_p=p, is_causal=True
        )
        x = x + F.dropout(self.out(y.transpose(1, 2).reshape(b, s, h)), p)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh")), p)

    def load_canonical(self, weights: Mapping[str, Tensor], layer: int) -> None:
        """Take the values of global layer `layer` by the engine's canonical tensor names."""
        at = f"layers.{layer}."
        with torch.no_grad():
            for kind in ("weight", "bias"):
                qkv = [weights[f"{at}attention.{part}.{kind}"] for part in "qkv"]
                getattr(self.qkv, kind).copy_(torch.cat(qkv))
                for module, name in (
                    (self.norm1, "attention_norm"),
                    (self.norm2, "mlp_norm"),
                    (self.out, "attention.output"),
                    (self.up, "mlp.up"),
                    (self.down, "mlp.down"),
                ):
                    getattr(module, kind).copy_(weights[f"{at}{name}.{kind}"])


class PlainGPT(nn.Module):
    """GPT-2 with a tied head. `forward` gives the mean token loss of tokens and labels (B, S)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.positions = nn.Embedding(shape.sequence_length, shape.hidden_size)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.norm = nn.LayerNorm(shape.hidden_size)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Mean negative log likelihood."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        x = F.dropout(x, self.shape.dropout if self.training else 0.0)
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def load_canonical(self, weights: Mapping[str, Tensor]) -> None:
        """Take initial values by the engine's canonical tensor names."""
        with torch.no_grad():
            self.tokens.weight.copy_(weights["embedding.tokens.weight"])
            self.positions.weight.copy_(weights["embedding.positions.weight"])
            for index, block in enumerate(self.blocks):
                assert isinstance(block, Block)
                block.load_canonical(weights, index)
            self.norm.weight.copy_(weights["head.norm.weight"])
            self.norm.bias.copy_(weights["head.norm.bias"])


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups of all parameters: decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


class PlainTrainer:
    """The loop a careful user writes by hand: accumulation, clipping, torch's fused AdamW, decay on matrices only."""

    def __init__(self, model: PlainGPT, lr: float, weight_decay: float, clip: float) -> None:
        self.model, self.clip = model, clip
        groups = decay_groups(model, weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=1e-8, fused=True)

    def step(self, microbatches: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
        """One optimizer step; returns (loss, gradient norm before clipping)."""
        self.optimizer.zero_grad(set_to_none=False)
        total = 0.0
        for tokens, labels in microbatches:
            loss = self.model(tokens, labels) / len(microbatches)
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip or math.inf)
        self.optimizer.step()
        return total, float(norm)
