"""How the tensors of one layer are called and stored: a row of a codec's table of the formats that it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from fp4.checkpoint.formats.codec import Codec, LayerScheme, StoredLinear


class Layout(NamedTuple):
    """One way to store a weight, which several codecs may have in common.

    Attributes:
        suffixes: as ``Codec.suffixes``, those of this layout.
        codes: as ``Codec.codes``.
        markers: as ``Codec.markers``.
        read: as ``Codec.read``: takes tensors by suffix, the scheme, and N, K or None.
        write: as ``Codec.write``: takes the layer, its scheme, the codec's name for messages, and ``allow_rounding``.
    """

    suffixes: tuple[str, ...]
    codes: tuple[str, ...]
    markers: Mapping[str, tuple[str, ...]]
    read: Callable[[Mapping[str, Tensor], LayerScheme, tuple[int, int] | None], StoredLinear]
    write: Callable[[StoredLinear, LayerScheme, str, bool], dict[str, Tensor]]


def add_layouts(codec: Codec, layouts: Iterable[Layout]) -> None:
    """Let a codec know the tensors of further layouts, which the checkpoint's configuration says that it has."""
    for layout in layouts:
        codec.suffixes = tuple(dict.fromkeys([*codec.suffixes, *layout.suffixes]))
        codec.codes = tuple(dict.fromkeys([*codec.codes, *layout.codes]))
        codec.markers = {**codec.markers, **layout.markers}
