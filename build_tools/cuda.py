"""Find nvcc and CUTLASS, and compile csrc/cuda with them: what setuptools cannot do.

Objects are kept under a key made of everything that they are compiled from, so that a build repeats only what changed:
in build/cuda, or in the folder that FP4_BUILD_CACHE names.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from setuptools.errors import CompileError

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "csrc" / "cuda"
OLDEST_NVCC = (12, 8)  # the first that knows Blackwell
OLDEST_CAPABILITY = 80  # bfloat16 on tensor cores
DEFAULT_ARCHITECTURES = "100a;120a"
BYTES_PER_JOB = 9 << 30  # the largest source takes 8.6 GB

CUTLASS = "nvidia-cutlass==4.2.0.0"
# nvcc's own dependencies are not pinned, so all five are.
TOOLCHAIN = (
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
)

# Compute capabilities whose tensor cores multiply FP4, by the family of kernels that runs on them.
FAMILIES = {"sm100": ("100", "103", "110"), "sm120": ("120", "121")}
CONFIGURATIONS = ("small", "large", "grouped")  # of the matmul: gemm_<family>_<configuration>.cu

# ptxas, at -O3 unless told otherwise, spills in these; at these levels it does not, and main loops are about as long
# (benchmarks/results/gpu_derived.md).
PTXAS_LEVELS = {"gemm_sm120_small": "-O2", "gemm_sm120_large": "-O2", "gemm_sm120_grouped": "-O1"}


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: ``bin/nvcc``, headers, and a folder with libcudart_static.a."""

    root: Path
    version: tuple[int, ...]

    @property
    def nvcc(self) -> Path:
        return self.root / "bin" / "nvcc"

    @property
    def libraries(self) -> Path:
        for name in ("lib64", "lib", "targets/x86_64-linux/lib"):
            if (self.root / name / "libcudart_static.a").exists():
                return self.root / name
        raise CompileError(f"no libcudart_static.a below {self.root}")


def cache() -> Path:
    folder = Path(os.environ.get("FP4_BUILD_CACHE") or ROOT / "build" / "cuda")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _fetch(name: str, packages: tuple[str, ...]) -> Path:
    """Packages of PyPI in a folder of their own in the cache, downloaded once."""
    folder = cache() / f"{name}-{hashlib.sha256(repr(packages).encode()).hexdigest()[:12]}"
    if not folder.exists():
        print(f"fp4: downloading {', '.join(packages)}", file=sys.stderr)
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        # An isolated build hides pip behind PYTHONPATH; the interpreter itself has it.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(partial), *packages]
        if subprocess.run(command, env=environment, check=False).returncode:
            raise CompileError(f"pip could not download {', '.join(packages)}")
        partial.rename(folder)
    return folder


def _toolkit_at(nvcc: Path) -> Toolkit | None:
    try:
        text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    match = re.search(r"release (\d+)\.(\d+)", text)
    return Toolkit(nvcc.resolve().parent.parent, tuple(map(int, match.groups()))) if match else None


def find_toolkit(choice: str | None) -> Toolkit:
    """The toolkit to compile with. Raises CompileError saying what was looked for."""
    if choice == "pypi":
        for nvcc in sorted(_fetch("toolchain", TOOLCHAIN).glob("nvidia/*/bin/nvcc")):
            nvcc.chmod(0o755)
            toolkit = _toolkit_at(nvcc)
            if toolkit is not None:
                return toolkit
        raise CompileError("the toolchain of PyPI holds no nvcc that runs here")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    on_path = shutil.which("nvcc")
    if on_path:
        candidates.insert(1, Path(on_path))
    found = [toolkit for nvcc in candidates if (toolkit := _toolkit_at(nvcc)) is not None]
    for toolkit in found:
        if toolkit.version >= OLDEST_NVCC:
            return toolkit
    have = ", ".join(".".join(map(str, t.version)) for t in found) or "none"
    raise CompileError(
        f"nvcc {'.'.join(map(str, OLDEST_NVCC))} or newer was not found (CUDA_HOME, PATH, /usr/local/cuda; "
        f"found: {have}); FP4_CUDA=pypi downloads one"
    )


def find_cutlass() -> list[Path]:
    """CUTLASS's include folders: those of CUTLASS_ROOT, or of the wheel on PyPI."""
    root = os.environ.get("CUTLASS_ROOT")
    folder = Path(root) if root else _fetch("cutlass", (CUTLASS,)) / "cutlass_library" / "source"
    includes = [folder / "include", folder / "tools" / "util" / "include"]
    if not (includes[0] / "cutlass" / "cutlass.h").exists():
        raise CompileError(
            f"{folder} holds no include/cutlass/cutlass.h; CUTLASS_ROOT must be a copy of CUTLASS >= 4.2"
        )
    return includes


def _visible_capabilities() -> list[str]:
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []
    return sorted({line.replace(".", "") for line in lines if re.fullmatch(r"\d+\.\d", line)}, key=int)


def _of_visible_gpus() -> list[str]:
    blackwell = {number for numbers in FAMILIES.values() for number in numbers}
    return [c + "a" if c in blackwell else c for c in _visible_capabilities() if int(c) >= OLDEST_CAPABILITY]


def left_out(choice: str | None) -> str | None:
    """Why an installation does not even try, or None: nobody who did not ask should wait for what they cannot run."""
    if choice == "0":
        return "FP4_CUDA=0"
    if sys.platform != "linux":
        return None if choice else "they are for Linux"
    if choice is None and not os.environ.get("FP4_CUDA_ARCHS") and not _of_visible_gpus():
        return f"no GPU that they run on is visible; FP4_CUDA=1 compiles them all the same, for {DEFAULT_ARCHITECTURES}"
    return None


def find_architectures() -> list[str]:
    """Names as nvcc has them after ``sm_``: of FP4_CUDA_ARCHS, else of the visible GPUs, else the two of Blackwell."""
    asked = os.environ.get("FP4_CUDA_ARCHS")
    if asked:
        names = [name.strip() for name in asked.split(";") if name.strip()]
        bad = [name for name in names if not re.fullmatch(r"\d{2,3}[af]?", name)]
        if bad:
            raise ValueError(f"FP4_CUDA_ARCHS names {bad}; expected for example 90;100a;120a")
        return names
    return _of_visible_gpus() or DEFAULT_ARCHITECTURES.split(";")


def find_configurations() -> list[str]:
    asked = [name.strip() for name in os.environ.get("FP4_CUDA_CONFIGURATIONS", "").split(";") if name.strip()]
    bad = set(asked) - set(CONFIGURATIONS)
    if bad:
        raise ValueError(f"FP4_CUDA_CONFIGURATIONS names {sorted(bad)}; there are {', '.join(CONFIGURATIONS)}")
    return [name for name in CONFIGURATIONS if name in asked or not asked]


def _of_family(architectures: list[str], family: str) -> list[str]:
    # Without the `a` or `f` an architecture has no block-scaled instructions.
    return [a for a in architectures if a[-1] in "af" and a[:-1] in FAMILIES[family]]


def _closure(source: Path) -> list[Path]:
    """The source and every file of csrc/cuda that it includes."""
    found, queue = [source], [source]
    while queue:
        for name in re.findall(r'^#include "([^"]+)"', queue.pop().read_text(), re.M):
            path = SOURCES / name
            if path.exists() and path not in found:
                found.append(path)
                queue.append(path)
    return found


@dataclass(frozen=True)
class Job:
    source: Path
    command: tuple[str, ...]
    object: Path


def _job(source: Path, architectures: list[str], toolkit: Toolkit, includes: list[Path]) -> Job:
    flags = [
        "-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-diag-suppress=177,2908",
        "-Xcompiler", "-fPIC,-fvisibility=hidden,-g0",
        *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures),
    ]  # fmt: skip
    if source.stem in PTXAS_LEVELS:
        flags += ["-Xptxas", PTXAS_LEVELS[source.stem]]
    key = hashlib.sha256(repr((flags, toolkit.version)).encode())
    files = _closure(source)
    for path in files:
        key.update(path.read_bytes())
    if any("cutlass/" in path.read_text() for path in files):
        key.update((includes[0] / "cutlass" / "version.h").read_bytes())
    where = [f"-I{folder}" for folder in includes]
    return Job(source, (str(toolkit.nvcc), *flags, *where), cache() / f"{source.stem}-{key.hexdigest()[:16]}.o")


def _compile(job: Job) -> None:
    partial = job.object.with_suffix(f".{os.getpid()}.o")
    start = time.monotonic()
    done = subprocess.run(
        [*job.command, "-c", str(job.source), "-o", str(partial)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise CompileError(f"nvcc failed on {job.source.name} ({done.returncode}):\n{done.stdout[-4000:]}")
    partial.rename(job.object)
    print(f"fp4: compiled {job.source.name} in {time.monotonic() - start:.0f} s", file=sys.stderr)


def _memory() -> int:
    """Bytes that can be had: of the machine's, and of the container's."""
    match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    memory = int(match[1]) << 10 if match else BYTES_PER_JOB
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        memory = min(memory, int(limit.read_text()) - int(used.read_text()))
    return memory


def _jobs() -> int:
    return max(1, min(len(os.sched_getaffinity(0)), _memory() // BYTES_PER_JOB))


def _compile_all(jobs: list[Job]) -> None:
    """Raises the CompileError of the first that fails, after those that run already."""
    with concurrent.futures.ThreadPoolExecutor(min(_jobs(), len(jobs))) as pool:
        running = [pool.submit(_compile, job) for job in jobs]
        concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_EXCEPTION)
        pool.shutdown(wait=True, cancel_futures=True)
    for future in running:
        if not future.cancelled():
            future.result()


def _stamp(text: str) -> Path:
    """A file with this text, written anew only where it had another."""
    path = cache() / "library.txt"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path


@dataclass(frozen=True)
class CudaBuild:
    """What the extension is linked from besides its C++ sources."""

    objects: list[Path]
    macros: list[tuple[str, str]]
    toolkit: Toolkit
    stamp: Path  # newer than a library that was linked from something else


def build(choice: str | None) -> CudaBuild:
    """Compile what changed. Raises CompileError where something is missing or fails."""
    toolkit = find_toolkit(choice)
    architectures = find_architectures()
    includes = find_cutlass()
    jobs = [_job(SOURCES / "quantize.cu", architectures, toolkit, includes)]
    configurations = find_configurations()
    macros = [
        ("FP4_CUDA_ARCHS", f'"{";".join(architectures)}"'),
        ("FP4_CUDA_CONFIGURATIONS", f'"{";".join(configurations)}"'),
    ]
    for family in FAMILIES:
        chosen = _of_family(architectures, family)
        for configuration in configurations if chosen else []:
            macros.append((f"FP4_{family.upper()}_{configuration.upper()}", "1"))
            jobs.append(_job(SOURCES / f"gemm_{family}_{configuration}.cu", chosen, toolkit, includes))
    missing = [job for job in jobs if not job.object.exists()]
    if missing:
        print(
            f"fp4: compiling {len(missing)} of {len(jobs)} CUDA sources for {';'.join(architectures)}, "
            f"{min(_jobs(), len(missing))} at a time, two minutes or so each; FP4_CUDA=0 leaves them out",
            file=sys.stderr,
        )
        _compile_all(missing)
    objects = [job.object for job in jobs]
    return CudaBuild(objects, macros, toolkit, _stamp(repr((objects, macros))))
