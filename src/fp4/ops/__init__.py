"""The schema, argument checks and result shape of every torch operator of the package. No arithmetic lives here.

All backends implement the same operators under their own prefix (``fp4::cpu_linear``, ``fp4::triton_linear``, ...),
because each lays out ``weight`` and ``weight_scale`` in its own way (``Backend.pack``). The Python backends register
their functions through :func:`implement`; compiled ones register theirs from C++ when their library is loaded.

Each function of ``matmul.py`` and ``canonical.py`` describes one operator. It checks the arguments as far as that is
possible without knowing a backend's layout, and returns the shape and dtype of each result. The fake kernel makes empty
tensors of these, so that ``torch.compile`` rejects a wrong call when it traces a graph. The same checks run before
every implementation in Python; compiled implementations check their arguments themselves. The checks raise
``RuntimeError``, and ``ValueError`` for the name of a format that does not exist.

All operators share these arguments: ``format`` is the name of the weight's format (``formats.WEIGHT_FORMATS``).
``global_scale`` is float64 ``[]``, or ``[E]`` for stacks of experts; NVFP4 needs one and FP8 has none. ``rotation`` is
``[h, h]``. ``x``, biases and results are float32, bfloat16 or float16.
"""

from fp4.ops.canonical import dequantize, largest_magnitude, quantize
from fp4.ops.definition import BACKENDS, implement, operator
from fp4.ops.matmul import (
    grouped_input_gradient,
    grouped_linear,
    grouped_linear_quantized,
    input_gradient,
    linear,
    linear_quantized,
)

__all__ = [
    "BACKENDS",
    "dequantize",
    "grouped_input_gradient",
    "grouped_linear",
    "grouped_linear_quantized",
    "implement",
    "input_gradient",
    "largest_magnitude",
    "linear",
    "linear_quantized",
    "operator",
    "quantize",
]
