"""Small models for tests: their configs, their stages on one rank, values equal in every layout, whole gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trilith.config.model_keys import ModelConfig
from trilith.config.sparse_keys import SparseBlocks
from trilith.kernels.stream import fill_box
from trilith.models.base import LocalParameter, UnitDecl
from trilith.models.batch import Microbatch
from trilith.models.families import declare
from trilith.models.stage import StageModel, StageOptions, build_stage
from trilith.process_groups import build_topology
from trilith.rng import stream_key
from trilith.topology import Degrees, Topology

SEED = 5


def small(family: str, **changes: Any) -> ModelConfig:
    """A model of two layers; 12 divides S and F, so that 2, 3 and 4 tensor ranks fit."""
    gpt2 = family == "gpt2"
    values: dict[str, Any] = {
        "family": family,
        "num_layers": 2,
        "hidden_size": 24,
        "num_heads": 6,
        "num_kv_heads": 6,
        "ffn_hidden_size": 36,
        "sequence_length": 12,
        "vocab_size": 61,
        "tie_embeddings": gpt2,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "norm_eps": 1e-5,
        "init_std": 0.02,
        "activation": "gelu_tanh" if gpt2 else "swiglu",
        "linear_bias": gpt2,
    }
    return ModelConfig(**{**values, **changes})


def tensor_topology(degree: int = 1, device: str = "cpu") -> Topology:
    """The topology of a run with tensor parallelism only; the default process group must exist where degree > 1."""
    return build_topology(Degrees(tensor=degree), torch.device(device), 60.0)


def make_stage(
    model: ModelConfig,
    topology: Topology,
    *,
    units: Sequence[UnitDecl] | None = None,
    recompute: str = "none",
    sequence_parallel: bool = False,
    dtype: torch.dtype = torch.float64,
    sparse: SparseBlocks | None = None,
) -> StageModel:
    """The stage of `units` (None: the whole model) on the topology's device, with the test's values, in training mode."""
    stage = build_stage(
        model,
        declare(model) if units is None else units,
        topology,
        StageOptions(recompute, SEED, sequence_parallel, dtype, sparse=sparse),
    )
    values = {p.name: nn.Parameter(local_value(p, dtype, topology.device)) for p in stage.local_parameters}
    by_identity = {id(parameter): values[name] for name, parameter in stage.named_parameters()}
    for module in stage.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            module.register_parameter(name, by_identity[id(parameter)])
    return stage.train()


def local_value(local: LocalParameter, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Values that depend on canonical names only, nowhere trivial: norms about 1, biases not 0."""
    flat = torch.zeros(local.numel, dtype=dtype, device=device)
    for spec, init in zip(local.specs, local.inits, strict=True):
        for piece in spec.pieces:
            key = stream_key(SEED, "init", spec.name)
            value = fill_box(key, spec.shape, piece.box, "normal", 0.2, torch.float64, device)
            flat.as_strided(piece.box.shape, piece.strides, piece.offset).copy_(value + (init.kind == "ones"))
    return flat.view(local.shape)


def microbatch(model: ModelConfig, size: int = 3, device: torch.device | str = "cpu") -> Microbatch:
    """Random tokens; every fifth label or so does not count."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (size, model.sequence_length)
    tokens, labels = (torch.randint(0, model.vocab_size, shape, generator=generator) for _ in range(2))
    mask = torch.rand(shape, generator=generator) > 0.2
    positions, sample_ids = torch.arange(model.sequence_length), torch.arange(size) + 7
    return Microbatch(
        tokens.to(device),
        labels.to(device),
        mask.to(device),
        positions.to(device),
        sample_ids.to(device),
        loss_weight=1.0 / int(mask.sum()),
    )


def gradients(stage: StageModel) -> dict[str, tuple[LocalParameter, Tensor]]:
    """What one rank hands over to `whole_gradients`."""
    found = dict(stage.named_parameters())
    result = {}
    for local in stage.local_parameters:
        gradient = found[local.name].grad
        assert gradient is not None, local.name
        result[local.name] = (local, gradient.detach().cpu())
    return result


def whole_gradients(ranks: Sequence[Mapping[str, tuple[LocalParameter, Tensor]]]) -> dict[str, Tensor]:
    """Canonical gradients from those of all tensor ranks: summed pieces added up, then every box put into its place.

    Checks that each element is counted exactly once, and that all other copies of it are equal.
    """
    whole: dict[str, Tensor] = {}
    copies: list[tuple[str, Tensor, Any]] = []
    for name in ranks[0]:
        held = [(local, gradient.flatten().clone()) for local, gradient in (rank[name] for rank in ranks)]
        sum_shared(held)
        for local, flat in held:
            for spec in local.specs:
                target = whole.setdefault(spec.name, torch.full(spec.shape, float("nan"), dtype=flat.dtype))
                for piece in spec.pieces:
                    part = flat.as_strided(piece.box.shape, piece.strides, piece.offset)
                    where = tuple(slice(a, b) for a, b in zip(piece.box.start, piece.box.stop, strict=True))
                    if piece.replica == 0:
                        assert target[where].isnan().all(), f"{spec.name}{where} is counted twice"
                        target[where] = part
                    else:
                        copies.append((spec.name, part, where))
    for name, tensor in whole.items():
        assert not tensor.isnan().any(), f"{name}: elements that no rank counts"
    for name, part, where in copies:
        torch.testing.assert_close(part, whole[name][where], rtol=1e-12, atol=1e-14, msg=name)
    return whole


def sum_shared(held: Sequence[tuple[LocalParameter, Tensor]]) -> None:
    """Add up the pieces that several ranks hold parts of, in place: what ZeRO does over the tensor group."""
    (exchange_numel,) = {local.exchange_numel for local, _ in held}
    exchange = torch.zeros(exchange_numel, dtype=held[0][1].dtype)
    for local, flat in held:
        for piece in local.summed:
            area = slice(piece.exchange_offset, piece.exchange_offset + piece.numel)
            exchange[area] += flat[piece.offset : piece.offset + piece.numel]
    for local, flat in held:
        for piece in local.summed:
            area = slice(piece.exchange_offset, piece.exchange_offset + piece.numel)
            flat[piece.offset : piece.offset + piece.numel] = exchange[area]
