r"""The choice of layers to quantize: a pattern language, and a rule for what stays dense (unquantized) by default.

**Patterns** are matched against a layer's full name in the model. A pattern fits if one of these readings does, which
are tried in this order:

1. name: the pattern is the name of the layer, or of a module around it (``model.layers.1`` fits all of that block and
   none of block 11);
2. suffix: the layer's name ends with the pattern (``up_proj``, ``mlp.up_proj``; ``proj`` fits ``up_proj`` too);
3. glob: ``fnmatch`` with ``*``, ``?`` or ``[...]``, where ``*`` crosses dots. A match may start at the name's start or
   after any dot, and may end at the name's end or before any dot (``*.mlp`` and ``layers.[02].mlp.*`` fit what is in
   those modules);
4. regular expression: a match starts at the name's start and ends at its end or at a dot (``.*\.(q|k)_proj``). A
   number before a dot must be matched whole, so ``model.layers.1.*`` fits no layer of block 11.

Transformers reads ``modules_to_not_convert`` by 1, 2 and 4; 3 is how shells match file names. All options that choose
layers take these patterns: ``modules_to_not_convert`` and ``overrides`` of ``FPQuantConfig``, and ``--skip``,
``--only`` and ``--override`` on the command line.

**Precedence**: a layer that ``skip`` fits stays dense. Where ``only`` is given, a layer that it does not fit stays
dense. For the remaining layers the first override that fits decides, and layers without one take the default scheme.

**Dense by default** (:class:`DenseLayers`) are the output embedding, heads of classifiers and regressors, routers,
gates of shared experts, matrices of fewer than 16 rows, layers that the model keeps in float32, and weights tied to
another. The last two are always dense. The others are quantized if an override with a scheme ends in the layer's own
name: ``*.shared_expert_gate`` does, ``*.mlp.*`` does not.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from fp4.linear_like import linear_like
from fp4.scheme import SCHEMES
from fp4.spelling import hint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Pair = TypeVar("Pair", bound=Sequence[Any])

#: Matrices with fewer rows than this stay dense: there is little to save, and kernels compute tiles of 16 rows.
FEWEST_ROWS = 16

# Names of routers that stand beside the experts that they route to; all layers inside such a module belong to it.
_ROUTERS = ("gate", "gating", "router", "wg", "classifier")
# Names of routers that do not stand beside experts: Doge's experts are two embeddings, and Gemma 3n routes between
# copies of its hidden states.
_ROUTERS_ANYWHERE = ("router", "router_gate", "modality_router")
_HEADS = ("score", "classifier", "lm_head")

TIED = "tied to another weight"


# --- patterns --------------------------------------------------------------------------------------------------------


def fits(name: str, pattern: str) -> bool:
    """Whether ``pattern`` fits the layer called ``name``, as the module's docstring describes."""
    if name == pattern or name.startswith(f"{pattern}.") or name.endswith(pattern):
        return True
    if _is_glob(pattern):
        globs = (pattern, f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*")
        if any(fnmatch.fnmatchcase(name, glob) for glob in globs):
            return True
    expression = _expression(pattern)
    return expression is not None and expression.match(name) is not None


def _is_glob(pattern: str) -> bool:
    return re.search(r"[*?]|\[.+\]", pattern) is not None


@functools.lru_cache(maxsize=1024)
def _expression(pattern: str) -> re.Pattern[str] | None:
    whole_numbers = re.sub(r"(?<=[\d\]])\.", r"(?!\\d).", pattern)
    try:
        re.compile(pattern)  # by itself, since a bracket missing in it could be found in what is added
        return re.compile(rf"(?:{whole_numbers})(?:(?<=\.)|(?=\.|$))")
    except re.error:
        return None


def require_pattern(pattern: str, option: str) -> None:
    """Check that a pattern can be read as a glob or as a regular expression.

    Args:
        pattern: the pattern.
        option: the option that it was given for, for the message.

    Raises:
        ValueError: it is neither.
    """
    if _is_glob(pattern):
        return
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{option} has {pattern!r}, which is no name, no glob and no regular expression ({error}); name layers as "
            "in 'lm_head', '*.mlp.*' or 'model.layers.(0|1)'"
        ) from error


def first_fit(name: str, overrides: Iterable[Pair]) -> Pair | None:
    """The first override whose pattern fits a layer.

    Args:
        name: the layer's full name.
        overrides: sequences that start with a pattern.

    Returns:
        the override, or None if none fits.
    """
    return next((pair for pair in overrides if fits(name, pair[0])), None)


def spelled_out(name: str, overrides: Iterable[Pair]) -> bool:
    """Whether the first override that fits a layer has a scheme and ends in the layer's own name, without a wildcard.

    Args:
        name: the layer's full name.
        overrides: pairs of a pattern and a scheme, or None to keep layers dense.
    """
    override = first_fit(name, overrides)
    own_name = name.rpartition(".")[2]
    return override is not None and override[1] is not None and override[0].rpartition(".")[2] == own_name


def idle_patterns(patterns: Iterable[str], names: Sequence[str]) -> list[str]:
    """The patterns that fit none of the layers called ``names``; they are most likely mistakes."""
    return [pattern for pattern in patterns if not any(fits(name, pattern) for name in names)]


def parse_overrides(overrides: Mapping[str, str | None] | Sequence[str]) -> tuple[tuple[str, str | None], ...]:
    """Overrides as pairs of a pattern and the name of a scheme, or None for layers that stay dense.

    Args:
        overrides: a dictionary such as ``{"*.down_proj": "mxfp4"}``, or a list such as ``["*.down_proj=mxfp4"]``.
            None or ``"keep"`` in place of a scheme keeps layers dense.

    Raises:
        ValueError: an entry of a list is not ``PATTERN=SCHEME``.
    """
    if isinstance(overrides, Mapping):
        pairs = [(str(pattern), None if scheme is None else str(scheme)) for pattern, scheme in overrides.items()]
    else:
        pairs = []
        for entry in overrides:
            pattern, equals, scheme = entry.partition("=")
            if not equals or not pattern or not scheme:
                raise ValueError(f"override is {entry!r}; expected PATTERN=SCHEME, e.g. '*.down_proj=mxfp4'")
            pairs.append((pattern, scheme))
    return tuple((pattern, None if scheme == "keep" else scheme) for pattern, scheme in pairs)


def fits_in_transformers(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern fits the layer called ``name`` as Transformers reads patterns, without globs."""
    # Checkpoints are inspected and converted without Transformers, which takes seconds to import.
    from transformers.quantizers.quantizers_utils import should_convert_module

    for pattern in patterns:
        try:
            if not should_convert_module(name, [pattern]):
                return True
        except re.error:
            continue
    return False


def as_transformers_reads(listed: Sequence[str], kept: Mapping[str, str], layers: Sequence[str]) -> list[str]:
    """A ``modules_to_not_convert`` by which Transformers keeps exactly the layers dense that are dense here.

    Transformers knows neither globs nor the rule for layers that stay dense by default.

    Args:
        listed: the patterns that the user listed. Those that Transformers reads alike are kept as they are; others are
            replaced by the names of the layers that they fit.
        kept: all layers that stay dense, with the reason. Layers with a tied weight need no entry.
        layers: the names of all layers that could be quantized.
    """
    patterns = [
        pattern
        for pattern in listed
        if all(fits_in_transformers(name, [pattern]) == fits(name, pattern) for name in layers)
    ]
    for name in layers:
        if kept.get(name, TIED) != TIED and not fits_in_transformers(name, patterns):
            patterns.append(name)
    return patterns


# --- what stays dense ------------------------------------------------------------------------------------------------


def float32_parameters(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], bool]:
    """A test of which parameters Transformers keeps in float32 when it loads a model in another dtype.

    Args:
        model: the model; its weights are not read.
        dtype: the dtype that the model is loaded in.

    Returns:
        a function from the name of a parameter to whether it is kept in float32.
    """
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(dtype)
    pattern = build_glob_alternation(list(plan))[0]
    return lambda name: bool(plan) and pattern.search(name) is not None


def tied_layers(model: PreTrainedModel) -> set[str]:
    """The names of all layers that share their weight with another layer."""
    return {key.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for key in pair}


def shared_layers(model: PreTrainedModel) -> set[str]:
    """The names of all layers that share their weight with another layer that is no embedding, as Zamba's blocks do."""
    embeddings = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    pairs = [pair for pair in model.all_tied_weights_keys.items() if embeddings.isdisjoint(pair)]
    return {key.removesuffix(".weight") for pair in pairs for key in pair}


@dataclass
class DenseLayers:
    """The layers of a model that stay dense unless the user says otherwise, with the reasons.

    Attributes:
        model: the model.
        tied: names of the layers that share their weight with another layer.
        heads: the output embedding and the heads, with reasons; an explicit ``modules_to_not_convert`` replaces these.
        others: routers, gates and small matrices, with reasons.
        no_linears: modules with a weight matrix that neither compute what ``nn.Linear`` does nor are embeddings, with
            reasons.
    """

    model: PreTrainedModel
    tied: set[str] = field(default_factory=set)
    heads: dict[str, str] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    no_linears: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model = self.model
        self.tied = tied_layers(model)
        self.heads = dict(_heads(model))
        routers = dict(_routers(model))
        # Transformers has two lists of what stays in float32. Its quantizers skip the modules of the first. The second,
        # strict list applies to bfloat16 too, and its entries may occur anywhere in a parameter's name (`gate.weight`).
        self._modules_in_float32 = list(model._keep_in_fp32_modules or [])
        self._parameters_in_float32 = float32_parameters(model, torch.bfloat16)
        for name, module in _matrices(model):
            form = linear_like(module)
            if form is None and not isinstance(module, nn.Linear):
                self.no_linears[name] = routers.get(name, f"{type(module).__name__} computes no nn.Linear")
            elif name in routers:
                self.others[name] = routers[name]
            elif form is not None and form.out_features < FEWEST_ROWS:
                self.others[name] = f"its rows, {form.out_features}, are fewer than {FEWEST_ROWS}"

    def reason(self, name: str, asked: bool = False, heads: bool = True) -> str | None:
        """The reason why a layer stays dense; None if it is to be quantized.

        Args:
            name: the layer's full name.
            asked: whether an override spells out the layer's name.
            heads: whether heads stay dense by default; False where a list of the user's replaces that rule.
        """
        if name in self.heads and heads and not asked:
            return self.heads[name]
        if name in self.tied:
            return TIED
        if self.stays_in_float32(name):
            return self.others.get(name, "the model keeps it in float32")
        return None if asked else self.others.get(name)

    def stays_in_float32(self, name: str) -> bool:
        """Whether the model's authors keep the layer out of half precision, which rules out four bits as well."""
        listed = fits_in_transformers(name, self._modules_in_float32)
        return listed or self._parameters_in_float32(f"{name}.weight")


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules with a weight matrix that are not embeddings, by name."""
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding):
            yield name, module


def _heads(model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """The output embedding, and layers outside the base model that compute labels or tokens: names and reasons."""
    output, base = model.get_output_embeddings(), model.base_model
    inside = {id(module) for module in base.modules()} if base is not model else set()
    rows = {getattr(model.config, "num_labels", None), getattr(model.config, "vocab_size", None)}
    for name, module in model.named_modules():
        if module is output:
            yield name, "output embedding"
        elif isinstance(module, nn.Linear) and id(module) not in inside:
            named = name.rpartition(".")[2] in _HEADS
            # Where the model does not say what its base is, only layers at the top with a head's name count as heads.
            if (named or module.out_features in rows) if inside else (named and "." not in name):
                yield name, "classification or regression head"


def _routers(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Layers that decide which experts run, and how much of a shared expert is added: names and reasons.

    Routers are recognised beside the experts by their name, or as a Linear layer with one row for each expert.
    """
    modules = dict(model.named_modules())
    routers = [name for name in modules if name.rpartition(".")[2] in _ROUTERS_ANYWHERE]
    for name, module in modules.items():
        children = dict(module.named_children())
        counts = {number for key, child in children.items() if (number := _number_of_experts(key, child))}
        if not counts:
            continue
        for key, child in children.items():
            path = f"{name}.{key}" if name else key
            rows = child.out_features if isinstance(child, nn.Linear) else None
            if key in _ROUTERS or rows in counts:
                routers.append(path)
            elif rows == 1:
                yield path, "gate of a shared expert"
    for router in routers:
        for below, _ in _matrices(modules[router]):
            yield f"{router}.{below}" if below else router, "router"


def _number_of_experts(key: str, module: nn.Module) -> int:
    """The number of experts in a child module called ``key``, as layers or in stacks; 0 if it holds none."""
    if "expert" not in key or "shared" in key:
        return 0
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return len(module)
    return next((stack.shape[0] for stack in module.parameters(recurse=False) if stack.ndim == 3), 0)


# --- what the user says ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """The user's choice of a scheme for each layer, by patterns.

    Attributes:
        scheme: the name of the scheme for all layers that no override fits.
        skip: patterns of layers that stay dense, whatever else fits them.
        only: where given, layers that none of these patterns fits stay dense, even if an override fits them.
        overrides: pairs of a pattern and the name of a scheme, or None to keep layers dense; the first that fits wins.
        include: patterns of layers outside the blocks of a model's text decoder that are to be quantized too.

    Raises:
        ValueError: a scheme does not exist.
    """

    scheme: str
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    overrides: tuple[tuple[str, str | None], ...] = ()
    include: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in (self.scheme, *(scheme for _, scheme in self.overrides)):
            if name is not None and name not in SCHEMES:
                raise ValueError(f"scheme is {name!r}; expected one of {', '.join(SCHEMES)}{hint(name, SCHEMES)}")

    def of(self, name: str, dense: DenseLayers) -> tuple[str | None, str]:
        """The scheme for a layer.

        Args:
            name: the layer's full name.
            dense: the layers of the model that stay dense by default.

        Returns:
            the name of the scheme and where it comes from, or None and the reason why the layer stays dense.
        """
        reason = dense.reason(name, spelled_out(name, self.overrides))
        if reason is not None:
            return None, reason
        for pattern in self.skip:
            if fits(name, pattern):
                return None, f"skipped by {pattern}"
        if self.only and not any(fits(name, pattern) for pattern in self.only):
            return None, "not among the layers chosen"
        override = first_fit(name, self.overrides)
        return (self.scheme, "") if override is None else (override[1], f"override {override[0]}")

    def includes(self, name: str) -> bool:
        """Whether a layer outside the blocks of the text decoder is to be quantized."""
        return any(fits(name, pattern) for pattern in self.include)

    def require_used(self, names: Sequence[str], outside: Sequence[str] = ()) -> None:
        """Check that every pattern fits a layer, since one that fits none is most likely a mistake.

        Args:
            names: the full names of all layers in the blocks of the text decoder.
            outside: those of all other layers.

        Raises:
            ValueError: a pattern fits none; the message names it.
        """
        chosen = [*names, *filter(self.includes, outside)]
        overrides = [pattern for pattern, _ in self.overrides]
        options = (
            ("include", self.include, outside, "layers outside the decoder's blocks"),
            ("skip", self.skip, chosen, "layers"),
            ("only", self.only, chosen, "layers"),
            ("override", overrides, chosen, "layers"),
        )
        for option, patterns, candidates, what in options:
            for pattern in idle_patterns(patterns, candidates):
                shown = f" ({', '.join(list(candidates)[:3])}, ...)" if candidates else ""
                raise ValueError(f"{option} {pattern!r} fits none of {len(candidates)} {what}{shown}")
