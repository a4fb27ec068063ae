"""What ``from_pretrained`` and ``save_pretrained`` call. Importing this registers it with Transformers."""

from fp4.quantizer.checkpoint_config import CheckpointConfig
from fp4.quantizer.checkpoints import CheckpointHfQuantizer, register
from fp4.quantizer.fp_quant import FPQuantHfQuantizer

__all__ = ["CheckpointConfig", "CheckpointHfQuantizer", "FPQuantHfQuantizer", "register"]

register()
