"""The CUDA kernels compile for Ampere and Hopper, and no hot kernel spills registers or needs a stack."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from csrc.build import cuda_reports, launches_as_calls

ROOT = Path(__file__).resolve().parents[2]
ARCHS = "80 90a"
KERNEL = re.compile(
    r"Compiling entry function '(\S+)' for '(\S+)'\n.*\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores"
)


@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
@pytest.mark.parametrize("all_types", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_kernel_spills(all_types: bool) -> None:
    reports = cuda_reports(ROOT / "build" / f"cuda_reports{'_all' * all_types}", ARCHS, all_types)
    found = [(name, *kernel) for name, text in reports.items() for kernel in KERNEL.findall(text)]
    assert {f"sm_{arch}" for arch in ARCHS.split()} == {arch for _, _, arch, _, _ in found}
    assert {name for name, *_ in found} == set(reports), "each file has kernels"
    assert not [name for name, text in reports.items() if "Potential Performance Loss" in text], "serialised products"
    # A block must fit into the 65,536 registers of a multiprocessor: of 256 threads, of 384 on Hopper.
    for name, text in reports.items():
        if name.startswith("cuda_attention"):
            threads = 384 if "sm90" in name else 256
            assert max(map(int, re.findall(r"Used (\d+) registers", text))) * threads <= 65536, name
    spilling = [row for row in found if int(row[3]) or int(row[4])]
    assert not spilling, spilling


def test_launches_as_calls() -> None:
    """What the emulator's translation does to a launch."""
    text = "a ? f<T, g(), h<1>()>\n    <<<dim3(b, c), 32, 0, on>>>(\n x, y) : nothing<<<1, 2, 0, s>>>();"
    assert launches_as_calls(text) == (
        "a ? ::trilith::emulated::launch(dim3(b, c), 32, 0, on, f<T, g(), h<1>()>, \n x, y) : "
        "::trilith::emulated::launch(1, 2, 0, s, nothing);"
    )
