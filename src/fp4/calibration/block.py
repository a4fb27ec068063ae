"""One decoder block on its way to FP4, what a method returns for each of its layers, and what those layers compute."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as linear_function

from fp4 import backends
from fp4.backends.base import Backend
from fp4.numerics.formats import FP8, QuantizedTensor, fake_quantize_fp8
from fp4.numerics.rotation import rotate, rotation_for
from fp4.scheme import Scheme


class LayerResult(NamedTuple):
    """A quantized layer.

    Attributes:
        weight: canonical, in the rotated basis.
        rotation: float32 ``[h, h]`` that the layer's input is rotated by, None for none.
        input_global_scale: float64 ``[]``, where FP4 activations have a calibrated (static) global scale.
        rule: how the block scales were chosen, for the report.
    """

    weight: QuantizedTensor
    rotation: Tensor | None
    input_global_scale: Tensor | None
    rule: str


@dataclass
class Block:
    """One decoder block with the samples that reach it.

    Attributes:
        name: of the block in the model, such as ``model.layers.3``; errors name layers with it.
        module: dense, in its compute dtype (float32 on CPU), on the compute device; weights of ``layers`` may be in the
            dtype of the checkpoint, if that is half of it. A method may turn it into an equivalent one in place
            (channels rescaled between a norm and the layers that read it), so whoever writes the block writes its other
            parameters as they are afterwards, rounded to the dtype of the checkpoint, and compares quantized weights
            with those that the module has then.
        layers: name within ``module`` -> scheme; all are ``nn.Linear``.
        fused: groups of ``layers`` that share one global scale (and one input).
        inputs: hidden states ``[batch, tokens, hidden]``, one entry a batch, from the quantized prefix of the model.
        originals: the same from the original prefix. The block's target for batch i is ``run(originals[i], i)``. Empty
            for a method that does not read them (:attr:`Method.needs_originals`).
        run: ``run(hidden, i)`` is the block's output for batch i, with that batch's mask and positions.
        seed: of everything random.
        dtype: what the module computes in.
    """

    name: str
    module: nn.Module
    layers: dict[str, Scheme]
    fused: list[list[str]]
    inputs: Sequence[Tensor]
    originals: Sequence[Tensor]
    run: Callable[[Tensor, int], Tensor]
    seed: int = 0
    dtype: torch.dtype = torch.float32

    def linear(self, layer: str) -> nn.Linear:
        """The dense module of ``layer``."""
        module = self.module.get_submodule(layer)
        if not isinstance(module, nn.Linear):
            raise TypeError(f"{self.name}.{layer} is {type(module).__name__}; methods quantize nn.Linear only")
        return module

    def groups(self) -> list[list[str]]:
        """All layers, those that share a global scale together, in the order of ``layers``."""
        group_of = {layer: group for group in self.fused for layer in group}
        groups: list[list[str]] = []
        for layer in self.layers:
            group = [name for name in group_of.get(layer, [layer]) if name in self.layers]
            if group not in groups:
                groups.append(group)
        return groups

    def rotation(self, layer: str) -> Tensor | None:
        """The rotation that the scheme of ``layer`` asks for, as it is stored (rounded to bfloat16)."""
        scheme = self.layers[layer]
        rotation = rotation_for(scheme.rotation, scheme.group_size, torch.bfloat16)
        return None if rotation is None else rotation.to(self.linear(layer).weight.device)


def siblings(layer: str) -> str:
    """What the names of one layer of every expert have in common: numbers do not count."""
    return re.sub(r"\d+", "*", layer)


def quantizes_activations(scheme: Scheme) -> bool:
    """Whether the scheme is W4A4 (or W4A8, W8A8) on hardware that multiplies it, which calibration prepares for."""
    return scheme.activations != "model"


def quantized_input(x: Tensor, scheme: Scheme, rotation: Tensor | None, input_global_scale: Tensor | None) -> Tensor:
    """What a layer multiplies its weight with: x ``[..., K]`` rotated, rounded to FP4 if the scheme does; float32."""
    values = x.float() if rotation is None else rotate(x, rotation)
    if not quantizes_activations(scheme):
        return values
    if scheme.input_format is FP8:
        return fake_quantize_fp8(values, input_global_scale)
    backend = backends.for_device(x.device)
    rows = values.reshape(-1, values.shape[-1])
    quantized = backend.quantize(rows, scheme.format, scheme.activation_rule, input_global_scale)
    return backend.dequantize(quantized, torch.float32).view_as(values)


@contextmanager
def capture_inputs(block: Block, layers: Iterable[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Calls ``see(layer, x)`` with the input ``[..., K]`` of each of ``layers`` whenever one is run.

    Experts see every token within it, not only those of the router (:mod:`fp4.calibration.expert_linears`).
    """
    # Not at the top: it imports the packed modules, and those this package, since they round to nearest.
    from fp4.calibration.expert_linears import every_token

    with ExitStack() as stack:
        stack.enter_context(every_token(block.module))
        for layer in layers:

            def hook(module: nn.Module, arguments: tuple[Any, ...], layer: str = layer) -> None:
                see(layer, arguments[0].detach())

            stack.callback(block.linear(layer).register_forward_pre_hook(hook).remove)
        yield


@contextmanager
def emulated(block: Block, results: Mapping[str, LayerResult]) -> Iterator[None]:
    """Within it, the layers in ``results`` compute what they will as FP4; the module is dense again afterwards.

    A weight is decoded whenever its layer runs, so that only one at a time is in memory beside the dense ones.
    """
    with ExitStack() as stack:
        for layer, result in results.items():
            linear, scheme = block.linear(layer), block.layers[layer]
            backend = backends.for_device(linear.weight.device)

            def forward(
                x: Tensor,
                linear: nn.Linear = linear,
                scheme: Scheme = scheme,
                result: LayerResult = result,
                backend: Backend = backend,
            ) -> Tensor:
                values = quantized_input(x, scheme, result.rotation, result.input_global_scale).to(x.dtype)
                return linear_function(values, backend.dequantize(result.weight, x.dtype), linear.bias)

            stack.callback(linear.__dict__.pop, "forward")
            linear.__dict__["forward"] = forward
        yield


@dataclass(frozen=True)
class Method:
    """A way to quantize a block: ``run(block, options)``, with options an instance of the class named here.

    Attributes:
        needs_originals: whether the method reads ``block.originals`` under the given options. They cost a forward pass
            of every dense block over all samples, and room for a second set of hidden states.
        memory: at its peak, the dense block included, in sizes of that block in float32: as measured on experts.
        passes: over all samples, for each block, beside those that hand hidden states on to the next.
        sweeps: products of a weight with a matrix ``[K, K]``, in multiples of ``N K^2`` operations; 0 without second
            moments.
        steps: name of the option that says how many steps of gradient descent there are.
    """

    name: str
    run: Callable[[Block, Any], dict[str, LayerResult]]
    options: type[Any]
    cost: str
    needs_data: bool
    memory: float
    passes: float
    sweeps: float = 0
    steps: str | None = None
    needs_originals: Callable[[Any], bool] = lambda options: False
