"""Quantize a whole checkpoint block by block, in bounded memory, resumable."""

from fp4.pipeline.job import Hub, Job, quantize

__all__ = ["Hub", "Job", "quantize"]
