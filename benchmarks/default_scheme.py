"""Which rotation and which scale rules are best without calibration data, per format: perplexity by round to nearest.

    python benchmarks/default_scheme.py MODEL [MODEL ...] --choose-on wikitext2/valid.txt --report-on wikitext2/test.txt

Weights are quantized by ``methods.rtn`` and multiplied in float32; activations are rotated, quantized and dequantized
before every matmul, which is what W4A4 computes. Everything is chosen on windows of one text and reported on another,
so that what is reported was not looked at while choosing. The search is pruned: weight rules are screened weight-only
on the first windows, then activation rules at W4A4 with each rotation's best weight rule, and the pairs of rotation and
activation rule that come out ahead are measured on all windows with the best weight rules, beside the best weight-only
schemes. The first of them at W4A4 and the first weight-only are measured on the other text, beside the defaults that
fp4 has now. Prints markdown tables.
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
from fp4.scheme import SCHEMES, Scheme

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
    texts: dict[str, Tensor]
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

    def perplexity(self, scheme: Scheme | None, text: str, windows: int) -> float:
        """Perplexity under ``scheme`` (None: unquantized) on the first windows of 1024 tokens of one of ``texts``."""
        self._input = self._output = self.rotation = None
        if scheme is not None and scheme.rotation != "identity":
            self.rotation = ROTATIONS[scheme.rotation](scheme.group_size).float()
        self.scheme = scheme
        key = None
        if scheme is not None:
            key = (scheme.format.name, scheme.weight_rule, scheme.rotation, scheme.group_size)
        if key != self._weights_of:
            for name, weight in self.weights.items():
                values = weight
                if scheme is not None:
                    values = BACKEND.dequantize(round_to_nearest(weight, scheme, self.rotation, name), torch.float32)
                self.model.get_submodule(name).weight.data = values
            self._weights_of = key
        return perplexity(self.model, self.texts[text], windows=windows)


def label(scheme: Scheme) -> str:
    rotation = "none" if scheme.rotation == "identity" else f"{scheme.rotation} {scheme.group_size}"
    activation_rule = scheme.activation_rule if scheme.activations == "fp4" else "(W4A16)"
    return f"{scheme.format.name} | {rotation} | {scheme.weight_rule} | {activation_rule}"


def measure(models: list[Emulated], schemes: list[Scheme], text: str, windows: int, title: str) -> dict[Scheme, float]:
    """Prints a table of ``schemes`` on all models, and returns the geometric mean of each row."""
    print(f"\n### {title}: {windows} window{'s' * (windows > 1)} of {text}\n")
    print("| format | rotation | weight rule | activation rule |", end="")
    print("".join(f" {chr(ord('A') + i)} |" for i in range(len(models))) + "\n" + "|---" * (4 + len(models)) + "|")
    means = {}
    for scheme in dict.fromkeys(schemes):
        values = [model.perplexity(scheme, text, windows) for model in models]
        means[scheme] = math.exp(sum(math.log(v) for v in values) / len(values))
        print(f"| {label(scheme)} | " + " | ".join(f"{v:.2f}" for v in values) + " |", flush=True)
    return means


def defaults_of(fmt: Format) -> list[Scheme]:
    """What fp4 rounds to nearest by when nothing is asked for: at W4A4, and weight-only."""
    found = []
    for preset in SCHEMES.values():
        if preset.scheme.format == fmt:
            weight_only = preset.scheme.activations == "model"
            scheme = replace(preset.scheme, activation_rule="abs_max") if weight_only else preset.scheme
            rotation = preset.rotation
            if weight_only and preset.unrotated_rule is not None:
                scheme, rotation = replace(scheme, weight_rule=preset.unrotated_rule), None
            rotation = rotation or SEARCH[fmt.name][0][0]
            found.append(replace(scheme, rotation=rotation[0], group_size=rotation[1]))
    return found


def search(
    models: list[Emulated], fmt: Format, texts: tuple[str, str], screen: int, windows: int, finalists: int, rules: int
) -> list[Scheme]:
    """Chooses on the first of ``texts``, prints the choice on the second, and returns it: W4A4, then weight-only."""
    choosing, reporting = texts
    rotations, weight_rules, activation_rules = SEARCH[fmt.name]
    weight_only = [Scheme(fmt, rule, "model", "abs_max", *rotation) for rotation in rotations for rule in weight_rules]
    screened = measure(models, weight_only, choosing, screen, f"{fmt.name}, weight rules")
    ranked = {
        r: sorted((s for s in weight_only if (s.rotation, s.group_size) == r), key=screened.__getitem__)
        for r in rotations
    }
    w4a4 = [replace(ranked[r][0], activations="fp4", activation_rule=a) for r in rotations for a in activation_rules]
    means = measure(models, w4a4, choosing, screen, f"{fmt.name}, activation rules")
    final = [
        replace(ahead, weight_rule=weights.weight_rule)
        for ahead in sorted(w4a4, key=means.__getitem__)[:finalists]
        for weights in ranked[ahead.rotation, ahead.group_size][:rules]
    ]
    final += sorted(weight_only, key=screened.__getitem__)[: max(finalists, rules)]
    means = measure(models, final, choosing, windows, f"{fmt.name}, finalists")
    chosen = [
        min((s for s in means if s.activations == activations), key=means.__getitem__)
        for activations in ("fp4", "model")
    ]
    measure(models, [*chosen, *defaults_of(fmt)], reporting, windows, f"{fmt.name}, chosen, then fp4's defaults")
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="folders of causal language models (columns A, B, ...)")
    parser.add_argument("--choose-on", required=True, type=Path, help="text that the search looks at")
    parser.add_argument("--report-on", required=True, type=Path, help="another text, for what was chosen")
    parser.add_argument("--formats", nargs="+", default=list(SEARCH), choices=list(SEARCH))
    parser.add_argument("--windows", type=int, default=4, help="windows of 1024 tokens for the finalists")
    parser.add_argument("--screen", type=int, default=2, help="windows of 1024 tokens for screening")
    parser.add_argument("--finalists", type=int, default=3, help="pairs of rotation and activation rule in the final")
    parser.add_argument("--rules", type=int, default=2, help="weight rules in the final, the best of each rotation")
    options = parser.parse_args()
    texts = (options.choose_on, options.report_on)
    if texts[0].read_bytes() == texts[1].read_bytes():
        parser.error(
            f"--choose-on {texts[0]} and --report-on {texts[1]} hold the same text, expected two different ones; "
            "name a text for --report-on that the choice does not look at"
        )
    short = texts[0].name != texts[1].name
    names = (texts[0].name, texts[1].name) if short else (str(texts[0]), str(texts[1]))
    models = []
    for path in options.models:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
        ids = [torch.tensor(tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]) for text in texts]
        models.append(Emulated(model, dict(zip(names, ids, strict=True))))
        unquantized = [f"{models[-1].perplexity(None, name, options.windows):.2f} on {name}" for name in names]
        print(f"{path.name} unquantized: {', '.join(unquantized)}", flush=True)
    formats = {fmt.name: fmt for fmt in (NVFP4, MXFP4)}
    for name in options.formats:
        search(models, formats[name], names, options.screen, options.windows, options.finalists, options.rules)


if __name__ == "__main__":
    main()
