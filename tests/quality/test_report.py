"""The page about a quantized model: what is gathered for it, and that it is whole."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import naive_model as naive
import pytest
import torch
from shards import tensors_of

from fp4.checkpoint import codec_for
from fp4.checkpoint.io.headers import Checkpoint, load
from fp4.checkpoint.layers import packed_layers
from fp4.numerics.formats import dequantize
from fp4.quality.report_data import Report, gather

pytest.importorskip("matplotlib", reason="the plots need the extra 'report'")
from fp4.quality.report_page import page, verdict, write_report


@pytest.mark.parametrize("name", ["llmcompressor-NVFP4", "modelopt-MXFP4", "autoround-NVFP4"])
def test_weight_errors_of_any_checkpoint(name: str, shared: Callable[[str], Path]) -> None:
    folder, source = shared(f"fixtures/{name}"), shared("fixtures/source-llama")
    seen: list[tuple[int, int]] = []
    report = gather(folder, source=source, progress=lambda *step: seen.append(step))
    assert report.measured == "weight_error"
    assert len(report.layers) == 14
    assert seen[-1] == (14, 14)
    checkpoint, dense = Checkpoint.open(folder), Checkpoint.open(source)
    codec = codec_for(checkpoint.quantization_config() or {})
    groups = packed_layers(codec, checkpoint.tensors)
    for layer in report.layers:
        scheme = codec.scheme(layer["name"])
        assert scheme is not None
        stored = codec.read({suffix: load(info) for suffix, info in groups[layer["name"]].items()}, scheme)
        weight = load(dense.tensors[f"{layer['name']}.weight"]).float()
        error = (dequantize(*stored.weight) - weight).norm() / weight.norm()
        assert layer["weight_error"] == pytest.approx(error.item(), rel=1e-5)
        assert layer["depth"] in (0, 1)
        assert layer["kind"].count(".") == 1
        assert layer["bits_per_weight"] > 4
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    assert sum(report.sizes.values()) == total
    assert "lm_head" in {row["name"] for row in report.kept}
    worst = report.worst(3)
    assert worst[0]["weight_error"] == max(layer["weight_error"] for layer in report.layers)


def test_rotated_weights_are_compared_in_their_basis(shared: Callable[[str], Path]) -> None:
    report = gather(shared("fixtures/fpquant-nvfp"), source=shared("fixtures/source-llama"))
    tensors, source = (tensors_of(shared(f"fixtures/{name}")) for name in ("fpquant-nvfp", "source-llama"))
    assert len(report.layers) == 14
    for layer in report.layers:
        weight, matrix = source[f"{layer['name']}.weight"].double(), tensors[f"{layer['name']}.forward_hadamard_matrix"]
        scales, scale = (tensors[f"{layer['name']}.{name}"] for name in ("scales", "weight_global_scale"))
        codes = tensors[f"{layer['name']}.qweight"]
        values = naive.decoded(codes, scales.view(torch.float8_e4m3fn), 1 / float(scale)).double()
        rotated = (weight.unflatten(-1, (-1, len(matrix))) @ matrix.double()).flatten(-2)
        # Sums of squares in float32, and weights that were rotated in it.
        assert layer["weight_error"] == pytest.approx(float((values - rotated).norm() / rotated.norm()), rel=1e-5)


@pytest.fixture
def quantized(shared: Callable[[str], Path], tmp_path: Path) -> Path:
    """A folder as ``fp4 quantize`` and ``fp4 evaluate --save`` leave it."""
    folder = tmp_path / "out"
    shutil.copytree(shared("fixtures/llmcompressor-NVFP4"), folder, copy_function=shutil.copyfile)
    names = [row["name"] for row in gather(folder, source=shared("fixtures/source-llama")).layers]
    layers = [
        {
            "name": name,
            "scheme": "nvfp4",
            "output_error": 0.4 if number == 5 else 0.01 * (number + 1),
            "weight_snr_db": 20.0,
            "zero": 0.1,
            "clipped": None,
            "scale_rule": "mse",
        }
        for number, name in enumerate(names)
    ]
    report = {"scheme": "nvfp4", "method": "gptq", "command": "fp4 quantize <a> & b", "seconds": 100, "layers": layers}
    report["kept"] = [{"name": "lm_head", "reason": "output embedding"}]
    (folder / "report.json").write_text(json.dumps(report))
    comparison = {"original_perplexity": 20.0, "kl_mean": 0.01, "kl_p99": 0.2, "top1_agreement": 0.9}
    evaluation: dict[str, Any] = {"perplexity": 22.0, "windows": 4, "window": 1024, "data": {"name": "test.txt"}}
    (folder / "evaluation.json").write_text(json.dumps(evaluation | {"comparison": comparison}))
    return folder


class Outline(html.parser.HTMLParser):
    """Text, and whether every element is closed in its place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.references: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for key, value in attributes if key in ("src", "href", "xlink:href")]
        if tag not in ("meta", "input", "use", "path", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for key, value in attributes if key in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag in ("use", "path", "rect"):
            return
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)


def test_page_is_whole_and_needs_nothing_else(quantized: Path) -> None:
    report = write_report(quantized, quantized / "report.html")
    text = (quantized / "report.html").read_text()
    outline = Outline(text)
    assert all(reference.startswith("#") for reference in outline.references)
    visible = " ".join(outline.text)
    for words in (
        "Which layers hurt",
        f"the worst, {report.worst(1)[0]['name']}, by 40.0%",
        "1 layer loses more than twice the median",
        "22 (+10.0%)",
        "4 windows of 1024 tokens of test.txt",
        "lm_head (BF16 256 x 128): output embedding",
        "fp4 quantize <a> & b",
        "gptq",
    ):
        assert words in visible, words
    plots = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(plots) == 3
    ids = []
    for plot in plots:
        root = ElementTree.fromstring(plot)
        assert "currentColor" in plot
        ids += [element.get("id") for element in root.iter("{http://www.w3.org/2000/svg}path") if element.get("id")]
    assert len(set(ids)) == len(ids)
    found = re.search(r'id="rows">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    rows = json.loads(found[1])["rows"]
    assert len(rows) == 14
    assert sum(row["bad"] for row in rows) == 1
    assert "--back: #14181c" in text


def test_names_from_a_checkpoint_cannot_become_markup(quantized: Path) -> None:
    report = gather(quantized)
    evil = "</script><script>alert(1)</script>.0.<img src=x>"
    report.layers[0] |= {"name": evil, "kind": r"$\no<img src=x>$"}  # nor what matplotlib would read as a formula
    report.kept[0]["name"] = report.facts["command"] = evil
    report.model = "<b>"
    outline = Outline(page(report))
    assert "x" not in outline.references
    assert "<script>alert" not in page(report)
    assert "<img" not in page(report)


def test_experts_and_layers_without_errors() -> None:
    common = {"scheme": "nvfp4", "shape": [4, 32], "scale_rule": "", "output_error": None}
    common |= dict.fromkeys(("weight_snr_db", "clipped", "zero", "bits_per_weight", "seconds"))
    layers = [
        {"name": f"layers.{d}.experts.{e}.up", "kind": "experts.*.up", "depth": d, "weight_error": 0.1 + e / 50}
        | common
        for d in range(3)
        for e in range(4)
    ]
    layers.append({"name": "head", "kind": "head", "depth": None, "weight_error": None} | common)
    report = Report("model", layers=layers)
    Outline(page(report))
    assert verdict(report)[-1].startswith("No layer loses more than twice")
    assert verdict(Report("empty")) == []
    Outline(page(Report("empty")))


def test_mistakes_are_named(shared: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shared("fixtures/llmcompressor-NVFP4")
    with pytest.raises(ValueError, match=r"no report\.json, which fp4 quantize writes"):
        gather(folder)
    with pytest.raises(ValueError, match="is not quantized"):
        gather(shared("fixtures/source-llama"), source=shared("fixtures/source-llama"))
    # A source that is quantized itself is compared by its values.
    rounded = gather(folder, source=shared("fixtures/llmcompressor-FP8_DYNAMIC"))
    assert all(0 < layer["weight_error"] < 1 for layer in rounded.layers)
    other = gather(folder, source=shared("fixtures/source-qwen3moe"))
    assert any("has no weight for" in note for note in other.notes)
