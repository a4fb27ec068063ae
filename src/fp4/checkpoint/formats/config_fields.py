"""Typed access to the fields of a ``quantization_config``.

A checkpoint may come from a stranger, so a field of a wrong type must end in a sentence and not in a crash. Each
function takes the configuration and the name of a field, and raises ValueError if the field has another type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def dictionary(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A field that is a dictionary; empty if the field is missing or null."""
    found = config.get(key)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise _error(key, found, "a dictionary")
    return found


def dictionaries(config: Mapping[str, Any], key: str) -> dict[str, Mapping[str, Any]]:
    """A field that is a dictionary of dictionaries; empty if the field is missing or null."""
    found = dictionary(config, key)
    if not all(isinstance(value, Mapping) for value in found.values()):
        raise _error(key, found, "a dictionary of dictionaries")
    return dict(found)


def entries(config: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """A field that is a list of dictionaries; empty if the field is missing or null."""
    found = config.get(key)
    if found is None:
        return []
    if not isinstance(found, (list, tuple)) or not all(isinstance(entry, Mapping) for entry in found):
        raise _error(key, found, "a list of dictionaries")
    return list(found)


def names(config: Mapping[str, Any], key: str) -> list[str]:
    """A field that is a list of strings; empty if the field is missing or null."""
    found = config.get(key)
    if found is None:
        return []
    if not isinstance(found, (list, tuple)) or not all(isinstance(name, str) for name in found):
        raise _error(key, found, "a list of strings")
    return list(found)


def whole(config: Mapping[str, Any], key: str, default: int) -> int:
    """A field that is a positive whole number; ``default`` if the field is missing, null or zero."""
    found = config.get(key) or default
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise _error(key, found, "a positive whole number")
    return found


def _error(key: str, found: object, expected: str) -> ValueError:
    return ValueError(f"quantization_config has {key} = {str(found)[:100]}; expected {expected}")
