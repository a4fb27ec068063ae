"""Errors whose remedy is an option, which is spelled differently in Python and on the command line."""

from __future__ import annotations

import shlex


class NotQuantizable(ValueError):
    """A layer whose weight or inputs cannot be quantized.

    Callers append to the message which option of theirs keeps the layer unquantized.

    Args:
        message: what was found.
        layer: name of the layer.
    """

    def __init__(self, message: str, layer: str) -> None:
        super().__init__(message, layer)
        self.message, self.layer = message, layer

    def __str__(self) -> str:
        return self.message


class OptionError(ValueError):
    """A mistake that another option corrects: ``str`` names the Python argument, :meth:`on_command_line` the flag.

    Args:
        before: the sentence up to the name of the option.
        option: name of the Python argument.
        value: the suggested value of an option that takes a list; None for a switch.
        after: the rest of the sentence.
    """

    def __init__(self, before: str, option: str, value: str | None = None, after: str = "") -> None:
        super().__init__(before, option, value, after)
        self.before, self.option, self.value, self.after = before, option, value, after

    def __str__(self) -> str:
        given = "True" if self.value is None else repr([self.value])
        return f"{self.before} {self.option}={given}{self.after}"

    def on_command_line(self) -> str:
        """Text of the error with the option spelled as a flag of the ``fp4`` command."""
        flag = f"--{self.option.replace('_', '-')}"
        given = flag if self.value is None else f"{flag} {shlex.quote(self.value)}"
        return f"{self.before} {given}{self.after}"
