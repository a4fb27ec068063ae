"""Weights in parts of rows, and rows and columns in another order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp4.methods.tiling import elements_at_once, in_parts, reordered
from fp4.numerics.formats import MXFP4, NVFP4, QuantizedTensor


@pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_parts_of_rows_make_up_the_whole(lead: tuple[int, ...], fmt: object) -> None:
    """Ten rows of four columns in parts of about so many elements, all leading axes in each."""
    weight = torch.arange(10.0).repeat(*lead, 4, 1).transpose(-1, -2).contiguous()
    weight += 16 * torch.arange(lead[0]).view(-1, *[1] * (len(lead) + 1)) if lead else 0
    per_row = weight.numel() // 10
    scale = torch.tensor(2.0)
    for rows, sizes in ((10, [10]), (5, [5, 5]), (4, [4, 4, 2]), (3, [3, 3, 3, 1]), (0.1, [1] * 10), (99, [10])):
        seen: list[int] = []

        def solve(part: Tensor, seen: list[int] = seen) -> QuantizedTensor:
            assert part.shape[:-2] == lead
            assert part.shape[-1] == 4
            seen.append(part.shape[-2])
            codes = part.to(torch.uint8)
            return QuantizedTensor(codes[..., :2], codes[..., :1].view(fmt.scale_dtype), scale, fmt)

        found = in_parts(solve, weight, max(1, int(rows * per_row)))
        assert seen == sizes
        assert torch.equal(found.codes, weight[..., :2].to(torch.uint8))
        assert found.scales.dtype == fmt.scale_dtype
        assert torch.equal(found.scales.view(torch.uint8), weight[..., :1].to(torch.uint8))
        assert found.global_scale is scale
        assert found.format == fmt


def test_rows_and_columns_are_put_into_an_order() -> None:
    x = torch.arange(24).view(2, 3, 4)
    columns, rows = torch.tensor([[3, 0], [1, 2]]), torch.tensor([[2, 2, 0], [0, 1, 2]])
    assert reordered(x, columns, -1).tolist() == [
        [[3, 0], [7, 4], [11, 8]],
        [[13, 14], [17, 18], [21, 22]],
    ]
    assert reordered(x, rows, -2).tolist() == [
        [[8, 9, 10, 11], [8, 9, 10, 11], [0, 1, 2, 3]],
        [[12, 13, 14, 15], [16, 17, 18, 19], [20, 21, 22, 23]],
    ]
    # One order for all, with a leading axis of length one or without.
    for order in (torch.tensor([2, 0]), torch.tensor([[2, 0]])):
        assert torch.equal(reordered(x, order, -1), x[..., [2, 0]])
        assert torch.equal(reordered(x, order, -2), x[..., [2, 0], :])


def test_a_gpu_is_given_more_at_once() -> None:
    assert elements_at_once(torch.device("cuda")) > elements_at_once(torch.device("cpu")) > 0
