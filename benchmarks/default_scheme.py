"""Which rotation and which scale rules are best without calibration data, per format: perplexity by round to nearest.

    python benchmarks/default_scheme.py MODEL [MODEL ...] --text wikitext2/test.txt

Weights are quantized by ``methods.rtn`` and multiplied in float32; activations are rotated, quantized and dequantized
before every matmul, which is what W4A4 computes. The search is pruned: weight rules are screened weight-only on the
first windows, then activation rules at W4A4 with each rotation's best weight rule, and the pairs of rotation and
activation rule that come out ahead are measured on all windows with the best weight rules. Prints markdown tables.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fp4 import backends
from fp4.numerics.formats import MXFP4, NVFP4, Format
from fp4.numerics.rotation import ROTATIONS, rotate
from fp4.quality.evaluate import perplexity
from fp4.rounding import round_to_nearest
from fp4.scheme import Scheme

# Per format: (rotation, group size), weight rules and activation rules, each list from the simplest on. A gsr of one
# block's size is the hadamard with its columns permuted within the block, which changes no scale and no error.
SEARCH: dict[str, tuple[list[tuple[str, int]], list[str], list[str]]] = {
    "nvfp4": (
        [("identity", 16), ("hadamard", 16)],
        ["abs_max", "mse", "four_over_six"],
        ["abs_max", "four_over_six"],
    ),
    "mxfp4": (
        [("identity", 32), ("hadamard", 32), ("hadamard", 64), ("gsr", 64)],
        ["abs_max", "even", "ceil", "mse"],
        ["abs_max", "even", "ceil"],
    ),
}
BACKEND = backends.for_device(torch.device("cpu"))


@dataclass
class Emulated:
    """A float32 model whose Linear layers (all but the output embedding) can be given quantized values."""

    model: Any
    token_ids: Tensor
    scheme: Scheme | None = None
    rotation: Tensor | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)
    _weights_of: tuple[object, ...] | None = None
    _input: Tensor | None = None
    _output: Tensor | None = None

    def __post_init__(self) -> None:
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear) and module is not self.model.get_output_embeddings():
                self.weights[name] = module.weight.data
                module.register_forward_pre_hook(self._quantize_input)

    def _quantize_input(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (x,) = arguments
        if x is not self._input:  # layers that read the same input (q, k and v; gate and up) share the result
            self._input, values = x, x.flatten(0, -2)
            if self.rotation is not None:
                values = rotate(values, self.rotation)
            if self.scheme is not None and self.scheme.activations == "fp4":
                values = BACKEND.dequantize(
                    BACKEND.quantize(values, self.scheme.format, self.scheme.activation_rule), torch.float32
                )
            self._output = values.view(x.shape)
        assert self._output is not None
        return (self._output,)

    def perplexity(self, scheme: Scheme | None, windows: int) -> float:
        """Perplexity under ``scheme`` (None: unquantized) on the first windows of 1024 tokens."""
        self._input = self._output = self.rotation = None
        if scheme is not None and scheme.rotation != "identity":
            self.rotation = ROTATIONS[scheme.rotation](scheme.group_size).float()
        self.scheme = scheme
        key = scheme and (scheme.format.name, scheme.weight_rule, scheme.rotation, scheme.group_size)
        if key != self._weights_of:
            for name, weight in self.weights.items():
                values = weight
                if scheme is not None:
                    values = BACKEND.dequantize(round_to_nearest(weight, scheme, self.rotation, name), torch.float32)
                self.model.get_submodule(name).weight.data = values
            self._weights_of = key
        return perplexity(self.model, self.token_ids, windows=windows)


def label(scheme: Scheme) -> str:
    rotation = "none" if scheme.rotation == "identity" else f"{scheme.rotation} {scheme.group_size}"
    activation_rule = scheme.activation_rule if scheme.activations == "fp4" else "(W4A16)"
    return f"{scheme.format.name} | {rotation} | {scheme.weight_rule} | {activation_rule}"


def measure(models: list[Emulated], schemes: list[Scheme], windows: int, title: str) -> dict[Scheme, float]:
    """Prints a table of ``schemes`` on all models, and returns the geometric mean of each row."""
    print(f"\n### {title}\n\n| format | rotation | weight rule | activation rule |", end="")
    print("".join(f" {chr(ord('A') + i)} |" for i in range(len(models))) + "\n" + "|---" * (4 + len(models)) + "|")
    means = {}
    for scheme in dict.fromkeys(schemes):
        values = [model.perplexity(scheme, windows) for model in models]
        means[scheme] = math.exp(sum(math.log(v) for v in values) / len(values))
        print(f"| {label(scheme)} | " + " | ".join(f"{v:.2f}" for v in values) + " |", flush=True)
    return means


def search(models: list[Emulated], fmt: Format, screen: int, windows: int, finalists: int, rules: int) -> None:
    rotations, weight_rules, activation_rules = SEARCH[fmt.name]
    weight_only = [Scheme(fmt, rule, "model", "abs_max", *rotation) for rotation in rotations for rule in weight_rules]
    means = measure(models, weight_only, screen, f"{fmt.name}: weight rules, {screen} of the windows")
    ranked = {
        r: sorted((s for s in weight_only if (s.rotation, s.group_size) == r), key=means.__getitem__) for r in rotations
    }
    w4a4 = [replace(ranked[r][0], activations="fp4", activation_rule=a) for r in rotations for a in activation_rules]
    means = measure(models, w4a4, screen, f"{fmt.name}: activation rules, {screen} of the windows")
    final = []
    for ahead in sorted(w4a4, key=means.__getitem__)[:finalists]:
        for weights in ranked[ahead.rotation, ahead.group_size][:rules]:
            final += [replace(ahead, weight_rule=weights.weight_rule), weights]
    measure(models, final, windows, f"{fmt.name}: finalists, all {windows} windows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="folders of causal language models (columns A, B, ...)")
    parser.add_argument("--text", required=True, type=Path, help="what perplexity is measured on")
    parser.add_argument("--formats", nargs="+", default=list(SEARCH), choices=list(SEARCH))
    parser.add_argument("--windows", type=int, default=4, help="windows of 1024 tokens for the finalists")
    parser.add_argument("--screen", type=int, default=2, help="windows of 1024 tokens for screening")
    parser.add_argument("--finalists", type=int, default=3, help="pairs of rotation and activation rule in the final")
    parser.add_argument("--rules", type=int, default=2, help="weight rules in the final, the best of each rotation")
    options = parser.parse_args()
    models = []
    for path in options.models:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        tokens = AutoTokenizer.from_pretrained(path)(options.text.read_text(), add_special_tokens=False)["input_ids"]
        models.append(Emulated(model, torch.tensor(tokens)))
        unquantized = models[-1].perplexity(None, options.windows)
        print(f"{path.name} unquantized: {unquantized:.2f}", flush=True)
    formats = {fmt.name: fmt for fmt in (NVFP4, MXFP4)}
    for name in options.formats:
        search(models, formats[name], options.screen, options.windows, options.finalists, options.rules)


if __name__ == "__main__":
    main()
