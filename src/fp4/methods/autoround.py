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
from fp4.calibration.channel_statistics import survey
from fp4.methods.gptq import search_scales
from fp4.methods.grid import assemble, effective, elements_at_once, nearest
from fp4.methods.rtn import RTNOptions, rtn_block
from fp4.numerics.elements import decode_e2m1, encode_e4m3, unpack_codes
from fp4.numerics.rotation import rotate
from fp4.scheme import Scheme

_LARGEST_OFFSET = 0.4999  # of a step: more than half of one would leave the cell that rounding put a value in


@dataclass(frozen=True)
class AutoRoundOptions:
    """Options of ``autoround``.

    Attributes:
        iters: steps of signed gradient descent for each block, each on one entry of its inputs; 0 is round to nearest.
        lr: of offsets and factors, falling linearly to zero; None is 1/iters: an offset can just reach its bound.
    """

    iters: int = 100
    lr: float | None = None


def _steps(value: Tensor) -> Tensor:
    """Distance of neighbouring grid values at magnitude ``|value|``: 1/2 below 2, 1 below 4, 2 from there on."""
    magnitude = value.abs()
    return torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))


def into_cells(scaled: Tensor, value: Tensor) -> Tensor:
    """``scaled`` moved just inside the interval of numbers that round to ``value`` (on the E2M1 grid), elementwise."""
    above = _LARGEST_OFFSET * torch.where(value >= 0, _steps(value), _steps(value.abs() - 0.25))
    below = _LARGEST_OFFSET * torch.where(value > 0, _steps(value.abs() - 0.25), _steps(value))
    inside = torch.minimum(torch.maximum(scaled, value - below), value + above)
    saturated = (value.abs() == 6) & (scaled.abs() > 6) & (scaled * value > 0)
    return torch.where(saturated, scaled, inside)


class _Learned(nn.Module):
    """The parameters of sibling layers (one, or that of many experts) around where they start.

    Those are offsets ``[E, N, K]`` and scale factors ``[E, N, K/B]``. The weights of all layers are worked out when the
    first of them is run, once for every step, and once more for the gradients of the parameters: what lies between
    parameters and weights is a dozen tensors of their size, which only one stack at a time has in memory then.
    """

    def __init__(self, layers: list[str], weights: list[Tensor], starts: list[LayerResult], scheme: Scheme) -> None:
        super().__init__()
        self.layers, self.scheme, self.starts = layers, scheme, dict(zip(layers, starts, strict=True))
        triples = [start.weight for start in starts]
        units = [triple.global_scale for triple in triples if triple.global_scale is not None]
        self.unit = torch.stack(units)[:, None, None] if units else None
        stored = torch.stack([triple.scales.view(torch.uint8) for triple in triples])
        self.stored = stored.view(triples[0].scales.dtype)
        self.scale = effective(self.stored, self.unit)
        wide, codes = self._wide(self.scale), torch.stack([triple.codes for triple in triples])
        self.latent = into_cells(torch.stack(weights) / wide, decode_e2m1(unpack_codes(codes))) * wide
        self.offset = nn.Parameter(torch.zeros_like(self.latent))
        self.factor = nn.Parameter(torch.ones_like(self.scale))
        #: Of this step, once a layer was run.
        self.weights: Tensor | None = None
        self._each: dict[str, Tensor] = {}

    def _wide(self, scale: Tensor) -> Tensor:
        return scale.repeat_interleave(self.scheme.format.block_size, dim=-1)

    def scales(self) -> Tensor:
        """Block scales as stored now. E8M0 has no room for small changes, so MXFP4 keeps those that it starts with."""
        return self.stored if self.unit is None else encode_e4m3(self.scale * self.factor / self.unit.float())

    def _values(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        scaled = self.latent / scale
        scaled = (scaled + self.offset * _steps(scaled.detach())).clamp(-6, 6)
        return scaled, nearest(scaled.detach())

    def forward(self) -> Tensor:
        """The weights as they would be stored now, with gradients to both parameters: float32 ``[E, N, K]``."""
        scale = self.scale
        if self.unit is not None:
            smooth = scale * self.factor
            stored = effective(self.scales(), self.unit)
            scale = smooth + (stored - smooth).detach()
        scale = self._wide(scale)
        scaled, value = self._values(scale)
        return (scaled + (value - scaled).detach()) * scale

    def weight(self, layer: str) -> Tensor:
        """That of one layer, ``[N, K]``."""
        if self.weights is None:
            with torch.no_grad():
                self.weights = self()
            self.weights.requires_grad_(True)
            self._each = dict(zip(self.layers, self.weights.unbind(), strict=True))
        return self._each[layer]

    def step(self, rate: float, gradient: Tensor) -> None:
        """Follow the signs of the gradients of both parameters, given that of ``weights``."""
        self.weights, self._each = None, {}
        learned = (self.offset,) if self.unit is None else (self.offset, self.factor)
        with torch.enable_grad():
            gradients = torch.autograd.grad(self(), learned, gradient)
        with torch.no_grad():
            for parameter, own, (low, high) in zip(learned, gradients, ((-0.5, 0.5), (0.5, 1.5)), strict=False):
                parameter.sub_(own.sign_(), alpha=rate).clamp_(low, high)

    def read(self, layer: str, x: Tensor) -> Tensor:
        """What a layer multiplies with, rounding passed straight through."""
        start = self.starts[layer]
        values = x if start.rotation is None else rotate(x, start.rotation)
        with torch.no_grad():
            rounded = quantized_input(x, self.scheme, start.rotation, start.input_global_scale)
        return values + (rounded - values).detach()

    @torch.no_grad()
    def results(self, rule: str) -> dict[str, LayerResult]:
        scales = self.scales()
        _, values = self._values(self._wide(effective(scales, self.unit)))
        found = {}
        for layer, value, own in zip(self.layers, values, scales, strict=True):
            start = self.starts[layer]
            found[layer] = start._replace(
                weight=assemble(value, own, start.weight.global_scale, self.scheme.format), rule=rule
            )
        return found


def _stacked(block: Block, start: Mapping[str, LayerResult], weights: Mapping[str, Tensor]) -> list[_Learned]:
    """The layers in ``start``, those of sibling modules (experts) together as far as it pays."""
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
    """Within it the layers of ``block`` compute with what is being learned."""
    with ExitStack() as stack:
        for layer, parameters in ((layer, stacked) for stacked in learned for layer in stacked.layers):
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
    """Squared error of the block's output over all samples, summed."""
    with emulated(block, results):
        return sum(
            (block.run(hidden, i) - targets[i]).double().square().sum().item() for i, hidden in enumerate(block.inputs)
        )


def learn(
    block: Block, start: Mapping[str, LayerResult], weights: Mapping[str, Tensor], iters: int, lr: float, rule: str
) -> dict[str, LayerResult]:
    """Improve ``start`` by ``iters`` steps of signed gradient descent on the squared error of the block's output.

    Args:
        weights: what ``start`` rounded, float32 ``[N, K]`` in the rotated basis.

    Returns:
        the layers learned, or those of ``start`` if their error over all samples is less.
    """
    with torch.no_grad():
        targets = [block.run(hidden, i) for i, hidden in enumerate(block.originals)]
    learned = _stacked(block, start, weights)
    generator = torch.Generator().manual_seed(block.seed)
    kept = [(parameter, parameter.requires_grad) for parameter in block.module.parameters()]
    block.module.requires_grad_(False)
    order: list[int] = []
    with torch.enable_grad(), _learning(block, learned):
        for step in range(iters):
            if not order:
                order = torch.randperm(len(block.inputs), generator=generator).tolist()
            index = order.pop()
            loss = (block.run(block.inputs[index].detach(), index) - targets[index]).float().square().mean()
            run = [own for own in learned if own.weights is not None]
            gradients = list(torch.autograd.grad(loss, [own.weights for own in run if own.weights is not None]))
            for own in reversed(run):
                own.step(lr * (1 - step / iters), gradients.pop())
    for parameter, required in kept:
        parameter.requires_grad_(required)
    found = {layer: result for own in learned for layer, result in own.results(rule).items()}
    results = {layer: found[layer] for layer in start}
    better = output_error(block, results, targets) < output_error(block, start, targets)
    return results if better else dict(start)


def searched(block: Block) -> dict[str, LayerResult]:
    """Rounded to nearest, with the block scales of least rounding error weighted by the energy of the inputs.

    Layers that are rotated, or whose input no sample reached, keep the scales of the scheme's rule.
    """
    results, energy = rtn_block(block, RTNOptions()), survey(block).energy
    for layer, result in results.items():
        scheme, unit = block.layers[layer], result.weight.global_scale
        searches = scheme.format.feeds_errors and scheme.format == scheme.format.base
        if result.rotation is not None or layer not in energy or not searches:
            continue
        weight = block.linear(layer).weight.data.float()
        scales = search_scales(weight, energy[layer], scheme.format, unit)
        wide = effective(scales, unit).repeat_interleave(scheme.format.block_size, dim=-1)
        results[layer] = result._replace(weight=assemble(nearest(weight / wide), scales, unit, scheme.format))
    return results


def autoround_block(block: Block, options: AutoRoundOptions) -> dict[str, LayerResult]:
    """Search block scales for what the inputs weigh, then learn offsets and clipping on the output of the whole block.

    Without steps it is round to nearest by the scheme's rule.
    """
    if not options.iters:
        return rtn_block(block, RTNOptions())
    start = searched(block)
    weights = {}
    for layer in block.layers:
        weight, rotation = block.linear(layer).weight.data.float(), block.rotation(layer)
        weights[layer] = weight if rotation is None else rotate(weight, rotation)
    return learn(block, start, weights, options.iters, options.lr or 1 / options.iters, "autoround")
