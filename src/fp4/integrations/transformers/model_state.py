"""What is known of one model while its weights are read and saved."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fp4.checkpoint import Codec, LayerScheme
from fp4.config import FPQuantConfig
from fp4.integrations.transformers.coverage import Coverage
from fp4.integrations.transformers.prequantized_config import CheckpointConfig
from fp4.nn import FP4Experts
from fp4.scheme import Scheme


@dataclass
class SharedScale:
    """Layers that are to have one global scale, and the dense weights of those that have been read."""

    layers: list[str]
    waiting: dict[str, Tensor] = field(default_factory=dict)


class Packing:
    """The part of a quantizer that operations on tensors and experts work with."""

    quantization_config: FPQuantConfig | CheckpointConfig

    def _reset(self, codec: Codec) -> None:
        #: Reads and writes the stored tensors.
        self.codec = codec
        #: What went wrong with which layer while loading; reported together, after the last one.
        self.problems: dict[str, str] = {}
        self.loaded: set[str] = set()
        #: Parameters that the checkpoint lacks: Transformers' own set, which it strikes them out of as it reads them.
        self.missing: set[str] = set()
        #: Groups of layers that share a global scale, by each of their names.
        self.sharing: dict[str, SharedScale] = {}
        #: Experts modules, and what checkpoints call the matrices of an expert of each.
        self.experts: dict[str, FP4Experts] = {}
        self.expert_names: dict[str, dict[str, str]] = {}
        #: What checkpoints call the layers of stacks, by projection, for families that have such.
        self.stack_names: dict[str, dict[str, str]] = {}
        #: Projections of experts that the checkpoint stores as stacks, though its format can store single matrices.
        self.stacked: set[str] = set()
        #: What the checkpoint holds packed of experts, and the module of each.
        self.packed_experts: dict[str, str] = {}
        #: Which share of the model's parameters is quantized, to what, and why the others are not.
        self.report: Coverage | None = None

    def stored_scheme(self, layer: str, runs: Scheme) -> LayerScheme:
        """How the tensors of ``layer`` are stored, which runs by scheme ``runs``."""
        if isinstance(self.quantization_config, CheckpointConfig):
            scheme = self.codec.scheme(layer)
            if scheme is None:
                raise ValueError("it is packed, but the configuration says that it is not quantized")
            return scheme
        fp8 = runs.input_format.kind == "FP8"
        return LayerScheme(runs.format, "model" if runs.activations == "model" else "fp8" if fp8 else "fp4")
