"""README.md of a quantized model."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fp4.checkpoint import CODECS, holders
from fp4.quality.model_card import model_card, refresh_model_card, write_model_card
from fp4.scheme import SCHEMES

REPORT: dict[str, Any] = {
    "version": 1,
    "command": "fp4 quantize owner/model out --scheme nvfp4 --method gptq --data text.txt",
    "versions": {"fp4": "0.1.0", "torch": "2.13.0"},
    "source": "owner/model",
    "base_model": "owner/model",
    "scheme": "nvfp4",
    "method": "gptq",
    "format": "compressed-tensors",
    "seed": 0,
    "data": {"description": "text.txt", "samples": 8, "tokens": 4096},
    "layers": [{"name": f"model.layers.{i}.q_proj", "scheme": "nvfp4", "bits_per_weight": 4.5} for i in range(3)],
    "kept": [{"name": f"model.layers.{i}.router", "dtype": "BF16", "shape": [8, 8]} for i in range(3)]
    + [{"name": "lm_head", "dtype": "BF16", "shape": [8, 8], "reason": "output embedding"}],
}
EVALUATION: dict[str, Any] = {
    "perplexity": 21.5,
    "window": 1024,
    "windows": 4,
    "dtype": "float32",
    "device": "cpu",
    "data": {"name": "test.txt", "sha256": "ab" * 32},
    "runs": {"nvfp4, fp4 activations, cpu": 3},
    "comparison": {"original_perplexity": 20.0, "kl_mean": 0.012, "kl_p99": 0.25, "top1_agreement": 0.934},
}


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---")[1])


def test_card_says_how_it_was_made_how_good_it_is_and_how_to_load_it() -> None:
    card = model_card(REPORT, EVALUATION, {"license": "mit"}, "model-nvfp4")
    assert front_matter(card) == {
        "base_model": "owner/model",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["fp4", "nvfp4", "compressed-tensors"],
    }
    for words in (
        REPORT["command"],
        "| calibration data | text.txt, 8 samples, 4096 tokens |",
        "| versions | fp4 0.1.0, torch 2.13.0 |",
        "| 3 | nvfp4 | 4.50 |",
        "Not quantized: 3 x `model.layers.*.router`, `lm_head`.",
        "| perplexity | 21.5 |",
        "| same most likely token | 93.4% |",
        "first 4 windows of 1024 tokens of `test.txt`",
        "3 layers: nvfp4, fp4 activations, cpu",
        "from_pretrained('model-nvfp4', dtype=\"auto\"",
        "vllm serve model-nvfp4",
    ):
        assert words in card
    assert "no licence" not in card


@pytest.mark.parametrize(
    ("fmt", "schemes", "says", "says_not"),
    [
        ("compressed-tensors", ["nvfp4"], "vllm serve model", "Not with vLLM"),
        ("compressed-tensors", ["nvfp4", "fp8_dynamic"], "vllm serve model", "Not with vLLM"),
        ("compressed-tensors", ["mxfp4a16"], "quantizes the activations of every MXFP4 checkpoint", "convert_hf"),
        ("modelopt", ["nvfp4a16"], "vllm serve model", "convert_hf"),
        ("modelopt", ["nvfp4"], "convert_hf_to_gguf.py model", "Not with vLLM"),
        ("modelopt", ["mxfp4"], "Not with vLLM (vLLM 0.32.0): its ModelOpt loader has no MXFP4.", "vllm serve"),
        ("modelopt", ["nvfp4", "nvfp4a8"], "its ModelOpt loader has no W4A8_NVFP4_FP8.", "vllm serve"),
        ("fp_quant", ["mxfp4"], "it calls the format fp_quant deprecated", "vllm serve"),
        ("auto-round", ["nvfp4"], "from_pretrained", "vLLM"),  # not tried
        ("compressed-tensors", ["nvfp4", "int4"], "from_pretrained", "vLLM"),
    ],
)
def test_card_names_the_engines_that_take_the_checkpoint(
    fmt: str, schemes: list[str], says: str, says_not: str
) -> None:
    layers = [{"name": f"l{i}", "scheme": scheme, "bits_per_weight": 4.5} for i, scheme in enumerate(schemes)]
    card = model_card({"format": fmt, "scheme": schemes[0], "layers": layers}, name="model")
    assert says in card
    assert says_not not in card
    if len(schemes) == 1:  # the scheme that was asked for, where no layer is listed
        assert says in model_card({"format": fmt, "scheme": schemes[0]}, name="model")


def test_the_default_of_every_scheme_is_served() -> None:
    for scheme in SCHEMES:
        served = holders(scheme)[0].served_by("vllm", [scheme])
        if scheme in ("fp8_block", "mxfp8"):
            assert served is None, "no engine was seen to read these"
            continue
        assert served is not None
        assert served.served == (scheme != "nvfp4a8"), "which nothing but TensorRT-LLM runs"


def test_engines_are_asked_about_schemes_and_formats_that_exist() -> None:
    for codec in CODECS.values():
        for rows in codec.engines.values():
            assert set(rows) <= set(codec.schemes) <= set(SCHEMES)


@pytest.mark.parametrize("report", [{}, {"data": None, "layers": [], "source": "/some/where/model"}])
def test_a_card_of_little(report: dict[str, Any]) -> None:
    card = model_card(report)
    assert front_matter(card)["library_name"] == "transformers"
    assert "/some/where" not in card
    assert "Measured" not in card
    assert "no licence" in card


# The last keeps a regular expression that lets white space stand on both sides of a line's end busy for hours.
@pytest.mark.parametrize(
    "broken",
    [
        "",
        "---\n: [\n---\n",
        "no front matter",
        "---\njust text\n---\n",
        "---\nlicense: mit\n",
        f"---{1_000_000 * chr(10)}license: mit",
    ],
    ids=["empty", "no yaml", "no front matter", "text", "no end", "endless"],
)
def test_licence_comes_from_the_originals_card_and_stays(broken: str, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: llama\nmodel-index: [1]\n---\n# Model\n")
    write_model_card(out, REPORT, source)
    assert front_matter((out / "README.md").read_text())["license_name"] == "llama"
    assert not refresh_model_card(out)
    (out / "report.json").write_text(json.dumps(REPORT))
    (out / "evaluation.json").write_text(json.dumps(EVALUATION))
    assert refresh_model_card(out)
    card = (out / "README.md").read_text()
    assert front_matter(card)["license"] == "other"
    assert "model-index" not in front_matter(card)
    assert "| perplexity | 21.5 |" in card
    (source / "README.md").write_text(broken)
    (out / "README.md").unlink()
    write_model_card(out, REPORT, source)
    assert "license" not in front_matter((out / "README.md").read_text())


def test_python_in_the_card_survives_quotes_in_names() -> None:
    name = 'it\'s a "model"\\n'
    code = model_card(REPORT, name=name).split("```python\n")[1].split("```")[0]
    loads = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert [ast.literal_eval(call.args[0]) for call in loads] == [name, name]
