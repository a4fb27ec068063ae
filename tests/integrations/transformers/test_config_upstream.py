"""fp4.FPQuantConfig against Transformers' own: upstream's options mean what they mean upstream."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
from typing import Any

import pytest
import transformers
from transformers.quantizers.auto import AutoQuantizationConfig

from fp4 import FPQuantConfig
from fp4.numerics.formats import FORMATS, MXFP4
from fp4.scheme import Scheme

StockConfig = transformers.FPQuantConfig

# What FP-Quant's own export and Transformers 5.23 write into config.json.
HARNESS_MXFP4 = {
    "backward_dtype": "bf16",
    "forward_dtype": "mxfp4",
    "forward_method": "abs_max",
    "hadamard_group_size": 32,
    "modules_to_not_convert": ["lm_head"],
    "pseudoquantization": False,
    "quant_method": "fp_quant",
    "store_master_weights": False,
}
HARNESS_NVFP4 = {**HARNESS_MXFP4, "forward_dtype": "nvfp4", "hadamard_group_size": 16}
TRANSFORMERS_QUEST = {
    **HARNESS_MXFP4,
    "forward_method": "quest",
    "hadamard_group_size": 128,
    "modules_to_not_convert": ["lm_head", "model.layers.0"],
    "pseudoquantization": True,
    "transform_init": "gsr",
}

UPSTREAM_VALID = [
    {
        "forward_dtype": forward,
        "forward_method": method,
        "backward_dtype": backward,
        "store_master_weights": master,
        "hadamard_group_size": size,
        "pseudoquantization": pseudo,
        "transform_init": init,
    }
    for forward, methods, backwards, sizes in [
        ("nvfp4", ["abs_max"], ["bf16"], [None, 16, 32, 64, 128]),
        ("mxfp4", ["abs_max", "quest"], ["bf16", "mxfp8", "mxfp4"], [None, 32, 64, 128]),
    ]
    for method, backward, size in itertools.product(methods, backwards, sizes)
    for master, pseudo in itertools.product([False, True], repeat=2)
    for init in ["hadamard", "identity", "gsr"]
    # Gradients in 4 or 8 bits are not computed here, so training with them is refused.
    if not (master and backward != "bf16")
]


def scheme(config: FPQuantConfig, name: str = "model.layers.0.mlp.up_proj") -> Scheme:
    chosen = config.scheme_for(name)
    assert chosen is not None
    return chosen[0]


def expected_upstream_scheme(options: dict[str, Any]) -> Scheme:
    """What FP-Quant 0.3.2 computes: a fixed global scale of 3 (stored as reciprocal), none for QuEST."""
    fmt = FORMATS[options["forward_dtype"]]
    quest = options["forward_method"] == "quest"
    rule = "quest" if quest else ("below_six" if fmt == MXFP4 else "abs_max")
    return Scheme(
        format=fmt,
        weight_rule=rule,
        activations="fp4" if options["pseudoquantization"] else "auto",
        activation_rule=rule,
        rotation=options["transform_init"],
        group_size=options["hadamard_group_size"] or fmt.block_size,
        global_scale=None if quest else 1 / 3,
    )


def test_upstreams_valid_combinations_mean_what_they_mean_upstream() -> None:
    assert len(UPSTREAM_VALID) > 200
    for options in UPSTREAM_VALID:
        stock = StockConfig(**options)
        config = FPQuantConfig(**options)
        assert scheme(config) == expected_upstream_scheme(options)
        assert config.uses_static_scales
        for name in (*options, "quant_method"):
            assert getattr(config, name) == getattr(stock, name), name
        from_stock = FPQuantConfig.from_stock(stock)
        assert scheme(from_stock) == scheme(config)
        assert from_stock.modules_to_not_convert == ["lm_head"]
        read = FPQuantConfig.from_dict(json.loads(stock.to_json_string()))
        assert read.to_dict() == from_stock.to_dict()


def test_options_have_upstreams_names_order_and_defaults() -> None:
    upstream = [p for p in inspect.signature(StockConfig).parameters.values() if p.name != "kwargs"]
    ours = list(inspect.signature(FPQuantConfig).parameters.values())[: len(upstream)]
    assert [p.name for p in ours] == [p.name for p in upstream]
    # The one default that differs is left open for the best measured rotation.
    assert {p.name for p, q in zip(ours, upstream, strict=True) if p.default != q.default} == {"transform_init"}


def test_stock_defaults_keep_their_meaning() -> None:
    for forward in ("nvfp4", "mxfp4"):
        config = FPQuantConfig.from_stock(StockConfig(forward_dtype=forward))
        options = {"forward_dtype": forward, "forward_method": "abs_max", "pseudoquantization": False}
        options |= {"transform_init": "hadamard", "hadamard_group_size": None}
        assert scheme(config) == expected_upstream_scheme(options)


@pytest.mark.parametrize("written", [HARNESS_MXFP4, HARNESS_NVFP4, TRANSFORMERS_QUEST], ids=["mx", "nv", "quest"])
def test_config_json_written_by_upstream_is_read(written: dict[str, Any]) -> None:
    before = copy.deepcopy(written)
    for config in (FPQuantConfig.from_dict(written), AutoQuantizationConfig.from_dict(written)):
        assert isinstance(config, FPQuantConfig)
        assert scheme(config) == expected_upstream_scheme({"transform_init": "hadamard", **written})
        assert config.modules_to_not_convert == written["modules_to_not_convert"]
        assert config.uses_static_scales
    assert written == before


def test_naming_only_quest_asks_for_fp_quants_behaviour() -> None:
    options = {"forward_dtype": "mxfp4", "forward_method": "quest"}
    expected = {"transform_init": "hadamard", "hadamard_group_size": 32, "pseudoquantization": False}
    assert scheme(FPQuantConfig(**options)) == expected_upstream_scheme(options | expected)


@pytest.mark.parametrize("forward_dtype", FORMATS)
def test_naming_only_a_group_size_asks_for_a_rotation_of_that_size(forward_dtype: str) -> None:
    chosen = scheme(FPQuantConfig(forward_dtype=forward_dtype, hadamard_group_size=64))
    assert (chosen.rotation, chosen.group_size) == ("hadamard", 64)


def test_rotations_larger_than_upstream_allows() -> None:
    assert scheme(FPQuantConfig(transform_init="hadamard", hadamard_group_size=256)).group_size == 256


def test_everything_upstream_refuses_is_refused_except_larger_rotations() -> None:
    values: dict[str, list[Any]] = {
        "forward_dtype": ["nvfp4", "mxfp4", "mxfp8"],
        "forward_method": ["abs_max", "quest", "mse"],
        "backward_dtype": ["bf16", "mxfp8", "mxfp4", "fp32"],
        "hadamard_group_size": [None, 8, 16, 32, 48, 128],
        "transform_init": ["hadamard", "random"],
    }
    for combination in itertools.product(*values.values()):
        options = dict(zip(values, combination, strict=True))
        try:
            StockConfig(**options)
        except ValueError:
            with pytest.raises(ValueError, match=r"expected|needs|are not rotated"):
                FPQuantConfig(**options)
        else:
            FPQuantConfig(**options)


def test_what_fp4_writes_has_upstreams_names_in_it() -> None:
    written = FPQuantConfig().to_dict()
    assert written["quant_method"] == "fp_quant"
    assert set(StockConfig().to_dict()) <= set(written)
    options = {name: written[name] for name in StockConfig().to_dict() if name != "quant_method"}
    assert StockConfig(**options).forward_dtype == "nvfp4"


def test_from_dict_checks_what_it_is_given_beside_the_dictionary() -> None:
    assert FPQuantConfig.from_dict(HARNESS_NVFP4, activation_dtype="fp4").activation_dtype == "fp4"
    config, unused = FPQuantConfig.from_dict(HARNESS_NVFP4, return_unused_kwargs=True, backend="reference", other=1)
    assert (config.backend, unused) == ("reference", {"other": 1})
    with pytest.raises(ValueError, match=r"'nonsense'.*'nvfp4', 'mxfp4'"):
        FPQuantConfig.from_dict(HARNESS_NVFP4, forward_dtype="nonsense")
