"""fp4.FPQuantConfig: fp4's own options, JSON, and every refusal."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers.quantizers.auto import AutoQuantizationConfig

from fp4 import FPQuantConfig
from fp4.config import _OVERRIDABLE
from fp4.numerics.formats import FORMATS, MXFP4, NVFP4
from fp4.scheme import SCHEMES, Scheme


def scheme(config: FPQuantConfig, name: str = "model.layers.0.mlp.up_proj") -> Scheme:
    chosen = config.scheme_for(name)
    assert chosen is not None
    return chosen[0]


# --- schemes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_is_format_and_activations_by_one_name(name: str) -> None:
    preset = SCHEMES[name].scheme
    config = FPQuantConfig(scheme=name)
    chosen = scheme(config)
    assert chosen.format.family == preset.format.family
    assert chosen.input_format is preset.input_format
    native = preset.activations != "model" and preset.input_format is preset.format
    assert chosen.activations == ("auto" if native else preset.activations)
    again = FPQuantConfig.from_dict(config.to_dict())
    assert scheme(again) == chosen
    assert "scheme" not in config.to_dict()


def test_a_scheme_is_not_contradicted() -> None:
    with pytest.raises(ValueError, match=r"scheme is 'fp9'; expected one of 'nvfp4', .*'fp8_dynamic'"):
        FPQuantConfig(scheme="fp9")
    with pytest.raises(ValueError, match="scheme 'mxfp4' means activation_dtype 'auto', but 'model' is given"):
        FPQuantConfig(scheme="mxfp4", activation_dtype="model")
    with pytest.raises(ValueError, match="scheme 'nvfp4a16' means forward_dtype 'nvfp4', but 'mxfp4' is given"):
        FPQuantConfig("mxfp4", scheme="nvfp4a16")
    with pytest.raises(ValueError, match="sets both scheme and forward_dtype"):
        FPQuantConfig(overrides={"a": {"scheme": "mxfp4", "forward_dtype": "nvfp4"}})
    assert FPQuantConfig("mxfp4", scheme="mxfp4").forward_dtype == "mxfp4"


@pytest.mark.parametrize("base", SCHEMES)
@pytest.mark.parametrize("name", SCHEMES)
def test_layers_may_have_another_scheme(base: str, name: str) -> None:
    config = FPQuantConfig(scheme=base, overrides={"*.mamba.*": {"scheme": name}, "*.gate": None})
    for again in (config, FPQuantConfig.from_dict(config.to_dict())):
        chosen = again.scheme_for("model.layers.0.mamba.in_proj")
        assert chosen is not None
        assert chosen[0] == scheme(FPQuantConfig(scheme=name))
        assert scheme(again) == scheme(FPQuantConfig(scheme=base))
        assert again.scheme_for("model.gate") is None


def test_weights_alone_have_another_best_than_w4a4() -> None:
    for config in (FPQuantConfig(scheme="mxfp4a16"), FPQuantConfig("mxfp4", activation_dtype="model")):
        assert (scheme(config).rotation, scheme(config).weight_rule) == ("identity", "even")
    assert (scheme(FPQuantConfig("mxfp4")).rotation, scheme(FPQuantConfig("mxfp4")).weight_rule) == ("hadamard", "mse")
    overrides = {"a": {"scheme": "mxfp4a16"}, "b": {"activation_dtype": "model"}}
    left_open, chosen = (
        FPQuantConfig("mxfp4", overrides=overrides),
        FPQuantConfig("mxfp4", scale_rule="ceil", overrides=overrides),
    )
    for config in (left_open, chosen):
        # The choice is made when the checkpoint is written, not by whoever loads it for other activations.
        again = FPQuantConfig.from_dict(config.to_dict() | {"activation_dtype": "model"})
        for name in ("a", "b", "c"):
            assert replace(scheme(again, name), activations="model") == replace(
                scheme(config, name), activations="model"
            )
    assert (scheme(left_open, "a").rotation, scheme(left_open, "a").weight_rule) == ("identity", "even")
    assert (scheme(chosen, "a").rotation, scheme(chosen, "a").weight_rule) == ("hadamard", "ceil")
    assert scheme(left_open, "b").rotation == scheme(chosen, "b").rotation == "hadamard"


def test_pseudoquantization_emulates_the_scheme() -> None:
    assert scheme(FPQuantConfig(scheme="nvfp4", pseudoquantization=True)).activations == "fp4"
    assert scheme(FPQuantConfig(scheme="nvfp4a8", pseudoquantization=True)).activations == "fp8"
    config = FPQuantConfig("nvfp4", activation_dtype="fp4", overrides={"a": {"forward_dtype": "fp8"}})
    chosen = config.scheme_for("a")
    assert chosen is not None
    assert chosen[0].activations == "fp8"


# --- fp4's own options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forward_dtype", FORMATS)
def test_defaults_are_complete_and_need_no_calibration(forward_dtype: str) -> None:
    config = FPQuantConfig(forward_dtype=forward_dtype)
    chosen = scheme(config)
    assert chosen.format is FORMATS[forward_dtype]
    assert chosen.weight_rule in chosen.format.rules
    assert chosen.activation_rule in set(chosen.format.rules) - {"mse"}
    assert chosen.activations == "auto"
    assert chosen.global_scale is None
    assert not config.uses_static_scales
    assert config.scheme_for("lm_head") is not None, "which layers are kept is not decided by name here"


@pytest.mark.parametrize(("fmt", "rule"), [(f, r) for f in FORMATS.values() for r in f.rules], ids=str)
def test_every_rule_of_a_format_can_be_named(fmt: Any, rule: str) -> None:
    config = FPQuantConfig(forward_dtype=fmt.name, scale_rule=rule)
    assert scheme(config).weight_rule == rule
    assert scheme(config).global_scale is None
    if rule != "mse":
        assert scheme(FPQuantConfig(forward_dtype=fmt.name, activation_rule=rule)).activation_rule == rule


def test_a_rule_beside_a_rotation_is_taken_instead_of_fp_quants() -> None:
    chosen = scheme(FPQuantConfig(transform_init="hadamard", scale_rule="mse"))
    assert (chosen.rotation, chosen.weight_rule, chosen.global_scale) == ("hadamard", "mse", None)


@pytest.mark.parametrize("activation_dtype", ["auto", "fp4", "model"])
@pytest.mark.parametrize("backend", ["auto", "reference", "cpu", "triton", "cutlass"])
def test_activation_dtype_and_backend_reach_the_layer(activation_dtype: str, backend: str) -> None:
    chosen = FPQuantConfig(activation_dtype=activation_dtype, backend=backend).scheme_for("any")
    assert chosen is not None
    assert (chosen[0].activations, chosen[1]) == (activation_dtype, backend)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("activation_dtype", ["auto", "fp4"])
def test_pseudoquantization_is_w4a4_on_the_reference_backend(backend: str, activation_dtype: str) -> None:
    config = FPQuantConfig(pseudoquantization=True, backend=backend, activation_dtype=activation_dtype)
    chosen = config.scheme_for("any")
    assert chosen is not None
    assert (chosen[0].activations, chosen[1]) == ("fp4", "reference")


# --- overrides -------------------------------------------------------------------------------------------------------


def test_overrides_change_the_layers_that_fit_their_pattern() -> None:
    config = FPQuantConfig(
        overrides={
            "*.down_proj": {"forward_dtype": "mxfp4", "scale_rule": "even"},
            "model.layers.0.*": None,
            "*.layers.1.*": {"activation_dtype": "model", "backend": "reference"},
            "*.q_proj": {"transform_init": "hadamard", "hadamard_group_size": 32},
        }
    )
    base = scheme(config, "model.layers.5.mlp.up_proj")
    down = scheme(config, "model.layers.0.mlp.down_proj")
    assert (down.format, down.weight_rule) == (MXFP4, "even"), "the first pattern that fits wins"
    assert config.scheme_for("model.layers.0.mlp.up_proj") is None
    second = config.scheme_for("model.layers.1.self_attn.q_proj")
    assert second is not None
    assert (second[0].activations, second[1], second[0].rotation) == ("model", "reference", base.rotation)
    query = scheme(config, "model.layers.5.self_attn.q_proj")
    assert (query.rotation, query.group_size, query.weight_rule) == ("hadamard", 32, base.weight_rule)
    assert scheme(config, "model.layers.5.down_proj_adapter") == base, "a pattern describes a name to its end or a dot"


def test_an_override_keeps_what_it_does_not_name() -> None:
    config = FPQuantConfig(
        forward_dtype="mxfp4",
        scale_rule="ceil",
        activation_rule="even",
        activation_dtype="fp4",
        overrides={"a": {"transform_init": "gsr"}, "b": {"forward_dtype": "nvfp4"}},
    )
    changed = scheme(config, "a")
    assert (changed.rotation, changed.weight_rule, changed.activation_rule) == ("gsr", "ceil", "even")
    other = scheme(config, "b")
    assert other == scheme(FPQuantConfig(forward_dtype="nvfp4", activation_dtype="fp4"))


def test_an_override_of_the_format_stays_with_fp_quant_where_that_was_asked_for() -> None:
    config = FPQuantConfig(transform_init="hadamard", overrides={"a": {"forward_dtype": "mxfp4"}})
    assert scheme(config, "a") == scheme(FPQuantConfig(forward_dtype="mxfp4", transform_init="hadamard"))


def test_pseudoquantization_covers_overridden_layers() -> None:
    config = FPQuantConfig(pseudoquantization=True, overrides={"a": {"scale_rule": "abs_max"}})
    assert config.scheme_for("a") == (scheme(config, "a"), "reference")
    assert scheme(config, "a").activations == "fp4"


# --- JSON ------------------------------------------------------------------------------------------------------------

ROUND_TRIPS = [
    {},
    {"forward_dtype": "mxfp4"},
    {"transform_init": "hadamard"},
    {"forward_dtype": "mxfp4", "transform_init": "gsr", "hadamard_group_size": 128},
    {"forward_dtype": "mxfp4", "forward_method": "quest", "backward_dtype": "mxfp8"},
    {"scale_rule": "four_over_six", "activation_rule": "four_over_six", "activation_dtype": "fp4"},
    {"scale_rule": "fp_quant", "activation_scaling": "dynamic"},
    {"modules_to_not_convert": [], "strict": True, "backend": "cpu"},
    {"modules_to_not_convert": ["lm_head", "router"], "store_master_weights": True},
    {"pseudoquantization": True},
    {"overrides": {"*.down_proj": {"forward_dtype": "mxfp4"}, "*.0.*": None, "x": {"scale_rule": "abs_max"}}},
]


@pytest.mark.parametrize("options", ROUND_TRIPS, ids=lambda options: ",".join(options) or "default")
def test_json_round_trip(options: dict[str, Any], tmp_path: Path) -> None:
    config = FPQuantConfig(**options)
    text = config.to_json_string()
    config.to_json_file(tmp_path / "config.json")
    assert (tmp_path / "config.json").read_text() == text
    for again in (FPQuantConfig.from_dict(json.loads(text)), AutoQuantizationConfig.from_dict(json.loads(text))):
        assert again.to_dict() == config.to_dict()
        assert again.to_json_string() == text
        for name in ("a", "x", "model.layers.0.mlp.down_proj"):
            assert again.scheme_for(name) == config.scheme_for(name)


def test_checking_twice_changes_nothing() -> None:
    for options in ROUND_TRIPS:
        config = FPQuantConfig(**options)
        before = config.to_dict()
        config.post_init()
        assert config.to_dict() == before


def test_loading_attributes_are_what_was_chosen_anew() -> None:
    assert FPQuantConfig().get_loading_attributes() == {}
    assert FPQuantConfig(activation_dtype="fp4").get_loading_attributes() == {"activation_dtype": "fp4"}
    assert FPQuantConfig(backend="reference", activation_dtype="model").get_loading_attributes() == {
        "activation_dtype": "model",
        "backend": "reference",
    }


# --- refusals --------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"forward_dtype": "int4"}, "forward_dtype.*'int4'.*'nvfp4', 'mxfp4'"),
    ({"forward_dtype": None}, "forward_dtype.*None.*'nvfp4', 'mxfp4'"),
    ({"forward_dtype": "NVFP4"}, "forward_dtype.*'NVFP4'.*'nvfp4', 'mxfp4'"),
    ({"forward_method": "quest"}, "forward_method.*nvfp4.*'quest'.*'abs_max'"),
    ({"forward_dtype": "mxfp4", "forward_method": "mse"}, "forward_method.*'mse'.*'abs_max', 'quest'"),
    ({"backward_dtype": "fp8"}, "backward_dtype.*'fp8'.*'bf16', 'mxfp8', 'mxfp4'"),
    ({"backward_dtype": "mxfp8"}, "backward_dtype 'mxfp8' needs forward_dtype 'mxfp4'.*'nvfp4'"),
    (
        {"forward_dtype": "mxfp4", "backward_dtype": "mxfp4", "store_master_weights": True},
        "backward_dtype.*'mxfp4'.*'bf16'",
    ),
    ({"store_master_weights": "yes"}, "store_master_weights.*'yes'.*True or False"),
    ({"pseudoquantization": 1}, "pseudoquantization.*1.*True or False"),
    ({"strict": None}, "strict.*None.*True or False"),
    ({"transform_init": "random"}, "transform_init.*'random'.*'hadamard', 'identity', 'gsr'"),
    ({"hadamard_group_size": 0}, "hadamard_group_size.*0.*power of two of at least 16"),
    ({"hadamard_group_size": 8}, "hadamard_group_size.*8.*power of two of at least 16"),
    ({"hadamard_group_size": 48}, "hadamard_group_size.*48.*power of two of at least 16"),
    ({"hadamard_group_size": -64}, "hadamard_group_size.*-64.*power of two of at least 16"),
    ({"hadamard_group_size": 32.0}, "hadamard_group_size.*32.0.*power of two"),
    ({"hadamard_group_size": "32"}, "hadamard_group_size.*'32'.*power of two"),
    ({"forward_dtype": "mxfp4", "hadamard_group_size": 16}, "hadamard_group_size.*16.*mxfp4.*at least 32"),
    ({"scale_rule": "even"}, "scale_rule.*nvfp4.*'even'.*'fp_quant', 'abs_max', 'mse', 'four_over_six'"),
    ({"scale_rule": ""}, "scale_rule.*''.*'abs_max'"),
    ({"forward_dtype": "mxfp4", "scale_rule": "four_over_six"}, "scale_rule.*mxfp4.*'abs_max', 'even', 'ceil'"),
    ({"activation_rule": "mse"}, "activation_rule.*'mse'.*'abs_max', 'four_over_six'"),
    ({"activation_rule": ""}, "activation_rule.*''.*'abs_max'"),
    ({"activation_scaling": "calibrated"}, "activation_scaling.*'calibrated'.*'dynamic', 'static'"),
    ({"activation_dtype": "bf16"}, "activation_dtype.*'bf16'.*'auto', 'fp4', 'fp8', 'model'"),
    ({"pseudoquantization": True, "activation_dtype": "model"}, "pseudoquantization.*activation_dtype is 'model'"),
    ({"pseudoquantization": True, "backend": "cpu"}, "pseudoquantization.*backend is 'cpu'.*'auto' or 'reference'"),
    ({"backend": "gpu"}, "backend.*'gpu'.*'auto', 'reference', 'cpu', 'triton', 'cutlass'"),
    ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert.*'lm_head'.*list"),
    ({"modules_to_not_convert": [1]}, r"modules_to_not_convert.*\[1\].*list"),
    ({"modules_to_not_convert": ["mlp("]}, r"has 'mlp\(', which is no name, no glob and no regular expression"),
    ({"overrides": ["a"]}, r"overrides.*\['a'\].*dictionary"),
    ({"overrides": {"a": "mxfp4"}}, r"overrides\['a'\].*'mxfp4'.*dictionary"),
    ({"overrides": {"a": {"bits": 4}}}, r"overrides\['a'\] sets bits.*forward_dtype.*scale_rule"),
    ({"overrides": {"a": {"overrides": {}}}}, r"overrides\['a'\] sets overrides.*forward_dtype"),
    ({"overrides": {"a": {"pseudoquantization": True}}}, r"overrides\['a'\] sets pseudoquantization"),
    ({"overrides": {"a": {"forward_dtype": "int4"}}}, "forward_dtype.*'int4'.*'nvfp4', 'mxfp4'"),
    ({"overrides": {"a": {"scale_rule": "even"}}}, "scale_rule.*nvfp4.*'even'"),
    ({"pseudoquantization": True, "overrides": {"a": {"backend": "cpu"}}}, "pseudoquantization.*'cpu'"),
    ({"quant_method": "mxfp4"}, "quant_method.*'mxfp4'.*fp_quant"),
    ({"overrides": ""}, "overrides is ''; expected a dictionary"),
    ({"overrides": 0}, "overrides is 0; expected a dictionary"),
    ({"overrides": False}, "overrides is False; expected a dictionary"),
    ({"forward_dtype": "fp8", "activation_dtype": "fp4"}, r"\(beside FP8 weights\) is 'fp4'.*'auto', 'fp8', 'model'"),
    ({"forward_dtype": "fp8", "transform_init": "hadamard"}, "FP8 weights are not rotated.*'hadamard'"),
    ({"forward_dtype": "fp8", "hadamard_group_size": 16}, "FP8 weights are not rotated.* 16"),
    ({"forward_dtype": "fp8", "scale_rule": "mse"}, r"scale_rule \(of fp8\).*'mse'.*'abs_max'"),
    ({"forward_dtype": "fp8", "scale_rule": "fp_quant"}, r"scale_rule \(of fp8\).*'fp_quant'.*'abs_max'"),
    ({"forward_dtype": "fp8", "store_master_weights": True}, "training quantizes to FP4"),
    ({"store_master_weights": True, "overrides": {"a": {"forward_dtype": "fp8"}}}, "training quantizes to FP4"),
    ({"activation_dtype": "fp8", "activation_scaling": "static"}, r"activation_scaling \(of FP8 .*'static'.*'dynamic'"),
    ({"transform": "hadamard"}, "has no option transform; it has forward_dtype, .*transform_init"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_what_has_no_meaning_is_refused_with_what_is_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FPQuantConfig(**options)
    with pytest.raises(ValueError, match=message):
        FPQuantConfig.from_dict({"scale_rule": None, **options})


def test_overridable_options_are_options() -> None:
    assert set(_OVERRIDABLE) <= set(inspect.signature(FPQuantConfig).parameters)
    for name in _OVERRIDABLE:
        value = getattr(FPQuantConfig(), name) if name != "scheme" else "mxfp4"
        assert FPQuantConfig(overrides={"a": {name: value}}).scheme_for("a") is not None


def test_nvfp4_is_the_default_format() -> None:
    assert scheme(FPQuantConfig()).format == NVFP4


def test_formats_that_engines_serve_are_not_rotated_unless_that_is_asked_for() -> None:
    def rotation(**options: str) -> str | None:
        return FPQuantConfig("mxfp4", **options).transform_init

    assert rotation() == rotation(checkpoint_format="fp_quant") == "hadamard"
    assert rotation(checkpoint_format="compressed-tensors") == rotation(checkpoint_format="modelopt") == "identity"
    assert rotation(checkpoint_format="compressed-tensors", transform_init="hadamard") == "hadamard"
