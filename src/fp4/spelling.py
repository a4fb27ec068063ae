"""Misspelled names: what was probably meant."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def hint(name: str, known: Iterable[str]) -> str:
    """``" (did you mean …?)"`` with the nearest of ``known``, to end a message with; nothing where none is near."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {nearest[0]}?)" if nearest else ""


def names_nearest(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, whose TypeError for an unknown keyword names the nearest known one, as Python does from 3.13 on."""
    known = inspect.signature(function).parameters

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                raise TypeError(f"{function.__name__}() has no option {name!r}{hint(name, known)}")
        return function(*args, **kwargs)

    return call
