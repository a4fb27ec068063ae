"""Where the command prints to. Names of files and layers are printed as they are: rich would take ``[x]`` in one for
markup, and ``:fire:`` for an emoji. What has a style is a :class:`rich.text.Text` or a styled column."""

from rich.console import Console

console = Console(markup=False, emoji=False)
errors = Console(markup=False, emoji=False, stderr=True)
