"""Which classes compute what nn.Linear computes, decided by their forward pass, and how they are made again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledLinear
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter
from transformers.pytorch_utils import Conv1D

from fp4 import FP4Linear
from fp4.linear_like import linear_like
from fp4.numerics.formats import NVFP4
from fp4.scheme import Scheme


class Clipped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-100, 100)


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, training=self.training))


class Pair(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x), None


class NeedsMore(nn.Linear):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x) * scale


class Scaled(nn.Linear):
    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def scaled(scale: float) -> nn.Linear:
    layer = Scaled(32, 48)
    layer.scale = scale
    return layer


@pytest.mark.parametrize(
    ("make", "transposed"),
    [
        (lambda: nn.Linear(32, 48), False),
        (lambda: FalconLinear(32, 48), False),
        (lambda: FalconLinear(32, 32, bias=False), False),
        (lambda: Conv1D(48, 32), True),
        (lambda: Conv1D(32, 32), True),
        (lambda: scaled(1.0), False),
    ],
)
def test_layers_that_compute_a_linear_one_are_quantized_and_made_again(make, transposed: bool) -> None:
    dense = make()
    nn.init.normal_(dense.weight)
    form = linear_like(dense)
    assert form is not None
    assert (form.in_features, form.is_transposed) == (32, transposed)
    layer = FP4Linear.from_linear(dense, Scheme(NVFP4, activations="model"))
    again = layer.dense(torch.float32)
    assert type(again) is type(dense)
    assert again.weight.shape == dense.weight.shape
    assert {*vars(again)} == {*vars(dense)}
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(again(x), layer(x), rtol=1e-5, atol=1e-5)
    assert torch.nn.functional.cosine_similarity(again(x), dense(x), dim=-1).min() > 0.95


@pytest.mark.parametrize(
    "module",
    [
        Clipped(32, 48),
        Noisy(32, 48),
        Pair(32, 48),
        NeedsMore(32, 48),
        scaled(0.5),
        IdeficsDecoupledLinear(32, 48, 16),
        nn.Embedding(32, 48),
        nn.Bilinear(4, 4, 4),
        nn.Conv1d(32, 48, 1),
        nn.utils.parametrizations.weight_norm(nn.Linear(32, 48)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_computes_something_else_or_may_do_so_is_not_taken(module: nn.Module) -> None:
    assert linear_like(module) is None
    with pytest.raises(ValueError, match=f"{type(module).__name__} computes something else than nn.Linear"):
        FP4Linear.from_linear(module, Scheme(NVFP4))


def test_nothing_is_computed_with_the_weights_and_no_random_number_is_taken() -> None:
    with torch.device("meta"):
        layer = FalconLinear(1 << 20, 1 << 20)
        before = torch.random.get_rng_state()
        assert linear_like(layer) is not None
    assert torch.equal(torch.random.get_rng_state(), before)
    assert PhimoeTopKRouter.__mro__[1] is nn.Linear
