"""fp4: a Transformers quantizer for 4-bit floating point (NVFP4, MXFP4).

Importing this package registers its quantizers with Transformers, whichever of the two is imported first. The import is
fast, because torch and Transformers are imported only when one of the names below is used.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

from fp4 import registration

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
    "requantize",
]

if TYPE_CHECKING:
    from fp4.config import FPQuantConfig
    from fp4.integrations.transformers import (
        CheckpointConfig,
        CheckpointHfQuantizer,
        FPQuantHfQuantizer,
        requantize,
    )
    from fp4.nn import FP4Experts, FP4Linear
    from fp4.numerics.formats import MXFP4, NVFP4, Format, QuantizedTensor, dequantize
    from fp4.pipeline import quantize
else:
    _MODULES = {
        "fp4.config": ("FPQuantConfig",),
        "fp4.numerics.formats": ("MXFP4", "NVFP4", "Format", "QuantizedTensor", "dequantize"),
        "fp4.nn": ("FP4Experts", "FP4Linear"),
        "fp4.pipeline": ("quantize",),
        "fp4.integrations.transformers": (
            "CheckpointConfig",
            "CheckpointHfQuantizer",
            "FPQuantHfQuantizer",
            "requantize",
        ),
    }
    _MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

    def __getattr__(name):
        """Import a public name or a module of the package when it is first used (PEP 562)."""
        if name in _MODULE_OF:
            value = getattr(importlib.import_module(_MODULE_OF[name]), name)
            globals()[name] = value
            return value
        module = f"{__name__}.{name}"
        if not name.startswith("_") and importlib.util.find_spec(module) is not None:
            return importlib.import_module(module)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})


registration.when_transformers_is_imported()
