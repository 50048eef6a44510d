"""Copies between host memory and a device: what the calls promise where there is no GPU."""

from __future__ import annotations

import torch

from trilith.zero.copies import Copies


def test_without_a_gpu_a_copy_is_there_at_once() -> None:
    copies = Copies(torch.device("cpu"))
    down, up = torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16)
    copies.down(down, torch.arange(4.0)).wait()
    copies.up(up, torch.arange(4.0).bfloat16())
    copies.join()
    assert down.tolist() == up.tolist() == [0.0, 1.0, 2.0, 3.0]
