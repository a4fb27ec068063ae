"""A YAML reader for untrusted files: it refuses aliases, which can expand to terabytes, and deep nesting."""

from __future__ import annotations

from typing import Any

import yaml

# Far more than needed: recipes and the front matter of model cards have four levels.
_MAX_DEPTH = 50


class _PlainLoader(yaml.SafeLoader):
    """A safe loader that refuses aliases and deep nesting; an alias can also refer to the value that contains it."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not read; write the value out", problem_mark=mark)
        if self.depth == _MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"values are nested more than {_MAX_DEPTH} deep", problem_mark=mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read_yaml(text: str, name: str) -> tuple[Any, yaml.Node | None]:
    """Parsed value of a YAML text, and its root node, which holds line numbers.

    Args:
        text: the YAML text.
        name: name of the file, for error messages.

    Returns:
        The value and the node; both are None for an empty text.

    Raises:
        ValueError: the text is no YAML, has aliases, or is nested too deep; the message gives the line.
    """
    try:
        loader = _PlainLoader(text)
        node = loader.get_single_node()
        return None if node is None else loader.construct_document(node), node
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date such as 2001-99-99
        raise ValueError(f"{name} is no valid YAML: {' '.join(str(error).split())}") from error
