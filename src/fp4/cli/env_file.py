"""Settings from a ``.env`` file in the folder where the command is called."""

from __future__ import annotations

import os
import re
from pathlib import Path

#: Variables that the file may set. It may have come with a repository of someone else, so it can neither redirect a
#: token (``HF_ENDPOINT``) nor change what is computed (``FP4_SCHEME``).
ALLOWED = ("HF_TOKEN", "FP4_TOKEN", "HF_HOME", "HF_HUB_CACHE", "FP4_CACHE_DIR")

_OURS = re.compile(r"(FP4|HF)_[A-Z0-9_]+")


def load_env_file(path: Path) -> list[str]:
    """Set environment variables from the lines ``NAME=value`` of a file, unless they are set already.

    Args:
        path: the file; only variables in ``ALLOWED`` are read from it.

    Returns:
        Sentences for the user, without values: which variables were set, and which variables of fp4 or the hub were
        ignored.

    Raises:
        ValueError: the file is not text, or a variable has no value; the message names the line.
    """
    if not path.is_file():
        return []
    taken, ignored = [], []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8; expected lines NAME=value") from error
    for number, line in enumerate(lines, start=1):
        text = line.strip().removeprefix("export ")
        name, equals, value = (part.strip() for part in text.partition("="))
        if name not in ALLOWED:  # the file may contain settings of other programs
            if equals and _OURS.fullmatch(name):
                ignored.append(name)
            continue
        if not equals:
            raise ValueError(f"{path}, line {number}: {name} has no value; expected NAME=value")
        if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        if name not in os.environ:
            os.environ[name] = value
            taken.append(name)
    notes = [f"{path} gave {', '.join(taken)}"] if taken else []
    if ignored:
        notes.append(
            f"{path} names {', '.join(ignored)}, not read from a file (only {', '.join(ALLOWED)} are); "
            "set it in the environment"
        )
    return notes
