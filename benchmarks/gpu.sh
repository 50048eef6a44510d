#!/bin/sh
# The parity suite and the GPU tests on CUDA, then the benchmarks, with the Python of this machine and without network.
# What that Python lacks (pydantic, safetensors, ...) may lie in .deps/, made by `make gpu-deps` on a machine with network.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH="engine:launcher:.:.deps${PYTHONPATH:+:$PYTHONPATH}"
if ! "$PYTHON" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)' 2>/dev/null; then
    echo "make gpu: no CUDA device here (or no torch with CUDA in $PYTHON): nothing was run"
    exit 0
fi
# Code for this device only: the other architectures would take as long again.
ARCH=$("$PYTHON" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + ("a" if a == 9 else ""))')
TRILITH_CUDA=1 TRILITH_CUDA_ARCHS="${TRILITH_CUDA_ARCHS:-$ARCH}" "$PYTHON" csrc/build.py here || exit $?
mkdir -p "${OUT:-benchmarks/results}"
"$PYTHON" -m pytest -m gpu -p no:cacheprovider tests || exit $?
"$PYTHON" -m benchmarks.step --json "${OUT:-benchmarks/results}/step_gpu.json"
"$PYTHON" -m benchmarks.gpu_kernels --json "${OUT:-benchmarks/results}/kernels_gpu.json"
"$PYTHON" -m benchmarks.gpu_attention --json "${OUT:-benchmarks/results}/attention_gpu.json"
