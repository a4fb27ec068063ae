"""Where torch's headers and libraries are, and how the kernels are linked to them."""

from __future__ import annotations

import importlib.util
import re
import sys
import sysconfig
from pathlib import Path

from setuptools.errors import CompileError

OLDEST_TORCH = (2, 11)
STABLE_ABI = [
    ("TORCH_TARGET_VERSION", "0x020b000000000000"),  # OLDEST_TORCH
    ("Py_LIMITED_API", "0x030A0000"),  # requires-python
]


def link_arguments(platform: str = sys.platform) -> list[str]:
    """Linker arguments that keep libtorch.so and libtorch_cpu.so among the libraries that an extension needs.

    No symbol is taken from libtorch.so directly, but through it alone the loader finds the symbols of libtorch_cuda.so.
    The linkers of Debian and Ubuntu drop such a library unless ``--no-as-needed`` stands before it, and setuptools
    writes ``extra_link_args`` after ``libraries``. So the flag and the two libraries are one sequence of arguments.
    """
    libraries = ["-ltorch", "-ltorch_cpu"]
    if platform != "linux":
        return libraries
    return ["-Wl,--push-state,--no-as-needed", *libraries, "-Wl,--pop-state"]


def _version(torch: Path) -> tuple[int, ...]:
    text = (torch / "version.py").read_text()
    match = re.search(r"__version__ = '(\d+)\.(\d+)", text)
    return tuple(map(int, match.groups())) if match else (0, 0)


def find_torch() -> Path:
    """The torch to build against: that of the environment, which an isolated build does not see, or the build's own.

    Raises CompileError where there is none with headers.
    """
    candidates = [Path(sysconfig.get_path("purelib")) / "torch"]
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        candidates.append(Path(spec.origin).parent)
    for torch in candidates:
        if (torch / "include").is_dir() and _version(torch) >= OLDEST_TORCH:
            return torch
    raise CompileError(f"no torch >= {'.'.join(map(str, OLDEST_TORCH))} with headers in {[str(c) for c in candidates]}")
