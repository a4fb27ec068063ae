"""Which share of a model's parameters is quantized, to what, and what is not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from fp4.nn import FP4Experts, PackedWeight


@dataclass
class Coverage:
    """Numbers of parameters, counted as the unquantized model has them; tied ones once.

    Attributes:
        quantized: by name of the format.
        embeddings: of input and output embeddings that are not quantized.
        kept: of every other module that is not quantized, by its name.
        reasons: why modules that could hold packed weights are kept, by name.
    """

    quantized: dict[str, int] = field(default_factory=dict)
    embeddings: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(map(sum, (self.quantized.values(), self.embeddings.values(), self.kept.values())))

    @property
    def share(self) -> float:
        """Of all parameters, the share that is quantized."""
        return sum(self.quantized.values()) / max(1, self.total)

    @property
    def share_of_blocks(self) -> float:
        """Of the parameters that are in no embedding, the share that is quantized."""
        return sum(self.quantized.values()) / max(1, self.total - sum(self.embeddings.values()))

    def describe(self) -> str:
        """One line."""
        formats = ", ".join(f"{name} {count / max(1, self.total):.1%}" for name, count in self.quantized.items())
        largest = sorted((self.embeddings | self.kept).items(), key=lambda item: -item[1])[:4]
        kept = ", ".join(f"{name} ({count / max(1, self.total):.1%})" for name, count in largest)
        return (
            f"{self.share:.1%} of {self.total:,} parameters are quantized ({formats or 'none'}), "
            f"{self.share_of_blocks:.1%} of those outside embeddings; largest that are kept: {kept}"
        )


def coverage_of(model: nn.Module, reasons: Mapping[str, str]) -> Coverage:
    """Count the parameters of a model whose layers have been swapped, before or after they are loaded."""
    coverage = Coverage(reasons=dict(reasons))
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    formats: Counter[str] = Counter()
    seen: set[int] = set()
    tied = getattr(model, "all_tied_weights_keys", None) or {}  # before loading, these are parameters of their own
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight):
            formats[module.scheme.format.name] += math.prod(module.lead) * module.out_features * module.in_features
            own = [parameter for key, parameter in module.named_parameters(recurse=False) if key == "bias"]
        elif isinstance(module, FP4Experts):
            own = []
            for key, parameter in module.named_parameters(recurse=False):
                if key in module.layout.projections:  # dense until it is loaded
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
