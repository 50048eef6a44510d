"""Trilith: a 3D-parallel training engine. One JSON file describes a run; `trilith train` runs it.

Public names are loaded when they are first used, so that the command line starts without torch.
"""

from __future__ import annotations

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trilith.config import Config, load_config
    from trilith.models.pipeline_model import LayerSpec, PipelineModel, TiedLayerSpec
    from trilith.pipeline_engine.engine import initialize
    from trilith.trainer import Trainer
    from trilith.zero.materialise import empty_weights

__all__ = [
    "Config",
    "LayerSpec",
    "PipelineModel",
    "TiedLayerSpec",
    "Trainer",
    "empty_weights",
    "initialize",
    "load_config",
]
__version__ = "0.1.0"

_HOMES = MappingProxyType(
    {
        "Config": "trilith.config",
        "LayerSpec": "trilith.models.pipeline_model",
        "PipelineModel": "trilith.models.pipeline_model",
        "TiedLayerSpec": "trilith.models.pipeline_model",
        "Trainer": "trilith.trainer",
        "empty_weights": "trilith.zero.materialise",
        "initialize": "trilith.pipeline_engine.engine",
        "load_config": "trilith.config",
    }
)


def __getattr__(name: str) -> Any:
    """Import a public name from where it lives."""
    if name not in _HOMES:
        raise AttributeError(f"module 'trilith' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
