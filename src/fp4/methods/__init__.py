"""Quantization methods: from weights and what was observed of their inputs to canonical triples, block by block.

They know no models and no files: what they meet is a :class:`~fp4.methods.block.Block` and its ``nn.Linear`` layers.
"""

from fp4.methods.block import Block, LayerResult, Method
from fp4.methods.rtn import RTNOptions, rtn_block

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("rtn", rtn_block, RTNOptions, "seconds; no data but for static input scales", needs_data=False),
    )
}

__all__ = ["METHODS", "Block", "LayerResult", "Method"]
