"""Counts which share of a model's parameters is quantized, and to which formats."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from fp4.nn import FP4Experts, PackedWeight


@dataclass
class Coverage:
    """Numbers of quantized and unquantized parameters of a model.

    A packed weight counts with the parameters of the dense weight it represents; tied parameters count once.

    Attributes:
        quantized: number of quantized parameters by format.
        embeddings: number of parameters of each unquantized input or output embedding, by module.
        kept: number of parameters of every other unquantized module, by module.
        reasons: why a module that could hold packed weights is unquantized, by module.
    """

    quantized: dict[str, int] = field(default_factory=dict)
    embeddings: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Number of all parameters."""
        return sum(map(sum, (self.quantized.values(), self.embeddings.values(), self.kept.values())))

    @property
    def share(self) -> float:
        """Fraction of all parameters that is quantized."""
        return sum(self.quantized.values()) / max(1, self.total)

    @property
    def share_of_blocks(self) -> float:
        """Fraction of the parameters outside unquantized embeddings that is quantized."""
        return sum(self.quantized.values()) / max(1, self.total - sum(self.embeddings.values()))

    def describe(self) -> str:
        """Summary in one line, for the log."""
        formats = ", ".join(f"{name} {count / max(1, self.total):.1%}" for name, count in self.quantized.items())
        largest = sorted((self.embeddings | self.kept).items(), key=lambda item: -item[1])[:4]
        kept = ", ".join(f"{name} ({count / max(1, self.total):.1%})" for name, count in largest)
        return (
            f"{self.share:.1%} of {self.total:,} parameters are quantized ({formats or 'none'}), "
            f"{self.share_of_blocks:.1%} of those outside embeddings; largest that are kept: {kept}"
        )


def coverage_of(model: nn.Module, reasons: Mapping[str, str]) -> Coverage:
    """Count the parameters of a model whose layers have been swapped, before or after its weights are loaded.

    Args:
        model: the model.
        reasons: why modules were kept, by name; becomes :attr:`Coverage.reasons`.
    """
    coverage = Coverage(reasons=dict(reasons))
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    formats: Counter[str] = Counter()
    seen: set[int] = set()
    tied = getattr(model, "all_tied_weights_keys", None) or {}  # before loading, tied parameters are still separate
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight):
            formats[module.scheme.format.name] += math.prod(module.lead) * module.out_features * module.in_features
            own = [parameter for key, parameter in module.named_parameters(recurse=False) if key == "bias"]
        elif isinstance(module, FP4Experts):
            own = []
            for key, parameter in module.named_parameters(recurse=False):
                if key in module.layout.projections:  # still the dense parameter, before loading
                    formats[module.schemes[key][0].format.name] += parameter.numel()
                else:
                    own.append(parameter)
        else:
            named = module.named_parameters(name, recurse=False)
            own = [parameter for key, parameter in named if key not in tied]
        count = sum(parameter.numel() for parameter in own if id(parameter) not in seen)
        seen.update(map(id, own))
        if count:
            embedding = isinstance(module, nn.Embedding) or module is head
            (coverage.embeddings if embedding else coverage.kept)[name] = count
    coverage.quantized = dict(formats)
    return coverage
