"""Which of a test's parameters `make test` tries; `make test-all` tries all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def sampled(values: Iterable[Any], *quick: Any) -> list[Any]:
    """The values as parameters of a test, those that are not among ``quick`` marked slow."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]
