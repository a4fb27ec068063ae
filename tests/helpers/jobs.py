"""Jobs that are planned but not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fp4.pipeline import Job
from fp4.request import Request


def planned(model: Path, *arguments: Any, **options: Any) -> Job:
    """The job that ``fp4.quantize(model, ..., *arguments, **options)`` would run; its folder is never made."""
    return Job(Request(model, model.with_name("never made"), *arguments, **options))
