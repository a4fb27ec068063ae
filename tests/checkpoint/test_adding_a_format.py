"""A checkpoint format is one file, here the class ``ToyCodec``, and one row in ``CODECS``: nothing else knows of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from small_models import save_small
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto

import fp4
from fp4.checkpoint import CODECS
from fp4.checkpoint.convert import convert
from fp4.checkpoint.formats.codec import Codec, LayerScheme, Serving, StoredLinear
from fp4.checkpoint.formats.stored_tensors import (
    read_codes,
    read_scales,
    require,
    require_no_global_scale,
    require_no_rotation,
)
from fp4.checkpoint.inspect import inspect
from fp4.integrations.transformers.prequantized import register
from fp4.numerics.formats import MXFP4, QuantizedTensor


class ToyCodec(Codec):
    """MXFP4 weights alone, with every layer that is packed listed by name."""

    name = "toy"
    schemes = ("mxfp4a16",)
    engines: ClassVar = {"vllm": {"mxfp4a16": Serving(True, "It runs toys.")}}
    suffixes = (".toy_codes", ".toy_scales")
    codes = (".toy_codes",)
    markers: Mapping[str, tuple[str, ...]] = {".toy_codes": ()}
    side_file = "toys.json"
    side_file_suffices = True

    def scheme(self, layer: str) -> LayerScheme | None:
        return LayerScheme(MXFP4, "model") if layer in self.config["toys"] else None

    def read(
        self, tensors: Mapping[str, Tensor], scheme: LayerScheme, shape: tuple[int, int] | None = None
    ) -> StoredLinear:
        codes = read_codes(require(tensors, ".toy_codes"), "toy_codes", shape)
        scales = read_scales(require(tensors, ".toy_scales"), "toy_scales", MXFP4, codes)
        return StoredLinear(QuantizedTensor(codes, scales, None, scheme.format), None, None)

    def write(self, stored: StoredLinear, scheme: LayerScheme, allow_rounding: bool = False) -> dict[str, Tensor]:
        codes, scales, _, _ = stored.weight
        if (scheme.format, scheme.activations, codes.ndim) != (MXFP4, "model", 2):
            raise ValueError(f"it is {scheme}, which is no toy")
        require_no_rotation(stored, self.name)
        require_no_global_scale(stored.weight, self.name)
        return {".toy_codes": codes, ".toy_scales": scales.view(torch.uint8)}

    @classmethod
    def configuration(
        cls, layers: Mapping[str, LayerScheme], kept: Sequence[str], source: Mapping[str, Any]
    ) -> dict[str, Any]:
        return {"quant_method": cls.name, "toys": sorted(layers)}

    @classmethod
    def side_files(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"toys.json": {"toys": config["toys"]}}


@pytest.fixture(autouse=True)
def _row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row of the format; Transformers is told of it as it is when fp4 is imported."""
    monkeypatch.setitem(CODECS, ToyCodec.name, ToyCodec)
    for mapping in ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING"):
        monkeypatch.setattr(auto, mapping, dict(getattr(auto, mapping)))
    register()


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A small Llama in the format."""
    save_small("llama", tmp_path / "model")
    fp4.quantize(tmp_path / "model", tmp_path / "toy", "mxfp4a16", "rtn", format="toy", progress=False)
    return tmp_path / "toy"


def logits_of(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert sum(isinstance(module, fp4.FP4Linear) for module in model.modules()) == 21
    with torch.no_grad():
        logits: Tensor = model(torch.arange(8)[None]).logits
    return logits


def test_it_is_quantized_to_and_inspected(toy: Path) -> None:
    found = inspect(toy, values=True)
    assert (found.format, found.schemes, found.problems) == ("toy", {"mxfp4a16": 21}, [])
    assert "With vLLM, which reads toy" in (toy / "README.md").read_text()
    assert not inspect(toy.parent / "model").problems


def test_it_is_converted_from_and_to(toy: Path, tmp_path: Path) -> None:
    convert(toy, tmp_path / "there", "compressed-tensors")
    assert not (tmp_path / "there/toys.json").exists()
    convert(tmp_path / "there", tmp_path / "back", "toy")
    before, after = load_file(toy / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in ("config.json", "toys.json"):
        assert (toy / name).read_bytes() == (tmp_path / "back" / name).read_bytes()
    config = (toy / "config.json").read_text()
    (toy / "config.json").write_text(config.replace('"toys":', '"kv_cache_scheme": "FP8", "toys":'))
    with pytest.raises(ValueError, match="KV cache is quantized"):
        convert(toy, tmp_path / "again", "toy")


def test_it_is_loaded_and_saved(toy: Path, tmp_path: Path) -> None:
    convert(toy, tmp_path / "there", "compressed-tensors")
    expected = logits_of(tmp_path / "there")
    assert torch.equal(logits_of(toy), expected)
    AutoModelForCausalLM.from_pretrained(toy, dtype=torch.bfloat16).save_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(tmp_path / "saved"), expected)
    config = fp4.FPQuantConfig(scheme="mxfp4a16", checkpoint_format="toy", scale_rule="even", transform_init="identity")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=config)
    model.save_pretrained(tmp_path / "on the fly")
    assert inspect(tmp_path / "on the fly").format == "toy"


def test_its_own_file_suffices(toy: Path) -> None:
    expected = logits_of(toy)
    config = (toy / "config.json").read_text()
    (toy / "config.json").write_text(config.replace('"quantization_config"', '"something_else"'))
    assert inspect(toy).format == "toy"
    assert torch.equal(logits_of(toy), expected)
