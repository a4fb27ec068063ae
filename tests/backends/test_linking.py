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


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc to link with")
@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="setuptools is absent")
@pytest.mark.parametrize("has_cuda", [True, False])
def test_the_loader_finds_symbols_of_libtorch_cuda(
    has_cuda: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a build of torch for CUDA the weak symbols are found, beside one without they are null, and both load."""
    monkeypatch.syspath_prepend(ROOT)
    link_arguments = importlib.import_module("build_tools.libtorch").link_arguments
    binding = (ROOT / "csrc" / "cuda" / "quantize_binding.cpp").read_text()
    (symbol,) = set(re.findall(r"weak\W.*?(aoti_torch\w+)", binding, re.S))
    (tmp_path / "cuda.c").write_text(f"int {symbol}(int device, void** stream) {{ return 7; }}\n")
    (tmp_path / "empty.c").write_text("")
    (tmp_path / "kernels.c").write_text(
        f"extern int {symbol}(int, void**) __attribute__((weak));\n"
        f"int stream(void) {{ return {symbol} ? {symbol}(0, 0) : 0; }}\n"
    )

    def link(source: str, name: str, *arguments: str) -> Path:
        out = tmp_path / name
        common = ["gcc", "-shared", "-fPIC", "-Wl,--as-needed", f"-Wl,-rpath,{tmp_path}", f"-Wl,-soname,{name}"]
        subprocess.run([*common, str(tmp_path / source), f"-L{tmp_path}", "-o", str(out), *arguments], check=True)
        return out

    link("cuda.c", "libtorch_cuda.so")
    link("empty.c", "libtorch_cpu.so")
    link("empty.c", "libtorch.so", *(["-Wl,--no-as-needed", "-ltorch_cuda"] if has_cuda else []))
    library = link("kernels.c", "kernels.so", *link_arguments("linux"))
    assert {"libtorch.so", "libtorch_cpu.so"} <= needed(library)
    assert "libtorch_cuda.so" not in needed(library)
    # In a process of its own, because this one holds torch's libraries of the same names.
    load = f"import ctypes; print(ctypes.CDLL({str(library)!r}).stream())"
    found = subprocess.run([sys.executable, "-c", load], check=True, capture_output=True, text=True).stdout
    assert int(found) == (7 if has_cuda else 0)
