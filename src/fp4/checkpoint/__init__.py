"""Checkpoints on disk: their formats, reading and writing, conversion and inspection."""

from __future__ import annotations

from fp4.checkpoint.formats import CODECS, codec_for, codec_named, holders
from fp4.checkpoint.formats.codec import Codec, LayerScheme, StoredLinear

__all__ = ["CODECS", "Codec", "LayerScheme", "StoredLinear", "codec_for", "codec_named", "holders"]
