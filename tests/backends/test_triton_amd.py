"""The Triton kernels compile for AMD's GPUs, none of which has run them; in a process whose torch says it is ROCm's."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fp4 import backends
from fp4.backends import triton as backend_module
from fp4.numerics.formats import NVFP4
from fp4.scheme import Scheme

ROOT = Path(__file__).parents[2]
COMPILE = """
import sys, torch
torch.version.hip = "7.0"  # before fp4 is imported, whose kernels then use no assembly of NVIDIA's
sys.path[:0] = {paths!r}
from triton import compile
from triton.backends.compiler import GPUTarget
import test_triton_compile as nvidia
from fp4.backends.triton.linear import TILINGS

def compiled(kernel, architecture, types, constants, tiling):
    aligned = [i for i, name in enumerate(kernel.arg_names) if types[name].startswith("*") or name in nvidia.ALIGNED]
    source = nvidia.ASTSource(kernel, types, constants, {{(i,): [["tt.divisibility", 16]] for i in aligned}})
    target = GPUTarget("hip", architecture, 32 if architecture.startswith("gfx11") else 64)
    return compile(source, target=target, options={{"num_warps": tiling.num_warps, "num_stages": 2}})

nvidia.compiled = compiled
for rows in (1, 64):
    for mx in (False, True):
        code = nvidia.compile_multiply({architecture!r}, "bf16", mx, TILINGS[rows]).asm["amdgcn"]
        assert rows == 1 or {instruction!r} in code
nvidia.compile_quantize({architecture!r}, False, "mse", nvidia.CANONICAL.value, 0, False)
nvidia.compile_quantize({architecture!r}, True, "even", nvidia.VALUES.value, 32, False)
constants = {{"MX": False, "CHUNKS": 4}}
types = dict.fromkeys(nvidia.decode_panels.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
types |= {{"weight": "*u32", "weight_scale": "*u8", "unit": "*fp64", "out": "*bf16"}}
compiled(nvidia.decode_panels, {architecture!r}, types, constants, nvidia.ANY)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="Triton is not installed, or is set to interpret",
)
@pytest.mark.parametrize(("architecture", "instruction"), [("gfx942", "mfma"), ("gfx950", "mfma"), ("gfx1100", "wmma")])
def test_products_compile(architecture: str, instruction: str) -> None:
    assert architecture in backend_module.AMD
    paths = [str(ROOT / "tests" / "backends"), str(ROOT / "tests" / "helpers")]
    code = COMPILE.format(paths=paths, architecture=architecture, instruction=instruction)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(("name", "refusal"), [("gfx942:sramecc+:xnack-", None), ("gfx1201", "this GPU is gfx1201")])
def test_gpus_that_the_kernels_were_compiled_for(
    name: str, refusal: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=name))
    found = backends.named("triton").refuses(Scheme(NVFP4, activations="model"), torch.device("cuda"), (64, 64))
    assert found is None if refusal is None else refusal in str(found)
