"""It always installs: without a compiler, without torch, and what runs without the library; one OpenMP with torch's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cells import Cell, config
from trilith.kernels import library

ROOT = Path(__file__).resolve().parents[2]
NOTICE = "trilith: kernels were not built, training will use torch's own ops and be slower: no C++ compiler"
has_compiler = pytest.mark.skipif(
    not (os.environ.get("CXX") or shutil.which("g++")), reason="no g++ on PATH, and CXX is not set"
)
needs_library = pytest.mark.skipif(library.LIBRARY is None, reason=library.MISSING)


def python(
    *words: str, environment: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """A Python of its own that sees this checkout's sources."""
    known = {key: value for key, value in os.environ.items() if key not in ("CXX", "TRILITH_REQUIRE_KERNELS")}
    known["PYTHONPATH"] = os.pathsep.join(str(ROOT / name) for name in ("engine", "launcher"))
    return subprocess.run(
        [sys.executable, *words],
        env={**known, **(environment or {})},
        cwd=cwd or ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


def build(folder: Path, environment: dict[str, str], prelude: str = "") -> subprocess.CompletedProcess[str]:
    """`setup.py build_ext` into `folder`, after `prelude`."""
    words = [
        "setup.py",
        "--quiet",
        "build_ext",
        "--build-lib",
        str(folder / "lib"),
        "--build-temp",
        str(folder / "temp"),
    ]
    code = f"{prelude}\nimport runpy, sys; sys.argv = {words!r}; runpy.run_path('setup.py', run_name='__main__')"
    return python("-c", code, environment=environment)


@pytest.mark.parametrize("required", [False, True])
def test_without_a_compiler(tmp_path: Path, required: bool) -> None:
    """One line that says so; an error only where the kernels are asked for."""
    (tmp_path / "empty").mkdir()
    environment = {"PATH": str(tmp_path / "empty"), "TRILITH_REQUIRE_KERNELS": str(int(required))}
    done = build(tmp_path, environment)
    assert not list(tmp_path.rglob("*.so"))
    if required:
        assert done.returncode != 0 and "TRILITH_REQUIRE_KERNELS is set" in done.stderr, done.stderr
        assert "no C++ compiler (g++, clang++ or c++) on PATH, and CXX is not set" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert [line for line in done.stderr.splitlines() if NOTICE in line] == done.stderr.splitlines(), done.stderr


@pytest.mark.parametrize("required", [False, True])
def test_without_nvcc(tmp_path: Path, required: bool) -> None:
    """The CUDA kernels are asked for and cannot be built: the same, and the others are built all the same."""
    wanted = {"TRILITH_CUDA": "1", "CUDA_HOME": str(tmp_path), "TRILITH_REQUIRE_KERNELS": str(int(required))}
    prelude = f"""import sys; sys.path.insert(0, {str(ROOT)!r}); import csrc.build
csrc.build.build_library = lambda target, *rest: print("built", target.name.split(".")[0])"""
    done = build(tmp_path, wanted, prelude)
    assert done.stdout.split() == ["built", "_kernels"], done.stdout
    assert "CUDA kernels were not built" in done.stderr and f"no nvcc in CUDA_HOME {tmp_path}" in done.stderr, (
        done.stderr
    )
    assert (done.returncode != 0) == required


def test_a_compiler_that_fails(tmp_path: Path) -> None:
    """Its output, then the same line."""
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho this compiler is broken\nexit 1\n")
    broken.chmod(0o755)
    done = build(tmp_path, {"CXX": str(broken)})
    assert done.returncode == 0 and "this compiler is broken" in done.stderr, done.stderr
    assert f"{broken} failed; its output stands above" in done.stderr.splitlines()[-1]


BLOCK_TORCH = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "numpy"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, NoTorch())
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@has_compiler
def test_the_build_needs_no_torch(tmp_path: Path) -> None:
    """Nor numpy; and what it builds can be loaded without them. Only loaded: a system's OpenMP may come before torch's."""
    done = build(tmp_path, {"TRILITH_REQUIRE_KERNELS": "1"}, BLOCK_TORCH)
    assert done.returncode == 0, done.stderr
    (built,) = (tmp_path / "lib" / "trilith").glob("_kernels*.so")
    code = (
        f"{BLOCK_TORCH}\nsys.path.insert(0, {str(built.parent)!r})\nimport _kernels; print(*_kernels.instruction_sets)"
    )
    loaded = python("-c", code)
    assert loaded.returncode == 0 and "base" in loaded.stdout, loaded.stderr


FALLBACK = """
import sys
class NoKernels:
    def find_spec(self, name, path=None, target=None):
        if name == "trilith._kernels":
            raise ImportError("blocked by a test")
sys.meta_path.insert(0, NoKernels())
import torch
from trilith.errors import KernelError
from trilith.kernels import library, ops
assert library.LIBRARY is None and library.CPU is None
assert "blocked by a test" in library.MISSING and "C++17 compiler" in library.MISSING, library.MISSING
x, weight, bias = torch.randn(3, 8, requires_grad=True), torch.randn(8), torch.randn(8)
y = ops.layer_norm(x, weight, bias, 1e-5)
torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (8,), weight, bias, 1e-5))
ops.gelu(y, "gelu").sum().backward()
try:
    ops.layer_norm(x, weight, bias, 1e-5, backend="fused")
    raise AssertionError("fused without the library")
except KernelError as error:
    assert "C++17 compiler" in str(error), error
"""
TRAIN = """
import json, sys
from trilith import preflight
from trilith.trainer import Place, Trainer
trainer = Trainer(preflight.plan(json.load(open(sys.argv[1]))), Place())
print(json.dumps([trainer.train_step().loss for _ in range(3)]))
"""


def test_ops_without_the_library() -> None:
    done = python("-c", FALLBACK)
    assert done.returncode == 0, done.stderr


def test_training_without_the_library(tmp_path: Path) -> None:
    """The same losses, by torch's own ops, with states on disk as they go through Python's threads."""
    content = config(Cell())
    place = {"device": "nvme", "nvme_path": str(tmp_path)}
    content["zero_optimization"] = {"stage": 1, "offload_optimizer": place}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    losses = []
    for prelude in ("", FALLBACK):
        done = python("-c", prelude + TRAIN, str(path))
        assert done.returncode == 0, done.stderr
        losses.append(json.loads(done.stdout.splitlines()[-1]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 3


ONE_TEAM = """
import re
from trilith.kernels import library, ops
import torch
torch.set_num_threads(2)
x, weight, bias = torch.randn(4096, 64), torch.randn(64), torch.randn(64)
ops.layer_norm(x, weight, bias, 1e-5, backend="fused")
torch.nn.functional.gelu(x)
text = open("/proc/self/maps").read()
print(len(set(re.findall(r"/\\S*lib[gi]?omp[^/\\s]*\\.so[^\\s]*", text))), library.LIBRARY.has_openmp)
"""


@needs_library
def test_one_openmp_serves_torch_and_the_library() -> None:
    done = python("-c", ONE_TEAM)
    assert done.returncode == 0 and done.stdout.split() == ["1", "True"], done.stdout + done.stderr
