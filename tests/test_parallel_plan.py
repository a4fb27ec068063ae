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

    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)}
    experts = {name for name in packed if isinstance(model.get_submodule(name.rpartition(".")[0]), FP4Experts)}
    for name in experts:
        own = {"gate_up_proj": "fp4_rows_of_two", "down_proj": "fp4_columns"}[name.rpartition(".")[2]]
        for key, parameter in packed[name].named_parameters():
            assert style(f"{name}.{key}", model.tp_plan) == own
            assert style(f"{name}.{key}", model.ep_plan) == "fp4_experts"
            assert parameter.shape[0] == 8  # which is what expert parallelism shares out
    for name in packed.keys() - experts:
        own = "fp4_columns" if name.endswith("o_proj") else "fp4_rows"
        for key, _ in packed[name].named_parameters():
            assert style(f"{name}.{key}", model.tp_plan) == (own if key == "weight" else "replicate")
    # Nothing is named that the model does not have: Transformers would warn of it.
    names = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
    generic = {parallel_utils.replace_layer_number_by_wildcard(name) for name in names}
    dense = type(model)._from_config(model.config).tp_plan
    assert {name for name in model.tp_plan if name not in generic} <= dense.keys()
