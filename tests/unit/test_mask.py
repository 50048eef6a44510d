"""Masks of packed samples: which keys each query may see, written out."""

from __future__ import annotations

import pytest
import torch

from trilith.errors import KernelError
from trilith.kernels.mask import document_mask, packed_mask


def test_documents_are_ranges_of_keys() -> None:
    mask = document_mask(torch.tensor([[5, 5, 2, 2, 2, 5], [0, 0, 0, 0, 0, 0]]))
    assert mask.key_begins is not None and mask.key_ends is not None
    assert mask.key_begins.tolist() == [[0, 0, 2, 2, 2, 5], [0] * 6]
    assert mask.key_ends.tolist() == [[2, 2, 5, 5, 5, 6], [6] * 6]
    seen = mask.visible(6, 6, torch.device("cpu"))
    assert seen is not None
    assert seen[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    both_ways = document_mask(torch.tensor([1, 1, 0]), causal=False).visible(3, 3, torch.device("cpu"))
    assert both_ways is not None and both_ways[0, 0].int().tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


def test_sequences_one_behind_the_other() -> None:
    packed, documents = packed_mask(torch.tensor([0, 2, 2, 5, 6])), document_mask(torch.tensor([0, 0, 2, 2, 2, 3]))
    assert packed.key_begins is not None and documents.key_begins is not None
    assert torch.equal(packed.key_begins, documents.key_begins)
    for wrong in ([1, 2], [0, 3, 2]):
        with pytest.raises(KernelError, match="must begin with 0 and never fall"):
            packed_mask(torch.tensor(wrong))
