"""The native ops beside torch's, one file a family: `python -m benchmarks.kernels [--family NAME] [--json FILE]`."""
