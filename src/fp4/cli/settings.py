"""Settings from the environment: ``FP4_*`` variables, and a ``.env`` file beside which the command is called."""

from __future__ import annotations

import os
from pathlib import Path

_PREFIXES = ("FP4_", "HF_")


def load_env_file(path: Path) -> list[str]:
    """Take ``FP4_*`` and ``HF_*`` (tokens, caches) from lines ``NAME=value``; what is set already stays.

    Returns:
        names of the variables that were set.

    Raises:
        ValueError: a line has another form; the message names it.
    """
    if not path.is_file():
        return []
    taken = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.strip().removeprefix("export ")
        if not text or text.startswith("#"):
            continue
        name, equals, value = (part.strip() for part in text.partition("="))
        if not name.startswith(_PREFIXES):
            continue  # the file may serve other programs too
        if not equals:
            raise ValueError(f"{path}, line {number}: {name} has no value; expected NAME=value")
        if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        if name not in os.environ:
            os.environ[name] = value
            taken.append(name)
    return taken
