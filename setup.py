"""The compiled kernels. Everything else about the package is in pyproject.toml.

Kernels are optional: without a C++ compiler the package installs and runs on its pure-torch reference backend. The
environment variable FP4_CPU decides about the CPU kernels: 1 makes a failure to build them an error, 0 leaves them out.

They are built against LibTorch's stable ABI, so headers of any torch >= 2.11 give a library that loads into any other.
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
            define_macros=STABLE_ABI,
            # No contraction: quantization is exact to the bit; matmuls name their FMAs.
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off"],
            # torch is loaded before the kernels; the reference must stay even though no symbol is taken directly.
            extra_link_args=["-Wl,--no-as-needed"] if sys.platform == "linux" else [],
            libraries=["torch", "torch_cpu"],
            py_limited_api=True,
            optional=choice is None,
        )
    ]


setup(
    ext_modules=cpu_extension(),
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
