"""The configuration of a run: one JSON file whose every key has a type, a default, a unit and a meaning.

`load_config` reads and checks the file, `resolve` replaces every "auto" and says where each value comes from.
Keys that DeepSpeed has keep its names and meaning; `deepspeed_keys` holds the verdict on those that are mapped,
ignored or refused.
"""

from trilith.config.load import load_config
from trilith.config.resolve import Resolved, resolve
from trilith.config.rules import check_rules
from trilith.config.schema import Config, json_schema

__all__ = ["Config", "Resolved", "check_rules", "json_schema", "load_config", "resolve"]
