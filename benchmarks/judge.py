"""Perplexity of a quantized checkpoint, by a program that shares no code with fp4 nor with any tool that it judges.

    python benchmarks/judge.py --source MODEL --model QUANTIZED --text wikitext2/test.txt --act nvfp4

It decodes the tensors of compressed-tensors, ModelOpt and FP-Quant (or reads plain ones) into the dense float32 model
of ``--source``, quantizes the input of every decoded layer as ``--act`` says, by the checkpoint's own input scales
where it has some, and computes in float32. The text is cut into windows of ``--length`` tokens, without overlap and
without special tokens. Prints one line of JSON with the perplexity as "ppl".

Activations follow one reference rule each, whichever tool wrote the checkpoint. NVFP4: blocks of 16, E4M3 scale of a
sixth of the largest magnitude. MXFP4: blocks of 32, the scale of OCP's rule (floor). FP8: one scale a token.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

#: Values of the 16 codes of E2M1.
VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
# Midpoints between neighbouring magnitudes; at these three the upper one has the even code.
_MIDPOINTS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
_UPPER_IS_EVEN = (0.75, 1.75, 3.5)


@dataclass(frozen=True)
class Input:
    """How a decoded layer's input is treated: NVFP4's global scale (multiplied; None: of each call), and a rotation."""

    global_scale: Tensor | None = None
    rotation: Tensor | None = None


def unpack(packed: Tensor) -> Tensor:
    """Values of codes that are packed two a byte, the lower nibble first: ``[N, K/2]`` to ``[N, K]``."""
    return VALUES[torch.stack([packed & 0xF, packed >> 4], -1).reshape(*packed.shape[:-1], -1).long()]


def round_to_e2m1(x: Tensor) -> Tensor:
    """Nearest value of E2M1, ties to the even code, beyond 6 to 6."""
    magnitude = x.abs()
    index = torch.bucketize(magnitude, _MIDPOINTS)
    for midpoint in _UPPER_IS_EVEN:
        index += magnitude == midpoint
    return torch.sign(x) * VALUES[index]


def nvfp4_activations(x: Tensor, global_scale: Tensor | None) -> Tensor:
    """NVFP4 and back. ``global_scale`` is multiplied into block scales before E4M3; None takes it from ``x``."""
    blocks = x.float().reshape(-1, 16)
    if global_scale is None:
        global_scale = 6 * 448 / x.abs().amax().float().clamp(min=1e-12)
    scales = blocks.abs().amax(-1, keepdim=True) / 6 * global_scale
    scales = scales.clamp(max=448).to(torch.float8_e4m3fn).float() / global_scale
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    return (round_to_e2m1(blocks / scales) * scales).reshape(x.shape)


def mxfp4_activations(x: Tensor, global_scale: Tensor | None = None) -> Tensor:
    """MXFP4 and back, by OCP's rule: the exponent of the largest magnitude, less 2."""
    blocks = x.float().reshape(-1, 32)
    largest = blocks.abs().amax(-1, keepdim=True).clamp(min=2**-126)
    scales = torch.exp2(torch.floor(torch.log2(largest)) - 2)
    return (round_to_e2m1((blocks / scales).clamp(-6, 6)) * scales).reshape(x.shape)


def fp8_activations(x: Tensor, global_scale: Tensor | None = None) -> Tensor:
    """E4M3 under one scale a token, and back."""
    scales = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 448
    return (x / scales).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scales


ACTIVATIONS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "nvfp4": nvfp4_activations,
    "mxfp4": mxfp4_activations,
    "fp8": fp8_activations,
}


def _scaled(values: Tensor, scales: Tensor) -> Tensor:
    return (values.reshape(*scales.shape, -1) * scales[..., None]).reshape(values.shape)


def _block_scales(stored: Tensor) -> Tensor:
    """Block scales as float32: bytes are exponents with a bias of 127."""
    return torch.exp2(stored.float() - 127) if stored.dtype == torch.uint8 else stored.float()


def _scalar(tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
    return tensors[name].float().reshape(()) if name in tensors else None


def decode(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Input]]:
    """Dense float32 tensors of a checkpoint, and how the inputs of its quantized layers are treated, by layer.

    The weight of a rotated layer stays in the rotated basis.
    """
    dense: dict[str, Tensor] = {}
    inputs: dict[str, Input] = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        weight = f"{layer}.weight"
        if kind == "weight_packed":  # compressed-tensors
            scales = _block_scales(tensors[f"{layer}.weight_scale"])
            global_scale = _scalar(tensors, f"{layer}.weight_global_scale")
            dense[weight] = _scaled(unpack(tensor), scales if global_scale is None else scales / global_scale)
            inputs[layer] = Input(_scalar(tensors, f"{layer}.input_global_scale"))
        elif kind == "qweight":  # FP-Quant stores the scales of both formats as bytes
            values, scales = unpack(tensor), tensors[f"{layer}.scales"].view(torch.uint8)
            if values.shape[1] // scales.shape[1] == 16:
                scales = scales.view(torch.float8_e4m3fn)
            values = _scaled(values, _block_scales(scales))
            dense[weight] = values / tensors[f"{layer}.weight_global_scale"].float()
            rotation = tensors[f"{layer}.forward_hadamard_matrix"].float()
            inputs[layer] = Input(_scalar(tensors, f"{layer}.act_global_scale"), rotation)
        elif kind == "weight" and tensor.dtype == torch.uint8:  # ModelOpt
            scales = _block_scales(tensors[f"{layer}.weight_scale"])
            global_scale = _scalar(tensors, f"{layer}.weight_scale_2")
            dense[weight] = _scaled(unpack(tensor), scales if global_scale is None else scales * global_scale)
            input_scale = _scalar(tensors, f"{layer}.input_scale")
            inputs[layer] = Input(None if input_scale is None else 1 / input_scale)
        elif kind == "weight" and tensor.dtype == torch.float8_e4m3fn:
            scale = tensors[f"{layer}.weight_scale"].float()
            dense[weight] = tensor.float() * (scale.reshape(-1, 1) if scale.numel() > 1 else scale)
            inputs[layer] = Input()
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if layer not in inputs or kind == "bias":
            dense[name] = tensor.float()
    return dense, inputs


def build(source: str | Path, model: str | Path, act: str) -> Any:
    """The float32 model of ``source`` with the tensors of ``model``, its layers' inputs quantized to ``act``.

    Raises:
        ValueError: the checkpoint is rotated in a way that its tensors do not hold, or its tensors are not the model's.
    """
    dense_model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    folder = Path(model)
    if folder.resolve() == Path(source).resolve():
        return dense_model
    config = json.loads((folder / "config.json").read_text())
    if (config.get("quantization_config") or {}).get("transform_config"):
        raise ValueError(
            f"{folder} is rotated by a transform_config, expected no rotation or FP-Quant's; judge another"
        )
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    dense, inputs = decode(tensors)
    loaded = dense_model.load_state_dict(dense, strict=False)
    dense_model.tie_weights()
    missing = [name for name in loaded.missing_keys if "lm_head" not in name]
    if missing or loaded.unexpected_keys:
        unknown = loaded.unexpected_keys[:3]
        raise ValueError(f"{folder} lacks {missing[:3]} and has unknown {unknown}, expected the tensors of {source}")
    for layer, treatment in inputs.items():
        dense_model.get_submodule(layer).register_forward_pre_hook(_hook(treatment, ACTIVATIONS.get(act)))
    return dense_model


def _hook(treatment: Input, quantize: Callable[[Tensor, Tensor | None], Tensor] | None) -> Any:
    def before(module: object, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = arguments[0]
        if treatment.rotation is not None:
            x = (x.reshape(-1, treatment.rotation.shape[0]) @ treatment.rotation).reshape(x.shape)
        if quantize is not None:
            x = quantize(x, treatment.global_scale)
        return (x, *arguments[1:])

    return before


def perplexity(model: Any, ids: Tensor) -> float:
    """Perplexity of ``ids`` ``[windows, length]``: of all tokens but the first of each window."""
    losses = []
    with torch.inference_mode():
        for window in ids:
            logits = model(input_ids=window[None], use_cache=False).logits[0]
            losses.append(cross_entropy(logits[:-1].float(), window[1:]).item())
    return math.exp(sum(losses) / len(losses))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="folder of the unquantized model, with its tokenizer")
    parser.add_argument("--model", required=True, help="folder of the checkpoint to judge; may be --source")
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--act", default="none", choices=["none", *ACTIVATIONS], help="what inputs are quantized to")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--start", type=int, default=0, help="windows to leave out at the beginning")
    options = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(options.source)
    ids = tokenizer(options.text.read_text(), return_tensors="pt", add_special_tokens=False).input_ids[0]
    first, last = options.start * options.length, (options.start + options.windows) * options.length
    if len(ids) < last:
        parser.error(f"{options.text} has {len(ids)} tokens, expected {last}; name a longer text or fewer --windows")
    model = build(options.source, options.model, options.act)
    measured = perplexity(model, ids[first:last].reshape(options.windows, options.length))
    name = Path(options.model).name
    print(json.dumps({"model": name, "act": options.act, "windows": options.windows, "ppl": round(measured, 4)}))


if __name__ == "__main__":
    main()
