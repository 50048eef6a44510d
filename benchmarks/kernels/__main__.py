"""Every family's cases in one run, on all cores."""

from __future__ import annotations

import importlib
import os

import torch

from benchmarks.harness import Benchmark, matmul_flops_per_s, option_parser
from benchmarks.kernels.limits import copy_bytes_per_s
from trilith.kernels import library

FAMILIES = (
    "norm",
    "attention",
    "cross_entropy",
    "activation",
    "rotary",
    "dropout",
    "optimizer",
    "data",
    "io",
    "gpt_step",
)


def main() -> int:
    """Measure the families asked for; without the native library there is nothing to measure."""
    parser = option_parser(__doc__ or "")
    parser.add_argument("--family", action="append", choices=FAMILIES, help="only this family (may be repeated)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads (default: all cores)")
    options = parser.parse_args()
    if library.LIBRARY is None:
        print(f"nothing measured: {library.MISSING}")
        return 0
    torch.set_num_threads(options.threads)
    rate = matmul_flops_per_s(torch.float32, torch.device("cpu"))
    small, large = copy_bytes_per_s(4 << 20) / 1e9, copy_bytes_per_s(64 << 20) / 1e9
    print(f"{options.threads} threads, {library.LIBRARY.instruction_sets[0]}")
    print(f"copies of 4 MB {small:.1f} GB/s, of 64 MB {large:.1f} GB/s; matrix products {rate / 1e9:.0f} GFLOP/s")
    benchmark = Benchmark("kernels")
    for family in options.family or FAMILIES:
        importlib.import_module(f"benchmarks.kernels.{family}").cases(benchmark, options.rounds)
    benchmark.finish(options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
