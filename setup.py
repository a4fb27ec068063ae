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

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))  # An isolated build does not look for modules beside setup.py.

from build_tools import cuda, libtorch  # noqa: E402


class BuildKernels(build_ext):
    """Adds torch's headers and libraries, and says plainly when an optional extension is left out."""

    def build_extension(self, ext: Extension) -> None:
        try:
            if sys.platform == "win32":
                raise CompileError("the kernels are written for GCC and Clang")
            torch = libtorch.find_torch()
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
            depends=sorted(
                str(p.relative_to(ROOT)) for p in (*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc/cpu").glob("*.h"))
            ),
            define_macros=list(libtorch.STABLE_ABI),
            # No contraction: quantization is exact to the bit; matmuls name their FMAs.
            extra_compile_args=["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off"],
            extra_link_args=libtorch.link_arguments(),
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
    reason = cuda.left_out(choice)
    if reason is not None:
        print(f"fp4: CUDA kernels left out: {reason}", file=sys.stderr)
        return []
    folder = ROOT / "csrc" / "cuda"
    sources = ["csrc/binding_cuda.cpp", *sorted(str(p.relative_to(ROOT)) for p in folder.glob("*.cpp"))]
    return [
        Extension(
            "fp4._C_cuda",
            sources,
            depends=sorted(str(p.relative_to(ROOT)) for p in (*folder.glob("*.[ch]*"), *folder.parent.glob("*.h"))),
            define_macros=list(libtorch.STABLE_ABI),
            extra_compile_args=["-std=c++20", "-O2", "-g0", "-fvisibility=hidden", "-Wno-unknown-pragmas"],
            extra_link_args=libtorch.link_arguments(),
            # The static runtime, so that the library loads where there is no driver and no CUDA.
            libraries=["cudart_static", "dl", "rt", "pthread"],
            py_limited_api=True,
            optional=choice is None,
        )
    ]


def add_cuda(ext: Extension) -> None:
    """Compile the CUDA sources of the extension, which setuptools cannot."""
    built = cuda.build(os.environ.get("FP4_CUDA"))
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
