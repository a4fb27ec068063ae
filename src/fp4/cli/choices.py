"""Allowed values of the command's options, repeated here because importing the registries would import torch.

So the help lists them quickly and a wrong value is refused at once. A test compares them with the registries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import typer

from fp4.spelling import hint

SCHEMES = ("nvfp4", "nvfp4a16", "nvfp4a8", "mxfp4", "mxfp4a16", "fp8_dynamic", "fp8_block", "mxfp8")
#: Names of checkpoint formats.
FORMATS = ("compressed-tensors", "fp_quant", "modelopt", "auto-round", "mxfp4")
#: What each method costs, by its name.
METHODS = {
    "rtn": "seconds; no data but for static input scales",
    "gptq": "one pass over the samples and a sweep over the columns of every layer",
    "autoround": "iters forward and backward passes over a batch of samples",
    "best": "as gptq, and sweeps of descent that cost twice that of a layer",
}
EXPERTS = ("all", "routed")


def one_of(what: str, names: Iterable[str]) -> Callable[[typer.Context, str | None], str | None]:
    """Option callback that refuses values other than ``names`` before the command imports torch.

    Args:
        what: what the option is called in the error message.
        names: the allowed values.
    """
    known = tuple(names)

    def check(context: typer.Context, value: str | None) -> str | None:
        if value is not None and value not in known and not context.resilient_parsing:
            raise ValueError(f"{what} is {value!r}; expected one of {', '.join(known)}{hint(value, known)}")
        return value

    return check
