"""Quantizers for ``from_pretrained`` and ``save_pretrained``; importing this package registers them."""

from fp4.integrations.transformers.edited_weights import requantize
from fp4.integrations.transformers.prequantized import CheckpointHfQuantizer, register
from fp4.integrations.transformers.prequantized_config import CheckpointConfig
from fp4.integrations.transformers.quantizer import FPQuantHfQuantizer

__all__ = ["CheckpointConfig", "CheckpointHfQuantizer", "FPQuantHfQuantizer", "register", "requantize"]

register()
