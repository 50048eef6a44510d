"""The two asynchronous schedules in one process, written from their formulas: every version of the weights is kept.

No pipeline, no engine: microbatches run one after the other through the whole model, each stage with the version of its
weights that a rule names, and torch's own AdamW makes the next version. The rule is an argument, so that a test can show
that another one gives another result.

- `pipedream`: stage s of p runs microbatch k of a span, forward and backward, with the weights after
  max(0, k - (p - 1 - s)) of the span's updates; one update per microbatch (Narayanan et al. 2019, section 3.3).
- `pipedream_2bw`: W(t+1) = W(t) - step(grad(W(t-1))), W(-1) = W(0); one update per step of m microbatches, and a drain
  changes nothing (Narayanan et al. 2021, arXiv 2006.09503, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trilith import preflight
from trilith.build import initial_value
from trilith.config.training_keys import AdamWParams
from trilith.data.batch import open_batches
from trilith.data.sampler import microbatch_ids, sample_ids_for
from trilith.models.base import LocalParameter
from trilith.models.batch import Microbatch
from trilith.models.decoder_declaration import TOKEN_WEIGHT
from trilith.models.stage import StageModel, StageOptions, build_stage
from trilith.optim.lr import make_lr
from trilith.process_groups import build_topology
from trilith.topology import Degrees

CPU = torch.device("cpu")
Weights = dict[str, Tensor]
Rule = Callable[[int, int, int], int]  # (microbatch of the span or step, stage, number of stages) -> version


def stashed(microbatch: int, stage: int, stages: int) -> int:
    """Weight stashing: the version that a stage runs a microbatch with."""
    return max(0, microbatch - (stages - 1 - stage))


def double_buffered(step: int, stage: int, stages: int) -> int:
    """Double-buffered weights: step t runs with W(t-1) on every stage, and W(-1) is W(0)."""
    return max(0, step - 1)


@dataclass(frozen=True)
class Result:
    """The loss of every step, and the final weights by canonical name."""

    losses: list[float]
    weights: Weights


class WholeModel:
    """A config's model in fp64 on one process, cut into the config's stages, with its data and its optimizer.

    `newest` holds the weights by the name of the parameter; weights that two stages share have one name.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        plan = preflight.plan(content)
        self.config = config = plan.config
        topology = build_topology(Degrees(), CPU, 10.0)
        self._stages = [
            build_stage(
                config.model,
                units,
                topology,
                StageOptions("none", config.training.seed, sequence_parallel=False, dtype=torch.float64),
            )
            for units in plan.stages
        ]
        self._data = open_batches(config.data, config.model.sequence_length, config.model.vocab_size, "train")
        self._declared = {key: p for stage in self._stages for key, p in _by_key(stage)}
        self.newest = {
            key: nn.Parameter(initial_value(p, torch.float64, config.training.seed, CPU))
            for key, p in self._declared.items()
        }
        params = config.optimizer.params
        assert isinstance(params, AdamWParams)
        groups = [
            {
                "params": [w for key, w in self.newest.items() if self._declared[key].decay == decay],
                "weight_decay": params.weight_decay * decay,
            }
            for decay in (True, False)
        ]
        self._optimizer = torch.optim.AdamW(
            groups, lr=0.0, betas=(params.betas[0], params.betas[1]), eps=params.eps, foreach=False
        )
        self._lr = make_lr(config.scheduler, params.lr)

    @property
    def num_stages(self) -> int:
        """p."""
        return len(self._stages)

    @property
    def num_microbatches(self) -> int:
        """m: microbatches of a step, each one with the samples of all data ranks."""
        return self.config.gradient_accumulation_steps

    def version(self) -> Weights:
        """A copy of the newest weights."""
        return {key: weight.detach().clone() for key, weight in self.newest.items()}

    def microbatch(self, step: int, index: int, *, per_microbatch: bool) -> Microbatch:
        """One microbatch of a step; its loss is normalised by its own target tokens, or by those of the step."""
        config = self.config
        size = config.train_micro_batch_size_per_gpu * config.parallel.data
        ids = microbatch_ids(step * config.train_batch_size, index, size, 0, 1)
        normalised_by = ids if per_microbatch else sample_ids_for(step, config.train_batch_size)
        tokens = self._data.count_targets(normalised_by)
        sample = self._data.samples(ids)
        return Microbatch(
            torch.from_numpy(sample.tokens),
            torch.from_numpy(sample.labels),
            None if sample.loss_mask is None else torch.from_numpy(sample.loss_mask),
            torch.arange(config.model.sequence_length),
            torch.from_numpy(ids),
            1.0 / tokens,
        )

    def gradients(self, versions: Sequence[Weights], batch: Microbatch) -> tuple[float, Weights]:
        """Loss and gradients of one microbatch, stage s running with `versions[s]`; shared weights get both gradients."""
        inputs: dict[str, Tensor] = {}
        used: list[tuple[str, Tensor]] = []
        for stage, weights in zip(self._stages, versions, strict=True):
            leaves = {key: weights[key].detach().clone().requires_grad_() for key, _ in _by_key(stage)}
            used += leaves.items()
            inputs = functional_call(stage, {p.name: leaves[key] for key, p in _by_key(stage)}, (inputs, batch))
        found: Weights = {}
        for (key, _), gradient in zip(used, torch.autograd.grad(inputs["loss"], [w for _, w in used]), strict=True):
            found[key] = found[key] + gradient if key in found else gradient
        return float(inputs["loss"].detach()), found

    def update(self, gradients: Weights, step: int) -> None:
        """One optimizer step of the newest weights, clipped where the config says so, at the learning rate of `step`."""
        for key, weight in self.newest.items():
            weight.grad = gradients[key]
        if self.config.gradient_clipping:
            nn.utils.clip_grad_norm_(list(self.newest.values()), self.config.gradient_clipping)
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr(step)
        self._optimizer.step()

    def canonical(self) -> Weights:
        """The newest weights by canonical name, q, k and v apart."""
        return whole(
            [(spec, self.newest[key].detach().flatten()) for key, p in self._declared.items() for spec in p.specs]
        )


def whole(parts: Sequence[tuple[Any, Tensor]]) -> Weights:
    """Canonical tensors from (spec, 1-D storage) of whoever holds parts of them; copies must be equal."""
    found: Weights = {}
    for spec, storage in parts:
        target = found.setdefault(spec.name, torch.full(spec.shape, float("nan"), dtype=storage.dtype))
        for piece in spec.pieces:
            at = tuple(slice(lo, hi) for lo, hi in zip(piece.box.start, piece.box.stop, strict=True))
            value = storage.as_strided(piece.box.shape, piece.strides, storage.storage_offset() + piece.offset)
            known = ~target[at].isnan()
            assert torch.equal(target[at][known], value[known]), f"copies of {spec.name} differ"
            target[at] = value
    for name, tensor in found.items():
        assert not bool(tensor.isnan().any()), f"{name}: elements that nobody holds"
    return found


def _by_key(stage: StageModel) -> Iterator[tuple[str, LocalParameter]]:
    """(name of the weight in the whole model, parameter) of a stage."""
    for parameter in stage.local_parameters:
        shared = parameter.specs[0].name == TOKEN_WEIGHT
        yield (TOKEN_WEIGHT if shared else parameter.name), parameter


def pipedream(content: Mapping[str, Any], spans: Sequence[int], rule: Rule = stashed) -> Result:
    """Spans of so many steps, each starting with an empty pipeline; the loss of a step is the mean of its microbatches'."""
    model, losses, step = WholeModel(content), [], 0
    p, m = model.num_stages, model.num_microbatches
    for num_steps in spans:
        history = [model.version()]  # after 0, 1, ... updates of the span
        for microbatch in range(num_steps * m):
            at = step + microbatch // m
            batch = model.microbatch(at, microbatch % m, per_microbatch=True)
            versions = [history[rule(microbatch, stage, p)] for stage in range(p)]
            loss, gradients = model.gradients(versions, batch)
            model.update(gradients, at)
            history.append(model.version())
            losses.append(loss)
        step += num_steps
    return Result([sum(losses[i : i + m]) / m for i in range(0, len(losses), m)], model.canonical())


def pipedream_2bw(content: Mapping[str, Any], num_steps: int, rule: Rule = double_buffered) -> Result:
    """So many steps; where the pipeline drains does not matter."""
    model, losses = WholeModel(content), []
    p, m = model.num_stages, model.num_microbatches
    history = [model.version()]  # W(0), W(1), ...
    for step in range(num_steps):
        versions = [history[rule(step, stage, p)] for stage in range(p)]
        total: Weights = {}
        losses.append(0.0)
        for microbatch in range(m):
            loss, gradients = model.gradients(versions, model.microbatch(step, microbatch, per_microbatch=False))
            total = {key: total[key] + g if total else g for key, g in gradients.items()}
            losses[-1] += loss
        model.update(total, step)
        history.append(model.version())
    return Result(losses, model.canonical())
