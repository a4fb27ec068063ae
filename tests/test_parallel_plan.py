"""Every tensor of a packed weight has its place in Transformers' tensor- and expert-parallel plans."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from moe import make_moe

from fp4 import FPQuantConfig
from fp4.nn import FP4Experts, PackedWeight

parallel_utils = pytest.importorskip("transformers.distributed.parallel_utils")


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_every_tensor_of_a_packed_weight_is_in_both_plans(family: str, tmp_path: Path) -> None:
    make_moe(family).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=FPQuantConfig())

    def style(name: str, plan: dict[str, str]) -> str | None:
        found: str | None = parallel_utils._get_parameter_plan(name, plan)
        return found

    for name, module in model.named_modules():
        if not isinstance(module, PackedWeight) or not isinstance(
            model.get_submodule(name.rpartition(".")[0]), FP4Experts
        ):
            continue
        matrix = {"gate_up_proj": "packed_colwise", "down_proj": "rowwise"}[name.rpartition(".")[2]]
        for key, parameter in module.named_parameters():
            expected = matrix if key in ("weight", "weight_scale") else "replicate"
            assert style(f"{name}.{key}", model.tp_plan) == expected
            assert style(f"{name}.{key}", model.ep_plan) == "grouped_gemm"
            assert parameter.shape[0] == 8  # which is what expert parallelism splits
    linear = "model.layers.1.self_attn.o_proj"
    assert style(f"{linear}.weight_scale", model.tp_plan) == "rowwise"
    assert style(f"{linear}.global_scale", model.tp_plan) == "replicate"
    first = "model.layers.1.mlp.experts.gate_proj"
    assert style(f"{first}.weight", model.tp_plan) == "colwise"
    assert style(f"{first}.global_scale", model.ep_plan) == "grouped_gemm"
