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
from fp4.numerics.formats import FP8, NVFP4, QuantizedTensor
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
        module, _, own_name = name.rpartition(".")
        projection, own = {
            "packed_gate_up": ("gate_up_proj", "fp4_rows_of_two"),
            "packed_down": ("down_proj", "fp4_columns"),
        }[own_name]
        # While the model is loaded, the projection is still a parameter.
        assert style(f"{module}.{projection}", model.tp_plan) == own
        assert style(f"{module}.{projection}", model.ep_plan) == "fp4_experts"
        for parameter in packed[name].parameters():
            assert parameter.shape[0] == 8  # which is what expert parallelism shares out
    for name in packed.keys() - experts:
        assert style(f"{name}.weight", model.tp_plan) == ("fp4_columns" if name.endswith("o_proj") else "fp4_rows")
    # Nothing is named that the model does not have while it is loaded: Transformers would warn of it.
    names = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
    names |= {f"{name}.weight" for name in packed.keys() - experts}
    names |= {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, FP4Experts)
        for part in module.layout.projections
    }
    generic = {parallel_utils.replace_layer_number_by_wildcard(name) for name in names}
    dense = type(model)._from_config(model.config).tp_plan
    assert {name for name in model.tp_plan if name not in generic} <= dense.keys()


def test_shares_by_hand() -> None:
    """Four experts of four rows and four columns of codes; each code says expert, row and column."""
    codes = torch.tensor([[[100 * e + 10 * n + k for k in range(4)] for n in range(4)] for e in range(2)]).to(
        torch.int16
    )
    units = torch.tensor([0.5, 0.25])
    whole = QuantizedTensor(codes, codes[..., :2] + 1000, units, NVFP4)
    rows = {(1, 0): [0, 1], (1, 1): [2, 3], (2, 0): [0, 2], (2, 1): [1, 3]}  # parts, rank: gate's rows before up's
    for (parts, rank), chosen in rows.items():
        split = Split("rows", rank, 2, parts)
        found = split.of(whole)
        assert found.codes.tolist() == codes[:, chosen].tolist()
        assert found.scales.tolist() == whole.scales[:, chosen].tolist()
        assert found.global_scale.tolist() == split.of_experts(units).tolist() == [0.5, 0.25]
        assert split.shape((2, 4, 32), 16, "w") == (2, 2, 32)
    for rank, columns in enumerate(([0, 1], [2, 3])):
        split = Split("columns", rank, 2)
        found = split.of(whole)
        assert found.codes.tolist() == codes[..., columns].tolist()
        assert found.scales.tolist() == whole.scales[..., [rank]].tolist()
        assert split.of_experts(units).tolist() == [0.5, 0.25]
        assert split.of(whole._replace(scales=codes[..., :1], format=FP8)).scales.shape == (2, 4, 1)
        assert split.shape((2, 4, 32), 16, "w") == (2, 4, 16)
        split = Split("experts", rank, 2)
        found = split.of(whole)
        assert found.codes.tolist() == codes[[rank]].tolist()
        assert found.global_scale.tolist() == split.of_experts(units).tolist() == [(0.5, 0.25)[rank]]
        assert split.shape((2, 4, 32), 16, "w") == (1, 4, 32)
    for split in (Split("rows", 0, 2, 2), Split("columns", 0, 2), Split("experts", 0, 2)):
        with pytest.raises(ValueError, match=r"w: its \d+ (rows|columns|experts) cannot be shared out to 2 ranks"):
            split.shape((3, 6, 48), 16, "w")
    with pytest.raises(ValueError, match=r"w: its 192 rows cannot be shared out to 2 ranks, in multiples of 128"):
        Split("rows", 0, 2).shape((192, 128), 128, "w", block_rows=128)


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
    assert [packed.shape[-2] for packed in module.place_parts()] == [32, 32]
