"""From the pure sampler to microbatches: what each rank reads itself, and how losses are normalised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from trilith import comm
from trilith.data.batch import Batches, open_batches
from trilith.data.sampler import microbatch_ids
from trilith.failpoints import Failpoints
from trilith.models.batch import Microbatch
from trilith.models.stage import StageModel
from trilith.preflight import Plan
from trilith.stepping.base import StepBatch
from trilith.topology import Topology


class TokenFeed:
    """Microbatches of a language model's token stream. Only ranks with the first or the last stage read tokens, unless
    each must know which documents they are of."""

    def __init__(
        self, plan: Plan, topology: Topology, stages: Mapping[int, StageModel], failpoints: Failpoints
    ) -> None:
        self.config, self.topology = plan.config, topology
        self._plan, self._stages, self._failpoints = plan, stages, failpoints
        self._is_first, self._is_last = 0 in stages, len(plan.stages) - 1 in stages
        self.train_data = self._open("train")

    @cached_property
    def eval_data(self) -> Batches:
        """The held-out split, opened by the first evaluation."""
        return self._open("valid")

    def step(self, index: int, *, per_microbatch: bool = False) -> StepBatch:
        """The input of training step `index`; see `Feed`."""
        first = index * self.config.train_batch_size
        return self._batch(self.train_data, first, self.config.gradient_accumulation_steps, per_microbatch)

    def evaluation(self, index: int) -> StepBatch:
        """The input of evaluation batch `index`: always the same samples."""
        first = index * self.config.training.eval_batch_size
        return self._batch(self.eval_data, first, self._plan.eval_microbatches, per_microbatch=False)

    def boundary(self, batch: Microbatch) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """What crosses between stages for microbatches like `batch`."""
        stage = next(iter(self._stages.values()))
        return stage.boundary(batch.sample_ids.numel(), batch.positions.numel())

    def _open(self, split: str) -> Batches:
        model = self.config.model
        return open_batches(self.config.data, model.sequence_length, model.vocab_size, split)

    def _batch(self, data: Batches, first: int, count: int, per_microbatch: bool) -> StepBatch:
        """This rank's microbatches from sample `first` on: the same global batch in every layout."""
        self._failpoints.hit("data_read")
        size, topology = self.config.train_micro_batch_size_per_gpu, self.topology
        ids = [microbatch_ids(first, i, size, topology.data_index, topology.data_size) for i in range(count)]
        tokens = self._sum_over_data([data.count_targets(i) for i in ids])
        total = sum(tokens)
        counted = tokens if per_microbatch else [total] * count
        device = self.topology.device
        positions = torch.arange(self.config.model.sequence_length, device=device)
        batches = []
        for sample_ids, targets in zip(ids, counted, strict=True):
            is_read = self._is_first or self._is_last or data.numbers_documents
            sample = data.samples(sample_ids) if is_read else None
            batches.append(
                Microbatch(
                    tokens=self._place(sample.tokens) if sample is not None and self._is_first else None,
                    labels=self._place(sample.labels) if sample is not None and self._is_last else None,
                    loss_mask=self._place(sample.loss_mask) if sample is not None and self._is_last else None,
                    positions=positions,
                    sample_ids=torch.from_numpy(sample_ids).to(device),
                    loss_weight=1.0 / max(targets, 1),  # no label counts: the loss is 0
                    documents=None if sample is None else self._place(sample.documents),
                )
            )
        return StepBatch(batches, self.boundary(batches[0]), total)

    def _place(self, array: Any) -> Tensor | None:
        return None if array is None else torch.from_numpy(array).to(self.topology.device, non_blocking=True)

    def _sum_over_data(self, counts: Sequence[int]) -> list[int]:
        """Per microbatch, the targets of all data ranks; without a mask every rank has as many."""
        if self.config.data.loss_mask == "none":
            return [count * self.topology.data_size for count in counts]
        totals = torch.tensor(counts, dtype=torch.float64, device=self.topology.device)
        for group in (self.topology.dp, self.topology.replicate):
            comm.all_reduce(totals, group).wait()
        return [int(total) for total in totals.tolist()]
