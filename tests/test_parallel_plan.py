"""Every tensor of a packed weight has its place in Transformers' tensor- and expert-parallel plans."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from moe import make_moe

from fp4 import FPQuantConfig
from fp4.nn import FP4Experts, PackedWeight
from fp4.nn.rank_share import Split
from fp4.numerics.formats import NVFP4
from fp4.scheme import Scheme

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


def test_shares_by_hand() -> None:
    """Four experts of four rows and four columns of codes; each code says expert, row and column."""
    codes = torch.tensor([[[100 * e + 10 * n + k for k in range(4)] for n in range(4)] for e in range(2)]).to(
        torch.int16
    )
    scales, units = codes[..., :2] + 1000, torch.tensor([0.5, 0.25])
    whole = {"weight": codes, "weight_scale": scales, "global_scale": units, "input_global_scale": units * 2}
    rows = {(1, 0): [0, 1], (1, 1): [2, 3], (2, 0): [0, 2], (2, 1): [1, 3]}  # parts, rank: gate's rows before up's
    for (parts, rank), chosen in rows.items():
        found = Split("rows", rank, 2, parts).of(whole)
        assert found["weight"].tolist() == codes[:, chosen].tolist()
        assert found["weight_scale"].tolist() == scales[:, chosen].tolist()
        assert found["global_scale"].tolist() == [0.5, 0.25]
        assert Split("rows", rank, 2, parts).shape((2, 4, 32), 16, "w") == (2, 2, 32)
    for rank, columns in enumerate(([0, 1], [2, 3])):
        found = Split("columns", rank, 2).of(whole)
        assert found["weight"].tolist() == codes[..., columns].tolist()
        assert found["weight_scale"].tolist() == scales[..., [rank]].tolist()
        assert found["input_global_scale"].tolist() == [1.0, 0.5]
        assert Split("columns", rank, 2).shape((2, 4, 32), 16, "w") == (2, 4, 16)
        found = Split("experts", rank, 2).of(whole)
        assert found["weight"].tolist() == codes[[rank]].tolist()
        assert found["global_scale"].tolist() == [(0.5, 0.25)[rank]]
        assert found["input_global_scale"].tolist() == [(1.0, 0.5)[rank]]
        assert Split("experts", rank, 2).shape((2, 4, 32), 16, "w") == (1, 4, 32)
    for split in (Split("rows", 0, 2, 2), Split("columns", 0, 2), Split("experts", 0, 2)):
        with pytest.raises(ValueError, match=r"w: its \d+ (rows|columns|experts) cannot be shared out to 2 ranks"):
            split.shape((3, 6, 48), 16, "w")


@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_gate_and_up_apart_are_each_shared_out_whole(family: str) -> None:
    """Together their rows are shared out in two parts, apart as one matrix each."""
    experts = next(module for module in make_moe(family).modules() if type(module).__name__.endswith("Experts"))
    scheme = {name: (Scheme(NVFP4, activations="model"), "auto") for name in ("gate_up_proj", "down_proj")}
    module = FP4Experts(experts, scheme)
    module.splits["gate_up_proj"] = Split("rows", 1, 2, 2)
    assert module.split_of("gate_up_proj") == Split("rows", 1, 2, 2)
    assert module.split_of("gate_proj") == module.split_of("up_proj") == Split("rows", 1, 2, 1)
    assert module.split_of("down_proj") is None
    assert [packed.out_features for packed in module.place_parts()] == [32, 32]
