"""What a model that is quantized on the fly must be to be saved in another tool's format."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fp4.checkpoint import CODECS, Codec, LayerScheme, StoredLinear
from fp4.checkpoint.formats.codec import name_rotation
from fp4.checkpoint.fusing import fused_groups
from fp4.integrations.transformers import expert_stacking
from fp4.integrations.transformers.model_state import Packing, SharedScale
from fp4.integrations.transformers.prequantized_config import CheckpointConfig
from fp4.nn import FP4Linear, PackedWeight
from fp4.numerics.formats import QuantizedTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("fp4")


def prepare(quantizer: Packing, model: PreTrainedModel) -> None:
    """Group layers that runtimes fuse, so that they share a global scale, and check that the format fits.

    Raises:
        ValueError: the format cannot store a layer, for instance its rotation.
    """
    modules: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, FP4Linear)}
    name_of_format = quantizer.quantization_config.checkpoint_format
    writer, problems = CODECS[name_of_format].writer(), {}
    schemes = {name: (m.scheme, (m.out_features, m.in_features)) for name, m in modules.items()}
    for name, experts in quantizer.experts.items():
        shapes = experts.layout.projections
        schemes |= {f"{name}.{p}": (scheme, shapes[p]) for p, (scheme, _) in experts.schemes.items()}
    for name, (scheme, shape) in schemes.items():
        unit = torch.tensor(scheme.global_scale or 1.0, dtype=torch.float64, device="cpu")
        meta = PackedWeight(shape[1], shape[0], scheme, dtype=model.dtype, device="meta")
        weight = QuantizedTensor(meta.codes, meta.scales, None if meta.global_scale is None else unit, scheme.format)
        try:
            writer.write(StoredLinear(weight, None, meta.rotation), written_scheme(meta))
        except ValueError as error:
            problems[name] = str(error)
    if problems:
        name, problem = next(iter(problems.items()))
        raise ValueError(
            f"{len(problems)} layers cannot be saved as {name_of_format}, {name} first: {problem}; "
            "choose other options (transform_init='identity' rotates nothing) or another checkpoint_format"
        )
    free = [n for n, m in modules.items() if m.scheme.format.needs_global_scale and m.scheme.global_scale is None]
    for fused in fused_groups(free):
        for scheme in dict.fromkeys(modules[name].scheme for name in fused):
            group = [name for name in fused if modules[name].scheme == scheme]
            quantizer.sharing |= dict.fromkeys(group, SharedScale(group))


def written_scheme(weight: PackedWeight) -> LayerScheme:
    """The scheme of a layer quantized on the fly in another tool's format."""
    fmt = weight.scheme.format
    # Other formats store a calibrated scale for NVFP4 activations and for FP8 activations of FP4 weights. Layers
    # quantized on the fly have none, so they are saved as weight-only.
    calibrated = fmt.needs_global_scale or weight.scheme.mixes_formats
    weight_only = weight.scheme.activations == "model" or calibrated
    rotation, group_size = name_rotation(weight.rotation)
    return LayerScheme(fmt, "model" if weight_only else "fp8" if fmt.kind == "FP8" else "fp4", rotation, group_size)


def adopt(quantizer: Packing, model: PreTrainedModel) -> None:
    """Turn the model into what loading a checkpoint in ``checkpoint_format`` would have made."""
    codec = CODECS[quantizer.quantization_config.checkpoint_format]
    weights = [module for module in model.modules() if isinstance(module, PackedWeight)]
    quantizing = [weight for weight in weights if weight.scheme.activations in ("fp4", "fp8")]
    lost = [weight for weight in quantizing if written_scheme(weight).activations == "model"]
    if lost:
        logger.warning(
            "%d layers quantize their activations here and will be saved as weight-only: %s wants a calibrated "
            "scale of activations, which `fp4 quantize` measures",
            len(lost),
            codec.name,
        )
    for name, experts in quantizer.experts.items():
        quantizer.stacked |= {
            f"{name}.{projection}"
            for projection, packed in experts.packed().items()
            if packed.scheme.format.name in codec.stacked_formats and projection in quantizer.stack_names[name]
        }
    describe(quantizer, model, codec, lambda _, weight: written_scheme(weight))


def describe(
    quantizer: Packing,
    model: PreTrainedModel,
    codec: type[Codec],
    scheme_of: Callable[[str, PackedWeight], LayerScheme],
) -> None:
    """Set the configuration of ``model`` to that of a checkpoint in the format of ``codec``.

    ``scheme_of`` maps the name and module of a packed layer to the scheme by which it is stored.
    """
    config, modules = quantizer.quantization_config, dict(model.named_modules())
    schemes = {name: scheme_of(name, module) for name, module in modules.items() if isinstance(module, FP4Linear)}
    for name in quantizer.experts:
        schemes |= {layer: scheme_of(layer, weight) for layer, weight in expert_stacking.layers_of(quantizer, name)}
    matrices = (
        name
        for name, module in modules.items()
        if isinstance(weight := getattr(module, "weight", None), Tensor)
        and weight.ndim == 2
        and not isinstance(module, (PackedWeight, nn.Embedding))
    )
    source = config.stored if isinstance(config, CheckpointConfig) else {}
    stored = codec.configuration(schemes, sorted(matrices), source)
    quantizer.quantization_config = CheckpointConfig(stored, config.activation_dtype, config.backend)  # type: ignore[arg-type]
    quantizer.codec = quantizer.quantization_config.codec
    model.config.quantization_config = quantizer.quantization_config
