"""State of a quantizer while the weights of its model are loaded and saved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fp4.checkpoint import Codec, LayerScheme
from fp4.config import FPQuantConfig
from fp4.integrations.transformers.coverage import Coverage
from fp4.integrations.transformers.prequantized_config import CheckpointConfig
from fp4.nn import FP4Experts
from fp4.scheme import Scheme


@dataclass
class SharedScale:
    """A group of layers that share one global scale, and the dense weights of those read so far."""

    layers: list[str]
    waiting: dict[str, Tensor] = field(default_factory=dict)


class Packing:
    """The state of a quantizer that the loading operations and the conversion of experts use."""

    quantization_config: FPQuantConfig | CheckpointConfig

    def _reset(self, codec: Codec) -> None:
        #: Reads and writes the tensors of the checkpoint's format.
        self.codec = codec
        #: Error by layer; all are reported together after loading.
        self.problems: dict[str, str] = {}
        self.loaded: set[str] = set()
        #: Names of parameters not loaded yet. This is Transformers' own set, from which it removes what it has read.
        self.missing: set[str] = set()
        #: Groups of layers that share a global scale, by the name of each layer.
        self.sharing: dict[str, SharedScale] = {}
        #: Experts modules by name, and for each the names of an expert's matrices in checkpoints.
        self.experts: dict[str, FP4Experts] = {}
        self.expert_names: dict[str, dict[str, str]] = {}
        #: For each experts module, the names of its stacks in checkpoints, by projection; only for some model families.
        self.stack_names: dict[str, dict[str, str]] = {}
        #: Projections that the checkpoint stores as stacks, in a format that can also store single matrices.
        self.stacked: set[str] = set()
        #: Experts module by name of each packed matrix or stack of experts in the checkpoint.
        self.packed_experts: dict[str, str] = {}
        #: Transformers' weight conversions of the model, for saving once it is dequantized.
        self._conversions_when_dense: list[Any] = []
        #: Numbers of quantized parameters, and why the other layers are unquantized.
        self.report: Coverage | None = None

    def stored_scheme(self, layer: str, runs: Scheme) -> LayerScheme:
        """Scheme of the stored tensors of a layer.

        Args:
            layer: name of the layer in the checkpoint.
            runs: scheme by which the layer runs.

        Raises:
            ValueError: the checkpoint's configuration says that the layer is not quantized.
        """
        if isinstance(self.quantization_config, CheckpointConfig):
            scheme = self.codec.scheme(layer)
            if scheme is None:
                raise ValueError("it is packed, but the configuration says that it is not quantized")
            return scheme
        fp8 = runs.input_format.kind == "FP8"
        return LayerScheme(runs.format, "model" if runs.activations == "model" else "fp8" if fp8 else "fp4")
