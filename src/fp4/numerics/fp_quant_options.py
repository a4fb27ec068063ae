"""What the options of FP-Quant's configuration mean in terms of formats and their rules."""

from __future__ import annotations

from fp4.numerics.formats import MXFP4, NVFP4, Format

#: FP-Quant multiplies blocks by 3 before it takes their scale, which is a fixed global scale of 1/3. QuEST has none.
FP_QUANT_GLOBAL_SCALE = 1 / 3
#: The rule of block scales that each forward_method means, by format. Only these formats can be rotated.
FP_QUANT_RULES: dict[Format, dict[str, str]] = {
    NVFP4: {"abs_max": "abs_max"},
    MXFP4: {"abs_max": "below_six", "quest": "quest"},
}
#: The precisions of gradients beside bf16, with the format of weights that each needs. fp4 takes them for inference.
FP_QUANT_GRADIENTS: dict[str, Format] = {"mxfp8": MXFP4, "mxfp4": MXFP4}
