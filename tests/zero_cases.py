"""A toy that ZeRO trains at any stage, one way to train it, and the same training in one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trilith.config import load_config, resolve
from trilith.models.base import LocalParameter
from trilith.optim.adamw import Adam, AdamOptions
from trilith.optim.groups import multipliers
from trilith.pipeline.action import NO_MICROBATCH
from trilith.pipeline.passes import complete
from trilith.pipeline.schedules import make_schedule
from trilith.precision import PrecisionPolicy
from trilith.sharding import Piece, ShardSpec, contiguous_strides, whole
from trilith.topology import Topology
from trilith.zero.sharded import ShardedModel, Sharding

VOCABULARY, BLOCKS, BATCH, STEPS = 7, 3, 12, 3
LR, DECAY = 0.05, 0.1
NO_LIMIT = 10**9


@dataclass(frozen=True)
class Way:
    """One way to train the toy. `known`: the order of its modules is declared, not learned from the first step."""

    stage: int = 1
    microbatches: int = 1
    interval: str = "microbatch"
    overlap: bool = True
    bucket: int = 0
    prefetch: int = NO_LIMIT
    backward_prefetch: str = "pre"
    max_live: int = NO_LIMIT
    max_reuse: int = NO_LIMIT
    persistence: int = 0
    model_persistence: int = NO_LIMIT
    known: bool = True
    clipping: float = 0.7
    tied: bool = False
    frozen: bool = False
    dtype: str = "fp64"
    communication: str = "auto"
    hidden: int = 5

    @property
    def reduces_each_microbatch(self) -> bool:
        """Whether gradients are summed over ranks before they are summed over microbatches."""
        return self.stage >= 2 and self.interval == "microbatch" and self.microbatches > 1

    def zero_section(self) -> dict[str, Any]:
        """The config section `zero_optimization`."""
        return {
            "stage": self.stage,
            "reduce_interval": self.interval,
            "overlap_comm": self.overlap,
            "reduce_bucket_size": self.bucket,
            "stage3_prefetch_bucket_size": self.prefetch,
            "stage3_backward_prefetch": self.backward_prefetch,
            "stage3_max_live_parameters": self.max_live,
            "stage3_max_reuse_distance": self.max_reuse,
            "stage3_param_persistence_threshold": self.persistence,
            "stage3_model_persistence_threshold": self.model_persistence,
        }


def blank(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """A parameter without values."""
    return nn.Parameter(torch.empty(shape, device="meta", dtype=dtype))


class Table(nn.Module):
    """Rows by number."""

    def __init__(self, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = blank(VOCABULARY, hidden, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B,) to (B, H)."""
        return nn.functional.embedding(tokens, self.weight)


class Block(nn.Module):
    """x + tanh(W (norm * (W x + b)) + b): W and b are used twice."""

    def __init__(self, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = blank(hidden, dtype=dtype)
        self.weight = blank(hidden, hidden, dtype=dtype)
        self.bias = blank(hidden, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H) to (B, H)."""
        inner = self.norm * nn.functional.linear(x, self.weight, self.bias)
        return x + torch.tanh(nn.functional.linear(inner, self.weight, self.bias))


class Head(nn.Module):
    """Logits, of weights of its own or of the table's, and a weight that forward never uses."""

    def __init__(self, hidden: int, dtype: torch.dtype, table: Table | None) -> None:
        super().__init__()
        self.weight = blank(VOCABULARY, hidden, dtype=dtype) if table is None else table.weight
        self.unused = blank(3, 2, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H) to (B, V)."""
        return nn.functional.linear(x, self.weight)


class Toy(nn.Module):
    """Table, blocks and head; the loss is the sum of squared logits against the next token's one-hot."""

    def __init__(self, way: Way, dtype: torch.dtype) -> None:
        super().__init__()
        self.table = Table(way.hidden, dtype)
        self.blocks = nn.ModuleList(Block(way.hidden, dtype) for _ in range(BLOCKS))
        self.head = Head(way.hidden, dtype, self.table if way.tied else None)
        self._way = way
        if way.frozen:
            self.blocks[1].weight.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        """The loss of tokens (B,)."""
        x = self.table(tokens)
        for block in self.blocks:
            x = block(x)
        target = nn.functional.one_hot((tokens + 1) % VOCABULARY, VOCABULARY).to(x.dtype)
        return (self.head(x) - target).square().sum()

    # ---- what ZeRO asks for -------------------------------------------------------------------------------------

    @property
    def local_parameters(self) -> tuple[LocalParameter, ...]:
        """A unit for each child."""
        return tuple(_declared(name, p) for name, p in self.named_parameters())

    def home_of(self, name: str) -> str:
        """The child that holds the parameter; of one that two children hold, the toy itself."""
        return "" if self._way.tied and name in ("table.weight", "head.weight") else _unit_of(name)

    def homes(self) -> list[str] | None:
        """Children in the order of forward, if they are all there is to know."""
        if self._way.tied or not self._way.known:
            return None
        return ["table", *(f"blocks.{index}" for index in range(BLOCKS)), "head"]

    def home(self, path: str) -> nn.Module:
        """The child at `path`."""
        return self.get_submodule(path)

    def weightless_backwards(self) -> list[str]:
        """Rows are looked up."""
        return ["table"]


def _unit_of(name: str) -> str:
    return ".".join(name.split(".")[: 2 if name.startswith("blocks") else 1])


def _declared(name: str, parameter: Tensor) -> LocalParameter:
    """A parameter that is whole on every rank."""
    shape = tuple(parameter.shape)
    spec = ShardSpec(name, shape, (Piece(whole(shape), 0, contiguous_strides(shape)),))
    return LocalParameter(name, shape, (spec,), (), _unit_of(name), len(shape) > 1, (), 0)


def config_of(way: Way) -> Any:
    """The resolved config of a way."""
    content = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": way.clipping,
        "communication_data_type": way.communication,
        "data_types": {"param_dtype": way.dtype},
        "zero_optimization": way.zero_section(),
    }
    return resolve(load_config(content), 1, needs="engine").config


def make(way: Way, topology: Topology) -> tuple[Toy, ShardedModel]:
    """The toy with its initial values, and what ZeRO keeps of it."""
    config = config_of(way)
    policy = PrecisionPolicy.from_config(config)
    toy = Toy(way, policy.param_dtype)
    units = tuple(dict.fromkeys(p.flat_unit for p in toy.local_parameters))
    options = AdamOptions((0.8, 0.9), 1e-3, DECAY)
    sharding = Sharding(units, frozenset(), multipliers(), lambda partitions: Adam(partitions, options))
    model = ShardedModel({0: toy}, topology, policy, config, sharding)
    for p in toy.local_parameters:
        model.assign(0, p.name, initial(p.name, p.shape))
    return toy, model


def initial(name: str, shape: tuple[int, ...]) -> Tensor:
    """The values that a parameter starts with."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5


def tokens_of(step: int) -> Tensor:
    """The batch of a step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, VOCABULARY, (BATCH,), generator=generator)


def train(model: ShardedModel, toy: Toy, way: Way, steps: range = range(STEPS)) -> list[float]:
    """The norm of each step; every data rank takes its part of each microbatch."""
    topology, stage = model.topology, model.stage(0)
    index = topology.coordinate("replicate") * topology.dp.size + topology.dp.index
    schedule = complete(make_schedule("1f1b", 1, 1, way.microbatches))
    norms = []
    for step in steps:
        stage.begin_run(schedule)
        parts = tokens_of(step).view(way.microbatches, topology.data_size, -1)
        for number, microbatch in enumerate(parts):
            is_final = number == way.microbatches - 1
            loss = toy(microbatch[index]) / BATCH
            stage.begin_backward(number, is_final)
            loss.backward()
            stage.end_backward(number, is_final)
        stage.reduce(NO_MICROBATCH)
        norm = model.step(LR).grad_norm
        assert norm is not None
        norms.append(norm)
    return norms


def reference(way: Way) -> tuple[dict[str, Tensor], list[float]]:
    """The same training in one process with torch's own optimizer, in float64: weights and norms."""
    toy = Toy(way, torch.float64).to_empty(device="cpu")
    if way.tied:
        toy.head.weight = toy.table.weight
    with torch.no_grad():
        for name, p in toy.named_parameters():
            p.copy_(initial(name, tuple(p.shape)))
    batches = [tokens_of(step) for step in range(STEPS)]
    return trained_by_torch(toy, batches, way.clipping, LR, DECAY)


def trained_by_torch(
    toy: nn.Module, batches: Sequence[Tensor], clipping: float, lr: float, decay: float
) -> tuple[dict[str, Tensor], list[float]]:
    """Weights and norms after one step of torch's AdamW for each batch; the toy gives the sum of its samples' losses."""
    trained = [p for p in toy.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.8, 0.9), eps=1e-3, foreach=False)
    norms = []
    for batch in batches:
        for p in trained:
            p.grad = torch.zeros_like(p)  # a weight that forward does not use is decayed all the same
        (toy(batch) / len(batch)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, clipping or float("inf"))))
        optimizer.step()
    return {name: p.detach() for name, p in toy.named_parameters()}, norms
