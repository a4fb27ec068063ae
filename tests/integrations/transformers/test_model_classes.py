"""Classes of Transformers' auto mappings, each tiny and random: what is quantized, what others see, what comes out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from classes_tried import CLASSES
from model_classes import SCHEMES, TRIED_WITH, NotComparable, check_class
from tiny_models import all_classes, class_named, tiny_config
from torch import nn
from transformers import PreTrainedModel

from fp4 import FP4Linear, FPQuantConfig
from fp4.integrations.transformers.parameter_count import count_unpacked
from fp4.nn import FP4Experts, swap_experts, swap_linears
from fp4.selection import DenseLayers

# Decoders, encoders, both; experts, state spaces; vision, audio; layers of classes of their own, weights that are read.
SAMPLE = (
    "BertLMHeadModel",
    "DeepseekV3ForCausalLM",
    "FalconForCausalLM",
    "GPT2LMHeadModel",
    "GteForMaskedLM",
    "JetMoeForCausalLM",
    "LlamaForCausalLM",
    "LongT5ForConditionalGeneration",
    "Mamba2ForCausalLM",
    "MobileBertForMaskedLM",
    "Qwen3MoeForCausalLM",
    "Siglip2ForImageClassification",
    "ViTForImageClassification",
    "Wav2Vec2ForCTC",
    "ZambaForCausalLM",
)
# Classes whose first floating-point parameter is one of a packed layer, and so once told a wrong dtype.
FIRST_IS_PACKED = (
    "BltForCausalLM",
    "GraniteSpeechForConditionalGeneration",
    "Lfm2VlForConditionalGeneration",
    "PatchTSTModel",
    "Pix2StructForConditionalGeneration",
    "Qwen3ASRForConditionalGeneration",
    "Siglip2VisionModel",
    "TimesFmModelForPrediction",
)


def names_and_schemes() -> list[object]:
    return [
        pytest.param(name, scheme, marks=() if name in SAMPLE else pytest.mark.slow, id=f"{name}-{scheme}")
        for name in CLASSES
        for scheme in SCHEMES
    ]


@pytest.mark.parametrize(("name", "scheme"), names_and_schemes())
def test_class(name: str, scheme: str, tmp_path: Path) -> None:
    try:
        check_class(name, scheme, tmp_path)
    except NotComparable as reason:
        pytest.skip(str(reason))


def test_enough_classes_are_tried() -> None:
    assert len(CLASSES) >= 120
    assert {*SAMPLE} <= {*CLASSES}


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("DbrxForCausalLM", "DbrxExpertGLU lays out or runs its experts in a way fp4 does not know"),
        ("JetMoeForCausalLM", "JetMoeParallelExperts lays out or runs its experts in a way fp4 does not know"),
        ("LongcatFlashForCausalLM", "LongcatFlashExperts lays out or runs its experts in a way fp4 does not know"),
        ("ZambaForCausalLM", "its weight is shared with another layer, and packed ones are not"),
    ],
)
def test_layers_that_cannot_be_quantized_are_named_in_one_warning(
    name: str, what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model_class = class_named(name)
    assert model_class is not None
    try:
        model_class(tiny_config(model_class)).save_pretrained(tmp_path)
    except ValueError as error:
        if transformers.__version__.startswith(TRIED_WITH):
            raise
        pytest.skip(f"in Transformers {transformers.__version__} its tiny model cannot be made: {error}")
    with caplog.at_level("WARNING", logger="fp4"):
        model_class.from_pretrained(tmp_path, quantization_config=FPQuantConfig())
    warnings = [record.getMessage() for record in caplog.records if record.name == "fp4"]
    assert len(warnings) == 1
    assert what in warnings[0]


# --- on the meta device ----------------------------------------------------------------------------------------------


def on_meta(name: str) -> PreTrainedModel | None:
    """A tiny model in bfloat16; None if this version has no such class, or it needs other packages or other sizes."""
    model_class = class_named(name)
    try:
        with torch.device("meta"):
            return None if model_class is None else model_class(tiny_config(model_class)).to(torch.bfloat16)
    except Exception:  # whatever Transformers' classes raise for the tiny configuration
        return None


def problem_of_packed(name: str, model: PreTrainedModel) -> str | None:
    """What is wrong with dtypes and sizes of a model once it is packed; None if nothing is."""
    dtypes = {key: parameter.dtype for key, parameter in model.named_parameters()}
    expected = model.dtype, model.num_parameters()
    shapes = {key: module.weight.shape for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    pack(model)
    count_unpacked(model)
    if (model.dtype, model.num_parameters()) != expected:
        return f"{name}: {(model.dtype, model.num_parameters())} instead of {expected}"
    for key, parameter in model.named_parameters():
        wanted = torch.uint8 if ".packed_" in f".{key}" else dtypes[key]
        if parameter.dtype != wanted:
            return f"{name}.{key} is {parameter.dtype}, expected {wanted}"
    for key, module in model.named_modules():
        if isinstance(module, FP4Linear) and (module.weight.dtype, module.weight.shape) != (
            torch.bfloat16,
            shapes.get(key, module.weight.shape),
        ):
            return f"{name}.{key}.weight is {module.weight.dtype} {tuple(module.weight.shape)}"
    return None


def pack(model: PreTrainedModel) -> None:
    config, dense = FPQuantConfig(), DenseLayers(model)

    def choose(name: str) -> object:
        return None if dense.reason(name) else config.scheme_for(name)

    swap_linears(model, choose)
    swap_experts(model, lambda name, layout: {key: config.scheme_for(f"{name}.{key}") for key in layout.projections})
    for module in list(model.modules()):
        if isinstance(module, FP4Experts):
            for projection in module.layout.projections:
                module.place(projection)


@pytest.mark.parametrize("name", FIRST_IS_PACKED)
def test_dtype_and_size_are_those_of_the_dense_model(name: str) -> None:
    model = on_meta(name)
    if model is None and not transformers.__version__.startswith(TRIED_WITH):
        pytest.skip(f"no {name} of these sizes in Transformers {transformers.__version__}")
    assert model is not None
    assert problem_of_packed(name, model) is None
    assert any(isinstance(module, FP4Linear) for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_dtype_and_size_of_every_class_are_those_of_the_dense_model(part: int) -> None:
    tried, problems = 0, []
    for name in all_classes()[part::8]:
        model = on_meta(name)
        if model is not None:
            tried += 1
            problems.append(problem_of_packed(name, model))
    assert [problem for problem in problems if problem] == []
    assert tried > 100
