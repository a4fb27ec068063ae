"""Gradients through packed layers, as adapters on them need: those of the dense layer with the same values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fp4 import MXFP4, NVFP4, FPQuantConfig
from fp4.nn import FP4GroupedLinear, FP4Linear
from fp4.numerics.formats import FP8
from fp4.scheme import Scheme

SCHEMES = {
    "nvfp4": Scheme(NVFP4, "mse", "model"),
    "nvfp4-rotated": Scheme(NVFP4, "mse", "model", rotation="gsr", group_size=32),
    "mxfp4": Scheme(MXFP4, "even", "model"),
    "fp8": Scheme(FP8, "abs_max", "model"),
}
BACKENDS = ["auto", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(SCHEMES))
def test_gradients_of_a_linear_layer_are_the_dense_layers(name: str, backend: str) -> None:
    torch.manual_seed(0)
    packed = FP4Linear.from_linear(nn.Linear(64, 37), SCHEMES[name], backend)
    dense = nn.Linear(64, 37)
    dense.weight, dense.bias = nn.Parameter(packed.dequantize()), nn.Parameter(packed.bias.detach().clone())
    x, twin = (torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    upstream = torch.randn(2, 5, 37)
    packed(x).backward(upstream)
    dense(twin).backward(upstream)
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(packed.bias.grad, dense.bias.grad)
    assert packed.weight.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(SCHEMES))
def test_gradients_of_experts_are_those_of_each_experts_rows(name: str, backend: str) -> None:
    torch.manual_seed(0)
    packed = FP4GroupedLinear(3, 64, 37, SCHEMES[name], backend, torch.float32, "meta")
    packed.hold(packed.round(torch.randn(3, 37, 64)))
    packed.settle()
    weights, bias = packed.dequantize(), torch.randn(3, 37, requires_grad=True)
    x = torch.randn(9, 64, requires_grad=True)
    offsets = torch.tensor([0, 4, 4, 7], dtype=torch.int32)  # the last two rows are another rank's
    upstream = torch.randn(9, 37)
    upstream[7:] = 0
    packed(x, offsets, bias).backward(upstream)
    assert x.grad is not None
    assert bias.grad is not None
    torch.testing.assert_close(x.grad[:4], upstream[:4] @ weights[0])
    torch.testing.assert_close(x.grad[4:7], upstream[4:7] @ weights[2])
    assert not x.grad[7:].any()
    torch.testing.assert_close(bias.grad, torch.stack([upstream[:4].sum(0), torch.zeros(37), upstream[4:7].sum(0)]))


@pytest.mark.parametrize("activations", ["fp4", "fp8"])
def test_gradients_go_straight_through_quantized_activations(activations: str) -> None:
    scheme = Scheme(NVFP4, "mse", activations)  # type: ignore[arg-type]
    packed = FP4Linear.from_linear(nn.Linear(64, 32), scheme)
    x, upstream = torch.randn(3, 64, requires_grad=True), torch.randn(3, 32)
    packed(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ packed.dequantize())


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_reach_the_embeddings_of_a_model(compiled: bool, llama: Path, token_ids: Tensor) -> None:
    config = FPQuantConfig("mxfp4", activation_dtype="model")
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config, dtype=torch.float32)
    assert model.hf_quantizer.is_trainable
    run = torch.compile(model.forward, fullgraph=True, backend="aot_eager") if compiled else model.forward
    run(token_ids, labels=token_ids).loss.backward()
    found = model.get_input_embeddings().weight.grad
    dense = model.dequantize()
    dense.zero_grad()
    dense(token_ids, labels=token_ids).loss.backward()
    torch.testing.assert_close(found, dense.get_input_embeddings().weight.grad, rtol=1e-3, atol=1e-6)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def load(path: Path, config: FPQuantConfig) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_packed_parameter_of_a_loaded_model_asks_for_a_gradient(backend: str, llama: Path, tmp_path: Path) -> None:
    rounded = load(llama, FPQuantConfig(backend=backend, activation_scaling="static", transform_init="hadamard"))
    rounded.save_pretrained(tmp_path)
    for model in (rounded, AutoModelForCausalLM.from_pretrained(tmp_path)):
        asking = {name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert asking == {"weight"}
        packed = [module for module in model.modules() if isinstance(module, FP4Linear)]
        assert not any(parameter.requires_grad for module in packed for parameter in module.parameters())


@pytest.mark.usefixtures("one_process")
def test_ddp_trains_what_is_not_packed(llama: Path, token_ids: Tensor) -> None:
    model = load(llama, FPQuantConfig())
    distributed = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        distributed(token_ids, labels=token_ids).loss.backward()
    assert model.get_input_embeddings().weight.grad.any()


@pytest.mark.usefixtures("one_process")
def test_fsdp_shards_what_is_not_packed(llama: Path, token_ids: Tensor) -> None:
    model = load(llama, FPQuantConfig())
    with torch.no_grad():
        expected = model(token_ids).logits
    packed = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    mesh = init_device_mesh("cpu", (1,))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, ignored_params=packed)
    found = model(token_ids, labels=token_ids)
    torch.testing.assert_close(found.logits, expected)
    found.loss.backward()
    assert isinstance(model.model.norm.weight.grad, DTensor)
