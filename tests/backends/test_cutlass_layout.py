"""What the CUTLASS backend packs, read back through CUTLASS's own layout functions by a host compiler."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp4.backends.block_scaled import swizzle, unswizzle
from fp4.backends.cutlass import CutlassBackend
from fp4.numerics import formats
from fp4.numerics.formats import FORMATS, Format

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc" / "cuda"
BACKEND = CutlassBackend()
FORMAT = pytest.mark.parametrize("fmt", list(FORMATS.values()), ids=list(FORMATS))


def cutlass_includes() -> list[Path]:
    """CUTLASS's headers where they are at hand: CUTLASS_ROOT, nvidia-cutlass, or a build."""
    candidates = [Path(os.environ["CUTLASS_ROOT"])] if "CUTLASS_ROOT" in os.environ else []
    spec = importlib.util.find_spec("cutlass_library")
    if spec is not None and spec.origin is not None:
        candidates.append(Path(spec.origin).parent / "source")
    cache = Path(os.environ.get("FP4_BUILD_CACHE") or ROOT / "build" / "cuda")
    candidates += sorted(cache.glob("cutlass-*/cutlass_library/source"))
    for root in candidates:
        if (root / "include" / "cutlass" / "cutlass.h").exists():
            return [root / "include", root / "tools" / "util" / "include"]
    return []


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    includes = cutlass_includes()
    if not includes or shutil.which("g++") is None:
        pytest.skip(
            "CUTLASS's headers (CUTLASS_ROOT, or pip install --no-deps nvidia-cutlass==4.2.0.0) or g++ are absent"
        )
    # The headers name types of CUDA's, which come with any toolkit.
    cuda = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    cuda += [Path(p) / "nvidia" / "cu13" / "include" for p in sys.path]
    found = [p for p in cuda if (p / "cuda_fp8.h").exists()]
    if not found:
        pytest.skip("CUDA's headers (CUDA_HOME) are absent")
    library = tmp_path_factory.mktemp("layout") / "layout.so"
    folders = [f"-I{p}" for p in (*includes, found[0], found[0] / "cccl", CSRC)]
    flags = ["-std=c++17", "-O1", "-w", "-ffp-contract=off", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, *folders, str(CSRC / "host" / "layout.cpp"), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.layout_disagreements.restype = ctypes.c_int64
    return loaded


def at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def random_weight(fmt: Format, *shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8, generator=generator)
    low, high = (0, 127) if fmt is formats.NVFP4 else (100, 140)
    scales = torch.randint(low, high, (*shape[:-1], shape[-1] // fmt.block_size), generator=generator)
    return codes, scales.to(torch.uint8).view(fmt.scale_dtype)


@FORMAT
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 64), (129, 8, 320), (7, 257, 96), (256, 128, 1024), (300, 136, 32)])
def test_swizzled_offset_is_where_cutlass_looks(layout: ctypes.CDLL, fmt: Format, m: int, n: int, k: int) -> None:
    assert layout.layout_disagreements(fmt.block_size, m, n, k) == 0


@FORMAT
@pytest.mark.parametrize(("m", "n", "k"), [(1, 8, 32), (5, 136, 96), (130, 24, 160), (3, 264, 256)])
def test_matmul_of_packed_operands(layout: ctypes.CDLL, fmt: Format, m: int, n: int, k: int) -> None:
    """Both operands through pack, multiplied in the order that CUTLASS reads them: what the reference multiplies."""
    a, b = random_weight(fmt, m, k, seed=1), random_weight(fmt, n, k, seed=2)
    packed_a, packed_b = BACKEND.pack(*a, fmt), BACKEND.pack(*b, fmt)
    d = torch.empty(m, n, dtype=torch.float64)
    layout.layout_multiply(
        fmt.block_size, at(packed_a[0]), at(packed_b[0]), at(packed_a[1]), at(packed_b[1]), m, n, k, at(d)
    )
    assert torch.equal(d, fmt.dequantize(*a).double() @ fmt.dequantize(*b).double().T) or torch.allclose(
        d, fmt.dequantize(*a).double() @ fmt.dequantize(*b).double().T, rtol=1e-12, atol=0
    )


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(list(FORMATS.values())),
    st.integers(1, 300),
    st.integers(1, 20),
    st.lists(st.integers(1, 3), max_size=2),
)
def test_unpack_inverts_pack(fmt: Format, n: int, blocks: int, lead: list[int]) -> None:
    codes, scales = random_weight(fmt, *lead, n, blocks * 32)
    weight, weight_scale = BACKEND.pack(codes, scales, fmt)
    assert weight_scale.dtype == fmt.scale_dtype
    assert weight_scale.is_contiguous()
    assert (weight_scale.shape[-2] % 128, weight_scale.shape[-1] % 4) == (0, 0)
    again = BACKEND.unpack(weight, weight_scale, fmt, n)
    assert torch.equal(again[0], codes)
    assert again[1].dtype == fmt.scale_dtype
    assert torch.equal(again[1].view(torch.uint8), scales.view(torch.uint8))


def test_padding_is_zero() -> None:
    """A scale that is NaN would spoil sums even beside codes that are zero."""
    scales = torch.full((5, 6), 7, dtype=torch.uint8)
    swizzled = swizzle(scales)
    assert swizzled.shape == (128, 8)
    assert int((swizzled == 7).sum()) == 30
    assert int((swizzled == 0).sum()) == swizzled.numel() - 30
    assert torch.equal(unswizzle(swizzled, 5, 6), scales)


def test_the_order_of_a_tile() -> None:
    scales = torch.arange(128 * 4, dtype=torch.int32).reshape(128, 4)
    first = swizzle(scales).flatten()[:20].reshape(5, 4)
    assert first.tolist() == [[r * 4 + j for j in range(4)] for r in (0, 32, 64, 96, 1)]
