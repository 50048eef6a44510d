"""Packages Trilith from its two source roots, engine/ (trilith) and launcher/ (trilith_launcher), and builds csrc/.

The kernels need a C++17 compiler, ninja and pybind11, never torch, those for CUDA also nvcc. Where one of them is missing,
or a build fails, the package installs without `trilith._kernels` or `trilith._kernels_cuda` and says so in one line;
TRILITH_REQUIRE_KERNELS=1 makes that an error. CUDA kernels are built where there is an NVIDIA driver, or TRILITH_CUDA=1.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # pip runs this file from elsewhere
from csrc.build import KernelsUnavailable, build_cuda_library, build_library, wants_cuda  # noqa: E402

PACKAGES = find_packages("engine") + find_packages("launcher")
CPU, CUDA = "trilith._kernels", "trilith._kernels_cuda"
LIBRARIES = [CPU, CUDA] if wants_cuda() else [CPU]


class BuildKernels(build_ext):
    """Builds the libraries with ninja, in parallel; without them the package still installs."""

    def build_extension(self, ext: Extension) -> None:
        """Build, or say in one line what is missing."""
        is_cuda = ext.name == CUDA
        build, kernels = (build_cuda_library, "CUDA kernels") if is_cuda else (build_library, "kernels")
        try:
            build(Path(self.get_ext_fullpath(ext.name)), self._objects() / ext.name, bool(self.verbose))
        except KernelsUnavailable as reason:
            if os.environ.get("TRILITH_REQUIRE_KERNELS", "0") not in ("", "0"):
                raise SystemExit(
                    f"trilith: TRILITH_REQUIRE_KERNELS is set, but the {kernels} were not built: {reason}"
                ) from None
            print(
                f"trilith: {kernels} were not built, training will use torch's own ops and be slower: {reason}",
                file=sys.stderr,
            )

    def _objects(self) -> Path:
        """Where objects lie. An editable install takes the checkout's place, too, so that nothing is compiled twice."""
        if self.editable_mode:
            return ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}"
        return Path(self.build_temp)

    def get_outputs(self) -> list[str]:
        """Only what was built can be installed."""
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        """For an editable install: nothing to copy where nothing was built."""
        self.extensions = [e for e in self.extensions if Path(self.build_lib, self.get_ext_filename(e.name)).exists()]
        super().copy_extensions_to_source()


setup(
    name="trilith",
    version="0.1.0",
    description="A 3D-parallel training engine: one JSON file, every combination, exact",
    python_requires=">=3.11",
    package_dir={"trilith": "engine/trilith", "trilith_launcher": "launcher/trilith_launcher"},
    packages=PACKAGES,
    package_data={"trilith": ["py.typed", "_kernels.pyi", "_kernels_cuda.pyi"], "trilith_launcher": ["py.typed"]},
    ext_modules=[Extension(name, sources=[]) for name in LIBRARIES],
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
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "ruff>=0.6",
            "mypy>=1.11",
        ],
        "data": ["pyarrow>=15"],
        "peers": ["transformers", "deepspeed"],
    },
    entry_points={"console_scripts": ["trilith = trilith.cli:main"]},
)
