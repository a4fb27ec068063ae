"""Other libraries' weight-only FP4 kernels for GPUs, where they are installed: vLLM's Marlin and gemlite.

Each gets random weights of its own making: only its time is compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

#: Multiplies x [M, K] by one of its weights, chosen by a running number.
Product = Callable[[Tensor, int], Tensor]


def marlin(n: int, k: int, fmt: str, copies: int, device: torch.device) -> Product:
    """vLLM's Marlin. Raises ImportError where vLLM is absent or has it elsewhere."""
    from vllm.model_executor.layers.quantization.utils import marlin_utils_fp4
    from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_make_workspace_new

    like = torch.randn(n, k, device=device, dtype=torch.bfloat16)
    made: tuple[Any, ...]
    if fmt == "nvfp4":
        made = marlin_utils_fp4.rand_marlin_weight_nvfp4_like(like, 16)
    else:
        made = (*marlin_utils_fp4.rand_marlin_weight_mxfp4_like(like, 32), None)
    weights = [tuple(None if t is None else t.clone() for t in made[1:]) for _ in range(copies)]
    workspace = marlin_make_workspace_new(device)

    def multiply(x: Tensor, i: int) -> Tensor:
        out: Tensor = marlin_utils_fp4.apply_fp4_marlin_linear(x, *weights[i % copies], workspace, n, k)
        return out

    return multiply


def gemlite(n: int, k: int, fmt: str, copies: int, device: torch.device) -> Product:
    """gemlite's MXFP4. Raises ImportError where gemlite is absent or has no such kernel."""
    from gemlite.helper import A16W4_MXFP

    if fmt != "mxfp4":
        raise ImportError("gemlite has no weight-only NVFP4")
    dense = nn.Linear(k, n, bias=False, device=device, dtype=torch.bfloat16)
    layer = A16W4_MXFP(device=str(device), dtype=torch.bfloat16).from_linear(dense)
    layers = [layer, *(copy.deepcopy(layer) for _ in range(copies - 1))]

    def multiply(x: Tensor, i: int) -> Tensor:
        out: Tensor = layers[i % copies](x)
        return out

    return multiply


PEERS = {"marlin": marlin, "gemlite": gemlite}
