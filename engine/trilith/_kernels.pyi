"""The native library as Python sees it. Addresses are integers, 0 for what is absent; csrc/cpu/kernels.h says what each
function does. Call it through `kernels/library.py` and `kernels/ops`."""

from types import ModuleType

instruction_sets: tuple[str, ...]
has_openmp: bool
base: ModuleType
avx2: ModuleType
avx512: ModuleType
io: ModuleType
data: ModuleType
