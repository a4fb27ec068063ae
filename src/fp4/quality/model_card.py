"""The model card of a quantized model: where it comes from, how it was made, how good it is, how to load it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from fp4.checkpoint import CODECS
from fp4.checkpoint.formats.codec import ENGINE_VERSIONS
from fp4.checkpoint.io.headers import read_json
from fp4.checkpoint.io.publish import write_text
from fp4.plain_yaml import read_yaml

CARD = "README.md"
REPORT = "report.json"
EVALUATION = "evaluation.json"

# Fields that a quantized model's card inherits from the original's.
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
# Tasks by the end of an architecture's name; other architectures generate text or give features.
_TASKS = {
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}
_COMPARED = ("original_perplexity", "kl_mean", "kl_p99", "top1_agreement")
_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def write_model_card(folder: Path, report: Mapping[str, Any], source: Path | None = None) -> None:
    """Write ``folder``/README.md.

    Args:
        folder: the quantized model's.
        report: content of report.json.
        source: folder of the original, whose card names the licence; without it, or where it has no card, the metadata
            of the present README.md in ``folder`` stays.
    """
    inherited: dict[str, Any] = {}
    for place in (source, folder):
        card = None if place is None else place / CARD
        if not inherited and card is not None and card.is_file():
            inherited = {key: value for key, value in _metadata(card).items() if key in _INHERITED}
    evaluation = read_evaluation(folder)
    write_text(folder / CARD, model_card(report, evaluation, inherited, folder.name.removesuffix(".partial")))


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """The content of the evaluation.json that ``fp4 evaluate --save`` writes into ``folder``, None where there is none.

    Raises:
        ValueError: the file holds something else; the message says what is missing.
    """
    if not (folder / EVALUATION).is_file():
        return None
    content = read_json(folder / EVALUATION)
    comparison = content.get("comparison") or {}
    parts = {"data": content.get("data") or {}, "runs": content.get("runs") or {}, "comparison": comparison}
    wrong = [key for key, value in parts.items() if not isinstance(value, dict)]
    if not wrong:
        numbers = {"perplexity": content.get("perplexity")}
        if comparison:
            numbers |= {key: comparison.get(key) for key in _COMPARED}
        wrong = [
            key
            for key, value in numbers.items()
            if not isinstance(value, (int, float)) or (key.endswith("perplexity") and not value)
        ]
    if wrong:
        raise ValueError(
            f"{folder / EVALUATION} says nothing usable as {', '.join(wrong)}; remove it, or measure again with "
            "`fp4 evaluate --save`"
        )
    return content


def refresh_model_card(folder: Path) -> bool:
    """Write the card of ``folder`` anew where it has a report.json; returns whether it has one."""
    if not (folder / REPORT).is_file():
        return False
    write_model_card(folder, read_json(folder / REPORT))
    return True


def _metadata(card: Path) -> dict[str, Any]:
    """The YAML at the top of a card; empty where there is none, or none that can be read.

    huggingface_hub's ``ModelCard`` is not for cards of strangers: it reads aliases, with which a few lines stand for
    terabytes, and in older releases its search for the YAML's end takes time that grows with the square of empty lines.
    """
    first, *lines = card.read_text(encoding="utf-8", errors="replace").lstrip().splitlines() or [""]
    end = next((number for number, line in enumerate(lines) if line.rstrip() == "---"), None)
    if first.rstrip() != "---" or end is None:
        return {}
    try:
        content, _ = read_yaml("\n".join(lines[:end]), card.name)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def model_card(
    report: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None = None,
    inherited: Mapping[str, Any] | None = None,
    name: str = "out",
) -> str:
    """The text of the card.

    Args:
        report: content of report.json, in which anything may be missing.
        evaluation: content of evaluation.json.
        inherited: metadata of the original's card.
        name: name of the model in the commands that load it.
    """
    base = report.get("base_model")
    scheme, fmt = str(report.get("scheme") or "FP4"), str(report.get("format") or "")
    task, auto = _task(report)
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": task, **(inherited or {})}
    metadata["tags"] = list(dict.fromkeys(tag for tag in ("fp4", scheme.lower(), fmt) if tag))
    if base:
        metadata |= {"base_model": base, "base_model_relation": "quantized"}
    front = ModelCardData(**dict(sorted(metadata.items()))).to_yaml(original_order=sorted(metadata))
    original = f"[{base}](https://huggingface.co/{base})" if base else f"`{Path(str(report.get('source'))).name}`"
    sections = [
        f"---\n{front}\n---\n\n# {name}\n",
        f"{original} quantized to **{scheme}** by fp4.\n",
        _how_made(report),
        _what_is_inside(report),
        _quality(evaluation),
        _how_to_load(name, auto),
        *([_engines(name, fmt, _schemes(report))] if auto == "AutoModelForCausalLM" else []),
    ]
    if "license" not in metadata:
        sections.append(
            "The original's card names no licence; whatever applies to the original applies to this model.\n"
        )
    return "\n".join(section for section in sections if section)


def _how_made(report: Mapping[str, Any]) -> str:
    lines = ["## How it was made\n"]
    if report.get("command"):
        lines += ["```bash", str(report["command"]), "```", ""]
    rows = {"method": report.get("method"), "scheme": report.get("scheme"), "checkpoint format": report.get("format")}
    data = report.get("data")
    if isinstance(data, Mapping):
        counts = [f"{data[key]} {key}" for key in ("samples", "tokens") if data.get(key)]
        rows["calibration data"] = ", ".join([str(data.get("description") or "unnamed"), *counts])
    if report.get("seed") is not None:
        rows["seed"] = report["seed"]
    versions = report.get("versions") or {}
    rows["versions"] = ", ".join(f"{package} {version}" for package, version in versions.items())
    lines += [
        "| | |",
        "|---|---|",
        *(f"| {key} | {_cell(value)} |" for key, value in rows.items() if value not in (None, "")),
    ]
    return "\n".join(lines) + "\n"


def _what_is_inside(report: Mapping[str, Any]) -> str:
    layers = [layer for layer in report.get("layers") or [] if isinstance(layer, Mapping)]
    if not layers:
        return ""
    lines = ["## What is inside\n", "| layers | scheme | bits per weight |", "|---|---|---|"]
    for scheme, count in Counter(str(layer.get("scheme")) for layer in layers).items():
        bits = [layer["bits_per_weight"] for layer in layers if str(layer.get("scheme")) == scheme]
        known = [b for b in bits if isinstance(b, (int, float))]
        lines.append(f"| {count} | {scheme} | {f'{sum(known) / len(known):.2f}' if known else ''} |")
    kept = Counter(
        f"`{_LAYER_NUMBER.sub('*', str(row.get('name')))}`"
        for row in report.get("kept") or []
        if isinstance(row, Mapping)
    )
    names = ", ".join(entry if count == 1 else f"{count} x {entry}" for entry, count in kept.items())
    lines += ["", f"Not quantized: {names or 'nothing'}."]
    return "\n".join(lines) + "\n"


def _quality(evaluation: Mapping[str, Any] | None) -> str:
    if not evaluation:
        return ""
    data, comparison = evaluation.get("data") or {}, evaluation.get("comparison")
    rows = [("perplexity", f"{evaluation['perplexity']:.4g}")]
    if isinstance(comparison, Mapping):
        rows += [
            ("perplexity of the original", f"{comparison['original_perplexity']:.4g}"),
            ("KL divergence from the original, mean, nats", f"{comparison['kl_mean']:.4g}"),
            ("KL divergence, 99th percentile", f"{comparison['kl_p99']:.4g}"),
            ("same most likely token", f"{comparison['top1_agreement']:.1%}"),
        ]
    runs = "; ".join(f"{count} layers: {how}" for how, count in (evaluation.get("runs") or {}).items())
    lines = ["## Measured quality\n", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows), ""]
    lines.append(
        f"On the first {evaluation.get('windows')} windows of {evaluation.get('window')} tokens of "
        f"`{data.get('name')}` (SHA-256 `{str(data.get('sha256'))[:16]}`), in {evaluation.get('dtype')} on "
        f"{evaluation.get('device')}{f' ({runs})' if runs else ''}."
    )
    return "\n".join(lines) + "\n"


def _task(report: Mapping[str, Any]) -> tuple[str, str]:
    """The model's task as the hub names it, and the class of Transformers that loads it."""
    named = report.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else ""
    for suffix, task in _TASKS.items():
        if architecture.endswith(suffix):
            return task, f"AutoModel{suffix}"
    if architecture.endswith("Model") and not architecture.endswith("LMHeadModel"):
        return "feature-extraction", "AutoModel"
    return "text-generation", "AutoModelForCausalLM"


def _how_to_load(name: str, auto: str) -> str:
    lines = [
        "## How to load it\n",
        "With Transformers, and fp4 installed. Weights stay packed on GPUs and CPUs:\n",
        "```python",
        "import fp4  # registers the quantizer",
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f'model = {auto}.from_pretrained({name!r}, dtype="auto", device_map="auto")',
        f"tokenizer = AutoTokenizer.from_pretrained({name!r})",
        "```",
    ]
    return "\n".join(lines) + "\n"


def _schemes(report: Mapping[str, Any]) -> list[str]:
    """The schemes of the layers, or the one that was asked for where no layer is listed."""
    layers = [layer for layer in report.get("layers") or [] if isinstance(layer, Mapping)]
    return list(dict.fromkeys(str(layer.get("scheme")) for layer in layers)) or [str(report.get("scheme"))]


def _engines(name: str, fmt: str, schemes: list[str]) -> str:
    """How other engines load the model, where that has been tried."""
    paragraphs: list[str] = []
    if fmt not in CODECS:
        return ""
    if (vllm := CODECS[fmt].served_by("vllm", schemes)) is not None:
        if vllm.served:
            paragraphs += [f"With vLLM, which reads {fmt}:", f"```bash\nvllm serve {name}\n```"]
            paragraphs += [vllm.note] if vllm.note else []
        else:
            paragraphs.append(f"Not with vLLM ({ENGINE_VERSIONS['vllm']}): {vllm.note}")
    llama = CODECS[fmt].served_by("llama.cpp", schemes)
    if llama is not None and llama.served:
        paragraphs.append(
            f"With llama.cpp, where it knows the architecture, after `python convert_hf_to_gguf.py {name}`."
        )
    return "\n\n".join(paragraphs) + "\n" if paragraphs else ""


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
