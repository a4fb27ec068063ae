"""What one layer computes in: a format for its weights, a precision for its activations, a rotation before both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fp4.formats import Format

Activations = Literal["auto", "fp4", "model"]


@dataclass(frozen=True)
class Scheme:
    """How a layer is quantized and run.

    Attributes:
        format: of the weight, and of the activations where those are FP4.
        weight_rule: how block scales of the weight are chosen (``formats.quantize``).
        activations: ``"fp4"`` quantizes them on every call (W4A4), ``"model"`` leaves them in the model's dtype
            (W4A16), ``"auto"`` is W4A4 where the hardware multiplies FP4 and W4A16 elsewhere.
        activation_rule: how block scales of the activations are chosen.
        rotation: a name of ``rotation.ROTATIONS``; ``"identity"`` is none.
        group_size: size of the rotation.
        global_scale: NVFP4 global scale used for weight and activations in place of one taken from the data; formats
            that fix it (FP-Quant's on-the-fly quantization) need it.
    """

    format: Format
    weight_rule: str = "abs_max"
    activations: Activations = "auto"
    activation_rule: str = "abs_max"
    rotation: str = "identity"
    group_size: int = 16
    global_scale: float | None = None

    @property
    def k_multiple(self) -> int:
        """What the number of columns must be a multiple of."""
        return self.format.block_size if self.rotation == "identity" else max(self.group_size, self.format.block_size)
