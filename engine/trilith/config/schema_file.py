"""`python -m trilith.config.schema_file [FILE]` writes the JSON schema for editors (default configs/schema.json)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from trilith.config.schema import json_schema


def schema_text() -> str:
    """The schema as it lies in configs/schema.json."""
    return json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "configs/schema.json")
    target.write_text(schema_text(), encoding="utf-8")
    print(f"wrote {target}")
