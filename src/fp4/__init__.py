"""fp4: models in 4-bit floating point. Importing it registers the quantizer with Transformers."""

from transformers.quantizers import auto as _auto

from fp4.config import FPQuantConfig
from fp4.formats import MXFP4, NVFP4, Format, QuantizedTensor, dequantize, quantize
from fp4.nn import FP4Linear
from fp4.quantizer import FPQuantHfQuantizer

__version__ = "0.1.0"

__all__ = [
    "MXFP4",
    "NVFP4",
    "FP4Linear",
    "FPQuantConfig",
    "FPQuantHfQuantizer",
    "Format",
    "QuantizedTensor",
    "dequantize",
    "quantize",
]

# `register_quantizer` refuses names that are taken, and fp4 takes over fp_quant: models, configurations and checkpoints
# meant for it work as before and on more machines.
_auto.AUTO_QUANTIZER_MAPPING["fp_quant"] = FPQuantHfQuantizer
_auto.AUTO_QUANTIZATION_CONFIG_MAPPING["fp_quant"] = FPQuantConfig
if FPQuantConfig not in _auto.LOADING_ATTRIBUTES_CONFIG_TYPES:
    _auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (FPQuantConfig,)
