"""A made-up model as a list of layers, and the same model trained by a plain loop in one process, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trilith.models.pipeline_model import LayerSpec, PipelineModel, TiedLayerSpec

VOCABULARY, WIDTH, SIZE, LR = 11, 6, 2, 0.05
Batch = tuple[Tensor, Tensor]


class Convolution(nn.Module):
    """(B, S, H) to (B, S, H) over neighbours in S."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.convolution(x.transpose(1, 2))).transpose(1, 2)


class Fork(nn.Module):
    """A tensor to a tuple with a mask, an index and numbers."""

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        mask = torch.arange(x.shape[1], device=x.device) % 3 != 1
        return x, [mask, torch.arange(x.shape[1], device=x.device)], x.shape[1], 0.25, None


class Mix(nn.Module):
    """Uses everything of the tuple and hands it on, mask and numbers unchanged."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, inner), nn.Linear(inner, WIDTH, bias=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.calls: Tensor

    def forward(self, value: tuple[Any, ...]) -> tuple[Any, ...]:
        x, (mask, index), length, share, nothing = value
        assert nothing is None and length == x.shape[1] and share == 0.25 and int(index[-1]) == length - 1
        if self.training:
            self.calls += 1
        mixed = self.down(functional.gelu(self.up(self.norm(x))))
        return x + share * mixed * mask[:, None], [mask, index], length, share, nothing


class Join(nn.Module):
    """A dict out of the tuple."""

    def forward(self, value: tuple[Any, ...]) -> dict[str, Any]:
        return {"hidden": value[0], "first": value[0][:, 0]}


class Recall(nn.Module):
    """Looks every position up among the rows of a matrix of the vocabulary's shape; takes and gives a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(VOCABULARY, WIDTH))
        nn.init.normal_(self.weight, std=0.3)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, value: dict[str, Any]) -> dict[str, Any]:
        hidden = value["hidden"] + self.scale * torch.softmax(value["hidden"] @ self.weight.T, -1) @ self.weight
        return {**value, "hidden": hidden}


def merge(value: dict[str, Any]) -> Tensor:
    """The end of the dict."""
    return value["hidden"] + 0.5 * value["first"][:, None]


def project(layer: nn.Embedding, x: Tensor) -> Tensor:
    """An embedding as output projection."""
    return x @ layer.weight.T


def loss(output: Tensor, labels: Tensor) -> Tensor:
    """Mean over the microbatch."""
    return functional.cross_entropy(output.flatten(0, 1), labels.flatten())


def layers(frozen: bool = False) -> list[Any]:
    """Ten layers: three copies of one matrix, plain functions, convolution, linears, an embedding."""
    made: list[Any] = [
        TiedLayerSpec("tokens", nn.Embedding, VOCABULARY, WIDTH),
        LayerSpec(Convolution),
        Fork(),
        LayerSpec(Mix, 9),
        LayerSpec(Mix, 5),
        Join(),
        LayerSpec(Recall),
        merge,
        LayerSpec(nn.Linear, WIDTH, WIDTH),
        TiedLayerSpec("tokens", nn.Embedding, VOCABULARY, WIDTH, forward_fn=project),
    ]
    if frozen:
        made[0] = LayerSpec(_frozen, made[0])
        made[1] = LayerSpec(_frozen, made[1])
    return made


def _frozen(spec: LayerSpec) -> Any:
    layer: Any = spec.build()
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    return layer


def model(frozen: bool = False, partition: Any = None) -> PipelineModel:
    """The layers with a three-way tie, or with the first layers frozen and the other two copies tied."""
    tied = [("6.weight", "9.weight")] if frozen else [("0.weight", "6.weight")]
    return PipelineModel(layers(frozen), loss, ties=tied, partition=partition)


@dataclass(frozen=True)
class Data:
    """Which microbatches there are: `lengths[step % len]` positions, `count` a step and data rank."""

    count: int
    lengths: tuple[int, ...] = (5,)

    def microbatch(self, step: int, number: int, data_rank: int) -> Batch:
        """Tokens and labels (B, S); the batch size changes where the length does."""
        which = step % len(self.lengths)
        generator = torch.Generator().manual_seed(1000 * step + 10 * number + data_rank)
        shape = (SIZE + which, self.lengths[which])
        tokens = torch.randint(VOCABULARY, shape, generator=generator)
        return tokens, torch.randint(VOCABULARY, shape, generator=generator)

    def stream(self, data_rank: int, first: int = 0) -> Iterator[Batch]:
        """What a data rank reads, from step `first` on."""
        step = first
        while True:
            for number in range(self.count):
                yield self.microbatch(step, number, data_rank)
            step += 1


class Plain:
    """The whole model in one process: `names` of the engine's parameters and buffers to its own tensors."""

    def __init__(self, frozen: bool, weights: dict[str, Tensor]) -> None:
        self.specs = layers(frozen)
        self.layers: list[Any] = [spec.build() if isinstance(spec, LayerSpec) else spec for spec in self.specs]
        self.layers[9].weight = self.layers[6].weight
        if not frozen:
            self.layers[0].weight = self.layers[6].weight
        self.module = nn.ModuleDict(
            {str(i): layer for i, layer in enumerate(self.layers) if layer is not merge}
        ).double()
        self.module.load_state_dict(weights)
        trained = [p for p in self.module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.trained = trained
        self.optimizer = torch.optim.AdamW(groups, lr=LR, eps=1e-3, foreach=False)

    def loss(self, batch: Batch) -> Tensor:
        """The loss of one microbatch."""
        value: Any = batch[0]
        for spec, layer in zip(self.specs, self.layers, strict=True):
            value = spec.call(layer, value) if isinstance(spec, LayerSpec) else layer(value)
        return loss(value, batch[1])

    def gradients(self, data: Data, data_ranks: int, step: int) -> float:
        """Leave a step's gradients in `.grad`; the step's loss."""
        self.optimizer.zero_grad()
        total = 0.0
        for rank in range(data_ranks):
            for number in range(data.count):
                share = self.loss(data.microbatch(step, number, rank)) / (data.count * data_ranks)
                share.backward()
                total += float(share.detach())
        return total

    def train(self, data: Data, data_ranks: int, steps: int, clipping: float) -> list[tuple[float, float]]:
        """(loss, norm) of every step."""
        found = []
        for step in range(steps):
            total = self.gradients(data, data_ranks, step)
            norm = float(torch.nn.utils.clip_grad_norm_(self.trained, clipping))
            self.optimizer.step()
            found.append((total, norm))
        return found
