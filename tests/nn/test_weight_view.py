"""What others see as the weight of a packed layer."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fp4.nn import FP4Linear
from fp4.nn.weight_view import WeightView
from fp4.numerics.formats import FP8, MXFP4, NVFP4, Format
from fp4.scheme import Scheme


def layer(fmt: Format = NVFP4, dtype: torch.dtype = torch.bfloat16, rotation: str = "identity") -> FP4Linear:
    torch.manual_seed(0)
    dense = nn.Linear(128, 48, dtype=dtype)
    return FP4Linear.from_linear(dense, Scheme(fmt, activations="model", rotation=rotation, group_size=32))


@pytest.mark.parametrize("rotation", ["identity", "hadamard"])
@pytest.mark.parametrize("fmt", [NVFP4, MXFP4, FP8], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_looks_and_computes_like_a_dense_one(fmt: Format, dtype: torch.dtype, rotation: str) -> None:
    packed = layer(fmt, dtype, rotation)
    values, weight = packed.dequantize(dtype), packed.weight
    assert isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.dtype, weight.device) == (values.shape, dtype, values.device)
    assert not weight.requires_grad
    x = torch.randn(5, 128, dtype=dtype, requires_grad=True)
    assert torch.equal(nn.functional.linear(x, weight), nn.functional.linear(x, values))
    assert torch.equal(weight * 2, values * 2)
    assert torch.equal(weight.data.clone(), values)
    assert torch.equal(weight.to(torch.float64), values.double())
    assert torch.equal(weight[3:5].T, values[3:5].T)
    assert weight.tolist() == values.tolist()
    assert repr(weight) == repr(values)
    nn.functional.linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, values.sum(0).expand(5, -1))
    assert packed.is_packed


def test_shape_dtype_and_device_cost_no_dequantization(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = layer()
    monkeypatch.setattr(FP4Linear, "dequantize", lambda *_: pytest.fail("the weight was dequantized"))
    weight = packed.weight
    assert (weight.ndim, weight.numel(), weight.size(0), weight.is_floating_point()) == (2, 48 * 128, 48, True)
    assert weight.data.detach().dtype == torch.bfloat16
    assert packed(torch.randn(2, 128).to(weight.dtype)).shape == (2, 48)


def test_no_parameter_but_the_bias_is_floating_point() -> None:
    for fmt in (NVFP4, MXFP4, FP8):
        for name, parameter in layer(fmt).named_parameters():
            assert (parameter.dtype == torch.uint8) == (name != "bias")
            assert parameter.requires_grad == (name == "bias")


def test_casts_change_what_is_seen_and_not_what_is_held() -> None:
    packed = layer(NVFP4, torch.float32)
    before = {name: parameter.clone() for name, parameter in packed.packed_parameters().items()}
    for cast, dtype in ((packed.half, torch.float16), (packed.bfloat16, torch.bfloat16), (packed.float, torch.float32)):
        cast()
        assert packed.weight.dtype == dtype
        assert all(torch.equal(parameter, before[name]) for name, parameter in packed.packed_parameters().items())
    packed.type(torch.float16)
    assert packed.weight.dtype == torch.float16
    assert all(torch.equal(parameter, before[name]) for name, parameter in packed.packed_parameters().items())


def _in_place(packed: FP4Linear) -> None:
    packed.weight.div_(2)


def _data_in_place(packed: FP4Linear) -> None:
    packed.weight.data *= 0.5


def _data_assigned(packed: FP4Linear) -> None:
    packed.weight.data = packed.weight.data.clone() / 2


def _copied_into(packed: FP4Linear) -> None:
    packed.weight.copy_(packed.weight / 2)


def _row_by_row(packed: FP4Linear) -> None:
    for row in range(48):
        packed.weight.data[row] = packed.weight.data[row] / 2


def _assigned(packed: FP4Linear) -> None:
    packed.weight = nn.Parameter(packed.weight / 2, requires_grad=False)


@pytest.mark.parametrize("edit", [_in_place, _data_in_place, _data_assigned, _copied_into, _row_by_row, _assigned])
def test_an_edited_weight_is_dense_from_then_on(edit: object) -> None:
    packed = layer()
    values, x = packed.dequantize(torch.bfloat16), torch.randn(3, 128).bfloat16()
    with torch.no_grad():
        edit(packed)  # type: ignore[operator]
    assert not packed.is_packed
    assert torch.equal(packed.weight, values / 2)
    assert set(packed.state_dict()) == {"weight", "bias"}
    assert torch.equal(packed(x), nn.functional.linear(x, values / 2, packed.bias))
    assert "format" not in repr(packed)
    assert torch.equal(packed.dequantize(torch.float32), (values / 2).float())
    assert torch.equal(copy.deepcopy(packed)(x), packed(x))


def test_only_parameters_can_be_assigned() -> None:
    with pytest.raises(TypeError, match=r"cannot assign Tensor as parameter 'weight'; expected nn\.Parameter"):
        layer().weight = torch.zeros(48, 128)


def test_copies_of_the_view_are_dense() -> None:
    packed = layer()
    values = packed.dequantize(torch.bfloat16)
    for copied in (copy.deepcopy(packed.weight), pickle.loads(pickle.dumps(packed.weight)), packed.weight.clone()):
        assert type(copied) is Tensor
        assert torch.equal(copied, values)


def test_code_that_reads_the_weight_compiles_in_one_graph() -> None:
    packed = layer()

    def forward(x: Tensor) -> Tensor:
        return packed(x.to(packed.weight.dtype)) + packed.weight.sum()

    x = torch.randn(3, 128)
    with torch.no_grad():
        found = torch.compile(forward, fullgraph=True, backend="aot_eager")(x)
        assert torch.equal(found, forward(x))


def test_autocast_casts_as_for_a_dense_layer() -> None:
    packed = layer(dtype=torch.float32)
    x = torch.randn(3, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = packed(x)
        assert out.dtype == nn.Linear(128, 48)(x).dtype == torch.bfloat16
        compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            assert torch.equal(compiled(x), out)
    assert torch.equal(out, packed(x.bfloat16()))
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_a_state_dict_of_an_earlier_version_loads() -> None:
    packed, other = layer(), layer()
    codes, scales, global_scale, _ = packed.canonical()
    assert global_scale is not None
    assert packed.bias is not None
    with torch.no_grad():
        other.packed_codes.zero_()
    before = {"weight": codes, "weight_scale": scales, "global_scale": global_scale, "bias": packed.bias}
    other.load_state_dict(before)
    assert torch.equal(other.dequantize(), packed.dequantize())


def test_the_view_that_was_written_to_may_be_assigned_to_the_dense_weight() -> None:
    """``weight += delta`` names the view again, and some adapters assign the result."""
    packed = layer()
    expected = packed.dequantize(torch.bfloat16) + 1
    weight = packed.weight.data
    weight += 1
    packed.weight.data = weight
    assert torch.equal(packed.weight, expected)
    assert torch.equal(
        packed(torch.ones(1, 128).bfloat16()),
        nn.functional.linear(torch.ones(1, 128).bfloat16(), expected, packed.bias),
    )


def test_an_edited_weight_is_requantized() -> None:
    packed, other = layer(), layer()
    packed.requantize()
    assert torch.equal(packed.dequantize(), other.dequantize())
    packed.weight.mul_(2)
    packed.requantize()
    assert packed.is_packed
    assert isinstance(packed.weight, WeightView)
    torch.testing.assert_close(packed.dequantize(), 2 * other.dequantize(), rtol=0.1, atol=0.02)
    packed.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"up_proj\.weight.*NaN"):
        packed.requantize("up_proj.weight")


def test_requantizing_keeps_the_calibrated_scale_of_activations() -> None:
    packed = layer()
    packed.hold(packed.canonical(), torch.tensor(0.25, dtype=torch.float64))
    packed.weight.mul_(2)
    packed.weight = nn.Parameter(packed.weight.detach() / 2, requires_grad=False)
    assert packed.input_global_scale is None
    packed.requantize()
    assert packed.input_global_scale is not None
    assert packed.input_global_scale.item() == 0.25


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight[3].zero_(),
        lambda weight: weight[2:7, 1].add_(1),
        lambda weight: weight.T.mul_(2),
        lambda weight: weight.data.reshape(-1).scatter_add_(0, torch.tensor([5, 700]), torch.ones(2)),
        lambda weight: weight.view(-1)[10:20].fill_(3),
        lambda weight: weight.t()[4].__setitem__(slice(2, 5), 1.5),
    ],
)
def test_what_is_written_to_a_slice_reaches_the_layer(write: Callable[[Tensor], object]) -> None:
    packed = layer(dtype=torch.float32)
    expected, row, x = packed.dequantize(), packed.weight[3], torch.randn(2, 128)
    assert torch.equal(row, expected[3])
    assert packed.is_packed
    write(expected)
    write(packed.weight)
    assert not packed.is_packed
    assert torch.equal(packed.weight, expected)
    assert torch.equal(row, expected[3])
    assert torch.equal(packed(x), nn.functional.linear(x, expected, packed.bias))


def test_slices_are_no_parameters() -> None:
    weight = layer().weight
    assert not isinstance(weight[3:], nn.Parameter)
    assert not isinstance(weight.T, nn.Parameter)
    assert weight.T.stride() == weight.dense().T.stride()
    assert [part.shape for part in weight.chunk(2)] == [(24, 128)] * 2
