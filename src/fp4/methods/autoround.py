"""AutoRound: rounding offsets and clipping factors learned by signed gradient descent on the output of a block.

Every weight gets an offset of at most half a step of the grid that is added before it is rounded, every block scale a
factor in [1/2, 3/2]; both follow the sign of the gradient of the squared error of the block's output, with
straight-through estimates of rounding, while the inputs of the layers are rounded to FP4 as they will be. What was
learned is kept only where it lowers the error over all samples. AutoRound: arXiv 2309.05516.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fp4.calibration.block import Block, LayerResult, emulated, quantized_input, siblings
from fp4.calibration.channel_statistics import channel_statistics
from fp4.methods.grid import assemble, nearest
from fp4.methods.rtn import RTNOptions, rtn_block
from fp4.methods.scale_search import effective, search_scales
from fp4.methods.tiling import elements_at_once
from fp4.numerics.elements import decode_e2m1, unpack_codes
from fp4.numerics.rotation import rotate
from fp4.scheme import Scheme

_LARGEST_OFFSET = 0.4999  # in steps of the grid; half a step or more would round to another value


@dataclass(frozen=True)
class AutoRoundOptions:
    """Options of ``autoround``.

    Attributes:
        iters: steps of signed gradient descent for each block, each on one entry of its inputs; 0 is round to nearest.
        lr: learning rate of offsets and factors, falling linearly to zero; None is 1/iters, with which an offset can
            just reach its bound.
    """

    iters: int = 100
    lr: float | None = None


def _grid_step(value: Tensor) -> Tensor:
    """The distance between neighbouring grid values around ``value``: 1/2 below magnitude 2, 1 below 4, 2 above."""
    magnitude = value.abs()
    return torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))


def into_cells(scaled: Tensor, value: Tensor) -> Tensor:
    """Move numbers just inside the interval that rounds to ``value``.

    Args:
        scaled: float32 ``[...]``.
        value: the E2M1 values to round to, of the same shape.

    Returns:
        the nearest number inside that interval, elementwise; what saturates stays as it is.
    """
    above = _LARGEST_OFFSET * torch.where(value >= 0, _grid_step(value), _grid_step(value.abs() - 0.25))
    below = _LARGEST_OFFSET * torch.where(value > 0, _grid_step(value.abs() - 0.25), _grid_step(value))
    inside = torch.minimum(torch.maximum(scaled, value - below), value + above)
    saturated = (value.abs() == 6) & (scaled.abs() > 6) & (scaled * value > 0)
    return torch.where(saturated, scaled, inside)


class _Learned(nn.Module):
    """Learnable rounding offsets and scale factors of E layers of one shape (experts, or a single layer).

    The weights of all layers are computed when the first of them runs, once for every step, and once more for the
    gradients of the parameters. Between parameters and weights lie a dozen tensors of their size, which only one stack
    at a time has in memory this way.

    Attributes:
        offset: what is added to each weight before it is rounded, in steps of the grid: float32 ``[E, N, K]``.
        factor: of each block scale: float32 ``[E, N, K/B]``.
        weights: weights of the current step, ``[E, N, K]``; set by the first forward pass of one of the layers.
    """

    def __init__(self, layers: list[str], weights: list[Tensor], starts: list[LayerResult], scheme: Scheme) -> None:
        super().__init__()
        self.layers, self.scheme, self.format = layers, scheme, scheme.format
        self.starts = dict(zip(layers, starts, strict=True))
        quantized = [start.weight for start in starts]
        global_scales = [weight.global_scale for weight in quantized if weight.global_scale is not None]
        self.global_scale = torch.stack(global_scales)[:, None, None] if global_scales else None
        block_scales = torch.stack([weight.scales.view(torch.uint8) for weight in quantized])
        self.block_scales = block_scales.view(quantized[0].scales.dtype)
        self.scale = effective(self.block_scales, self.global_scale)
        scale, codes = self._by_column(self.scale), torch.stack([weight.codes for weight in quantized])
        self.latent = into_cells(torch.stack(weights) / scale, decode_e2m1(unpack_codes(codes))) * scale
        self.offset = nn.Parameter(torch.zeros_like(self.latent))
        self.factor = nn.Parameter(torch.ones_like(self.scale))
        self.weights: Tensor | None = None
        self._weight_of: dict[str, Tensor] = {}

    def _by_column(self, scale: Tensor) -> Tensor:
        """Scales of blocks ``[..., K/B]`` repeated for each of their columns ``[..., K]``."""
        return scale.repeat_interleave(self.scheme.format.block_size, dim=-1)

    def scales(self) -> Tensor:
        """Block scales as they would be stored now."""
        if not self.format.fine_scales:
            return self.block_scales
        exact = self.scale * self.factor
        return self.format.nearest_scales(exact if self.global_scale is None else exact / self.global_scale.float())

    def _rounded(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Weights over ``scale`` ``[E, N, K]`` with their offsets, and the grid values that they round to."""
        scaled = self.latent / scale
        scaled = (scaled + self.offset * _grid_step(scaled.detach())).clamp(-6, 6)
        return scaled, nearest(scaled.detach())

    def forward(self) -> Tensor:
        """The weights as they would be stored now, with gradients to both parameters: float32 ``[E, N, K]``."""
        scale = self.scale
        if self.format.fine_scales:
            exact = scale * self.factor
            stored = effective(self.scales(), self.global_scale)
            scale = exact + (stored - exact).detach()
        scale = self._by_column(scale)
        scaled, value = self._rounded(scale)
        return (scaled + (value - scaled).detach()) * scale

    def weight(self, layer: str) -> Tensor:
        """The weight of one layer in this step, ``[N, K]``."""
        if self.weights is None:
            with torch.no_grad():
                self.weights = self()
            self.weights.requires_grad_(True)
            self._weight_of = dict(zip(self.layers, self.weights.unbind(), strict=True))
        return self._weight_of[layer]

    def step(self, rate: float, gradient: Tensor) -> None:
        """Move both parameters by ``rate`` against the sign of their gradients, given the gradient of ``weights``."""
        self.weights, self._weight_of = None, {}
        parameters = [(self.offset, -0.5, 0.5)]
        if self.format.fine_scales:
            parameters.append((self.factor, 0.5, 1.5))
        with torch.enable_grad():
            gradients = torch.autograd.grad(self(), [parameter for parameter, _, _ in parameters], gradient)
        with torch.no_grad():
            for (parameter, low, high), change in zip(parameters, gradients, strict=True):
                parameter.sub_(change.sign_(), alpha=rate).clamp_(low, high)

    def read(self, layer: str, x: Tensor) -> Tensor:
        """The input ``[..., K]`` as the layer multiplies it, with a gradient as if it were not rounded."""
        start = self.starts[layer]
        values = x if start.rotation is None else rotate(x, start.rotation)
        with torch.no_grad():
            rounded = quantized_input(x, self.scheme, start.rotation, start.input_global_scale)
        return values + (rounded - values).detach()

    @torch.no_grad()
    def results(self, rule: str) -> dict[str, LayerResult]:
        """The layers quantized with what was learned."""
        scales = self.scales()
        _, values = self._rounded(self._by_column(effective(scales, self.global_scale)))
        results = {}
        for layer, layer_values, layer_scales in zip(self.layers, values, scales, strict=True):
            start = self.starts[layer]
            weight = assemble(layer_values, layer_scales, start.weight.global_scale, self.scheme.format)
            results[layer] = start._replace(weight=weight, rule=rule)
        return results


def _stacked(block: Block, start: Mapping[str, LayerResult], weights: Mapping[str, Tensor]) -> list[_Learned]:
    """Parameters for all layers, in stacks of alike layers of sibling modules (experts) that fit into a cache."""
    stacks: dict[object, list[list[str]]] = {}
    for layer, weight in weights.items():
        alike = stacks.setdefault((siblings(layer), weight.shape, block.layers[layer]), [[]])
        if alike[-1] and (len(alike[-1]) + 1) * weight.numel() > elements_at_once(weight.device):
            alike.append([])
        alike[-1].append(layer)
    return [
        _Learned(
            layers, [weights[layer] for layer in layers], [start[layer] for layer in layers], block.layers[layers[0]]
        )
        for alike in stacks.values()
        for layers in alike
    ]


@contextmanager
def _learning(block: Block, learned: list[_Learned]) -> Iterator[None]:
    """Within this context the layers of ``block`` compute with the weights that are being learned."""
    with ExitStack() as stack:
        for layer, parameters in ((layer, one) for one in learned for layer in one.layers):
            linear = block.linear(layer)

            def forward(
                x: Tensor, layer: str = layer, linear: nn.Linear = linear, parameters: _Learned = parameters
            ) -> Tensor:
                return nn.functional.linear(parameters.read(layer, x), parameters.weight(layer), linear.bias)

            linear.__dict__["forward"] = forward
            stack.callback(linear.__dict__.pop, "forward")
        yield


@torch.no_grad()
def output_error(block: Block, results: Mapping[str, LayerResult], targets: list[Tensor]) -> float:
    """Sum of the squared errors of the quantized block's output over all samples.

    Args:
        block: the dense block, with its samples.
        results: its layers quantized.
        targets: what the output should be, ``[batch, tokens, hidden]`` for each entry of ``block.inputs``.
    """
    with emulated(block, results):
        return sum(
            (block.run(hidden, i) - targets[i]).double().square().sum().item() for i, hidden in enumerate(block.inputs)
        )


def learn(
    block: Block, start: Mapping[str, LayerResult], weights: Mapping[str, Tensor], *, iters: int, lr: float, rule: str
) -> dict[str, LayerResult]:
    """Improve quantized layers by signed gradient descent on the squared error of the block's output.

    Args:
        block: the dense block, with its samples and the original ones.
        start: its layers quantized.
        weights: what ``start`` rounded, float32 ``[N, K]``, rotated where the scheme rotates.
        iters: steps, each on one entry of ``block.inputs``.
        lr: learning rate of the first step; it falls linearly to zero.
        rule: the name of the method in the results.

    Returns:
        the layers learned, or those of ``start`` if their error over all samples is less.
    """
    with torch.no_grad():
        targets = [block.run(hidden, i) for i, hidden in enumerate(block.originals)]
    learned = _stacked(block, start, weights)
    generator = torch.Generator().manual_seed(block.seed)
    required_before = [(parameter, parameter.requires_grad) for parameter in block.module.parameters()]
    block.module.requires_grad_(False)
    order: list[int] = []
    with torch.enable_grad(), _learning(block, learned):
        for step in range(iters):
            if not order:
                order = torch.randperm(len(block.inputs), generator=generator).tolist()
            index = order.pop()
            loss = (block.run(block.inputs[index].detach(), index) - targets[index]).float().square().mean()
            # Experts that this batch did not reach have no weights in this step.
            reached = [stack for stack in learned if stack.weights is not None]
            gradients = list(
                torch.autograd.grad(loss, [stack.weights for stack in reached if stack.weights is not None])
            )
            for stack in reversed(reached):
                stack.step(lr * (1 - step / iters), gradients.pop())
    for parameter, required in required_before:
        parameter.requires_grad_(required)
    by_layer = {layer: result for stack in learned for layer, result in stack.results(rule).items()}
    results = {layer: by_layer[layer] for layer in start}
    better = output_error(block, results, targets) < output_error(block, start, targets)
    return results if better else dict(start)


def searched(block: Block) -> dict[str, LayerResult]:
    """The layers rounded to nearest, with the block scales of least rounding error weighted by the inputs' energy.

    Layers that are rotated, or that no sample reached, keep the scales of the scheme's rule.
    """
    results, energy = rtn_block(block, RTNOptions()), channel_statistics(block).energy
    for layer, result in results.items():
        scheme, global_scale = block.layers[layer], result.weight.global_scale
        searches = scheme.format.feeds_errors and scheme.format == scheme.format.base
        if result.rotation is not None or layer not in energy or not searches:
            continue
        weight = block.linear(layer).weight.data.float()
        scales = search_scales(weight, energy[layer], scheme.format, global_scale)
        scale = effective(scales, global_scale).repeat_interleave(scheme.format.block_size, dim=-1)
        results[layer] = result._replace(weight=assemble(nearest(weight / scale), scales, global_scale, scheme.format))
    return results


def autoround_block(block: Block, options: AutoRoundOptions) -> dict[str, LayerResult]:
    """AutoRound on all layers of ``block``, from block scales that were searched with the energy of the inputs.

    With ``options.iters`` of 0 the layers are rounded to nearest by the scheme's rule.
    """
    if not options.iters:
        return rtn_block(block, RTNOptions())
    start = searched(block)
    weights = {}
    for layer in block.layers:
        weight, rotation = block.linear(layer).weight.data.float(), block.rotation(layer)
        weights[layer] = weight if rotation is None else rotate(weight, rotation)
    lr = options.lr or 1 / options.iters
    return learn(block, start, weights, iters=options.iters, lr=lr, rule="autoround")
