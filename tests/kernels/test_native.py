"""The tests of csrc/ that need no Python (csrc/tests), built and run under the sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def build_and_run(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "csrc" / "build.py"), "test", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not (os.environ.get("CXX") or shutil.which("g++")), reason="no g++ on PATH, and CXX is not set")
def test_the_library_without_python() -> None:
    """Every family on every instruction set of this processor, the io queue, the index builders: all well, no report."""
    done = build_and_run(ROOT / "build" / "native_tests")
    assert done.returncode == 0, done.stdout[-8000:]
    assert ", 0 failed" in done.stdout and "ERROR: AddressSanitizer" not in done.stdout, done.stdout[-8000:]
    assert "runtime error" not in done.stdout and "FAILED" not in done.stdout, done.stdout[-8000:]
