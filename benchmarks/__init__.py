"""One file per question; `python -m benchmarks.NAME [--json FILE]`, or `python -m benchmarks` for all of them."""
