"""Which configuration of the FP4 matmul a shape gets (csrc/cuda/gemm_table.cpp), compiled without CUDA."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc" / "cuda"
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile the table with")
SMALL = {10: (128, 64, 256), 12: (128, 128, 128)}
LARGE = {10: (256, 256, 256), 12: (256, 128, 128)}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("choice") / "choice.so"
    built = [f"-DFP4_SM{family}_{name}=1" for family in (100, 120) for name in ("SMALL", "LARGE")]
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", *built, f"-I{CSRC / 'host'}", f"-I{CSRC}"]
    subprocess.run(
        ["g++", *flags, str(CSRC / "gemm_table.cpp"), str(CSRC / "host" / "choice.cpp"), "-o", str(path)], check=True
    )
    return ctypes.CDLL(str(path))


def choose(library: ctypes.CDLL, major: int, m: int, n: int, k: int) -> tuple[tuple[int, ...], int]:
    out = (ctypes.c_int * 4)()
    library.choose_configuration(major, 148 if major == 10 else 170, m, n, k, out)
    return tuple(out[:3]), out[3]


@pytest.mark.parametrize("major", [10, 12])
@pytest.mark.parametrize(("name", "tiles"), [("small", SMALL), ("large", LARGE)])
def test_the_tiles_are_those_of_the_kernels(major: int, name: str, tiles: dict[int, tuple[int, ...]]) -> None:
    text = (CSRC / f"gemm_sm{major}0_{name}.cu").read_text()
    shape = re.search(r"Element, Output, Shape<_(\d+), _(\d+), _(\d+)>", text)
    assert shape is not None
    assert tuple(map(int, shape.groups())) == tiles[major]


@pytest.mark.parametrize("major", [10, 12])
@pytest.mark.parametrize(("m", "n"), [(8192, 8192), (8200, 8192), (4096, 14336), (384, 28672)])
def test_many_rows_get_the_large_tile(library: ctypes.CDLL, major: int, m: int, n: int) -> None:
    """Also where some rows of the last tile, or some multiprocessors in the last wave, have nothing to do."""
    assert choose(library, major, m, n, 4096) == (LARGE[major], 1)


@pytest.mark.parametrize("major", [10, 12])
@pytest.mark.parametrize(("m", "n"), [(1, 4096), (128, 4096), (1, 128256), (128, 128256)])
def test_rows_of_one_small_tile_get_it(library: ctypes.CDLL, major: int, m: int, n: int) -> None:
    assert choose(library, major, m, n, 4096)[0] == SMALL[major]


def test_too_few_large_tiles_for_all_multiprocessors(library: ctypes.CDLL) -> None:
    """512 x 4096 is 32 large tiles for 74 pairs of multiprocessors, and two waves of small tiles of a quarter each."""
    assert choose(library, 10, 512, 4096, 4096) == (SMALL[10], 1)
    assert choose(library, 10, 1024, 4096, 4096) == (LARGE[10], 1)  # as much work for each as four waves of small tiles


@pytest.mark.parametrize(("k", "splits"), [(4096, 2), (1024, 1), (256, 1)])
def test_few_tiles_split_k(library: ctypes.CDLL, k: int, splits: int) -> None:
    """64 tiles on 148 multiprocessors: K in two parts, if each has at least four steps of 256."""
    assert choose(library, 10, 1, 4096, k) == (SMALL[10], splits)
