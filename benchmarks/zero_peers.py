"""The peers of `benchmarks.zero`: the plain GPT under DDP, DeepSpeed and FSDP2, each with the settings that suit it best.

No code of the engine. A peer is made from a model that holds the initial weights, on the default process group, and takes
a step with this rank's microbatches: accumulation, clipping to norm 1, AdamW with decay on matrices only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.plain_gpt import BETAS, PlainGPT, PlainTrainer, decay_groups

LR, WEIGHT_DECAY, CLIP = 1e-3, 0.1, 1.0
DEEPSPEED = "0.19.8"

Microbatches = list[tuple[Tensor, Tensor]]


class MissingPeer(Exception):
    """This peer cannot run here, for the reason given."""


class Peer(Protocol):
    """One rank of a peer."""

    def step(self, microbatches: Microbatches) -> tuple[float, float]:
        """One optimizer step; (mean loss of this rank's tokens, global gradient norm before clipping)."""

    def close(self) -> None:
        """Take back what was done to torch and to the model."""


@dataclass(frozen=True)
class PeerSpec:
    """A peer under one name; `make` may raise MissingPeer. `note` says what is particular about its settings."""

    name: str
    make: Callable[[PlainGPT, int], Peer]  # (model, number of microbatches of a step)
    note: str = ""


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """torch's fused AdamW over the parameters as they are now."""
    return torch.optim.AdamW(decay_groups(model, WEIGHT_DECAY), lr=LR, betas=BETAS, eps=1e-8, fused=True)


class Twin:
    """A copy of the model that talks to nobody: what two ranks could do at best. Its norm is its own."""

    def __init__(self, model: PlainGPT, _: int) -> None:
        self._trainer = PlainTrainer(model, LR, WEIGHT_DECAY, CLIP)

    def step(self, microbatches: Microbatches) -> tuple[float, float]:
        """See `Peer`."""
        return self._trainer.step(microbatches)

    def close(self) -> None:
        """Nothing to take back."""


class DDP:
    """torch's DistributedDataParallel; gradients are views of its buckets, summed in the last backward of a step."""

    def __init__(self, model: PlainGPT, _: int) -> None:
        self._model = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=4)
        self._optimizer = adamw(model)

    def step(self, microbatches: Microbatches) -> tuple[float, float]:
        """See `Peer`."""
        self._optimizer.zero_grad(set_to_none=False)
        losses = []
        for index, (tokens, labels) in enumerate(microbatches):
            last = index == len(microbatches) - 1
            with nullcontext() if last else self._model.no_sync():
                loss = self._model(tokens, labels) / len(microbatches)
                loss.backward()
            losses.append(loss.item())
        norm = nn.utils.clip_grad_norm_(self._model.parameters(), CLIP)
        self._optimizer.step()
        return sum(losses), float(norm)

    def close(self) -> None:
        """Hooks go with the model."""


class FSDP2:
    """torch's `fully_shard` per block. `reshard`: weights are whole only around a block's forward and backward.

    Else they are whole until the step is over. `reduce_each`: gradients go to their owners after each microbatch, else
    once a step. Without a GPU's streams FSDP2 waits for a gather as soon as it has begun; so all begin ahead of the first
    forward where weights are kept, and where they are not, its own prefetches are told not to wait.
    """

    def __init__(self, model: PlainGPT, *, reshard: bool, reduce_each: bool) -> None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
        # The root holds the embedding, which begins and ends every microbatch: letting it go in between gains nothing.
        self._model: Any = fully_shard(model, mesh=mesh, reshard_after_forward=False)
        if reshard:
            self._model._set_unshard_async_op(True)
        self._ahead = [] if reshard else [self._model, *model.blocks]
        self._reshard, self._reduce_each = reshard, reduce_each
        self._optimizer = adamw(model)

    def step(self, microbatches: Microbatches) -> tuple[float, float]:
        """See `Peer`."""
        self._optimizer.zero_grad()
        for module in self._ahead:
            module.unshard(async_op=True)
        losses = []
        for index, (tokens, labels) in enumerate(microbatches):
            last = index == len(microbatches) - 1
            self._model.set_is_last_backward(last)
            self._model.set_requires_gradient_sync(last or self._reduce_each)
            self._model.set_reshard_after_backward(last or self._reshard)
            loss = self._model(tokens, labels) / len(microbatches)
            loss.backward()
            losses.append(loss.item())
        parameters = list(self._model.parameters())
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        # As torchtitan does it: else every product with the norm, a partial DTensor, would be a collective of its own.
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        nn.utils.clip_grads_with_norm_(parameters, CLIP, whole)
        self._optimizer.step()
        return sum(losses), float(whole)

    def close(self) -> None:
        """Hooks go with the model."""


class DeepSpeed:
    """A DeepSpeed engine on its CPU accelerator, over gloo.

    Its CPU Adam is no faster here than torch's fused one. At stage 3 it would exchange torch.nn.functional.linear for a
    function of its own and leave that behind, so that all others in the process ran it, too: `memory_efficient_linear`
    must be false. With one microbatch of one sample DeepSpeed is no slower so.
    """

    def __init__(self, model: PlainGPT, num_microbatches: int, micro_size: int, zero: Mapping[str, Any]) -> None:
        deepspeed = _import_deepspeed()
        config = {
            "train_micro_batch_size_per_gpu": micro_size,
            "gradient_accumulation_steps": num_microbatches,
            "gradient_clipping": CLIP,
            "zero_optimization": {**zero, "memory_efficient_linear": False},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1 << 30,
        }
        if zero["stage"] == 3:
            # Both are read by the root's forward, outside of the modules that own them.
            for parameter in (model.tokens.weight, model.positions.weight):
                deepspeed.zero.register_external_parameter(model, parameter)
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=adamw(model), config=config)

    def step(self, microbatches: Microbatches) -> tuple[float, float]:
        """See `Peer`."""
        losses = []
        for tokens, labels in microbatches:
            loss = self._engine(tokens, labels)
            self._engine.backward(loss)
            losses.append(loss.item())
            self._engine.step()
        return sum(losses) / len(losses), float(self._engine.get_global_grad_norm())

    def close(self) -> None:
        """Remove its hooks."""
        self._engine.destroy()


def _import_deepspeed() -> ModuleType:
    """DeepSpeed, quiet and on its CPU accelerator; raises MissingPeer where it is not installed."""
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        raise MissingPeer(
            f"not installed: pip install --no-build-isolation deepspeed=={DEEPSPEED} (after torch; it needs g++)"
        ) from None
    if found != DEEPSPEED:
        raise MissingPeer(f"version {found} is installed, not {DEEPSPEED}")
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": rank, "RANK": rank, "LOCAL_SIZE": size, "WORLD_SIZE": size}
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")
    return deepspeed
