"""A quantization_config with junk in it is understood or refused, never half-understood."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fp4 import FPQuantConfig
from fp4.checkpoint import codec_for
from fp4.checkpoint.io.headers import Checkpoint
from fp4.integrations.transformers.prequantized import takes_over

JUNK: list[Any] = [None, True, -1, 3, 1e300, "", "x", "re:(", "Linear", [], [3], [[]], {}, {"x": 3}, {"weights": [{}]}]
CONFIGURED = [
    "llmcompressor-NVFP4",
    "llmcompressor-FP8_DYNAMIC",
    "modelopt-NVFP4",
    "modelopt-W4A8_NVFP4_FP8",
    "autoround-NVFP4-autoroundfmt",
    "fpquant-nvfp",
]


def with_junk(content: Any, rng: random.Random) -> Any:
    """``content`` with something in it, or beside it, replaced."""
    if not isinstance(content, (dict, list)) or not content or rng.random() < 0.2:
        return copy.deepcopy(rng.choice(JUNK))
    changed = copy.copy(content)
    key = rng.choice(sorted(content)) if isinstance(content, dict) else rng.randrange(len(content))
    changed[key] = with_junk(content[key], rng)
    return changed


@pytest.mark.parametrize("name", CONFIGURED)
def test_configurations_of_junk_are_understood_or_refused(name: str, shared: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(shared(f"fixtures/{name}"))
    config = checkpoint.quantization_config() or {}
    config |= {"quantized_layers": {"lm_head": {"quant_algo": "NVFP4"}}, "overrides": [["*.mlp.*", None]]}
    config |= {"extra_config": {"lm_head": {"bits": 16}}, "kv_cache_scheme": None}
    transform = {"type": "hadamard", "head_dim": 16, "apply": [{"targets": ["Linear"], "location": "input"}]}
    config |= {"transform_config": {"config_groups": {"r": transform}}}
    rng = random.Random(name)
    refusals = 0
    for _ in range(1500):
        changed = {"quant_method": config["quant_method"]}
        while not set(changed) - {"quant_method"}:
            junk = with_junk(config, rng)
            changed = junk | {"quant_method": config["quant_method"]} if isinstance(junk, dict) else changed
        takes_over(changed)
        try:
            codec = codec_for(changed)
            obstacle = codec.obstacle()
            for layer in ("model.layers.0.mlp.up_proj", "lm_head"):
                codec.scheme(layer)
        except ValueError:
            refusals += 1
        else:
            refusals += obstacle is not None
    assert refusals > 30


def test_configurations_of_fp4s_own_format_are_checked_whole(shared: Callable[[str], Path]) -> None:
    """FPQuantConfig is what a user passes as well, and what a checkpoint in FP-Quant's format brings."""
    config = Checkpoint.open(shared("fixtures/fpquant-nvfp")).quantization_config() or {}
    config |= {"overrides": [["*.mlp.*", None], ["a", {"forward_dtype": "mxfp4"}]], "scale_rule": "mse"}
    rng = random.Random(1)
    refusals = 0
    for _ in range(2000):
        changed = with_junk(config, rng)
        try:
            if isinstance(changed, dict):
                FPQuantConfig.from_dict(changed | {"quant_method": "fp_quant"})
        except ValueError:
            refusals += 1
    assert refusals > 1000
