"""Rounds weights that were edited after they had been quantized, as merging an adapter edits them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fp4.checkpoint.formats.fp_quant import FPQuantCodec
from fp4.checkpoint.fusing import fused_groups
from fp4.nn import FP4Experts, FP4Linear
from fp4.rounding import global_scale_of


def is_edited(module: nn.Module) -> bool:
    """Whether a module has quantized weights of which one was edited or assigned, as merging an adapter does."""
    return isinstance(module, FP4Linear | FP4Experts) and not module.is_packed


def requantize(model: nn.Module) -> list[str]:
    """Round every weight that was edited since it was quantized to nearest, in the scheme of its layer.

    Call it after ``merge_and_unload()`` to save the merged model quantized; without it, edited layers are saved
    unquantized. Weights that nobody edited keep their codes, unless engines fuse their layer with an edited one whose
    values need a larger global scale, which the fused layers then share.

    Args:
        model: changed in place.

    Returns:
        The names of the layers and experts modules that were rounded because they had been edited.

    Raises:
        ValueError: an edited weight holds NaN or infinity, or this process holds only a share of it.
    """
    edited: dict[str, Any] = {name: module for name, module in model.named_modules() if is_edited(module)}
    scales = _shared_scales(model, edited)
    for name, module in model.named_modules():
        if isinstance(module, FP4Linear) and name in scales:
            if module.is_packed and not torch.equal(_scale_of(module), scales[name]):
                module.become_dense(module.dequantize())
            module.requantize(f"{name}.weight", scales[name])
        elif name in edited:
            module.requantize(f"{name}.weight" if isinstance(module, FP4Linear) else name)
    return list(edited)


def _shared_scales(model: nn.Module, edited: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Global scale by layer, for groups with an edited layer that share one; those of FP-Quant's checkpoints do not."""
    codec = getattr(getattr(model, "hf_quantizer", None), "codec", None)
    if codec is None or codec.name == FPQuantCodec.name:
        return {}
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, FP4Linear)
        and module.scheme.format.needs_global_scale
        and module.scheme.global_scale is None
    }
    shared: dict[str, torch.Tensor] = {}
    for group in fused_groups(layers):
        if not edited.keys().isdisjoint(group):
            # The scale of a weight of zeros is 1, and fits any.
            scales = [_scale_of(layers[name]) for name in group if layers[name].weight.detach().any()]
            if scales:
                shared |= dict.fromkeys(group, torch.stack(scales).amax())
    return shared


def _scale_of(layer: FP4Linear) -> torch.Tensor:
    """The global scale of a packed layer, or the one that its edited weight needs."""
    scale = layer.global_scale if layer.is_packed else None
    if scale is None:
        rotation = None if layer.rotation is None else layer.rotation.to(layer.weight.device)
        scale = global_scale_of(layer.weight.detach(), layer.scheme, rotation)
    if scale is None:
        raise ValueError(f"{layer.scheme.format.name} has no global scale")
    return scale
