"""Packages Trilith from its two source roots, engine/ (trilith) and launcher/ (trilith_launcher), and builds csrc/.

The kernels need a C++17 compiler, ninja and pybind11, never torch. Where one of them is missing, or the build fails, the
package installs without `trilith._kernels` and says so in one line; TRILITH_REQUIRE_KERNELS=1 makes that an error.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGES = find_packages("engine") + find_packages("launcher")

# Each file of csrc/cpu is compiled once for each of these, in a namespace of that name (csrc/common/vec.h).
X86_SETS = {
    "base": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512",
}
# GCC 12 takes the undefined operand of its own AVX-512 intrinsics for an uninitialised variable.
CXX_FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra -Wno-maybe-uninitialized"
)
# Here nothing may be fused but what says fma: random numbers must be the same bits on every set, and differences of equal
# products must be zero.
UNFUSED = ("random", "dropout", "norm", "optimizer")
NOT_PER_SET = ("tables",)


class KernelsUnavailable(Exception):
    """Why the kernels cannot be built here."""


class BuildKernels(build_ext):
    """Builds `trilith._kernels` with ninja, in parallel; without it the package still installs."""

    def build_extension(self, ext: Extension) -> None:
        """Build, or say in one line what is missing."""
        try:
            self._build(Path(self.get_ext_fullpath(ext.name)))
        except KernelsUnavailable as reason:
            if os.environ.get("TRILITH_REQUIRE_KERNELS", "0") not in ("", "0"):
                raise SystemExit(
                    f"trilith: TRILITH_REQUIRE_KERNELS is set, but the kernels were not built: {reason}"
                ) from None
            print(
                f"trilith: kernels were not built, training will use torch's own ops and be slower: {reason}",
                file=sys.stderr,
            )

    def get_outputs(self) -> list[str]:
        """Only what was built can be installed."""
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        """For an editable install: nothing to copy where nothing was built."""
        self.extensions = [e for e in self.extensions if Path(self.build_lib, self.get_ext_filename(e.name)).exists()]
        super().copy_extensions_to_source()

    def _build(self, target: Path) -> None:
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
        if not compiler:
            raise KernelsUnavailable("no C++ compiler (g++, clang++ or c++) on PATH, and CXX is not set")
        try:
            import ninja
            import pybind11
        except ImportError as missing:
            raise KernelsUnavailable(
                f"the Python package {missing.name} is missing: pip install {missing.name}"
            ) from None
        folder = Path(self.build_temp).resolve() / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        target = target.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_rules(compiler, target, pybind11.get_include()))
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder), *(["-v"] if self.verbose else [])]
        try:
            result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        except OSError as problem:
            raise KernelsUnavailable(f"ninja did not start: {problem}") from None
        if result.returncode:
            print(result.stdout, file=sys.stderr)
            raise KernelsUnavailable(f"{compiler} failed; its output stands above")


def ninja_rules(compiler: str, target: Path, pybind_include: str) -> str:
    """The build file: every source of csrc/, those of csrc/cpu once for each instruction set."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    sets = X86_SETS if is_x86 else {"base": ""}
    flags = f"{CXX_FLAGS} {'-DTRILITH_X86' if is_x86 else ''} {openmp(compiler)}"
    includes = f"-isystem {sysconfig.get_paths()['include']} -isystem {pybind_include} -I {ROOT / 'csrc'}"
    lines = [
        f"cxx = {compiler}",
        f"flags = {flags} {includes} {os.environ.get('CXXFLAGS', '')}",
        f"ldflags = {openmp(compiler)} -pthread {os.environ.get('LDFLAGS', '')}",
        "rule compile",
        "  command = $cxx $flags $more -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx -shared $in $ldflags -o $out",
    ]
    objects = []

    def add(source: Path, name: str, more: str = "") -> None:
        objects.append(name)
        lines.extend([f"build {name}: compile {source}", f"  more = {more}"])

    for source in sorted((ROOT / "csrc").glob("**/*.cpp")):
        room = source.parent.name
        if room in ("tests", "cuda"):
            continue
        if room != "cpu" or source.stem in NOT_PER_SET:
            add(source, f"{room}_{source.stem}.o")
            continue
        for name, options in sets.items():
            unfused = "-ffp-contract=off" if source.stem in UNFUSED else ""
            add(source, f"{source.stem}_{name}.o", f"{options} {unfused} -DTRILITH_ISA={name}")
    lines.append(f"build {target}: link {' '.join(objects)}")
    lines.append(f"default {target}")
    return "\n".join(lines) + "\n"


def openmp(compiler: str) -> str:
    """-fopenmp, where the compiler has it."""
    tried = subprocess.run(
        [*shlex.split(compiler), "-fopenmp", "-x", "c++", "-", "-o", os.devnull],
        input="#include <omp.h>\nint main() { return omp_get_max_threads() < 0; }\n",
        text=True,
        capture_output=True,
    )
    return "-fopenmp" if tried.returncode == 0 else ""


setup(
    name="trilith",
    version="0.1.0",
    description="A 3D-parallel training engine: one JSON file, every combination, exact",
    python_requires=">=3.11",
    package_dir={"trilith": "engine/trilith", "trilith_launcher": "launcher/trilith_launcher"},
    packages=PACKAGES,
    package_data={"trilith": ["py.typed", "_kernels.pyi"], "trilith_launcher": ["py.typed"]},
    ext_modules=[Extension("trilith._kernels", sources=[])],
    cmdclass={"build_ext": BuildKernels},
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "pydantic>=2.7",
        "rich>=13",
        "safetensors>=0.5",
        "tokenizers>=0.20",
        "filelock>=3.13",
        "psutil>=5.9",
        "xxhash>=3.4",
        "matplotlib>=3.8",
        "tensorboard>=2.16",
    ],
    extras_require={
        "dev": ["pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100", "ruff>=0.6", "mypy>=1.11"],
        "data": ["pyarrow>=15"],
        "peers": ["transformers", "deepspeed"],
    },
    entry_points={"console_scripts": ["trilith = trilith.cli:main"]},
)
