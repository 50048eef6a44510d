"""Packages Trilith from its two source roots: engine/ holds trilith, launcher/ holds trilith_launcher."""

from setuptools import find_packages, setup

PACKAGES = find_packages("engine") + find_packages("launcher")

setup(
    name="trilith",
    version="0.1.0",
    description="A 3D-parallel training engine: one JSON file, every combination, exact",
    python_requires=">=3.11",
    package_dir={"trilith": "engine/trilith", "trilith_launcher": "launcher/trilith_launcher"},
    packages=PACKAGES,
    package_data={"trilith": ["py.typed"], "trilith_launcher": ["py.typed"]},
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
        "kernels": ["ninja", "pybind11>=2.13"],
        "peers": ["transformers", "deepspeed"],
    },
    entry_points={"console_scripts": ["trilith = trilith.cli:main"]},
)
