"""A data loader over a user's dataset: every data rank reads its part, in an order that epochs and the seed decide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from trilith.config import Config
from trilith.rng import stream_key
from trilith.topology import Topology


class EpochLoader(DataLoader[Any]):
    """A DataLoader that shuffles anew each time it is begun; `epoch` counts how often it was."""

    epoch = 0

    def __iter__(self) -> Any:
        """The batches of the next epoch."""
        if isinstance(self.sampler, DistributedSampler):
            self.sampler.set_epoch(self.epoch)
        self.epoch += 1
        return super().__iter__()


def make_loader(
    dataset: Dataset[Any] | None, config: Config, topology: Topology, collate_fn: Callable[..., Any] | None
) -> EpochLoader | None:
    """Microbatches of this data rank; None without a dataset. A smaller last microbatch is left out.

    An IterableDataset is read as it is: it must itself give each rank its part.
    """
    if dataset is None:
        return None
    sampler: DistributedSampler[Any] | None = None
    if not isinstance(dataset, IterableDataset):
        sampler = DistributedSampler(
            dataset, topology.data_size, topology.data_index, seed=config.training.seed, drop_last=False
        )
    low, high = stream_key(config.training.seed, "loader", topology.data_index)
    generator = torch.Generator().manual_seed((low | high << 32) >> 1)
    return EpochLoader(
        dataset,
        batch_size=config.train_micro_batch_size_per_gpu,
        sampler=sampler,
        collate_fn=collate_fn,
        drop_last=True,
        generator=generator,
    )
