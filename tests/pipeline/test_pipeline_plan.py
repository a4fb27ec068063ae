"""What is decided about layers from names, shapes and schemes alone: plans made by hand."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace

import pytest
import torch

from fp4.checkpoint import CODECS, LayerScheme
from fp4.numerics.formats import FP8, MXFP4, NVFP4
from fp4.numerics.rotation import hadamard
from fp4.pipeline.plan import KeptLayer, LayerPlan, PlannedLayer, _groups, rotated, ruled, stored_as
from fp4.pipeline.report import build_report, layer_row
from fp4.pipeline.storage import choose_format, empty_weight, rotation_of, scheme_in_file
from fp4.quality.layer_statistics import LayerStatistics
from fp4.scheme import SCHEMES


def layer(name: str, preset: str, columns: int = 128) -> PlannedLayer:
    key = f"{name}.weight"
    return PlannedLayer(name, preset, SCHEMES[preset].scheme, 3, (64, columns), name, key, (key,))


def plan_of(*layers: PlannedLayer) -> LayerPlan:
    named = {one.name: one for one in layers}
    return LayerPlan(named, [KeptLayer("lm_head", (8, 8), "output embedding")], groups=_groups(named))


PLAN = plan_of(
    layer("a.q_proj", "nvfp4"),
    layer("a.k_proj", "nvfp4"),
    layer("a.v_proj", "nvfp4a16"),
    layer("a.o_proj", "fp8_dynamic"),
    layer("b.gate_proj", "mxfp4a16"),
    layer("b.up_proj", "mxfp4a16", 96),
    layer("b.down_proj", "mxfp4"),
)


def test_groups_are_fused_layers_of_one_scheme_with_a_global_scale() -> None:
    assert PLAN.groups == [["a.q_proj", "a.k_proj"]]
    found = plan_of(*(layer(f"x.{part}_proj", scheme) for part, scheme in zip("qkv", ["nvfp4"] * 3, strict=True)))
    assert found.groups == [["x.q_proj", "x.k_proj", "x.v_proj"]]
    found = plan_of(layer("x.w1", "nvfp4"), layer("x.w2", "nvfp4"), layer("y.w3", "nvfp4"))
    assert found.groups == []


def decisions(plan: LayerPlan) -> dict[str, tuple[str, int, str]]:
    return {
        name: (one.scheme.rotation, one.scheme.group_size, one.scheme.weight_rule) for name, one in plan.layers.items()
    }


UNROTATED = {name: ("identity", one.scheme.group_size, one.scheme.weight_rule) for name, one in PLAN.layers.items()}


def test_rotations_that_measured_best() -> None:
    """MXFP4 is rotated by 64 columns at a time, or as many as divide; not where rounding to nearest needs none."""
    size = UNROTATED["b.up_proj"][1]
    turned = UNROTATED | dict.fromkeys(("b.gate_proj", "b.down_proj"), ("hadamard", 64, "mse"))
    turned |= {"b.up_proj": ("hadamard", 32, "mse")}
    assert decisions(rotated(PLAN, "auto", False)) == turned
    assert decisions(rotated(PLAN, "none", False)) == UNROTATED
    nearest = dict.fromkeys(("b.gate_proj", "b.up_proj"), ("identity", size, "even"))
    assert decisions(rotated(PLAN, "auto", True)) == UNROTATED | nearest | {"b.down_proj": ("hadamard", 64, "mse")}
    assert decisions(rotated(PLAN, "none", True)) == UNROTATED | nearest
    assert rotated(PLAN, "auto", True).kept == PLAN.kept
    assert rotated(PLAN, "auto", True).groups == PLAN.groups


def test_a_rotation_by_name_turns_every_layer_of_four_bits_by_as_much_as_divides_it() -> None:
    turned = {name: ("gsr", 32, "mse") for name in PLAN.layers if name != "a.o_proj"}
    for nearest in (True, False):
        assert decisions(rotated(PLAN, "gsr32", nearest)) == UNROTATED | turned
    few = {name: ("hadamard", 32 if name == "b.up_proj" else 128, "mse") for name in turned}
    assert decisions(rotated(PLAN, "hadamard128", False)) == UNROTATED | few
    assert decisions(rotated(PLAN, "identity64", False)) == UNROTATED
    assert decisions(rotated(PLAN, "hadamard2", False))["a.q_proj"] == ("hadamard", 2, "mse")


@pytest.mark.parametrize("rotation", ["hadamard48", "hadamard1", "hadamard", "walsh64", "64", "", "hadamard0"])
def test_other_rotations_are_refused(rotation: str) -> None:
    with pytest.raises(ValueError, match=f"rotation is '{rotation}'; expected 'auto', 'none', or a name and a size"):
        rotated(PLAN, rotation, False)


def test_a_rule_is_for_the_formats_that_define_it() -> None:
    assert ruled(PLAN, None) is PLAN
    own = {name: UNROTATED[name][:2] for name in PLAN.layers}
    expected = {name: (*own[name], "four_over_six") for name in ("a.q_proj", "a.k_proj", "a.v_proj")}
    assert decisions(ruled(PLAN, "four_over_six")) == UNROTATED | expected
    everywhere = {name: (*own[name], "abs_max") for name in PLAN.layers}
    assert decisions(ruled(PLAN, "abs_max")) == everywhere
    with pytest.raises(ValueError, match="rule is 'quest'; expected one of abs_max, four_over_six, mse"):
        ruled(plan_of(layer("a.q_proj", "nvfp4")), "quest")


def test_a_digest_is_of_what_decides_about_the_layers() -> None:
    first = PLAN.digest(["a.k_proj"])
    assert first == PLAN.digest(["a.k_proj"]) != PLAN.digest(["a.q_proj"])

    def changed(name: str, **what: object) -> LayerPlan:
        return replace(PLAN, layers={**PLAN.layers, name: replace(PLAN.layers[name], **what)})

    scheme = replace(SCHEMES["nvfp4"].scheme, weight_rule="abs_max")
    for other in (
        changed("a.k_proj", scheme=scheme),
        changed("a.q_proj", scheme=scheme),  # of the same group
        changed("a.k_proj", stack="experts"),
        changed("a.k_proj", preset="nvfp4a16"),
        replace(PLAN, groups=[]),
    ):
        assert other.digest(["a.k_proj"]) != first
    for alike in (changed("a.v_proj", scheme=scheme), changed("a.q_proj", stack="experts"), replace(PLAN, kept=[])):
        assert alike.digest(["a.k_proj"]) == first


def test_a_format_of_experts_has_no_place_for_other_layers() -> None:
    assert stored_as(PLAN, CODECS["compressed-tensors"]) == PLAN
    with pytest.raises(ValueError, match="format mxfp4 holds only stacks of experts, and no expert is to be quantized"):
        stored_as(PLAN, CODECS["mxfp4"])


# --- where layers are stored


def test_the_format_is_the_first_that_holds_every_layer() -> None:
    q, mx, fp8 = layer("a.q_proj", "nvfp4a16"), layer("b.up_proj", "mxfp4a16"), layer("a.o_proj", "fp8_dynamic")
    assert choose_format(None, [q]) == choose_format(None, [q, mx, fp8]) == "compressed-tensors"
    turned = list(rotated(plan_of(q, mx), "hadamard64", False).layers.values())
    assert choose_format(None, turned) == "compressed-tensors"
    assert choose_format("modelopt", [q]) == "modelopt"
    assert choose_format("fp_quant", turned) == "fp_quant"
    for name in ("modelopt", "auto-round"):
        with pytest.raises(ValueError, match=f"{name} cannot hold a.q_proj: "):
            choose_format(name, turned)
    with pytest.raises(ValueError, match="auto-round has no place for fp8_dynamic; formats that have are "):
        choose_format("auto-round", [q, fp8])
    with pytest.raises(ValueError, match="no checkpoint format holds mxfp4a16, nvfp4a8 together"):
        choose_format(None, [mx, *rotated(plan_of(layer("c.q_proj", "nvfp4a8")), "hadamard64", False).layers.values()])


def test_schemes_in_files() -> None:
    for name, activations in (("nvfp4", "fp4"), ("nvfp4a16", "model"), ("nvfp4a8", "fp8"), ("fp8_dynamic", "fp8")):
        scheme = SCHEMES[name].scheme
        assert scheme_in_file(layer("a", name), None) == LayerScheme(scheme.format, activations)
    # 1/8, the entries' magnitude, is exact in bfloat16; for 32 columns it would not be, and the name says so.
    for size, name in ((64, "hadamard"), (32, "hadamard-bfloat16")):
        turned = rotated(plan_of(layer("a", "mxfp4a16")), f"hadamard{size}", False).layers["a"]
        rotation = rotation_of(turned)
        assert torch.equal(rotation, hadamard(size).bfloat16().float())
        assert scheme_in_file(turned, rotation) == LayerScheme(MXFP4, "model", name, size)
    assert rotation_of(layer("a", "mxfp4a16")) is None
    automatic = replace(layer("a", "nvfp4"), scheme=replace(SCHEMES["nvfp4"].scheme, activations="auto"))
    assert scheme_in_file(automatic, None).activations == "fp4"


def test_an_empty_weight_has_the_dtypes_and_shapes_of_its_format() -> None:
    codes, scales, global_scale, fmt = empty_weight(NVFP4, (3, 8, 64), torch.bfloat16)
    assert (codes.shape, codes.dtype, codes.is_meta) == ((3, 8, 32), torch.uint8, True)
    assert (scales.shape, scales.dtype, scales.is_meta) == ((3, 8, 4), torch.float8_e4m3fn, True)
    assert (float(global_scale), global_scale.dtype, fmt) == (1.0, torch.float64, NVFP4)
    codes, scales, global_scale, _ = empty_weight(FP8, (8, 64), torch.bfloat16)
    assert (codes.dtype, scales.dtype, scales.shape) == (torch.float8_e4m3fn, torch.bfloat16, (8, 1))
    assert global_scale is None


def test_a_row_of_the_report() -> None:
    statistics = LayerStatistics(weight_error=0.5, weight_snr_db=21.5, clipped=0.25, zero=0.125)
    row = layer_row(layer("a.q_proj", "nvfp4a16"), statistics, "gptq", 0.01, 1.23456)
    assert row == {
        "name": "a.q_proj",
        "block": 3,
        "scheme": "nvfp4a16",
        "shape": [64, 128],
        "bits_per_weight": 4.5,
        "rotation": None,
        "output_error": 0.01,
        "weight_snr_db": 21.5,
        "clipped": 0.25,
        "zero": 0.125,
        "scale_rule": "gptq",
        "seconds": 1.2346,
    }
    turned = rotated(plan_of(layer("a", "mxfp4a16")), "hadamard32", False).layers["a"]
    assert layer_row(turned, statistics, "mse", None, 0)["rotation"] == "hadamard32"


def test_the_whole_report() -> None:
    found = build_report({"source": "x"}, [{"name": "a"}], ({"name": "b"},), seconds=2.5)
    versions = found.pop("versions")
    assert versions["torch"] == importlib.metadata.version("torch")
    assert found == {"version": 1, "source": "x", "seconds": 2.5, "layers": [{"name": "a"}], "kept": [{"name": "b"}]}
