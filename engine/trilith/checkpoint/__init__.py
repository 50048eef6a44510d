"""Checkpoints: a directory that appears whole or not at all, read by any layout."""

from trilith.checkpoint.load import Entry, load
from trilith.checkpoint.manifest import Manifest, candidates, newest, read_manifest, step_directory
from trilith.checkpoint.save import save

__all__ = ["Entry", "Manifest", "candidates", "load", "newest", "read_manifest", "save", "step_directory"]
