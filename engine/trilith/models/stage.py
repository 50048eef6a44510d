"""A pipeline stage as one module: a run of units, built on the meta device with exactly the declared parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor, nn

from trilith.config.model_keys import ModelConfig
from trilith.config.sparse_keys import SparseBlocks
from trilith.kernels.backends import DEFAULT, Backends
from trilith.kernels.mask import CAUSAL, AttentionMask, BlockLayout, document_mask
from trilith.kernels.weight_queue import WeightQueue
from trilith.layers.compiled import compile_forward
from trilith.layers.placement import Placement
from trilith.layers.recompute import FULL, recomputed
from trilith.models.base import LocalParameter, UnitDecl, local_parameter, stage_parameters
from trilith.models.batch import Microbatch
from trilith.models.decoder import Head, StageInput, StageSettings
from trilith.models.decoder_declaration import EMBEDDING, HEAD, layer_index
from trilith.models.gpt2 import model as gpt2
from trilith.models.llama import model as llama
from trilith.topology import Topology

Observer = Callable[[str, Tensor, Microbatch], None]
Boundary = dict[str, tuple[tuple[int, ...], torch.dtype]]


class StageModel(nn.Module):
    """A run of units in order. Parameters are found by their declared names, e.g. `layers.3.attention.qkv.weight`.

    `local_parameters` describes each of them, in the order of the units. `observer`, where it is set, is called with
    (unit name, output, microbatch) of each unit: its hidden in the sequence region or, for `head`, its local logits.
    """

    def __init__(
        self, settings: StageSettings, units: Sequence[UnitDecl], local_parameters: tuple[LocalParameter, ...]
    ) -> None:
        super().__init__()
        family = _family(settings.model)
        self.settings = settings
        self.local_parameters = local_parameters
        self.observer: Observer | None = None
        names = [unit.name for unit in units]
        self.embedding = family.Embedding(settings) if EMBEDDING in names else None
        blocks = [name for name in names if name not in (EMBEDDING, HEAD)]
        self.layers = nn.ModuleDict({str(layer_index(n)): family.Block(settings, n) for n in blocks})
        layout = settings.block_layout() if blocks else None
        # It has values from the start and goes where the stage goes, but is in no checkpoint: the config says it.
        self.live_blocks: Tensor | None
        self.register_buffer("live_blocks", None if layout is None else layout.live, persistent=False)
        self.head: Head | None = family.head(settings) if HEAD in names else None
        if self.head is not None and self.embedding is not None and settings.model.tie_embeddings:
            self.head.output.weight = self.embedding.tokens.weight
            # Not deferred: its two gradients are one sum in backward, in every schedule, so that all have the same bits.
            self.head.output.placement = replace(settings.placement, queue=None)
        self._check_declared()

    def forward(self, inputs: Mapping[str, Tensor], batch: Microbatch) -> dict[str, Tensor]:
        """Runs the units on one microbatch. All tensor ranks of the stage must call it.

        inputs: empty for the first stage, else `hidden` (B, S/t or S, H). Returns `hidden` of the same shape; the
        last stage returns `loss`, a float64 scalar (see `Head.loss`), or `logits` (B, S, this rank's vocabulary
        rows with padding) where `batch.labels` is None.
        """
        stage_input = self._stage_input(batch)
        if self.embedding is not None:
            hidden = self._observed(EMBEDDING, self.embedding(stage_input), batch)
        else:
            hidden = inputs["hidden"]
        for index, block in self.layers.items():
            if self.settings.recompute == FULL:
                hidden = recomputed(block, hidden, stage_input)
            else:
                hidden = block(hidden, stage_input)
            self._observed(f"layers.{index}", hidden, batch)
        if self.head is None:
            return {"hidden": hidden}
        if batch.labels is not None and self.head.fuses and self.observer is None:
            return {"loss": self.head(hidden, batch)}
        logits = self._observed(HEAD, self.head(hidden), batch)
        return {"logits": logits} if batch.labels is None else {"loss": self.head.loss(logits, batch)}

    @property
    def queue(self) -> WeightQueue | None:
        """Where its linears leave their weight gradients."""
        return self.settings.placement.queue

    def home_of(self, name: str) -> str:
        """The path of the unit's module that the parameter called `name` lies in: all its uses are inside of a call."""
        return ".".join(name.split(".")[: 2 if name.startswith("layers.") else 1])

    def homes(self) -> tuple[str, ...]:
        """The units' modules in the order of forward."""
        ends = (["embedding"] if self.embedding is not None else [], ["head"] if self.head is not None else [])
        return (*ends[0], *(f"layers.{index}" for index in self.layers), *ends[1])

    def home(self, path: str) -> nn.Module:
        """The module of the unit at `path`."""
        return self.get_submodule(path)

    def weightless_backwards(self) -> tuple[str, ...]:
        """Units' modules whose backward reads no weights: rows are looked up, and the mask is kept."""
        return ("embedding",)

    def boundary(self, batch_size: int, sequence_length: int) -> Boundary:
        """Shape and dtype of what crosses from any stage of this model to the next, by name."""
        region = self.settings.placement.region_slice(sequence_length)
        shape = (batch_size, region.stop - region.start, self.settings.model.hidden_size)
        return {"hidden": (shape, self.settings.placement.dtype)}

    def _stage_input(self, batch: Microbatch) -> StageInput:
        region = self.settings.placement.region_slice(batch.positions.shape[0])
        rotates = self.settings.model.family == "llama" and len(self.layers) > 0
        tables = llama.rotary(self.settings, batch.positions) if rotates else None
        return StageInput(batch, batch.positions[region], tables, self._mask(batch))

    def _mask(self, batch: Microbatch) -> AttentionMask:
        """What the queries of this rank's heads see."""
        mask = CAUSAL if batch.documents is None else document_mask(batch.documents)
        if self.live_blocks is None or self.settings.sparse is None:
            return mask
        return replace(mask, blocks=BlockLayout(self.settings.sparse.block, self.live_blocks))

    def _observed(self, unit: str, output: Tensor, batch: Microbatch) -> Tensor:
        if self.observer is not None:
            self.observer(unit, output, batch)
        return output

    def _check_declared(self) -> None:
        """The module holds the declared parameters and no others: a mistake of a family's files, never of a config."""
        built = {name: tuple(p.shape) for name, p in self.named_parameters()}
        declared = {p.name: p.shape for p in self.local_parameters}
        assert built == declared, f"built {built}, declared {declared}"


def _family(model: ModelConfig) -> ModuleType:
    """The module with the family's `Embedding`, `Block` and `head`."""
    return llama if model.family == "llama" else gpt2


@dataclass(frozen=True)
class StageOptions:
    """How a stage is built. `recompute` is `none`, `selective` or `full`; `seed` is the run's.

    `queue`: where its linears leave their weight gradients, None for autograd. `backends`: what its ops run on.
    `compiles`: backend and mode of torch.compile for its blocks. `fused_loss`, `z_loss`, `sparse`: see StageSettings.
    """

    recompute: str
    seed: int
    sequence_parallel: bool
    dtype: torch.dtype
    queue: WeightQueue | None = None
    backends: Backends = DEFAULT
    compiles: tuple[str, str] | None = None
    fused_loss: bool = False
    z_loss: float = 0.0
    sparse: SparseBlocks | None = None


def build_stage(model: ModelConfig, units: Sequence[UnitDecl], topology: Topology, options: StageOptions) -> StageModel:
    """The stage made of `units` for this tensor rank; its parameters on the meta device: shapes and dtypes, no values.

    Whoever fills it must give finite values to all of a parameter, padding included.
    """
    group = topology.tp
    shared = options.sequence_parallel and group.size > 1
    local = tuple(local_parameter(p, group.index, group.size, shared) for p in stage_parameters(units))
    placement = Placement(group, shared, options.dtype, torch.device("meta"), options.queue, options.backends)
    settings = StageSettings(
        model, placement, options.seed, options.recompute, options.fused_loss, options.z_loss, options.sparse
    )
    stage = StageModel(settings, units, local)
    if options.compiles is not None:
        for block in stage.layers.values():
            compile_forward(block, *options.compiles)
    return stage
