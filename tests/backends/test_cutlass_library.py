"""The compiled CUDA library on a machine without a GPU: it loads, says what it can run, and holds the instructions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from fp4 import backends
from fp4.backends import cutlass
from fp4.numerics.formats import FORMATS, MXFP4, NVFP4, Format
from fp4.scheme import Scheme

BACKEND = cutlass.CutlassBackend()
BUILT, KERNELS = cutlass.architectures(), cutlass.configurations()
if not BUILT and os.environ.get("FP4_REQUIRE_CUDA") == "1":
    pytest.fail("FP4_REQUIRE_CUDA=1, but the CUDA library is not built", pytrace=False)
needs_library = pytest.mark.skipif(not BUILT, reason="the CUDA library is not built (FP4_CUDA=1, or make cuda)")
MAJORS = [pytest.param(major, marks=needs_library, id=f"sm_{major}0") for major in (10, 12)]
FORMAT = pytest.mark.parametrize("fmt", list(FORMATS.values()), ids=list(FORMATS))
CUDA = torch.device("cuda", 0)


def workspace(
    major: int, fmt: Format, m: int, n: int, k: int, experts: int = 0, dtype: torch.dtype = torch.bfloat16
) -> int:
    count = 148 if major == 10 else 170
    return int(torch.ops.fp4.cutlass_workspace_bytes(major, count, fmt.name, dtype, m, n, k, experts))


def skip_unless_built_for(major: int) -> None:
    if not any(name.startswith(str(major)) and name[-1] in "af" for name in BUILT):
        pytest.skip(f"the library was built for {', '.join(BUILT)}")


@needs_library
def test_loads_beside_the_cpu_kernels_without_a_driver() -> None:
    code = (
        "import torch, fp4.ops; import fp4._C_cuda; from fp4.backends import cpu, cutlass; "
        "assert cutlass.architectures(); print(cpu.isa(), cutlass.architectures())"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_library
def test_operators_refuse_tensors_of_the_cpu() -> None:
    with pytest.raises(NotImplementedError, match="cutlass_quantize"):
        torch.ops.fp4.cutlass_quantize(torch.zeros(2, 32), None, "mxfp4", "abs_max")


@pytest.mark.parametrize("major", MAJORS)
@FORMAT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_shapes_that_can_be_implemented(major: int, fmt: Format, dtype: torch.dtype) -> None:
    skip_unless_built_for(major)
    for m, n, k in [(1, 4096, 4096), (7, 8, 32), (130, 24, 96), (4096, 14336, 4096), (65536, 8192, 28672)]:
        assert workspace(major, fmt, m, n, k, dtype=dtype) >= 0, (m, n, k)
        assert (workspace(major, fmt, m, n, k, experts=8, dtype=dtype) > 0) == ("grouped" in KERNELS), (m, n, k)


@pytest.mark.parametrize("major", MAJORS)
@FORMAT
def test_shapes_that_cannot(major: int, fmt: Format) -> None:
    skip_unless_built_for(major)
    for m, n, k in [(4, 64, 48), (4, 12, 64), (4, 1, 64), (4, 64, 33)]:
        assert workspace(major, fmt, m, n, k) == -1, (m, n, k)
        assert workspace(major, fmt, m, n, k, experts=4) == -1, (m, n, k)


@needs_library
def test_no_kernel_for_other_capabilities() -> None:
    assert workspace(9, NVFP4, 4, 64, 64) >= -1  # not asked for: the backend refuses GPUs below 10.0
    assert torch.ops.fp4.cutlass_configuration(12, 170, "nvfp4", torch.bfloat16, 4, 64, 64) or not any(
        name.startswith("12") for name in BUILT
    )


@pytest.mark.parametrize("major", MAJORS)
@FORMAT
def test_few_rows_are_spread_over_all_multiprocessors(major: int, fmt: Format) -> None:
    skip_unless_built_for(major)
    if not {"small", "large"} <= set(KERNELS):
        pytest.skip(f"the library was built with {', '.join(KERNELS)} kernels alone")
    count = 148 if major == 10 else 170

    def configuration(m: int, n: int, k: int) -> list[int]:
        return list(torch.ops.fp4.cutlass_configuration(major, count, fmt.name, torch.bfloat16, m, n, k))

    tile_m, tile_n, tile_k, splits = configuration(1, 4096, 4096)
    tiles = -(-4096 // tile_n)
    assert splits >= 2
    assert count // 2 < tiles * splits <= count
    assert splits * tile_k * 4 <= 4096
    assert configuration(1, 128256, 4096)[3] == 1  # more tiles than multiprocessors already
    large = configuration(8192, 8192, 8192)
    assert large[0] * large[1] > tile_m * tile_n
    assert large[3] == 1


@pytest.mark.parametrize("major", MAJORS)
def test_workspace_of_a_split_holds_its_partial_sums(major: int) -> None:
    skip_unless_built_for(major)
    if "small" not in KERNELS:
        pytest.skip(f"the library was built with {', '.join(KERNELS)} kernels alone")
    assert workspace(major, NVFP4, 1, 4096, 4096) >= 4096 * 4


def test_says_why_it_does_not_run_here() -> None:
    if torch.cuda.is_available() and BUILT:
        pytest.skip("this machine has a GPU")
    reason = BACKEND.unavailable()
    assert reason is not None
    assert ("built" in reason) == ("without CUDA" in reason or "kernels" in reason)
    with pytest.raises(ValueError, match=r"backend 'cutlass' cannot run nvfp4 .*: .*(not built|CUDA)"):
        backends.select(Scheme(NVFP4), torch.device("cpu"), (64, 64), "cutlass")


@pytest.mark.parametrize(
    ("scheme", "shape", "capability", "reason"),
    [
        (Scheme(NVFP4), (64, 64), (10, 0), None),
        (Scheme(MXFP4, activations="fp4"), (8, 64, 64), (12, 0), None),
        (Scheme(NVFP4, rotation="hadamard", group_size=128), (64, 128), (10, 0), None),
        (Scheme(NVFP4, activations="model"), (64, 64), (10, 0), "FP4 activations alone"),
        (Scheme(NVFP4), (64, 64), (9, 0), "compute capability 9.0"),
        (Scheme(NVFP4), (64, 64), (10, 3), "FP4_CUDA_ARCHS=103a"),
        (Scheme(NVFP4), (64, 48), (10, 0), "K is 48"),
        (Scheme(NVFP4), (60, 64), (10, 0), "N is 60"),
        (Scheme(NVFP4, rotation="hadamard", group_size=256), (64, 256), (10, 0), "size 256"),
    ],
)
def test_what_it_refuses(
    monkeypatch: pytest.MonkeyPatch, scheme: Scheme, shape: tuple[int, ...], capability: tuple[int, int], reason: str
) -> None:
    monkeypatch.setattr(cutlass, "architectures", lambda: ("100a", "120a"))
    monkeypatch.setattr(cutlass, "configurations", lambda: ("small", "large", "grouped"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert (BACKEND.refuses(scheme, CUDA, shape) or "").find(reason or "") >= 0
    assert (BACKEND.refuses(scheme, CUDA, shape) is None) == (reason is None)
    assert "not on cpu" in str(BACKEND.refuses(scheme, torch.device("cpu"), shape))


def test_architectures_of_a_family_and_of_plain_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def serves(built: tuple[str, ...], capability: tuple[int, int]) -> tuple[bool, bool]:
        monkeypatch.setattr(cutlass, "architectures", lambda: built)
        monkeypatch.setattr(cutlass, "configurations", lambda: ("small",))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return BACKEND.lacks(NVFP4, CUDA) is None, BACKEND.refuses(Scheme(NVFP4), CUDA, (64, 64)) is None

    assert serves(("80", "90"), (8, 9)) == (True, False)
    assert serves(("89",), (8, 6)) == (False, False)
    assert serves(("90", "100a"), (10, 0)) == (True, True)
    assert serves(("100f",), (10, 3)) == (True, True)
    assert serves(("100a",), (10, 3)) == (False, False)
    assert serves(("100",), (10, 0)) == (True, False)


def test_selection_leaves_weight_only_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutlass, "architectures", lambda: ("100a",))
    monkeypatch.setattr(cutlass, "configurations", lambda: ("small", "large"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    monkeypatch.setattr(cutlass.CutlassBackend, "unavailable", lambda self: None)
    chosen, quantizes = backends.select(Scheme(NVFP4), CUDA, (64, 64))
    assert (chosen.name, quantizes) == ("cutlass", True)
    assert backends.select(Scheme(NVFP4, activations="model"), CUDA, (64, 64))[0].name != "cutlass"
    assert "built without its grouped kernels" in str(BACKEND.refuses(Scheme(NVFP4), CUDA, (4, 64, 64)))


# --- machine code ----------------------------------------------------------------------------------------------------


def disassembler() -> str:
    """cuobjdump with nvdisasm beside it, from PATH or from PyPI's wheels."""
    folders = [Path(p) / "nvidia" / "cu13" / "bin" for p in sys.path]
    path = os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")])
    found = shutil.which("cuobjdump", path=path)
    if found is None or shutil.which("nvdisasm", path=path) is None:
        pytest.skip("no disassembler; pip install --no-deps nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    os.chmod(found, 0o755)
    return found


def dump(*options: str) -> str:
    tool = disassembler()
    library = Path(sys.modules["fp4._C_cuda"].__file__ or "")
    environment = {**os.environ, "PATH": f"{Path(tool).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        [tool, *options, str(library)], capture_output=True, text=True, check=True, env=environment
    ).stdout


@needs_library
def test_block_scaled_instructions() -> None:
    """The tensor cores' block-scaled FP4 instructions, in both formats, and the conversion to E2M1 in hardware."""
    sass = dump("-sass")
    found: dict[str, Counter[str]] = {}
    architecture = ""
    for line in sass.splitlines():
        named = re.match(r"\s*arch = sm_(\w+)", line)
        if named:
            architecture = named[1]
        instruction = re.search(r"\b(UTCOMMA\S*|OMMA\.SF\S*|F2FP\S*E2M1\S*)", line)
        if instruction:
            found.setdefault(architecture, Counter())[instruction[1]] += 1
    expected = {
        "sm100": ("UTCOMMA", "UTCOMMA.4X", "F2FP"),
        "sm120": ("OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X", "OMMA.SF.16864.F32.E2M1.E2M1.E8", "F2FP"),
    }
    for name in (a for a in BUILT if a[-1] in "af"):
        family = "sm120" if name.startswith("12") else "sm100"
        for instruction in expected[family]:
            assert any(seen.startswith(instruction) for seen in found[name]), (name, instruction, found[name])


@needs_library
def test_registers_do_not_spill() -> None:
    """No kernel keeps anything in local memory: no stack frame, and no instruction that reads or writes one."""
    kernels = 0
    name = ""
    for line in dump("--dump-resource-usage").splitlines():
        named = re.match(r"\s*Function (\S+):", line)
        if named:
            name = named[1]
        used = re.search(r"REG:\d+ STACK:(\d+) .*LOCAL:(\d+)", line)
        if used:
            kernels += 1
            assert used.groups() == ("0", "0"), name
    assert kernels > 20
    assert re.findall(r"^.*\b(?:LDL|STL)\b.*$", dump("-sass"), re.M) == []
