"""fp4: models in 4-bit floating point. Importing it registers the quantizer with Transformers."""

from fp4.config import FPQuantConfig
from fp4.integrations.transformers import CheckpointConfig, CheckpointHfQuantizer, FPQuantHfQuantizer, register
from fp4.nn import FP4Experts, FP4Linear
from fp4.numerics.formats import MXFP4, NVFP4, Format, QuantizedTensor, dequantize
from fp4.pipeline import quantize

__version__ = "0.1.0"

__all__ = [
    "MXFP4",
    "NVFP4",
    "CheckpointConfig",
    "CheckpointHfQuantizer",
    "FP4Experts",
    "FP4Linear",
    "FPQuantConfig",
    "FPQuantHfQuantizer",
    "Format",
    "QuantizedTensor",
    "dequantize",
    "quantize",
]

register()
