"""Copies of a loaded model: of its object, pickled, and with weights that accelerate offloads."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch
from moe import make_moe
from packaging.version import Version
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fp4 import FPQuantConfig
from fp4.nn import PackedWeight

SCHEMES = ["nvfp4", "mxfp4", "fp8_dynamic"]
Copy = Callable[[PreTrainedModel], PreTrainedModel]


def through_torch(model: PreTrainedModel) -> PreTrainedModel:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Copy] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch": through_torch,
}


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moe")
    make_moe("qwen3_moe").save_pretrained(path)
    return path


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("source", ["llama", "moe"])
def test_a_copy_is_a_model_of_its_own(
    source: str, scheme: str, how: str, token_ids: Tensor, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path, config = request.getfixturevalue(source), FPQuantConfig(scheme=scheme)
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
    with torch.no_grad():
        expected = model(token_ids).logits
    copied = COPIES[how](model)
    for name, parameter in model.named_parameters():
        own = copied.get_parameter(name)
        assert (own.dtype, own.shape, own.requires_grad) == (parameter.dtype, parameter.shape, parameter.requires_grad)
        assert own.data_ptr() != parameter.data_ptr()
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight):
            assert copied.get_submodule(name).backend is module.backend
    packed = [module for module in copied.modules() if isinstance(module, PackedWeight)]
    assert packed
    with torch.no_grad():
        for module in packed:
            module.packed_codes.zero_()
        assert torch.equal(model(token_ids).logits, expected)
        copied = COPIES[how](model)
        assert torch.equal(copied(token_ids).logits, expected)
        copied.save_pretrained(tmp_path)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(token_ids).logits, expected)


@pytest.mark.parametrize("to", ["memory", "disk"])
def test_accelerate_offloads_parameters_in_the_canonical_layout(
    to: str, llama: Path, token_ids: Tensor, tmp_path: Path
) -> None:
    if to == "disk" and Version(accelerate.__version__) < Version("1.15"):
        pytest.skip(f"accelerate {accelerate.__version__} cannot write 8-bit floating point to disk")
    config, device = FPQuantConfig(backend="reference"), torch.device("cpu")
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config)
    with torch.no_grad():
        expected = model(token_ids).logits
        offloaded = (
            accelerate.cpu_offload(model, device)
            if to == "memory"
            else accelerate.disk_offload(model, tmp_path, device)
        )
        assert all(parameter.is_meta for parameter in offloaded.parameters())
        assert torch.equal(offloaded(token_ids).logits, expected)
