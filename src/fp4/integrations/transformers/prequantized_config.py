"""The configuration of a model whose checkpoint is in another tool's format."""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from fp4.checkpoint import LayerScheme, codec_for
from fp4.scheme import Activations, Scheme


class CheckpointConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a checkpoint in another tool's format, kept as it is.

    Args:
        stored: the ``quantization_config`` of config.json.
        activation_dtype: as in :class:`fp4.FPQuantConfig`, for layers whose activations the checkpoint quantizes. Both
            ``"fp4"`` and ``"fp8"`` select the format that the checkpoint names.
        backend: as in :class:`fp4.FPQuantConfig`.
    """

    strict = False  # CheckpointHfQuantizer refuses what is packed and cannot be run; what is dense may stay so
    pseudoquantization = False
    store_master_weights = False
    uses_static_scales = True

    def __init__(
        self,
        stored: dict[str, Any],
        activation_dtype: Activations = "auto",
        backend: str = "auto",
    ) -> None:
        self.stored = dict(stored)
        self.quant_method = self.stored["quant_method"]
        self.activation_dtype = activation_dtype
        self.backend = backend
        #: Whether to load dense weights; Transformers copies this from a configuration that the user passes.
        self.dequantize = False
        self.modules_to_not_convert: list[str] = []
        self.codec = codec_for(self.stored)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Configuration for the ``quantization_config`` of a checkpoint, with the unused ``kwargs`` if asked for."""
        config = cls(config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The ``quantization_config`` to save, which is the one that was read."""
        return dict(self.stored)

    def to_diff_dict(self) -> dict[str, Any]:
        """The same as :meth:`to_dict`: a checkpoint's configuration is saved in full."""
        return self.to_dict()

    def get_loading_attributes(self) -> dict[str, Any]:
        """Options of the user that override those of a checkpoint's configuration."""
        chosen = {"activation_dtype": self.activation_dtype, "backend": self.backend}
        return {name: value for name, value in chosen.items() if value != "auto"}

    def _activations(self, stored: LayerScheme) -> Activations:
        """Activations option for a layer: the format named in the checkpoint, or none."""
        asked: Activations = self.activation_dtype
        if "model" in (stored.activations, asked):
            return "model"
        if asked != "auto":
            return stored.activations
        # No hardware multiplies FP4 weights with FP8 activations, so these are emulated only if the user asks for it.
        native = (
            Scheme(stored.format).input_format is Scheme(stored.format, activations=stored.activations).input_format
        )
        return "auto" if native else "model"

    def scheme_for(self, name: str) -> tuple[Scheme, str] | None:
        """Scheme and backend preference of the layer called ``name``, or None if the checkpoint keeps it."""
        stored = self.codec.scheme(name)
        if stored is None:
            return None
        scheme = Scheme(
            format=stored.format,
            activations=self._activations(stored),
            activation_rule=self.codec.input_rules.get(stored.format, "abs_max"),
            rotation=stored.rotation,
            group_size=stored.group_size or stored.format.block_size,
        )
        return scheme, self.backend
