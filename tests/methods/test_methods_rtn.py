"""Rounding to nearest in the terms of a scheme: which global scale, which rotation, which blocks."""

import math

import pytest
import torch
from naive import assert_nearest, decoded
from torch import Tensor

from fp4.numerics.formats import FP8, MXFP4, NVFP4, Format
from fp4.numerics.rotation import hadamard
from fp4.rounding import global_scale_of, round_to_nearest
from fp4.scheme import Scheme


def portable(amax: float) -> float:
    """The power of two at or above ``amax / 2688``."""
    return 2.0 ** math.ceil(math.log2(amax / 2688))


def peak(value: float) -> Tensor:
    """A weight of zeros and one entry: ``[4, 32]``."""
    weight = torch.zeros(4, 32)
    weight[1, 3] = -value
    return weight


def test_the_global_scale_is_that_of_what_is_rounded() -> None:
    rotation = hadamard(16).float()  # spreads an entry over sixteen of a quarter
    weight = peak(7.0)
    plain, turned = Scheme(NVFP4), Scheme(NVFP4, rotation="hadamard")
    assert float(round_to_nearest(weight, plain).global_scale) == float(global_scale_of(weight, plain)) == portable(7.0)
    assert float(round_to_nearest(weight, turned, rotation).global_scale) == portable(1.75)
    assert float(global_scale_of(weight, turned, rotation)) == portable(1.75)
    assert portable(7.0) == 4 * portable(1.75)
    assert float(global_scale_of([peak(0.0), weight, peak(0.5)], plain)) == portable(7.0)  # that of zeros alone is 1
    assert float(global_scale_of([weight, 4 * weight], turned, rotation)) == portable(7.0)
    given = torch.tensor(0.5, dtype=torch.float64)
    assert round_to_nearest(weight, plain, global_scale=given).global_scale == given


def test_a_stack_has_a_global_scale_for_each_matrix() -> None:
    stack = torch.stack([peak(7.0), peak(0.25)])
    for scales in (round_to_nearest(stack, Scheme(NVFP4)).global_scale, global_scale_of(stack, Scheme(NVFP4))):
        assert scales.tolist() == [portable(7.0), portable(0.25)]
    fixed = global_scale_of(stack, Scheme(NVFP4, global_scale=0.75))
    assert fixed.tolist() == [0.75, 0.75]
    assert fixed.dtype == torch.float64
    assert global_scale_of(stack, Scheme(MXFP4)) is None
    assert float(global_scale_of(peak(7.0), Scheme(NVFP4, "modelopt"))) == torch.tensor(7.0 / 2688).item()


@pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("rotated", [False, True])
def test_values_are_the_nearest(fmt: Format, rotated: bool) -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    rotation = hadamard(16).float() if rotated else None
    values, steps = decoded(*round_to_nearest(weight, Scheme(fmt, "mse"), rotation), fmt.name)
    target = weight.double()
    if rotated:
        target = torch.cat([part @ hadamard(16) for part in target.split(16, dim=1)], dim=1)
    assert_nearest(target, values, steps, slack=1e-5)


@pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=lambda fmt: fmt.name)
def test_wide_blocks_share_one_scale(fmt: Format) -> None:
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    quantized = round_to_nearest(weight, Scheme(fmt.wide(64)))
    stored = quantized.scales.view(torch.uint8)
    assert stored.shape == (6, 2)
    assert len(stored.unique()) > 1
    values, steps = decoded(*quantized, f"{fmt.name}_64")
    # Kernels and checkpoints know the format's own blocks: there each scale is stored several times.
    repeated = quantized.format.in_base(quantized.scales).view(torch.uint8).unflatten(1, (2, -1))
    assert repeated.shape == (6, 2, 64 // fmt.block_size)
    assert (repeated == stored[..., None]).all()
    assert_nearest(weight, values, steps, slack=1e-5)
    # The largest of 64 decides: nothing is rounded with a step that is too small for it.
    assert (weight.abs().unflatten(1, (2, 64)).amax(dim=2) <= 8 * steps[:, ::64]).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("fmt", [NVFP4, MXFP4, FP8], ids=lambda fmt: fmt.name)
def test_what_is_not_finite_is_named(fmt: Format, bad: float) -> None:
    with pytest.raises(ValueError, match=r"layers\.3\.weight holds 1 NaN or infinite"):
        round_to_nearest(peak(bad), Scheme(fmt), name="layers.3.weight")
