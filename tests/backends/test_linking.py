"""Which libraries the kernels are linked to, as readelf shows them: the loader finds torch's CUDA symbols through
libtorch.so alone, and some linkers drop it because no symbol is taken from it directly."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="readelf reads the libraries of Linux"),
    pytest.mark.skipif(shutil.which("readelf") is None, reason="there is no readelf (binutils)"),
]


def needed(library: Path) -> set[str]:
    text = subprocess.run(["readelf", "-dW", str(library)], check=True, capture_output=True, text=True).stdout
    return set(re.findall(r"\(NEEDED\).*\[(.*)\]", text))


@pytest.mark.parametrize("name", ["_C_cpu", "_C_cuda"])
def test_kernels_need_libtorch(name: str) -> None:
    spec = importlib.util.find_spec(f"fp4.{name}")
    if spec is None or spec.origin is None:
        pytest.skip(f"fp4.{name} is not built")
    assert {"libtorch.so", "libtorch_cpu.so"} <= needed(Path(spec.origin))


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc to link with")
@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="setuptools is absent")
def test_link_arguments_outlive_as_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Ubuntu, --as-needed comes first; as setuptools does it, these arguments come last."""
    monkeypatch.syspath_prepend(ROOT)
    link_arguments = importlib.import_module("build_tools.libtorch").link_arguments
    source = tmp_path / "source.c"
    source.write_text("int nothing;\n")
    link = ["gcc", "-shared", "-fPIC", "-Wl,--as-needed", str(source)]
    for name in ("libtorch.so", "libtorch_cpu.so", "libother.so"):
        subprocess.run([*link, "-o", str(tmp_path / name)], check=True)
    library = tmp_path / "kernels.so"
    subprocess.run([*link, f"-L{tmp_path}", "-o", str(library), *link_arguments("linux"), "-lother"], check=True)
    found = needed(library)
    assert {"libtorch.so", "libtorch_cpu.so"} <= found
    assert "libother.so" not in found  # The flag ends where these arguments end.
