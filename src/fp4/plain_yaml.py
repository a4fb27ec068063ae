"""YAML as plain data: without aliases, which let a few lines stand for terabytes, and without endless nesting."""

from __future__ import annotations

from typing import Any

import yaml

# Recipes and the front matter of cards nest four deep.
_MAX_DEPTH = 50


class _PlainLoader(yaml.SafeLoader):
    """Refuses aliases, which nothing here needs and which may also refer to what they are in."""

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
    """The value that ``text`` describes, and the node it was made of, which knows lines.

    Args:
        text: the YAML.
        name: name of the file, for errors.

    Raises:
        ValueError: the text is no YAML, has aliases, or is nested too deep; the message gives the line.
    """
    try:
        loader = _PlainLoader(text)
        node = loader.get_single_node()
        return None if node is None else loader.construct_document(node), node
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or number that is none, such as 2001-99-99
        raise ValueError(f"{name} is no valid YAML: {' '.join(str(error).split())}") from error
