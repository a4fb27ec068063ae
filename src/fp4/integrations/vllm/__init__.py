"""fp4's kernels for vLLM: on a CPU, every NVFP4 and MXFP4 checkpoint that vLLM reads runs packed.

Linear layers go through vLLM's public ``register_linear_kernel``. Two places have no such interface in vLLM 0.32, and
are filled by replacing a class that could not run on a CPU: the kernel of weight-only NVFP4, for which vLLM names
Marlin before it looks at the registered ones, and the experts of mixtures, whose kernels it lists in an enumeration.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.model_executor.kernels import linear as vllm_linear

from fp4.integrations.vllm.linear import Fp4MxFp4LinearKernel, Fp4NvFp4LinearKernel


@functools.cache
def register(platform: Any) -> None:
    """Register the kernels for a platform. Idempotent.

    Args:
        platform: a member of vLLM's ``PlatformEnum``.

    Raises:
        AttributeError: vLLM has no class of a name that is to be replaced.
    """
    vllm_linear.register_linear_kernel(Fp4NvFp4LinearKernel, platform, "nvfp4")
    vllm_linear.register_linear_kernel(Fp4MxFp4LinearKernel, platform, "mxfp4")
    if platform.name != "CPU":
        return
    _replace(vllm_linear, "MarlinNvFp4LinearKernel", Fp4NvFp4LinearKernel)

    from vllm.model_executor.layers.quantization import modelopt
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w4a4_mxfp4 as stored_mxfp4,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w4a4_nvfp4 as stored_nvfp4,
    )

    from fp4.integrations.vllm import experts

    _replace(stored_nvfp4, "CompressedTensorsW4A4Nvfp4MoEMethod", experts.CompressedTensorsNvFp4Experts)
    _replace(stored_mxfp4, "CompressedTensorsW4A4Mxfp4MoEMethod", experts.CompressedTensorsMxFp4Experts)
    _replace(modelopt, "ModelOptNvFp4FusedMoE", experts.ModelOptNvFp4Experts)
    modelopt.ModelOptNvFp4Config.FusedMoEMethodCls = experts.ModelOptNvFp4Experts


def _replace(module: Any, name: str, by: type) -> None:
    getattr(module, name)  # says which name is missing, where vLLM has changed
    setattr(module, name, by)
