"""Schemes: the format of a layer's weight, the precision of its activations, and a rotation of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fp4.numerics.formats import FP8, FP8_BLOCK, MXFP4, MXFP8, NVFP4, Format

Activations = Literal["auto", "fp4", "fp8", "model"]


@dataclass(frozen=True)
class Scheme:
    """How a layer is quantized and run.

    Attributes:
        format: the format of the weight, and of the activations where those have as many bits.
        weight_rule: how block scales of the weight are chosen (:meth:`.Format.quantize`).
        activations: ``"fp4"`` quantizes activations on every call (W4A4), ``"fp8"`` does so to FP8 (W4A8; beside
            weights of 8 bits to the weight's own format, W8A8), ``"model"`` leaves them in the model's dtype (W4A16),
            and ``"auto"`` quantizes them to the weight's format where the hardware multiplies that format and leaves
            them elsewhere.
        activation_rule: how block scales of the activations are chosen.
        rotation: a name in ``rotation.ROTATIONS``; ``"identity"`` means no rotation.
        group_size: the number of columns that are rotated together.
        global_scale: a fixed NVFP4 global scale for weight and activations, in place of one taken from the data.
            FP-Quant's on-the-fly quantization, for example, fixes it.
    """

    format: Format
    weight_rule: str = "abs_max"
    activations: Activations = "auto"
    activation_rule: str = "abs_max"
    rotation: str = "identity"
    group_size: int = 16
    global_scale: float | None = None

    @property
    def input_format(self) -> Format:
        """The format that activations are quantized to, if they are quantized."""
        another = self.activations == "fp8" != self.format.native_activations
        return FP8 if another else self.format

    @property
    def mixes_formats(self) -> bool:
        """Whether activations, if they are quantized, are in another format than the weight."""
        return self.input_format != self.format

    @property
    def has_global_scale(self) -> bool:
        """Whether weights have a global scale: one taken from the data, or a fixed one."""
        return self.format.needs_global_scale or self.global_scale is not None

    @property
    def k_multiple(self) -> int:
        """The number that K, the number of columns, must be a multiple of."""
        own = self.format.k_multiple
        return own if self.rotation == "identity" else max(self.group_size, own)


@dataclass(frozen=True)
class Preset:
    """A scheme that users choose by name, with the rules and the rotation that measured best.

    ``benchmarks/default_scheme.py`` and ``benchmarks/quality.py`` made the measurements.

    Attributes:
        scheme: the scheme without its rotation, because some methods do without one and some checkpoint formats cannot
            store one.
        summary: a sentence that describes the scheme.
        runs_on: a phrase that names the hardware that multiplies it natively, and what happens elsewhere.
        rotation: name and size of a block rotation of weights and inputs; None means no rotation.
        unrotated_rule: the rule of block scales under which weights that are rounded to nearest do better without the
            rotation than with it; None where no rule does.
    """

    scheme: Scheme
    summary: str
    runs_on: str
    rotation: tuple[str, int] | None = None
    unrotated_rule: str | None = None


_ANYWHERE = "any GPU and CPU, weight-only"

SCHEMES: dict[str, Preset] = {
    "nvfp4": Preset(
        Scheme(NVFP4, "mse", "fp4"),
        "W4A4: FP4 weights and activations in blocks of 16 under E4M3 scales and a global scale.",
        f"Blackwell tensor cores; {_ANYWHERE}, or emulated",
    ),
    "nvfp4a16": Preset(
        Scheme(NVFP4, "mse", "model"),
        "W4A16: NVFP4 weights, activations in the model's dtype.",
        _ANYWHERE,
    ),
    "nvfp4a8": Preset(
        # ModelOpt shares a block scale among 32 elements here.
        Scheme(NVFP4.wide(32), "mse", "fp8"),
        "W4A8: NVFP4 weights in blocks of 32, FP8 activations under one calibrated scale a tensor.",
        f"TensorRT-LLM on Blackwell; here {_ANYWHERE}, or emulated",
    ),
    "mxfp4": Preset(
        Scheme(MXFP4, "mse", "fp4", "even"),
        "W4A4: FP4 weights and activations in blocks of 32 under power-of-two scales.",
        f"Blackwell tensor cores; {_ANYWHERE}, or emulated",
        ("hadamard", 64),
    ),
    "mxfp4a16": Preset(
        Scheme(MXFP4, "mse", "model", "even"),
        "W4A16: MXFP4 weights, activations in the model's dtype.",
        _ANYWHERE,
        ("hadamard", 64),
        "even",
    ),
    "fp8_dynamic": Preset(
        Scheme(FP8, "abs_max", "fp8"),
        "W8A8: E4M3 weights with one scale a channel, E4M3 activations with one scale a token, taken from each call.",
        f"GPUs with FP8 tensor cores (compute capability 8.9 and newer); {_ANYWHERE}, or emulated",
    ),
    "fp8_block": Preset(
        Scheme(FP8_BLOCK, "abs_max", "fp8"),
        "W8A8: E4M3 weights with one scale a block of 128 x 128, E4M3 activations with one for each 128 columns of a "
        "token, taken from each call.",
        f"Hopper and Blackwell in engines; here {_ANYWHERE}, or emulated",
    ),
    "mxfp8": Preset(
        Scheme(MXFP8, "ceil", "fp8", "ceil"),
        "W8A8: E4M3 weights and activations in blocks of 32 under power-of-two scales.",
        f"Blackwell tensor cores in engines; here {_ANYWHERE}, or emulated",
    ),
}


def preset_of(format: Format, activations: Activations) -> Preset:
    """The preset of a format, whatever its block size, for some precision of activations.

    Args:
        format: the format of the weight.
        activations: the precision of the activations.

    Returns:
        the preset for both, or the format's first one where it has none for these activations.
    """
    presets = [preset for preset in SCHEMES.values() if preset.scheme.format.family == format.family]
    return next((preset for preset in presets if preset.scheme.activations == activations), presets[0])


def name_of(format: Format, activations: Activations) -> str:
    """The name of a format, whatever its block size, beside some precision of activations, as in ``SCHEMES``.

    Args:
        format: the format of the weight.
        activations: the precision of the activations.

    Returns:
        the name of the preset for both; where there is none, a name of the same form, such as ``mxfp4a8``.
    """
    for name, preset in SCHEMES.items():
        if (preset.scheme.format.family, preset.scheme.activations) == (format.family, activations):
            return name
    return format.family + {"auto": "", "fp4": "", "fp8": "a8", "model": "a16"}[activations]
