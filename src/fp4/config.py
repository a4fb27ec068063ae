"""The quantization config that users pass to Transformers: a superset of its own ``FPQuantConfig``, fully checked."""

from __future__ import annotations

import inspect
import math
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from fp4.numerics.formats import WEIGHT_FORMATS, Format
from fp4.numerics.fp_quant_options import FP_QUANT_GLOBAL_SCALE, FP_QUANT_GRADIENTS, FP_QUANT_RULES
from fp4.numerics.rotation import ROTATIONS
from fp4.numerics.tool_rounding import TOOL_INPUT_RULES, TOOL_RULES
from fp4.ops import BACKENDS
from fp4.scheme import SCHEMES, Scheme, preset_of
from fp4.selection import first_fit, require_pattern

_OVERRIDABLE = (
    "scheme",
    "forward_dtype",
    "forward_method",
    "hadamard_group_size",
    "transform_init",
    "scale_rule",
    "activation_dtype",
    "activation_rule",
    "backend",
)


def _require(value: object, allowed: tuple[object, ...], option: str) -> None:
    if value not in allowed:
        raise ValueError(f"{option} is {value!r}; expected one of {', '.join(repr(a) for a in allowed)}")


def _options_of(scheme: object) -> dict[str, str]:
    """``forward_dtype`` and ``activation_dtype`` of a scheme named as in ``SCHEMES``."""
    _require(scheme, tuple(SCHEMES), "scheme")
    preset = SCHEMES[str(scheme)].scheme
    # Not all hardware multiplies activations in the weight's own format, so "auto" decides where the model runs.
    native = preset.activations == preset.format.native_activations
    return {"forward_dtype": preset.format.family, "activation_dtype": "auto" if native else preset.activations}


class FPQuantConfig(QuantizationConfigMixin):
    """Options to quantize a model to FP4 and to run it. Those of Transformers' ``FPQuantConfig`` mean the same here.

    Args:
        forward_dtype: ``"nvfp4"`` (blocks of 16, E4M3 scales), ``"mxfp4"`` (blocks of 32, power-of-two scales) or
            ``"fp8"`` (E4M3 with one scale a row), ``"fp8_block"`` (one for 128 x 128) or ``"mxfp8"`` (blocks of 32).
        forward_method: FP-Quant's choice of scale, ``"abs_max"`` or, for MXFP4, ``"quest"``.
        backward_dtype: FP-Quant's precision of gradients in quantization-aware training. fp4 trains with ``"bf16"``
            (gradients in the model's dtype); ``"mxfp8"`` and ``"mxfp4"`` are accepted for inference, which has no
            gradients.
        store_master_weights: keep the unquantized weight and quantize it in every forward, for training.
        hadamard_group_size: columns rotated together, a power of two of at least one block. Default: one block
            (16 for NVFP4, 32 for MXFP4) where FP-Quant's behaviour is asked for, else the best measured, or for layers
            of which that does not divide the columns the largest size that does, as an override.
        pseudoquantization: emulate W4A4 to the bit in pure torch; weights stay packed.
        transform_init: ``"hadamard"``, ``"identity"`` or ``"gsr"``. Default: the best measured for the format without
            calibration data, but none in a ``checkpoint_format`` other than ``"fp_quant"``. Naming this,
            ``hadamard_group_size`` or ``"quest"`` asks for FP-Quant's behaviour, its scales included (unless
            ``scale_rule`` says otherwise).
        modules_to_not_convert: layers to keep, as patterns of :mod:`fp4.selection`: names, suffixes, globs or regular
            expressions. A list, even an empty one, replaces the heads that are kept by default: the output embedding
            and the heads of classifiers. Routers, gates of shared experts and matrices of fewer than 16 rows are kept
            as well, unless ``overrides`` names one of them in full. Embeddings, layers tied to them, and layers that
            the model keeps in float32 are always kept.
        scale_rule: how block scales of weights are chosen: ``"fp_quant"`` (``forward_method`` under FP-Quant's fixed
            global scale), a rule of the format (``formats.NVFP4.rules``, ``formats.MXFP4.rules``), or
            ``"llm-compressor"`` or ``"modelopt"``: to the bit as that tool rounds, without a rotation by default.
        activation_dtype: ``"fp4"`` (W4A4), ``"fp8"`` (one E4M3 scale a token: W4A8, or W8A8 beside FP8 weights),
            ``"model"`` (W4A16: activations keep the model's dtype) or ``"auto"``: the format of the weights where the
            hardware multiplies that, the model's dtype elsewhere.
        activation_rule: like ``scale_rule``, for activations; no ``"mse"``.
        activation_scaling: ``"dynamic"`` takes the global scale of NVFP4 activations from each call, ``"static"`` uses
            the one stored with the weights.
        backend: ``"auto"`` or the backend that must run the model; an error where it cannot.
        overrides: other values of these options for some layers, ``{"*.mamba.*": {"scheme": "fp8_dynamic"}}``; None in
            place of the dictionary keeps a layer. The first pattern (as of :mod:`fp4.selection`) that fits wins.
        strict: whether a layer that cannot be quantized is an error instead of being kept.
        checkpoint_format: what ``save_pretrained`` writes: ``"fp_quant"``, ``"compressed-tensors"``, ``"modelopt"`` or
            ``"auto-round"``. In the last three, NVFP4 layers that engines fuse (q/k/v, gate/up) share a global scale,
            and NVFP4 without calibrated activations is written as weight-only, since those formats have no other way.
        scheme: ``forward_dtype`` and ``activation_dtype`` by one name of ``fp4.scheme.SCHEMES``, such as ``"nvfp4a16"``
            or ``"fp8_dynamic"``. Only ``"nvfp4a8"`` always quantizes activations (emulated); the others as ``"auto"``.

    Raises:
        ValueError: for any value or combination that has no meaning; the message says what is allowed.
    """

    def __init__(
        self,
        forward_dtype: str = "nvfp4",
        forward_method: str = "abs_max",
        backward_dtype: str = "bf16",
        store_master_weights: bool = False,
        hadamard_group_size: int | None = None,
        pseudoquantization: bool = False,
        transform_init: str | None = None,
        modules_to_not_convert: list[str] | None = None,
        scale_rule: str | None = None,
        activation_dtype: str = "auto",
        activation_rule: str | None = None,
        activation_scaling: str | None = None,
        backend: str = "auto",
        overrides: dict[str, dict[str, Any] | None] | list[list[Any]] | None = None,
        strict: bool = False,
        checkpoint_format: str = "fp_quant",
        scheme: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method = QuantizationMethod.FPQUANT
        _require(kwargs.pop("quant_method", self.quant_method), (self.quant_method,), "quant_method")
        if kwargs:
            known = ", ".join(name for name in inspect.signature(FPQuantConfig).parameters if name != "kwargs")
            raise ValueError(f"FPQuantConfig has no option {', '.join(sorted(kwargs))}; it has {known}")
        if scheme is not None:
            meant = _options_of(scheme)
            given = {"forward_dtype": forward_dtype, "activation_dtype": activation_dtype}
            defaults = {"forward_dtype": "nvfp4", "activation_dtype": "auto"}
            for option, value in given.items():
                if value not in (defaults[option], meant[option]):
                    raise ValueError(
                        f"scheme {scheme!r} means {option} {meant[option]!r}, but {value!r} is given; set one of them"
                    )
            forward_dtype, activation_dtype = meant["forward_dtype"], meant["activation_dtype"]
        self.forward_dtype = forward_dtype
        self.forward_method = forward_method
        self.backward_dtype = backward_dtype
        self.store_master_weights = store_master_weights
        self.hadamard_group_size = hadamard_group_size
        self._group_is_default = hadamard_group_size is None
        self.pseudoquantization = pseudoquantization
        self.transform_init = transform_init
        self.modules_to_not_convert = modules_to_not_convert
        self.scale_rule = scale_rule
        self.activation_dtype = activation_dtype
        self.activation_rule = activation_rule
        self.activation_scaling = activation_scaling
        self.backend = backend
        # The first pattern that fits wins, and config.json would sort the keys of a dictionary, so this is a list.
        by_pattern = [] if overrides is None else overrides
        self.overrides: list[list[Any]] = (
            [list(item) for item in by_pattern.items()] if isinstance(by_pattern, dict) else by_pattern
        )
        self.strict = strict
        self.checkpoint_format = checkpoint_format
        self.post_init()

    def post_init(self) -> None:
        """Replace options that are None by their defaults, and check all options. Running it again changes nothing.

        Raises:
            ValueError: for a value or combination that has no meaning; the message says what is allowed.
        """
        _require(self.forward_dtype, tuple(WEIGHT_FORMATS), "forward_dtype")
        self._check_training()
        self._fill_in()
        self._check_numerics()
        self._check_running()
        self._check_layers()

    @property
    def _format(self) -> Format:
        return WEIGHT_FORMATS[self.forward_dtype]

    @property
    def _fp8_inputs(self) -> bool:
        return "fp8" in (self._format.native_activations, self.activation_dtype)

    @property
    def _tools(self) -> tuple[str, ...]:
        """The names of the tools whose rounding is defined for the format."""
        return tuple(rule for rule, formats in TOOL_RULES.items() if self._format in formats)

    def _check_training(self) -> None:
        fmt = self._format
        methods = tuple(FP_QUANT_RULES.get(fmt, ("abs_max",)))
        _require(self.forward_method, methods, f"forward_method (of {fmt.name})")
        _require(self.backward_dtype, ("bf16", *FP_QUANT_GRADIENTS), "backward_dtype")
        needed = FP_QUANT_GRADIENTS.get(self.backward_dtype, fmt)
        if fmt != needed:
            raise ValueError(
                f"backward_dtype {self.backward_dtype!r} needs forward_dtype {needed.name!r}, found {fmt.name!r}"
            )
        if self.store_master_weights and self.backward_dtype != "bf16":
            raise ValueError(
                f"training computes gradients in the model's dtype, but backward_dtype is {self.backward_dtype!r}; "
                "use 'bf16' with store_master_weights"
            )
        if self.store_master_weights and self.scale_rule in self._tools:
            raise ValueError(
                f"scale_rule {self.scale_rule!r} is for writing what that tool writes, not for training with "
                "store_master_weights; use a rule of the format"
            )

    def _fill_in(self) -> None:
        """Replace None by the option that measured best, or by that of FP-Quant or of the tool that is asked for."""
        fmt = self._format
        preset = preset_of(fmt, self.activation_dtype)  # type: ignore[arg-type]
        rotation, group_size = "identity", fmt.k_multiple
        weight_rule, activation_rule = preset.unrotated_rule, preset.scheme.activation_rule
        if weight_rule is None:
            if self.checkpoint_format == "fp_quant":  # no engine serves rotations of the others without CUDA kernels
                rotation, group_size = preset.rotation or (rotation, group_size)
            weight_rule = preset.scheme.weight_rule
        if self.scale_rule in self._tools:
            rotation, group_size = "identity", fmt.k_multiple
            activation_rule = TOOL_INPUT_RULES.get((self.scale_rule, fmt), activation_rule)
        # An option that only FP-Quant's configuration has asks for the whole of FP-Quant's behaviour.
        named = fmt in FP_QUANT_RULES and (
            self.transform_init is not None or self.hadamard_group_size is not None or self.forward_method == "quest"
        )
        if named:
            rotation, group_size = "hadamard", fmt.block_size
        as_fp_quant = self.scale_rule == "fp_quant" or (self.scale_rule is None and named)
        if as_fp_quant:
            weight_rule = activation_rule = "fp_quant"
        if self.transform_init is None:
            self.transform_init = rotation
        if self.hadamard_group_size is None:
            self.hadamard_group_size = group_size
        if self.scale_rule is None:
            self.scale_rule = weight_rule
        if self.activation_rule is None:
            self.activation_rule = activation_rule
        if self.activation_scaling is None:
            self.activation_scaling = "static" if as_fp_quant and self.activation_dtype != "fp8" else "dynamic"

    def _check_numerics(self) -> None:
        fmt, size = self._format, self.hadamard_group_size
        if fmt not in FP_QUANT_RULES and (self.transform_init != "identity" or size != fmt.k_multiple):
            raise ValueError(
                f"{fmt.kind} weights are not rotated, but transform_init is {self.transform_init!r} and "
                f"hadamard_group_size {size!r}; leave both out"
            )
        _require(self.transform_init, tuple(ROTATIONS), "transform_init")
        if not isinstance(size, int) or size < fmt.k_multiple or size & (size - 1):
            raise ValueError(
                f"hadamard_group_size is {size!r}; {fmt.name} needs a power of two of at least {fmt.k_multiple}"
            )
        own_rules = ("fp_quant",) if fmt in FP_QUANT_RULES else ()
        _require(self.scale_rule, (*own_rules, *fmt.rules, *self._tools), f"scale_rule (of {fmt.name})")
        on_the_fly = tuple(rule for rule in fmt.rules if rule != "mse")
        _require(self.activation_rule, (*own_rules, *on_the_fly), f"activation_rule (of {fmt.name})")
        scalings = ("dynamic",) if self._fp8_inputs else ("dynamic", "static")
        of_fp8 = " (of FP8 activations)" if self._fp8_inputs else ""
        _require(self.activation_scaling, scalings, f"activation_scaling{of_fp8}")
        precisions = ("auto", *dict.fromkeys((fmt.native_activations, "fp8")), "model")
        _require(self.activation_dtype, precisions, f"activation_dtype (beside {fmt.kind} weights)")

    def _check_running(self) -> None:
        for option in ("store_master_weights", "pseudoquantization", "strict"):
            if not isinstance(getattr(self, option), bool):
                raise ValueError(f"{option} is {getattr(self, option)!r}; expected True or False")
        if self.checkpoint_format != "fp_quant" and (self.store_master_weights or self.pseudoquantization):
            raise ValueError(
                f"checkpoint_format {self.checkpoint_format!r} has no place for master weights or pseudoquantization"
            )
        if self.pseudoquantization and self.activation_dtype == "model":
            raise ValueError(
                "pseudoquantization emulates quantized activations, but activation_dtype is 'model'; set only one"
            )
        _require(self.backend, ("auto", *BACKENDS), "backend")
        if self.pseudoquantization and self.backend not in ("auto", "reference"):
            raise ValueError(
                f"pseudoquantization runs on the reference backend, but backend is {self.backend!r}; "
                "use 'auto' or 'reference'"
            )

    def _check_layers(self) -> None:
        keep = self.modules_to_not_convert
        if keep is not None and not (isinstance(keep, list) and all(isinstance(name, str) for name in keep)):
            raise ValueError(f"modules_to_not_convert is {keep!r}; expected a list of names, or None")
        for name in keep or []:
            require_pattern(name, "modules_to_not_convert")
        if not isinstance(self.overrides, list) or not all(
            isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) for item in self.overrides
        ):
            raise ValueError(f"overrides is {self.overrides!r}; expected a dictionary from patterns to options")
        for item in self.overrides:
            pattern, options = item
            if options is None:
                continue
            if not isinstance(options, dict):
                raise ValueError(f"overrides[{pattern!r}] is {options!r}; expected a dictionary of options, or None")
            unknown = set(options) - set(_OVERRIDABLE)
            if unknown:
                raise ValueError(
                    f"overrides[{pattern!r}] sets {', '.join(sorted(unknown))}; "
                    f"a layer can override {', '.join(_OVERRIDABLE)}"
                )
            item[1] = self._without_scheme(pattern, options)
            self._overridden(item[1])
        fp8 = self._fp8_inputs or any(
            self._overridden(options)._fp8_inputs for _, options in self.overrides if options is not None
        )
        if self.store_master_weights and fp8:
            raise ValueError("training quantizes to FP4, but store_master_weights is set beside FP8; choose one")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config that a ``quantization_config`` describes; FP-Quant wrote it if it has none of fp4's own options.

        Args:
            config_dict: the options by name.
            return_unused_kwargs: whether to return, beside the config, the ``kwargs`` that are no options.
            **kwargs: options that replace those of ``config_dict``.

        Raises:
            ValueError: for a value or combination that has no meaning.
        """
        if "scale_rule" not in config_dict:
            config_dict = {"transform_init": "hadamard", **config_dict}
        result = super().from_dict(config_dict, return_unused_kwargs, **kwargs)
        (result[0] if return_unused_kwargs else result).post_init()
        return result

    @classmethod
    def from_stock(cls, config: Any) -> FPQuantConfig:
        """The config that asks for the same as a ``transformers.FPQuantConfig``."""
        options = config.to_dict()
        return cls(**{name: options[name] for name in inspect.signature(cls).parameters if name in options})

    @property
    def uses_static_scales(self) -> bool:
        """Whether the checkpoint stores the global scales of activations."""
        return self.activation_scaling == "static"

    def to_dict(self) -> dict[str, Any]:
        """All options by name, as config.json stores them."""
        return {name: value for name, value in super().to_dict().items() if name != "_group_is_default"}

    def get_loading_attributes(self) -> dict[str, Any]:
        """The options that a user may change when loading a checkpoint, where they differ from the default."""
        chosen = {"activation_dtype": self.activation_dtype, "backend": self.backend}
        return {name: value for name, value in chosen.items() if value != "auto"}

    def _numerics(self) -> dict[str, Any]:
        names = ("forward_method", "hadamard_group_size", "transform_init", "scale_rule", "activation_rule")
        return {name: getattr(self, name) for name in names}

    def _without_scheme(self, pattern: str, options: dict[str, Any]) -> dict[str, Any]:
        """The options of an override, with ``scheme`` replaced by the options that it stands for."""
        if "scheme" not in options:
            return options
        rest = {name: value for name, value in options.items() if name != "scheme"}
        meant: dict[str, Any] = dict(_options_of(options["scheme"]))
        both = sorted(set(rest) & set(meant))
        if both:
            raise ValueError(
                f"overrides[{pattern!r}] sets both scheme and {', '.join(both)}; the scheme says it already"
            )
        # A rotation or rule that the user chose for the model also holds for the override. Where the user chose none,
        # the override's scheme brings its own defaults, which may differ from those of the model's scheme.
        best = FPQuantConfig(self.forward_dtype, activation_dtype=self.activation_dtype)
        if meant["forward_dtype"] == self.forward_dtype and self._numerics() == best._numerics():
            meant |= FPQuantConfig(scheme=options["scheme"])._numerics()
        return meant | rest

    def _overridden(self, options: dict[str, Any]) -> FPQuantConfig:
        own = {name: getattr(self, name) for name in ("activation_dtype", "backend", "pseudoquantization")}
        forward_dtype = options.get("forward_dtype", self.forward_dtype)
        fmt = WEIGHT_FORMATS.get(str(forward_dtype))
        if fmt is not None and own["activation_dtype"] == self._format.native_activations != "fp8":
            own["activation_dtype"] = fmt.native_activations
        if forward_dtype == self.forward_dtype:
            own["forward_dtype"] = self.forward_dtype
            own |= self._numerics()
        elif self.scale_rule == "fp_quant" and fmt in FP_QUANT_RULES:
            own |= {"scale_rule": "fp_quant", "transform_init": self.transform_init}
        elif fmt in TOOL_RULES.get(str(self.scale_rule), ()):
            own["scale_rule"] = self.scale_rule
        overridden = FPQuantConfig(**(own | options))
        if "hadamard_group_size" in own and "hadamard_group_size" not in options:
            overridden._group_is_default = self._group_is_default
        return overridden

    def fit_rotation(self, name: str, columns: int) -> None:
        """Rotate a layer in the largest groups that divide its columns, by an override for it, where they do not yet.

        A size that the user chose is kept.

        Args:
            name: the layer's full name.
            columns: K of the layer.
        """
        override = first_fit(name, self.overrides)
        options = {} if override is None else override[1]
        if options is None:
            return
        chosen = self if override is None else self._overridden(options)
        size, smallest = int(chosen.hadamard_group_size or 1), chosen._format.k_multiple
        fitting = math.gcd(size, columns)
        if chosen._group_is_default and chosen.transform_init != "identity" and smallest <= fitting < size:
            self.overrides.insert(0, [name, {**options, "hadamard_group_size": fitting}])

    def scheme_for(self, name: str) -> tuple[Scheme, str] | None:
        """The scheme and the preferred backend of a layer.

        Args:
            name: the layer's full name in the model.

        Returns:
            both, or None if an override keeps the layer in the model's dtype.
        """
        override = first_fit(name, self.overrides)
        if override is not None:
            return None if override[1] is None else self._overridden(override[1]).scheme_for(name)
        fmt = self._format
        fp_quant_rule = FP_QUANT_RULES.get(fmt, {}).get(self.forward_method, "")
        emulated = "fp8" if self._fp8_inputs else "fp4"
        fixed = None
        if self.scale_rule == "fp_quant":
            fixed = None if self.forward_method == "quest" else FP_QUANT_GLOBAL_SCALE
        scheme = Scheme(
            format=fmt,
            weight_rule=fp_quant_rule if self.scale_rule == "fp_quant" else str(self.scale_rule),
            activations=emulated if self.pseudoquantization else self.activation_dtype,  # type: ignore[arg-type]
            activation_rule=fp_quant_rule if self.activation_rule == "fp_quant" else str(self.activation_rule),
            rotation=str(self.transform_init),
            group_size=int(self.hadamard_group_size or fmt.k_multiple),
            global_scale=fixed,
        )
        return scheme, "reference" if self.pseudoquantization else self.backend
