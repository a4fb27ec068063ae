"""Quantization methods: from weights and what was observed of their inputs to canonical triples, block by block.

They know no models and no files: what they meet is a :class:`~fp4.calibration.block.Block` and its ``nn.Linear``
layers.
"""

from fp4.calibration.block import Block, LayerResult, Method
from fp4.methods.autoround import AutoRoundOptions, autoround_block
from fp4.methods.best import BestOptions, best_block
from fp4.methods.gptq import GPTQOptions, gptq_block
from fp4.methods.rtn import RTNOptions, rtn_block

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "rtn",
            rtn_block,
            RTNOptions,
            "seconds; no data but for static input scales",
            needs_data=False,
            memory=1.5,
            passes=3,
        ),
        Method(
            "gptq",
            gptq_block,
            GPTQOptions,
            "one pass over the samples and a sweep over the columns of every layer",
            needs_data=True,
            memory=1.7,
            passes=2.5,
            sweeps=1,
            needs_originals=lambda options: options.shift > 0,
        ),
        Method(
            "autoround",
            autoround_block,
            AutoRoundOptions,
            "iters forward and backward passes over a batch of samples",
            needs_data=True,
            memory=10.5,
            passes=3,
            steps="iters",
            needs_originals=lambda options: options.iters > 0,
        ),
        Method(
            "best",
            best_block,
            BestOptions,
            "as gptq, and sweeps of descent that cost twice that of a layer",
            needs_data=True,
            memory=3.5,
            passes=2.5,
            sweeps=5,
            needs_originals=lambda options: options.shift > 0,
        ),
    )
}

__all__ = ["METHODS", "Block", "LayerResult", "Method"]
