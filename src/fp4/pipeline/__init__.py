"""Quantize a whole checkpoint block by block, in bounded memory, resumable."""

from fp4.pipeline.job import Job, quantize
from fp4.request import Hub, Request

__all__ = ["Hub", "Job", "Request", "quantize"]
