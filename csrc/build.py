"""How csrc/ is compiled: the flags, once, for the libraries that `setup.py` builds and for the program that tests them.

`python csrc/build.py test [FOLDER]` builds the tests of csrc/tests, under AddressSanitizer and UndefinedBehaviorSanitizer,
in FOLDER (build/native_tests) and runs them. `python csrc/build.py here` builds the libraries into the checkout, as an
editable install does, for a Python without setuptools. Needs a C++17 compiler and ninja, for the libraries pybind11 and
for CUDA nvcc, too; never torch.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

CSRC = Path(__file__).resolve().parent

# Each file of csrc/cpu is compiled once for each of these, in a namespace of that name (csrc/common/vec.h).
X86_SETS = {
    "base": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512",
}
# GCC 12 takes the undefined operand of its own AVX-512 intrinsics for an uninitialised variable.
CXX_FLAGS = (
    "-std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra -Wno-maybe-uninitialized"
)
# Here nothing may be fused but what says fma: random numbers must be the same bits on every set, and differences of equal
# products must be zero.
UNFUSED = ("random", "dropout", "norm", "optimizer")
NOT_PER_SET = ("tables",)
OPTIMIZED = "-O3"
# Code for Ampere and Hopper, and an intermediate form of it that drivers translate for younger devices.
CUDA_ARCHS = "80 90a 90+ptx"
CUDA_FLAGS = "-std=c++17 -O3 --expt-relaxed-constexpr -cudart static"
# As UNFUSED, on the device: its bits are those of the processor's.
CUDA_UNFUSED = ("optimizer",)
# What only Hopper runs is compiled for nothing else, where that is among the architectures.
HOPPER = "90a"
HOPPER_SOURCES = ("attention_sm90", "attention_sm90_backward")
# Every step that the sanitizers object to ends the program. Frames stay, so that what they say names functions.
# Unoptimised, GCC warns of its intrinsics more than it does already.
SANITIZED = "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all -Wno-uninitialized"


class KernelsUnavailable(Exception):
    """Why the kernels cannot be built here."""


def find_compiler() -> str:
    """The C++ compiler's command: CXX, else the first on PATH."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if not compiler:
        raise KernelsUnavailable("no C++ compiler (g++, clang++ or c++) on PATH, and CXX is not set")
    return compiler


def build_library(target: Path, folder: Path, verbose: bool = False) -> None:
    """Make `target`, the extension `trilith._kernels`, with its objects in `folder`."""
    compiler, headers = find_compiler(), _python_headers()
    sources = [source for source in all_sources() if source.parent.name not in ("tests", "cuda")]
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    _run_ninja(_rules(compiler, sources, target, f"{OPTIMIZED} {headers}", "-shared"), folder, compiler, verbose)


def find_nvcc() -> str:
    """The CUDA compiler's command: that of CUDA_HOME, else the first on PATH."""
    home = os.environ.get("CUDA_HOME")
    compiler = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc")
    if not compiler or not shutil.which(compiler):
        raise KernelsUnavailable(f"no nvcc {'in CUDA_HOME ' + home if home else 'on PATH'}")
    return compiler


def wants_cuda() -> bool:
    """Whether the CUDA kernels are to be built: TRILITH_CUDA says so (0 or 1), else where there is an NVIDIA driver."""
    said = os.environ.get("TRILITH_CUDA", "")
    return said != "0" if said else Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi") is not None


def build_cuda_library(target: Path, folder: Path, verbose: bool = False) -> None:
    """Make `target`, the extension `trilith._kernels_cuda`, with its objects in `folder`, for TRILITH_CUDA_ARCHS."""
    compiler, nvcc = find_compiler(), find_nvcc()
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    lines, objects = _cuda_rules(nvcc, os.environ.get("TRILITH_CUDA_ARCHS") or CUDA_ARCHS)
    lines += [
        f"cxx = {compiler}",
        "rule compile",
        f"  command = $cxx -std=c++17 -O2 -fPIC -fvisibility=hidden {_python_headers()} -I {CSRC} -c $in -o $out",
        f"build bind.o: compile {CSRC / 'cuda' / 'bind.cpp'}",
        "rule link",
        "  command = $nvcc -shared -cudart static $in -o $out",
        f"build {target}: link bind.o {' '.join(objects)}",
        f"default {target}",
    ]
    _run_ninja("\n".join(lines) + "\n", folder, nvcc, verbose)


def cuda_reports(folder: Path, archs: str, all_types: bool = False) -> dict[str, str]:
    """What the assembler says of the registers and spills of each file of csrc/cuda, compiled for `archs` in `folder`.

    With `all_types`, else without fp16, whose kernels differ from those of bf16 in a conversion.
    """
    nvcc, types = find_nvcc(), "" if all_types else "-DTRILITH_NO_F16"
    lines, objects = _cuda_rules(nvcc, archs, f"-Xptxas -v {types}", " > $out.report 2>&1 || (cat $out.report; exit 1)")
    _run_ninja("\n".join([*lines, f"default {' '.join(objects)}"]) + "\n", folder, nvcc, False)
    return {name: (folder / f"{name}.report").read_text() for name in objects}


def _cuda_rules(nvcc: str, archs: str, more: str = "", behind: str = "") -> tuple[list[str], list[str]]:
    """The lines of a build file that compile csrc/cuda for `archs` ("80 90a 90+ptx"), and the objects that they make."""
    lines = [
        f"nvcc = {nvcc}",
        f"cuda_flags = {CUDA_FLAGS} -Xcompiler -fPIC,-fvisibility=hidden -I {CSRC}",
        "rule cuda",
        f"  command = $nvcc $cuda_flags $codes $more {more} -MMD -MF $out.d -c $in -o $out{behind}",
        "  description = $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    objects = []
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        objects.append(f"cuda_{source.stem}.o")
        unfused = "--fmad=false" if source.stem in CUDA_UNFUSED else ""
        codes = _codes(HOPPER if source.stem in HOPPER_SOURCES and HOPPER in archs.split() else archs)
        lines += [f"build {objects[-1]}: cuda {source}", f"  more = {unfused}", f"  codes = {codes}"]
    return lines, objects


def _codes(archs: str) -> str:
    """The compiler's options for `archs`."""
    codes = []
    for arch in archs.split():
        number, _, ptx = arch.partition("+")
        code = f"compute_{number}" if ptx else f"sm_{number}"
        codes.append(f"-gencode=arch=compute_{number},code={code}")
    return " ".join(codes)


def build_emulated(target: Path, folder: Path) -> None:
    """Make `target`, the extension `trilith._kernels_cuda` for a processor: csrc/cuda on csrc/tests/device."""
    compiler, device, translated = find_compiler(), CSRC / "tests" / "device", folder.resolve() / "cuda"
    translated.mkdir(parents=True, exist_ok=True)
    for source in (*(CSRC / "cuda").glob("*.h"), *(CSRC / "cuda").glob("*.cu")):
        copy, text = translated / source.name, launches_as_calls(source.read_text())
        if not copy.exists() or copy.read_text() != text:
            copy.write_text(text)
    include = f"-I {device} -I {translated.parent} -I {CSRC}"
    flags = f"-std=c++17 -O1 -fPIC -fvisibility=hidden -ffp-contract=off -w {_python_headers()} {include}"
    lines = [
        "rule compile",
        f"  command = {compiler} {flags} -x c++ -include cuda_runtime.h -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} -shared $in -o $out",
    ]
    objects = []
    for source in (*sorted(translated.glob("*.cu")), CSRC / "cuda" / "bind.cpp", *sorted(device.glob("*.cpp"))):
        objects.append(f"{source.stem}.o")
        lines.append(f"build {objects[-1]}: compile {source}")
    lines += [f"build {target.resolve()}: link {' '.join(objects)}", f"default {target.resolve()}"]
    _run_ninja("\n".join(lines) + "\n", folder, compiler, False)


def launches_as_calls(text: str) -> str:
    """CUDA source with `kernel<...><<<grid, block, bytes, stream>>>(arguments)` as a call of the emulator's `launch`."""
    while (at := text.find("<<<")) >= 0:
        end = text.index(">>>", at)
        start = at
        if text[start - 1].isspace():
            start = len(text[:start].rstrip())
        if text[start - 1] == ">":  # back to the bracket that opens the kernel's own arguments
            depth = 1
            while depth:
                start -= 1
                depth += {">": 1, "<": -1}.get(text[start - 1], 0)
            start -= 1
        while text[start - 1].isalnum() or text[start - 1] == "_":
            start -= 1
        opening = text.index("(", end)
        assert not text[end + 3 : opening].strip(), text[at : opening + 1]
        kernel, config = text[start:at].strip(), text[at + 3 : end]
        separator = "" if text[opening + 1] == ")" else ", "
        text = f"{text[:start]}::trilith::emulated::launch({config}, {kernel}{separator}{text[opening + 1 :]}"
    return text


def build_tests(folder: Path, verbose: bool = False) -> Path:
    """Make the program that tests the library, without Python and under the sanitizers; returns its path."""
    compiler, target = find_compiler(), folder.resolve() / "native_tests"
    python = {CSRC / "bindings.cpp", *CSRC.glob("*/bind.cpp")}
    sources = [source for source in all_sources() if source not in python and source.parent.name != "cuda"]
    _run_ninja(_rules(compiler, sources, target, SANITIZED, SANITIZED), folder, compiler, verbose)
    return target


def _python_headers() -> str:
    try:
        import ninja  # noqa: F401
        import pybind11
    except ImportError as missing:
        raise KernelsUnavailable(f"the Python package {missing.name} is missing: pip install {missing.name}") from None
    return f"-isystem {sysconfig.get_paths()['include']} -isystem {pybind11.get_include()}"


def all_sources() -> list[Path]:
    """Every source file in C++ but those of the emulated device."""
    return sorted(source for source in CSRC.glob("**/*.cpp") if source.parent.name != "device")


def _rules(compiler: str, sources: list[Path], target: Path, flags: str, link_flags: str) -> str:
    """The build file: the sources, those of csrc/cpu once for each instruction set."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    sets = X86_SETS if is_x86 else {"base": ""}
    threads = openmp(compiler)
    lines = [
        f"cxx = {compiler}",
        f"flags = {CXX_FLAGS} {flags} {'-DTRILITH_X86' if is_x86 else ''} {threads} -I {CSRC}",
        f"ldflags = {threads} -pthread {os.environ.get('LDFLAGS', '')}",
        "rule compile",
        f"  command = $cxx $flags {os.environ.get('CXXFLAGS', '')} $more -MMD -MF $out.d -c $in -o $out",
        "  description = $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx {link_flags} $in $ldflags -o $out",
    ]
    objects = []

    def add(source: Path, name: str, more: str = "") -> None:
        objects.append(name)
        lines.extend([f"build {name}: compile {source}", f"  more = {more}"])

    for source in sources:
        room = source.parent.name
        unfused = "-ffp-contract=off" if source.stem in UNFUSED or room == "data" else ""
        if room != "cpu" or source.stem in NOT_PER_SET:
            add(source, f"{room}_{source.stem}.o", unfused)
            continue
        for name, options in sets.items():
            add(source, f"{source.stem}_{name}.o", f"{options} {unfused} -DTRILITH_ISA={name}")
    lines.append(f"build {target}: link {' '.join(objects)}")
    lines.append(f"default {target}")
    return "\n".join(lines) + "\n"


def _run_ninja(rules: str, folder: Path, compiler: str, verbose: bool) -> None:
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(rules)
    command = [_find_ninja(), "-C", str(folder), *(["-v"] if verbose else [])]
    try:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as problem:
        raise KernelsUnavailable(f"ninja did not start: {problem}") from None
    if result.returncode:
        print(result.stdout, file=sys.stderr)
        raise KernelsUnavailable(f"{compiler} failed; its output stands above")


def _find_ninja() -> str:
    try:
        import ninja
    except ImportError:
        return "ninja"
    return str(Path(ninja.BIN_DIR) / "ninja")


def openmp(compiler: str) -> str:
    """-fopenmp, where the compiler has it."""
    tried = subprocess.run(
        [*shlex.split(compiler), "-fopenmp", "-x", "c++", "-", "-o", os.devnull],
        input="#include <omp.h>\nint main() { return omp_get_max_threads() < 0; }\n",
        text=True,
        capture_output=True,
    )
    return "-fopenmp" if tried.returncode == 0 else ""


def build_here() -> None:
    """The libraries in the checkout."""
    package, folder = CSRC.parent / "engine" / "trilith", CSRC.parent / "build" / "here"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    build_library(package / f"_kernels{suffix}", folder / "kernels")
    if wants_cuda():
        build_cuda_library(package / f"_kernels_cuda{suffix}", folder / "kernels_cuda")


def main() -> int:
    """Build the libraries, or build and run the tests; returns the exit code."""
    words = sys.argv[1:]
    try:
        if words == ["here"]:
            build_here()
            return 0
        if words[:1] == ["test"] and len(words) <= 2:
            folder = Path(words[1]) if len(words) == 2 else CSRC.parent / "build" / "native_tests"
            return subprocess.run([str(build_tests(folder))]).returncode
    except KernelsUnavailable as reason:
        print(f"not built: {reason}", file=sys.stderr)
        return 1
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
