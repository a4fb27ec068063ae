"""The compiled kernels. Everything else about the package is in pyproject.toml.

Kernels are optional: without a C++ compiler the package installs and runs on its pure-torch reference backend.
Environment variables decide about them:

* FP4_CPU: 1 makes a failure to build the CPU kernels an error, 0 leaves them out.
* FP4_CUDA: the same for the CUDA kernels; ``pypi`` takes nvcc from PyPI. Unset, they are built where nvcc >= 12.8 and a
  GPU that they run on are found, or FP4_CUDA_ARCHS is set: compiling takes minutes that nobody should meet by surprise.
* FP4_CUDA_ARCHS: what they are compiled for, for example ``90;100a;120a``. By default the GPUs of this machine, or
  ``100a;120a`` where it has none.
* FP4_CUDA_CONFIGURATIONS: some of ``small;large;grouped``, to compile less than all of them while developing.
* CUTLASS_ROOT: a copy of CUTLASS >= 4.2, in place of its headers on PyPI.
* FP4_BUILD_CACHE: where compiled CUDA objects are kept, in place of build/cuda.

They are built against LibTorch's stable ABI, so headers of any torch >= 2.11 should give a library that loads into any
other; 2.13 is what has been tested.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))  # setup_cuda, which an isolated build would not find

import setup_cuda  # noqa: E402

OLDEST_TORCH = (2, 11)
STABLE_ABI = [
    ("TORCH_TARGET_VERSION", "0x020b000000000000"),  # OLDEST_TORCH
    ("Py_LIMITED_API", "0x030A0000"),  # requires-python
]


def _version(torch: Path) -> tuple[int, ...]:
    text = (torch / "version.py").read_text()
    match = re.search(r"__version__ = '(\d+)\.(\d+)", text)
    return tuple(map(int, match.groups())) if match else (0, 0)


def find_torch() -> Path:
    """The torch to build against: that of the environment, which an isolated build does not see, or the build's own."""
    candidates = [Path(sysconfig.get_path("purelib")) / "torch"]
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        candidates.append(Path(spec.origin).parent)
    for torch in candidates:
        if (torch / "include").is_dir() and _version(torch) >= OLDEST_TORCH:
            return torch
    raise CompileError(f"no torch >= {'.'.join(map(str, OLDEST_TORCH))} with headers in {[str(c) for c in candidates]}")


class BuildKernels(build_ext):
    """Adds torch's headers and libraries, and says plainly when an optional extension is left out."""

    def build_extension(self, ext: Extension) -> None:
        try:
            if sys.platform == "win32":
                raise CompileError("the kernels are written for GCC and Clang")
            torch = find_torch()
            ext.include_dirs.append(str(torch / "include"))
            ext.library_dirs.append(str(torch / "lib"))
            if ext.name == "fp4._C_cuda":
                add_cuda(ext)
            print(f"fp4: building {ext.name} against {torch}", file=sys.stderr)
            super().build_extension(ext)
        except Exception as error:
            if not ext.optional:
                raise
            print(f"fp4: {ext.name} was NOT built, the package works without it but slower: {error}", file=sys.stderr)
            raise CompileError(str(error)) from error  # the one error that `optional` forgives


def cpu_extension() -> list[Extension]:
    choice = os.environ.get("FP4_CPU")
    if choice not in (None, "0", "1"):
        raise ValueError(f"FP4_CPU is {choice!r}; expected 0 (no CPU kernels), 1 (fail without them) or nothing")
    if choice == "0":
        print("fp4: CPU kernels left out, because FP4_CPU=0", file=sys.stderr)
        return []
    sources = ["csrc/binding_cpu.cpp", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").glob("*.cpp"))]
    return [
        Extension(
            "fp4._C_cpu",
            sources,
            depends=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").glob("*.h")),
            define_macros=list(STABLE_ABI),
            # No contraction: quantization is exact to the bit; matmuls name their FMAs.
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off"],
            # torch is loaded before the kernels; the reference must stay even though no symbol is taken directly.
            extra_link_args=["-Wl,--no-as-needed"] if sys.platform == "linux" else [],
            libraries=["torch", "torch_cpu"],
            py_limited_api=True,
            optional=choice is None,
        )
    ]


def cuda_extension() -> list[Extension]:
    choice = os.environ.get("FP4_CUDA")
    if choice not in (None, "0", "1", "pypi"):
        raise ValueError(
            f"FP4_CUDA is {choice!r}; expected 0 (no CUDA kernels), 1 (fail without them), pypi or nothing"
        )
    reason = setup_cuda.left_out(choice)
    if reason is not None:
        print(f"fp4: CUDA kernels left out: {reason}", file=sys.stderr)
        return []
    folder = ROOT / "csrc" / "cuda"
    sources = ["csrc/binding_cuda.cpp", *sorted(str(p.relative_to(ROOT)) for p in folder.glob("*.cpp"))]
    return [
        Extension(
            "fp4._C_cuda",
            sources,
            depends=sorted(str(p.relative_to(ROOT)) for p in folder.glob("*.[ch]*")),
            define_macros=list(STABLE_ABI),
            extra_compile_args=["-std=c++17", "-O2", "-g0", "-fvisibility=hidden", "-Wno-unknown-pragmas"],
            extra_link_args=["-Wl,--no-as-needed"],
            # The static runtime, so that the library loads where there is no driver and no CUDA.
            libraries=["torch", "torch_cpu", "cudart_static", "dl", "rt", "pthread"],
            py_limited_api=True,
            optional=choice is None,
        )
    ]


def add_cuda(ext: Extension) -> None:
    """Compile the CUDA sources of the extension, which setuptools cannot."""
    built = setup_cuda.build(os.environ.get("FP4_CUDA"))
    ext.extra_objects = [str(path) for path in built.objects]
    ext.depends = [*ext.depends, *ext.extra_objects, str(built.stamp)]
    ext.define_macros += built.macros
    ext.include_dirs.append(str(built.toolkit.root / "include"))
    ext.library_dirs.append(str(built.toolkit.libraries))


setup(
    ext_modules=[*cpu_extension(), *cuda_extension()],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
