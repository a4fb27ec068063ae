"""Equalisation of channels: a block becomes an equivalent one that rounds better, before it is quantized.

The sixteen or thirty-two channels of an FP4 block share a scale, so a large channel costs its neighbours their
precision, in activations as in weights. Channel j of a layer's input is divided by s_j and column j of its weight
multiplied by it; the division is folded into what produced the input: the gain of a norm, or the rows of the linear
layer before it (up before down, v before o). With ``s = (rms of input)^a / (rms of column)^(1-a)`` both sides share the
burden (SmoothQuant, arXiv 2211.10438, with root mean squares for maxima).

The code knows no architecture: it finds producers by watching the block run, and takes a fold back that changes the
block's output.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fp4.calibration.block import Block, capture_inputs, siblings
from fp4.calibration.channel_statistics import ChannelStatistics
from fp4.calibration.layer_order import stages

_SAME_OUTPUT = 1e-3  # a change of the output up to this share of its norm counts as rounding


@dataclass
class _Fold:
    """A division of channels between the module that produces them and the layers that read them, and only they do.

    Attributes:
        producer: a norm or a linear layer.
        consumers: the layers that read its output.
        layers: their names.
        width: how many neighbouring channels of the producer are repeated together (the heads of grouped attention).
        repeats: how many times the consumers read each of them.
        dtype: what the block computes in.
        saved: parameters that were changed, with the values they had before.
    """

    producer: nn.Module
    consumers: list[nn.Linear]
    layers: list[str]
    width: int
    repeats: int
    dtype: torch.dtype
    saved: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def scales(self, energy: Tensor, alpha: float) -> Tensor:
        """The divisors s of the producer's channels, from the mean square ``[K]`` of the consumers' inputs."""
        columns = torch.stack([layer.weight.float().square().mean(dim=0) for layer in self.consumers]).mean(dim=0)
        if self.repeats > 1:
            energy, columns = (v.view(-1, self.repeats, self.width).mean(dim=1).flatten() for v in (energy, columns))
        known = (energy > 0) & (columns > 0)
        s = torch.where(known, energy, 1.0).pow(alpha / 2) / torch.where(known, columns, 1.0).pow((1 - alpha) / 2)
        middle = s[known].log().mean().exp() if bool(known.any()) else s.new_ones(())
        return torch.where(known, s / middle, 1.0)

    def apply(self, s: Tensor) -> Tensor:
        """Divide the producer's channels by ``s``, multiply the consumers' columns, and return s by column, ``[K]``.

        Gains of norms stay representable in bfloat16: s is adjusted to how they round, so that the fold is exact.
        """
        weight = self.producer.weight
        assert isinstance(weight, nn.Parameter)
        if weight.dim() == 1:
            gain = (weight.data.float() / s).bfloat16().float()
            usable = torch.isfinite(gain) & (gain != 0) & (weight.data != 0)
            gain = torch.where(usable, gain, weight.data.float())
            s = torch.where(usable, weight.data.float() / gain, 1.0)
            self._set(weight, gain)
        else:
            self._set(weight, weight.data / s[:, None])
        bias = getattr(self.producer, "bias", None)
        if isinstance(bias, nn.Parameter):
            self._set(bias, bias.data / s)
        if self.repeats > 1:
            s = s.view(-1, 1, self.width).expand(-1, self.repeats, -1).flatten()
        for layer in self.consumers:
            self._set(layer.weight, layer.weight.data * s)
        return s

    def _set(self, parameter: Tensor, value: Tensor) -> None:
        self.saved.append((parameter, parameter.data))
        parameter.data = value.to(torch.promote_types(parameter.dtype, self.dtype))

    def undo(self) -> None:
        """Give all parameters back the values they had."""
        while self.saved:
            parameter, value = self.saved.pop()
            parameter.data = value


def _find_folds(block: Block) -> dict[str, _Fold]:
    """Candidates for folds by the first of their consumers' names; whether they keep the output is not known yet."""
    norms: dict[int, nn.Module] = {}  # by the data pointer of their output
    alive: list[Tensor] = []  # these tensors are kept, so that no other gets their data pointer
    previous: dict[str, str | None] = {}  # the layer that ran before each layer
    sources: dict[str, int] = {}  # the data pointer of each layer's input
    run: list[str] = []

    def see_norm(module: nn.Module, arguments: object, output: object) -> None:
        if isinstance(output, Tensor):
            alive.append(output)
            norms[output.data_ptr()] = module

    def see(layer: str, x: Tensor) -> None:
        alive.append(x)
        sources.setdefault(layer, x.data_ptr())
        previous.setdefault(layer, run[-1] if run else None)
        run.append(layer)

    handles = [
        module.register_forward_hook(see_norm)
        for module in block.module.modules()
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter) and weight.dim() == 1
    ]
    with torch.no_grad(), capture_inputs(block, block.layers, see):
        block.run(block.inputs[0], 0)
    for handle in handles:
        handle.remove()
    head_dim = next((h for m in block.module.modules() if isinstance(h := getattr(m, "head_dim", None), int)), 0)
    folds = {}
    for layers in (layers for stage in stages(block) for layers in stage):
        consumers, columns = [block.linear(layer) for layer in layers], block.linear(layers[0]).in_features
        producer = norms.get(sources[layers[0]])
        if producer is None:
            before = previous[layers[0]]
            producer = None if before is None else block.linear(before)
        if producer is None or producer in consumers:
            continue
        gain = producer.weight
        assert isinstance(gain, nn.Parameter)
        width = gain.shape[0]
        if width == columns:
            folds[layers[0]] = _Fold(producer, consumers, layers, width, 1, block.dtype)
        elif isinstance(producer, nn.Linear) and head_dim and columns % width == 0 and width % head_dim == 0:
            # In grouped attention several query heads read the same value head.
            folds[layers[0]] = _Fold(producer, consumers, layers, head_dim, columns // width, block.dtype)
    return folds


def equalise(block: Block, alpha: float, statistics: ChannelStatistics) -> list[str]:
    """Turn ``block.module`` into an equivalent one whose channels are alike, in place.

    Args:
        block: with samples, the first of which shows whether a fold keeps the output.
        alpha: share of the differences that inputs give up; 0 leaves them to the inputs, 1 moves all to the weights.
        statistics: of the block before; updated to those of the equivalent block.

    Returns:
        for each fold that was valid, the first of the layers whose input it changed.
    """
    folds = _find_folds(block)
    with torch.no_grad():
        original = block.run(block.inputs[0], 0).float()

        def changed() -> bool:
            difference = (block.run(block.inputs[0], 0).float() - original).norm()
            return not bool(difference <= _SAME_OUTPUT * original.norm())

        applied: dict[str, Tensor] = {}

        def apply(layers: list[str]) -> None:
            # Folds do not disturb each other: one changes the rows of a producer, another the producer's columns.
            for layer in layers:
                applied[layer] = folds[layer].apply(folds[layer].scales(statistics.energy[layer], alpha))

        kept = [layer for layer in folds if layer in statistics.energy]
        apply(kept)
        if changed():
            for layer in reversed(kept):
                folds[layer].undo()
            # The folds of all experts are judged together, because few tokens reach some of them, so that the output
            # would hide a wrong fold of one.
            candidates: dict[str, list[str]] = {}
            for layer in kept:
                candidates.setdefault(siblings(layer), []).append(layer)
            kept = []
            for layers in candidates.values():
                apply(layers)
                if changed():
                    for layer in reversed(layers):
                        folds[layer].undo()
                else:
                    kept += layers
    for layer in kept:
        for name in folds[layer].layers:
            statistics.energy[name] = statistics.energy[name] / applied[layer].square()
            statistics.amax[name] = statistics.amax[name] / applied[layer].abs()
    return kept
