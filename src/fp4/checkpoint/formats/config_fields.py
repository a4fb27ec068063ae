"""Fields of a ``quantization_config``, each of the type that it must have: they came with the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def dictionary(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """``config[key]``, empty where there is none or null. ValueError if it is no dictionary."""
    found = config.get(key)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise _error(key, found, "a dictionary")
    return found


def dictionaries(config: Mapping[str, Any], key: str) -> dict[str, Mapping[str, Any]]:
    """As :func:`dictionary`, of dictionaries."""
    found = dictionary(config, key)
    if not all(isinstance(value, Mapping) for value in found.values()):
        raise _error(key, found, "a dictionary of dictionaries")
    return dict(found)


def entries(config: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """``config[key]``, empty where there is none or null. ValueError if it is no list of dictionaries."""
    found = config.get(key)
    if found is None:
        return []
    if not isinstance(found, (list, tuple)) or not all(isinstance(entry, Mapping) for entry in found):
        raise _error(key, found, "a list of dictionaries")
    return list(found)


def names(config: Mapping[str, Any], key: str) -> list[str]:
    """``config[key]``, empty where there is none or null. ValueError if it is no list of strings."""
    found = config.get(key)
    if found is None:
        return []
    if not isinstance(found, (list, tuple)) or not all(isinstance(name, str) for name in found):
        raise _error(key, found, "a list of strings")
    return list(found)


def whole(config: Mapping[str, Any], key: str, default: int) -> int:
    """``config[key]``, ``default`` where there is none, null or zero. ValueError if it is no positive whole number."""
    found = config.get(key) or default
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise _error(key, found, "a positive whole number")
    return found


def _error(key: str, found: object, expected: str) -> ValueError:
    return ValueError(f"quantization_config has {key} = {str(found)[:100]}; expected {expected}")
