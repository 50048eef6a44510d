"""Attention's CUDA kernels beside torch's: cuDNN and flash attention, causal and full, and block-sparse beside dense.

`python -m benchmarks.gpu_attention [--json FILE]`, on a machine with a CUDA device. Results are compared with torch's
first. TFLOP/s count 4 S^2 D a head forward and 10 S^2 D backward, half of it where causal.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_kernels import DTYPE, FUSED, Cases, gradients_of, same
from benchmarks.harness import Benchmark, arguments
from trilith.kernels import library, ops
from trilith.kernels.mask import CAUSAL, FULL, AttentionMask, BlockLayout

TOKENS, HEADS, FEATURES = 32768, 16, 128
PEERS = (("cuDNN", SDPBackend.CUDNN_ATTENTION, 1.0), ("flash", SDPBackend.FLASH_ATTENTION, 1 / 1.3))


def of_torch(q: Tensor, k: Tensor, v: Tensor, causal: bool, backend: SDPBackend | None) -> Tensor:
    """Torch's attention in our layout."""
    with nullcontext() if backend is None else sdpa_kernel(backend):
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return functional.scaled_dot_product_attention(*heads_first, is_causal=causal).transpose(1, 2)


def tensors(length: int) -> tuple[list[Tensor], Tensor]:
    """q, k and v of so many tokens in all, and a gradient of the output."""
    shape = (TOKENS // length, length, HEADS, FEATURES)
    given = [torch.randn(shape, device="cuda", dtype=DTYPE, requires_grad=True) for _ in range(3)]
    return given, torch.randn(shape, device="cuda", dtype=DTYPE)


def flops(length: int, causal: bool) -> float:
    """Of a forward."""
    return 4.0 * TOKENS * length * HEADS * FEATURES / (2 if causal else 1)


def dense(cases: Cases) -> None:
    """Forward and backward at several lengths, beside each of torch's backends that takes them."""
    for length in (512, 2048, 4096, 8192, 16384):
        for mask, causal in ((CAUSAL, True), (FULL, False)):
            if not causal and length != 4096:
                continue
            given, upstream = tensors(length)
            ours = ops.attention(*given, mask=mask, backend=FUSED)
            backward = gradients_of(ours, given, upstream)
            for name, backend, goal in PEERS:
                try:
                    theirs = of_torch(*given, causal, backend)
                except RuntimeError as refused:
                    print(f"{name}, S = {length}: {refused}")
                    continue
                their_backward = gradients_of(theirs, given, upstream)
                same(ours, theirs)
                for one, two in zip(backward(), their_backward(), strict=True):
                    same(one, two)
                case = f"attention {{}} S {length} {'causal' if causal else 'full'}, {{:.2f}} TFLOP"
                work = flops(length, causal) / 1e12
                with torch.no_grad():
                    run: Callable[[], Any] = lambda m=mask, g=given: ops.attention(*g, mask=m, backend=FUSED)
                    peer: Callable[[], Any] = lambda g=given, c=causal, b=backend: of_torch(*g, c, b)
                    cases.beside(case.format("forward", work), run, peer, name, goal)
                cases.beside(case.format("backward", 2.5 * work), backward, their_backward, name, goal)
            torch.cuda.empty_cache()


def sparse(cases: Cases) -> None:
    """An eighth of the blocks of 16,384 tokens beside all of them."""
    length, size = 16384, 128
    given, upstream = tensors(length)
    generator = torch.Generator().manual_seed(0)
    live = torch.rand((1, length // size, length // size), generator=generator) < 0.125
    live |= torch.eye(length // size, dtype=torch.bool)
    mask = AttentionMask(causal=False, blocks=BlockLayout(size, live.cuda()))
    runs = []
    for which in (mask, FULL):
        out = ops.attention(*given, mask=which, backend=FUSED)
        runs.append(gradients_of(out, given, upstream))
    with torch.no_grad():
        cases.beside(
            "attention forward, 1/8 of the blocks",
            lambda: ops.attention(*given, mask=mask, backend=FUSED),
            lambda: ops.attention(*given, mask=FULL, backend=FUSED),
            "all blocks",
            1 / 5,
        )
    cases.beside("attention backward, 1/8 of the blocks", runs[0], runs[1], "all blocks", 1 / 5)


def main() -> int:
    """Measure everything on the current device."""
    options = arguments(__doc__ or "")
    if not torch.cuda.is_available() or library.cuda_refusal(0):
        print(f"nothing measured: {library.cuda_refusal(0) if torch.cuda.is_available() else 'no CUDA device'}")
        return 0
    benchmark = Benchmark("gpu_attention")
    cases = Cases(benchmark, options.rounds)
    for family in (dense, sparse):
        family(cases)
        torch.cuda.empty_cache()
    benchmark.finish(options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
