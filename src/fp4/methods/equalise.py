"""Channels made alike before they are quantized: a block becomes an equivalent one that rounds better.

The sixteen or thirty-two channels of an FP4 block share a scale, so a large channel costs its neighbours their
precision, in activations as in weights. Channel j of a layer's input is divided by s_j and column j of its weight
multiplied by it; the division is folded into what produced the input: the gain of a norm, or the rows of the linear
layer before it (up before down, v before o). With ``s = (rms of input)^a / (rms of column)^(1-a)`` both sides share the
burden (SmoothQuant, arXiv 2211.10438, with root mean squares for maxima).

No architecture is known here: producers are found by watching the block run, and a fold that changes the block's output
is taken back.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fp4.calibration.block import Block, capture_inputs, siblings
from fp4.calibration.channel_statistics import Survey
from fp4.calibration.layer_order import stages

_SAME_OUTPUT = 1e-3  # largest change of the output, relative to its norm, that is put down to rounding


@dataclass
class _Fold:
    """A producer and the layers that alone read it; ``width`` neighbouring channels are repeated ``repeats`` times.

    ``dtype`` is what the block computes in.
    """

    producer: nn.Module
    consumers: list[nn.Linear]
    layers: list[str]
    width: int
    repeats: int
    dtype: torch.dtype
    saved: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def scales(self, energy: Tensor, alpha: float) -> Tensor:
        """s for the producer's channels, from the mean square of the consumers' inputs ``[K]``."""
        columns = torch.stack([layer.weight.float().square().mean(dim=0) for layer in self.consumers]).mean(dim=0)
        if self.repeats > 1:
            energy, columns = (v.view(-1, self.repeats, self.width).mean(dim=1).flatten() for v in (energy, columns))
        known = (energy > 0) & (columns > 0)
        s = torch.where(known, energy, 1.0).pow(alpha / 2) / torch.where(known, columns, 1.0).pow((1 - alpha) / 2)
        middle = s[known].log().mean().exp() if bool(known.any()) else s.new_ones(())
        return torch.where(known, s / middle, 1.0)

    def apply(self, s: Tensor) -> Tensor:
        """Fold ``s`` in, exactly, and return it as the consumers' channels ``[K]`` see it.

        Gains of norms stay representable in bfloat16, and s follows their rounding.
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
        while self.saved:
            parameter, value = self.saved.pop()
            parameter.data = value


def _find_folds(block: Block) -> dict[str, _Fold]:
    """Folds by the first of the layers that read the product, not yet known to be valid."""
    norms: dict[int, nn.Module] = {}
    alive: list[Tensor] = []
    before: dict[str, str | None] = {}
    sources: dict[str, int] = {}
    last: list[str] = []

    def see_norm(module: nn.Module, arguments: object, output: object) -> None:
        if isinstance(output, Tensor):
            alive.append(output)
            norms[output.data_ptr()] = module

    def see(layer: str, x: Tensor) -> None:
        alive.append(x)
        sources.setdefault(layer, x.data_ptr())
        before.setdefault(layer, last[-1] if last else None)
        last.append(layer)

    handles = [
        module.register_forward_hook(see_norm)
        for module in block.module.modules()
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter) and weight.dim() == 1
    ]
    with torch.no_grad(), capture_inputs(block, block.layers, see):
        block.run(block.inputs[0], 0)
    for handle in handles:
        handle.remove()
    head = next((h for m in block.module.modules() if isinstance(h := getattr(m, "head_dim", None), int)), 0)
    folds = {}
    for layers in (layers for stage in stages(block) for layers in stage):
        consumers, columns = [block.linear(layer) for layer in layers], block.linear(layers[0]).in_features
        producer = norms.get(sources[layers[0]])
        if producer is None:
            previous = before[layers[0]]
            producer = None if previous is None else block.linear(previous)
        if producer is None or producer in consumers:
            continue
        gain = producer.weight
        assert isinstance(gain, nn.Parameter)
        width = gain.shape[0]
        if width == columns:
            folds[layers[0]] = _Fold(producer, consumers, layers, width, 1, block.dtype)
        elif isinstance(producer, nn.Linear) and head and columns % width == 0 and width % head == 0:
            # Heads that share a value.
            folds[layers[0]] = _Fold(producer, consumers, layers, head, columns // width, block.dtype)
    return folds


def equalise(block: Block, alpha: float, seen: Survey) -> list[str]:
    """Makes ``block.module`` an equivalent one with channels alike, in place.

    Args:
        alpha: share of the differences that inputs give up; 0 leaves them to the inputs, 1 moves all to the weights.
        seen: a survey of the block, which is made to tell of the equivalent one.

    Returns:
        for each fold that was valid, the first of the layers whose input it changed.
    """
    folds = _find_folds(block)
    with torch.no_grad():
        wanted = block.run(block.inputs[0], 0).float()

        def changed() -> bool:
            difference = (block.run(block.inputs[0], 0).float() - wanted).norm()
            return not bool(difference <= _SAME_OUTPUT * wanted.norm())

        applied: dict[str, Tensor] = {}

        def apply(layers: list[str]) -> None:
            # A producer may itself read what an earlier fold has scaled: that is in its columns, not in its rows.
            for layer in layers:
                applied[layer] = folds[layer].apply(folds[layer].scales(seen.energy[layer], alpha))

        kept = [layer for layer in folds if layer in seen.energy]
        apply(kept)
        if changed():
            for layer in reversed(kept):
                folds[layer].undo()
            # Experts stand or fall together: the output may hide a wrong fold of one that few tokens are sent to.
            tried: dict[str, list[str]] = {}
            for layer in kept:
                tried.setdefault(siblings(layer), []).append(layer)
            kept = []
            for layers in tried.values():
                apply(layers)
                if changed():
                    for layer in reversed(layers):
                        folds[layer].undo()
                else:
                    kept += layers
    for layer in kept:
        for name in folds[layer].layers:
            seen.energy[name] = seen.energy[name] / applied[layer].square()
            seen.amax[name] = seen.amax[name] / applied[layer].abs()
    return kept
