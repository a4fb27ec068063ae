"""Errors that an option of the caller's interface would mend, which only that interface can spell."""

from __future__ import annotations

import shlex


class NotQuantizable(ValueError):
    """A layer's weight or inputs cannot be quantized. Whoever has an option that keeps layers adds it to the message.

    Attributes:
        layer: its name.
    """

    def __init__(self, message: str, layer: str) -> None:
        super().__init__(message, layer)
        self.message, self.layer = message, layer

    def __str__(self) -> str:
        return self.message


class OptionError(ValueError):
    """A mistake that ends where an option is given: its text names the argument, :meth:`on_command_line` the flag.

    Args:
        before: what was found, up to the name of the option.
        option: name of the Python argument.
        value: what is to be given, for an option that takes a list; None for a switch.
        after: the rest of the sentence.
    """

    def __init__(self, before: str, option: str, value: str | None = None, after: str = "") -> None:
        super().__init__(before, option, value, after)
        self.before, self.option, self.value, self.after = before, option, value, after

    def __str__(self) -> str:
        given = "True" if self.value is None else repr([self.value])
        return f"{self.before} {self.option}={given}{self.after}"

    def on_command_line(self) -> str:
        """The text as a user of the ``fp4`` command reads it."""
        flag = f"--{self.option.replace('_', '-')}"
        given = flag if self.value is None else f"{flag} {shlex.quote(self.value)}"
        return f"{self.before} {given}{self.after}"
