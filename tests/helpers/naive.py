"""Quantization methods in plain loops and float64, with which fp4's are compared: no function of fp4 is used.

Rows and columns are few where these are called. What is rounded by fp4 in float32 may fall either way at a tie between
two codes, and the rest of a row then differs; so column by column it is asked whether fp4's own choice is the nearest
one, given the choices that it made before (:func:`fed_targets`).
"""

from __future__ import annotations

import math

import torch
from blocks import e4m3_value
from torch import Tensor

from fp4.numerics.formats import Format

GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BLOCK = {"nvfp4": 16, "mxfp4": 32}


def on_grid(value: float) -> float:
    """The nearest E2M1 value, ties to the even code."""
    code = min(range(8), key=lambda code: (abs(GRID[code] - abs(value)), code % 2))
    return math.copysign(GRID[code], value)


def scale_of(byte: int, name: str) -> float:
    """The value of a stored block scale: E4M3 for NVFP4, E8M0 for MXFP4."""
    return e4m3_value(byte) if name == "nvfp4" else 2.0 ** (byte - 127)


def decoded(
    codes: Tensor, scales: Tensor, global_scale: Tensor | None, fmt: Format, name: str
) -> tuple[Tensor, Tensor]:
    """E2M1 values and effective scales of a quantized tensor ``[N, K/2]``, each ``[N, K]``.

    ``name`` is what its format must be called, with the size of a block where that is not the family's own: nvfp4_64.
    """
    assert fmt.name == name
    name, _, width = name.partition("_")
    unit, size = 1.0 if global_scale is None else float(global_scale), int(width or BLOCK[name])
    assert scales.shape == (codes.shape[0], 2 * codes.shape[1] // size)
    values = torch.empty(codes.shape[0], 2 * codes.shape[1], dtype=torch.float64)
    steps = torch.empty_like(values)
    stored = scales.view(torch.uint8)
    for n, row in enumerate(codes.tolist()):
        for column in range(values.shape[1]):
            code = row[column // 2] >> 4 * (column % 2) & 15
            values[n, column] = GRID[code % 8] * (-1 if code & 8 else 1)
            steps[n, column] = scale_of(int(stored[n, column // size]), name) * unit
    return values, steps


def candidates(block: list[float], name: str, unit: float, offsets: tuple[int, ...]) -> list[int]:
    """Stored scales around the one that maps the largest magnitude to 6 (MXFP4: the OCP floor rule)."""
    amax = max(map(abs, block)) / unit
    if name == "nvfp4":
        start = min(range(1, 127), key=lambda byte: (abs(e4m3_value(byte) - amax / 6), byte % 2))
        return [min(max(start + offset, 1), 126) for offset in offsets]
    start = math.frexp(amax)[1] - 1 - 2 + 127
    return [min(max(start + offset, 0), 252) for offset in offsets]


def best_scale(
    block: list[float], importance: list[float], name: str, unit: float, offsets: tuple[int, ...]
) -> tuple[int, float]:
    """The stored scale of least weighted squared error, the earliest of equals, and by how much the next is worse."""
    costs: dict[int, float] = {}
    for byte in candidates(block, name, unit, offsets):
        scale = scale_of(byte, name) * unit
        costs[byte] = sum(i * (on_grid(v / scale) * scale - v) ** 2 for v, i in zip(block, importance, strict=True))
    best = min(costs, key=costs.__getitem__)
    others = [cost for byte, cost in costs.items() if byte != best]
    return best, min(others, default=math.inf) - costs[best]


def quantized_rows(x: Tensor, name: str, unit: float) -> Tensor:
    """Activations ``[T, K]`` as they are multiplied: every block under the scale that maps its largest to 6."""
    out, size = x.double().clone(), BLOCK[name]
    for row in out:
        for start in range(0, len(row), size):
            block = row[start : start + size]
            scale = scale_of(candidates(block.tolist(), name, unit, (0,))[0], name) * unit
            block.copy_(torch.tensor([on_grid(v / scale) * scale for v in block.tolist()], dtype=torch.float64))
    return out


def mean_outer(x: Tensor, y: Tensor) -> Tensor:
    """The mean over tokens of ``x^T y``: ``[T, K]`` each -> float64 ``[K, K]``."""
    total = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64)
    for one, other in zip(x.double(), y.double(), strict=True):
        total += one[:, None] * other[None, :]
    return total / len(x)


def damped(hessian: Tensor, damping: float) -> Tensor:
    """With a share of its mean diagonal added to the diagonal, where channels never active have that mean before."""
    mean = sum(hessian.diagonal().tolist()) / len(hessian)
    diagonal = [(value or mean) + damping * mean for value in hessian.diagonal().tolist()]
    return hessian - torch.diag(hessian.diagonal()) + torch.diag(torch.tensor(diagonal, dtype=torch.float64))


def falling(hessian: Tensor) -> list[int]:
    """Columns in the order of falling diagonal."""
    return sorted(range(len(hessian)), key=lambda column: -float(hessian[column, column]))


def eliminate(inverse: Tensor, column: int) -> Tensor:
    """The inverse of a Hessian without ``column``, which stays as a row and column of zeros (Optimal Brain Surgeon)."""
    return inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]


def fed_targets(weight: Tensor, hessian: Tensor, order: list[int], quantized: Tensor) -> Tensor:
    """What each column of ``weight`` ``[N, K]`` has become when its turn to be rounded comes.

    ``quantized`` are the values that were chosen. Each error is made up for in the columns that follow, as the paper of
    Optimal Brain Quantization (arXiv 2208.11580) has it: no Cholesky factor, one column of the inverse at a time.
    """
    inverse, left = torch.linalg.inv(hessian.double()), weight.double().clone()
    targets = torch.empty_like(left)
    for column in order:
        targets[:, column] = left[:, column]
        error = (left[:, column] - quantized[:, column]) / inverse[column, column]
        left -= error[:, None] * inverse[None, column]
        inverse = eliminate(inverse, column)
    return targets


def assert_nearest(targets: Tensor, values: Tensor, scales: Tensor, slack: float = 1e-3) -> None:
    """Every value on the grid is the one nearest to its target, up to ``slack`` steps of rounding in float32."""
    scaled = targets / scales
    grid = torch.tensor([*GRID, *(-value for value in GRID[1:])], dtype=torch.float64)
    least = (scaled[..., None] - grid).abs().amin(dim=-1)
    worst = ((scaled - values).abs() - least).amax()
    assert worst <= slack, f"a value is {worst:.3g} farther than the nearest"


def round_in_turn(target: list[float], inverse: Tensor, scale: float) -> list[float]:
    """A block of columns rounded one after the other, each error made up for in those that follow."""
    left, out = list(target), []
    for column in range(len(left)):
        value = on_grid(left[column] / scale) * scale
        error = (left[column] - value) / float(inverse[column, column])
        for later in range(column, len(left)):
            left[later] -= error * float(inverse[column, later])
        inverse = eliminate(inverse, column)
        out.append(value)
    return out


def quadratic(error: Tensor, hessian: Tensor) -> float:
    """``error^T H error``."""
    return float(error @ hessian.double() @ error)


def swept(
    weight: Tensor, hessian: Tensor, blocks: list[int], name: str, unit: float, offsets: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Blocks of columns rounded in turn, each under the candidate scale that costs least while later blocks make up.

    Returns:
        values ``[N, K]`` and stored scales ``[N, K/B]``.
    """
    size, out = BLOCK[name], torch.empty_like(weight, dtype=torch.float64)
    stored = torch.zeros(len(weight), weight.shape[1] // size, dtype=torch.uint8)
    for n in range(len(weight)):
        inverse, left = torch.linalg.inv(hessian.double()), weight[n].double().clone()
        for block in blocks:
            inside = slice(block * size, (block + 1) * size)
            target, own = left[inside].tolist(), inverse[inside, inside]
            costs = {}
            for byte in candidates(target, name, unit, offsets):
                rounded = round_in_turn(target, own, scale_of(byte, name) * unit)
                error = torch.tensor(rounded, dtype=torch.float64) - left[inside]
                costs[byte] = quadratic(error, torch.linalg.inv(own)), rounded
            byte = min(costs, key=lambda byte: costs[byte][0])
            stored[n, block], out[n, inside] = byte, torch.tensor(costs[byte][1], dtype=torch.float64)
            for column in range(inside.start, inside.stop):
                left -= (left[column] - out[n, column]) / inverse[column, column] * inverse[column]
                inverse = eliminate(inverse, column)
    return out, stored


def descended(
    weight: Tensor, values: Tensor, stored: Tensor, hessian: Tensor, name: str, unit: float, offsets: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """One pass over the blocks: each is rounded anew with all others fixed, and kept where the whole row costs less."""
    size, out, stored = BLOCK[name], values.double().clone(), stored.clone()
    for n in range(len(weight)):
        for block in range(weight.shape[1] // size):
            inside = slice(block * size, (block + 1) * size)
            own = hessian[inside, inside].double()
            inverse = torch.linalg.inv(own)
            pull = hessian[inside].double() @ (out[n] - weight[n].double())
            target = (out[n, inside] - inverse @ pull).tolist()
            trials = []
            for offset in offsets:
                low, high = (1, 126) if name == "nvfp4" else (0, 252)
                byte = min(max(int(stored[n, block]) + offset, low), high)
                trial = out[n].clone()
                rounded = round_in_turn(target, inverse, scale_of(byte, name) * unit)
                trial[inside] = torch.tensor(rounded, dtype=torch.float64)
                trials.append((quadratic(trial - weight[n].double(), hessian), byte, trial))
            cost, byte, trial = min(trials, key=lambda trial: trial[0])
            if cost < quadratic(out[n] - weight[n].double(), hessian):
                stored[n, block], out[n] = byte, trial
    return out, stored
