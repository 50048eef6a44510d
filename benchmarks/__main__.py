"""Runs every benchmark, one process each, and keeps their JSON under benchmarks/results/."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
NOT_QUESTIONS = ("__init__", "__main__", "harness", "plain_gpt", "torch_pipelining", "zero_peers")


def main() -> int:
    """Run them in turn; the exit code is the worst of theirs."""
    (HERE / "results").mkdir(exist_ok=True)
    worst = 0
    for path in sorted([*HERE.glob("*.py"), HERE / "kernels"]):
        if path.stem in NOT_QUESTIONS:
            continue
        print(f"== {path.stem}", flush=True)
        target = HERE / "results" / f"{path.stem}.json"
        command = [sys.executable, "-m", f"benchmarks.{path.stem}", "--json", str(target)]
        worst = max(worst, subprocess.run(command, cwd=HERE.parent, check=False).returncode)
    return worst


if __name__ == "__main__":
    sys.exit(main())
