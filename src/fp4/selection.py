r"""Which layers are quantized: one pattern language, and one rule for what stays dense by default.

**Patterns** name layers by their full name in the model. One fits where any of these does, tried in this order:

1. name: it is the layer's, or that of a module around it (``model.layers.1`` fits all of that block, none of block 11);
2. suffix: the layer's name ends with it (``up_proj``, ``mlp.up_proj``; ``proj`` fits ``up_proj`` too);
3. glob: ``fnmatch`` with ``*``, ``?`` or ``[...]``, where ``*`` crosses dots, from the start of the name or from after
   any dot, to the name's end or to any dot (``*.mlp`` and ``layers.[02].mlp.*`` fit what is in those modules);
4. regular expression: from the start of the name to its end or to a dot (``.*\.(q|k)_proj``). A number that a dot
   follows is a whole one, so that ``model.layers.1.*`` fits no layer of block 11, read as a glob or in this way.

1, 2 and 4 are how Transformers reads ``modules_to_not_convert``, 3 is how file names are matched. Everything takes
every pattern: ``FPQuantConfig``'s ``modules_to_not_convert`` and ``overrides``, ``--skip``, ``--only``, ``--override``.

**Precedence**: what is skipped is kept; where ``only`` is given, what it does not fit is kept; then the first override
that fits decides; all others take the default.

**Dense by default** (:class:`DenseLayers`) are the output embedding, heads of classifiers and regressors, routers,
gates of shared experts, matrices of fewer than 16 rows, layers that the model keeps in float32, and weights tied to
another. The last two are always dense. An override with a scheme lifts the rule from the layers whose own name it
spells out: ``*.shared_expert_gate`` does, ``*.mlp.*`` does not.
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

from fp4.scheme import SCHEMES
from fp4.spelling import hint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Pair = TypeVar("Pair", bound=Sequence[Any])

#: Matrices with fewer rows than this stay dense: there is little to save, and kernels compute tiles of 16 rows.
FEWEST_ROWS = 16

# What routers are called beside the experts that they route to; whatever is in such a module belongs to the router.
_ROUTERS = ("gate", "gating", "router", "wg", "classifier")
# Routers without a sibling that holds experts: of Doge, whose experts are two embeddings, and of Gemma 3n, which routes
# between copies of its hidden states.
_ROUTERS_ANYWHERE = ("router", "router_gate", "modality_router")
_HEADS = ("score", "classifier", "lm_head")

TIED = "tied to another weight"


# --- patterns --------------------------------------------------------------------------------------------------------


def fits(name: str, pattern: str) -> bool:
    """Whether ``pattern`` fits the layer called ``name`` (see the module's docstring)."""
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
        re.compile(pattern)  # alone, since brackets that it lacks could be found around it
        return re.compile(rf"(?:{whole_numbers})(?:(?<=\.)|(?=\.|$))")
    except re.error:
        return None


def require_pattern(pattern: str, option: str) -> None:
    """ValueError unless ``pattern``, given as ``option``, can be read as a glob or as a regular expression."""
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
    """The first of ``overrides``, pairs of a pattern and anything, whose pattern fits the layer called ``name``."""
    return next((pair for pair in overrides if fits(name, pair[0])), None)


def spelled_out(name: str, overrides: Iterable[Pair]) -> bool:
    """Whether the first of ``overrides`` that fits asks for the layer by its own name, not by a wildcard."""
    override = first_fit(name, overrides)
    own_name = name.rpartition(".")[2]
    return override is not None and override[1] is not None and override[0].rpartition(".")[2] == own_name


def idle_patterns(patterns: Iterable[str], names: Sequence[str]) -> list[str]:
    """Those of ``patterns`` that fit none of the layers called ``names``: most likely mistakes."""
    return [pattern for pattern in patterns if not any(fits(name, pattern) for name in names)]


def parse_overrides(overrides: Mapping[str, str | None] | Sequence[str]) -> tuple[tuple[str, str | None], ...]:
    """``{"*.down_proj": "mxfp4"}`` or ``["*.down_proj=mxfp4"]``; None or ``keep`` keeps a layer.

    Raises:
        ValueError: an entry has no ``=``.
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
    """Whether one of ``patterns`` fits the layer called ``name`` as Transformers reads them, which knows no globs."""
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
    """``modules_to_not_convert`` for a file: Transformers' reading of it keeps what is kept here.

    Transformers knows neither the rule for what stays dense nor globs.

    Args:
        listed: what the user listed; patterns that are read alike stay, others give way to the names that they fit.
        kept: all layers that are kept, with the reason; weights tied to another need no entry.
        layers: all that could be quantized.
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
    """Whether Transformers leaves a parameter, by its name, in float32 where it loads ``model`` in ``dtype``."""
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(dtype)
    pattern = build_glob_alternation(list(plan))[0]
    return lambda name: bool(plan) and pattern.search(name) is not None


def tied_layers(model: PreTrainedModel) -> set[str]:
    """Names of the layers whose weight is another's, or another's theirs."""
    return {key.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for key in pair}


@dataclass
class DenseLayers:
    """Why layers of a model stay dense unless the user says otherwise.

    Attributes:
        tied: layers whose weight is another's.
        heads: output embedding and heads, with the reason; what an explicit ``modules_to_not_convert`` replaces.
        others: routers, gates and small matrices, with the reason.
        no_linears: modules with a matrix that are neither ``nn.Linear`` nor embeddings, with the reason.
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
        # Transformers has two lists. Its quantizers skip the modules of the first. The second, strict one holds for
        # bfloat16, and loading finds its entries anywhere in the name of a parameter, such as `gate.weight`.
        self._modules_in_float32 = list(model._keep_in_fp32_modules or [])
        self._parameters_in_float32 = float32_parameters(model, torch.bfloat16)
        for name, module in _matrices(model):
            if not isinstance(module, nn.Linear):
                self.no_linears[name] = routers.get(name, f"{type(module).__name__} is no nn.Linear")
            elif name in routers:
                self.others[name] = routers[name]
            elif module.out_features < FEWEST_ROWS:
                self.others[name] = f"its rows, {module.out_features}, are fewer than {FEWEST_ROWS}"

    def reason(self, name: str, asked: bool = False, heads: bool = True) -> str | None:
        """Why the layer called ``name`` stays dense; None if it is to be quantized.

        Args:
            name: of the layer.
            asked: an override spells the layer out.
            heads: whether the rule holds for heads; not where a list of the user's takes its place.
        """
        if name in self.heads and heads and not asked:
            return self.heads[name]
        if name in self.tied:
            return TIED
        if self.stays_in_float32(name):
            return self.others.get(name, "the model keeps it in float32")
        return None if asked else self.others.get(name)

    def stays_in_float32(self, name: str) -> bool:
        """Whether the model's authors keep the layer ``name`` out of half precision, and so out of four bits."""
        listed = fits_in_transformers(name, self._modules_in_float32)
        return listed or self._parameters_in_float32(f"{name}.weight")


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules with a weight matrix that are no embeddings, by name."""
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding):
            yield name, module


def _heads(model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """Names and reasons: the output embedding, and layers outside the base model that compute labels or tokens."""
    output, base = model.get_output_embeddings(), model.base_model
    inside = {id(module) for module in base.modules()} if base is not model else set()
    rows = {getattr(model.config, "num_labels", None), getattr(model.config, "vocab_size", None)}
    for name, module in model.named_modules():
        if module is output:
            yield name, "output embedding"
        elif isinstance(module, nn.Linear) and id(module) not in inside:
            named = name.rpartition(".")[2] in _HEADS
            # Of a model that does not say what its base is, only what is called so at the top.
            if (named or module.out_features in rows) if inside else (named and "." not in name):
                yield name, "classification or regression head"


def _routers(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names and reasons: whatever decides which experts run, and how much of a shared expert is added.

    Routers are found beside the experts, by their name or as the Linear layer with a row for each expert.
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
    """Of a child called ``key`` that holds the experts of a mixture, as layers or in stacks; 0 for any other."""
    if "expert" not in key or "shared" in key:
        return 0
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return len(module)
    return next((stack.shape[0] for stack in module.parameters(recurse=False) if stack.ndim == 3), 0)


# --- what the user says ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """What the user of ``fp4 quantize`` says about layers, by patterns.

    Attributes:
        scheme: name of the scheme for all layers that no override names.
        skip: layers to keep, whatever else names them.
        only: where given, all others are kept, whatever an override says of them.
        overrides: pattern and scheme name, or None to keep, for the layers left; the first that fits wins.
    """

    scheme: str
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    overrides: tuple[tuple[str, str | None], ...] = ()

    def __post_init__(self) -> None:
        for name in (self.scheme, *(scheme for _, scheme in self.overrides)):
            if name is not None and name not in SCHEMES:
                raise ValueError(f"scheme is {name!r}; expected one of {', '.join(SCHEMES)}{hint(name, SCHEMES)}")

    def of(self, name: str, dense: DenseLayers) -> tuple[str | None, str]:
        """Scheme name of the layer, or None with the reason why it is kept."""
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

    def require_used(self, names: Sequence[str]) -> None:
        """ValueError for a pattern that fits no layer: most likely a mistake."""
        options = (("skip", self.skip), ("only", self.only), ("override", [pattern for pattern, _ in self.overrides]))
        for option, patterns in options:
            for pattern in idle_patterns(patterns, names):
                shown = ", ".join(list(names)[:3])
                raise ValueError(f"{option} {pattern!r} fits none of {len(names)} layers ({shown}, ...)")
