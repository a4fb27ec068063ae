"""fp4.numerics.rotation: the matrices, what applying them does, and the sharing of equal ones."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from fp4.numerics.formats import MXFP4, NVFP4, Format, dequantize, quantize
from fp4.numerics.rotation import ROTATIONS, gsr, hadamard, identity, rotate, share

SIZES = [16, 32, 64, 128, 256, 512, 1024]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations_are_orthogonal_in_float64(name: str, size: int) -> None:
    matrix = ROTATIONS[name](size)
    assert matrix.dtype == torch.float64
    assert matrix.shape == (size, size)
    assert (matrix @ matrix.T - torch.eye(size, dtype=torch.float64)).abs().max() <= 1e-12
    assert (matrix.T @ matrix - torch.eye(size, dtype=torch.float64)).abs().max() <= 1e-12


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["hadamard", "gsr"])
def test_hadamard_and_gsr_are_signs_of_exactly_orthogonal_rows(name: str, size: int) -> None:
    matrix = ROTATIONS[name](size)
    signs = matrix.sign()
    assert torch.equal(matrix, signs / size**0.5)
    assert torch.equal(signs @ signs.T, size * torch.eye(size, dtype=torch.float64))
    assert torch.equal(matrix, matrix.T), "both are their own inverse"


@pytest.mark.parametrize("size", SIZES)
def test_hadamard_is_sylvesters(size: int) -> None:
    signs = hadamard(size).sign()
    for i, j in [(0, 0), (1, 1), (3, 5), (size - 1, size - 1), (size - 2, size // 2)]:
        assert signs[i, j] == (-1) ** (i & j).bit_count()


@pytest.mark.parametrize("size", SIZES)
def test_gsr_is_ordered_by_sequency(size: int) -> None:
    changes = (gsr(size).sign().diff(dim=1) != 0).sum(dim=1)
    assert changes.tolist() == list(range(size))


@pytest.mark.parametrize("size", SIZES)
def test_gsr_has_the_rows_of_hadamard(size: int) -> None:
    assert {tuple(row) for row in gsr(size).tolist()} == {tuple(row) for row in hadamard(size).tolist()}


def test_identity_changes_nothing() -> None:
    x = torch.randn(3, 96)
    assert torch.equal(rotate(x, identity(32)), x)


@pytest.mark.parametrize("size", [-4, 0, 3, 12, 24, 48, 1023])
@pytest.mark.parametrize("name", ["hadamard", "gsr"])
def test_sizes_that_are_no_power_of_two_are_refused(name: str, size: int) -> None:
    with pytest.raises(ValueError, match=rf"size {size} .*power of two"):
        ROTATIONS[name](size)


def test_the_callers_default_device_and_dtype_do_not_matter() -> None:
    with torch.device("meta"):
        matrices = [rotation(32) for rotation in ROTATIONS.values()]
    assert {(m.device.type, m.dtype) for m in matrices} == {("cpu", torch.float64)}


@pytest.mark.parametrize("size", [16, 32, 128])
@pytest.mark.parametrize("name", ROTATIONS)
def test_rotating_is_a_block_diagonal_product(name: str, size: int) -> None:
    x = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(0))
    matrix = ROTATIONS[name](size)
    expected = x.double() @ torch.block_diag(*[matrix] * (256 // size))
    rotated = rotate(x, matrix)
    assert rotated.shape == x.shape
    assert rotated.dtype == torch.float32
    assert (rotated - expected).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [16, 64, 256])
@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations_of_weight_and_input_cancel(name: str, size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 512, generator=generator).to(dtype)
    weight = torch.randn(11, 512, generator=generator).to(dtype)
    matrix = ROTATIONS[name](size)
    product = rotate(x, matrix) @ rotate(weight, matrix).T
    expected = x.double() @ weight.double().T
    assert (product - expected).abs().max() < 1e-4


@pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=lambda fmt: fmt.name)
def test_gsr_and_hadamard_of_one_block_round_to_the_same_values(fmt: Format) -> None:
    # They differ by a permutation within the block, and no abs_max scale depends on the order of a block.
    x = torch.randint(-100, 100, (8, 4 * fmt.block_size), generator=torch.Generator().manual_seed(2)).float()
    results = []
    for name in ("hadamard", "gsr"):
        signs = ROTATIONS[name](fmt.block_size).sign()  # products of integers are exact
        rounded = dequantize(*quantize(rotate(x, signs), fmt))
        results.append(rounded.view(-1, fmt.block_size).sort().values)
    assert torch.equal(*results)


def test_rotation_spreads_an_outlier_over_its_group() -> None:
    x = torch.zeros(1, 64)
    x[0, 5] = 8.0
    assert torch.equal(rotate(x, hadamard(16)).abs(), torch.tensor([[2.0] * 16 + [0.0] * 48]))


def test_share_gives_one_tensor_for_equal_rotations() -> None:
    first = share(hadamard(32).float())
    assert share(hadamard(32).float()) is first
    assert share(gsr(32).float()) is not first
    assert share(hadamard(64).float()) is not first
    assert share(hadamard(32)) is not first, "another dtype"


def test_share_keeps_no_rotation_alive() -> None:
    shared = share(hadamard(128).float() * 2)
    gone = weakref.ref(shared)
    del shared
    gc.collect()
    assert gone() is None


def test_share_leaves_meta_tensors_alone() -> None:
    first, second = (torch.empty(16, 16, device="meta") for _ in range(2))
    assert share(first) is first
    assert share(second) is second
