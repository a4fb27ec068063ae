"""Suggestions for misspelled names."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def hint(name: str, known: Iterable[str]) -> str:
    """End of a message, ``" (did you mean …?)"``, with the most similar of ``known``; empty if none is similar."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {nearest[0]}?)" if nearest else ""


def names_nearest(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate ``function`` so that a TypeError for an unknown keyword suggests the most similar one.

    Python does so itself from 3.13 on.
    """
    known = inspect.signature(function).parameters

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                raise TypeError(f"{function.__name__}() has no option {name!r}{hint(name, known)}")
        return function(*args, **kwargs)

    return call
