"""Configurations, templates, recipes and notes made to hang a command, or to be believed: each is one clear sentence.

What hangs fails here by never ending, so every call has a time limit that is far above what it takes.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jinja2 import UndefinedError
from small_models import save_small, save_text, save_vision_language
from small_models import tokenizer as make_tokenizer
from transformers import AutoModelForCausalLM

import fp4
from fp4 import FPQuantConfig, cli
from fp4.calibration.chat_template import BoundedTemplate
from fp4.calibration.recipe import read_recipe
from fp4.checkpoint.inspect import inspect
from fp4.quality.model_card import model_card, write_model_card

_SECONDS = 100


@pytest.fixture(autouse=True)
def _ends() -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise AssertionError(f"it does not end within {_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    dense = save_small("llama", root / "dense", num_hidden_layers=2)
    config = FPQuantConfig(scheme="nvfp4a16", checkpoint_format="compressed-tensors")
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=config).save_pretrained(root / "packed")
    for path in dense.glob("*token*"):
        shutil.copy(path, root / "packed")
    return {"dense": dense, "packed": root / "packed", "vision": save_vision_language(root / "vision")}


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that is to end with exit code 2, one sentence, and nothing written; returns the sentence."""

    def run(*words: str | Path) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["fp4", *map(str, words)])
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as raised:
            cli.main()
        said = capsys.readouterr().err
        assert raised.value.code == 2, said
        assert "Traceback" not in said
        error = [line for line in said.splitlines() if line.startswith("error:")]
        assert len(error) == 1, said
        assert said.endswith(f"{error[0]}\n"), "more than a line"
        assert sorted(tmp_path.rglob("*")) == before
        return error[0]

    return run


def changed(source: Path, folder: Path, changes: dict[str, Any], part: str | None = None) -> Path:
    """A copy of a model whose config.json says something else."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (config if part is None else config[part]).update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


QUANTIZE = ["quantize", "bad", "out", "--scheme", "nvfp4a16", "--method", "rtn", "--rule", "abs_max"]


# --- configurations --------------------------------------------------------------------------------------------------

ENDLESS: list[tuple[str, dict[str, Any], str]] = [
    ("dense", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, but the checkpoint has 21 tensors"),
    ("dense", {"num_hidden_layers": 1e300}, "num_hidden_layers is 1e[+]300"),
    ("dense", {"model_type": "qwen2", "max_window_layers": 10**9}, "max_window_layers is 1000000000"),
]
CONTRADICTORY: list[tuple[str, dict[str, Any], str]] = [
    *ENDLESS,
    ("dense", {"num_hidden_layers": 900}, "describes 900 blocks, and the checkpoint has no weight for model.layers.2"),
    ("dense", {"hidden_size": -5}, "no model can be built from .*-5"),
    ("dense", {"hidden_size": 0}, "has no list of blocks"),
    ("dense", {"hidden_size": "64"}, "no model can be built from .*hidden_size"),
    ("dense", {"hidden_size": 10**9}, "other shapes .lm_head.weight is stored as .320, 64., expected .320, 10{9}.."),
    ("dense", {"hidden_size": 10**15, "intermediate_size": 10**15}, "no model can be built from"),
    ("dense", {"vocab_size": 10**12}, "other shapes .lm_head.weight is stored as .320, 64., expected .10{12}, 64.."),
    ("dense", {"vocab_size": 300}, "other shapes"),
    ("dense", {"num_attention_heads": 0}, "no model can be built from"),
    ("dense", {"hidden_act": "nothing"}, "no model can be built from .*nothing"),
    ("dense", {"model_type": "nothing", "architectures": None}, "no model can be built from .*nothing"),
    (
        "dense",
        {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 10**9},
        "no weight for model.layers.0.mlp.gate",
    ),
]


@pytest.mark.parametrize(("model", "changes", "message"), CONTRADICTORY)
def test_contradictory_configurations(
    model: str,
    changes: dict[str, Any],
    message: str,
    models: dict[str, Path],
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    changed(models[model], tmp_path / "bad", changes)
    assert re.search(message, refused(*QUANTIZE))


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_contradictions_in_a_part_of_a_configuration(
    part: str, models: dict[str, Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    changed(models["vision"], tmp_path / "bad", {"num_hidden_layers": 10**9}, part)
    assert f"says {part}.num_hidden_layers is 1000000000" in refused(*QUANTIZE)
    changed(models["vision"], tmp_path / "worse", {"hidden_size": 48}, part)
    assert "other shapes" in refused("quantize", "worse", *QUANTIZE[2:])


def test_a_list_of_modules_that_no_tensor_fills(models: dict[str, Path], tmp_path: Path) -> None:
    """Whatever makes a model large: here every block is given a list of its own."""
    from fp4.pipeline import build_model

    with pytest.raises(ValueError, match="more than 10 modules"), build_model._few_modules(10):
        torch.nn.ModuleList(torch.nn.Identity() for _ in range(11))
    assert len(torch.nn.ModuleList(torch.nn.Identity() for _ in range(11))) == 11


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, but the checkpoint has"),
        ({"num_hidden_layers": 1}, "num_hidden_layers is 1, but the checkpoint has 2 blocks (model.layers.*)"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, but the checkpoint has 2 blocks (model.layers.*)"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000, but model.embed_tokens.weight has 320 rows"),
        ({"hidden_size": -5}, "hidden_size is -5, but model.embed_tokens.weight has 64 columns"),
    ],
)
@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_inspect_reports_contradictions(
    kind: str,
    changes: dict[str, Any],
    problem: str,
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert inspect(models[kind]).problems == []
    folder = changed(models[kind], tmp_path / "bad", changes)
    found = inspect(folder).problems
    assert len(found) == 1
    assert found[0] == f"config.json says {problem}" or problem in found[0]
    monkeypatch.setattr(sys, "argv", ["fp4", "inspect", str(folder)])
    with pytest.raises(SystemExit) as raised:
        cli.main()
    assert raised.value.code == 1
    assert f"problem: config.json says {problem[:30]}" in capsys.readouterr().out


def test_inspect_knows_parts_and_further_tokens(models: dict[str, Path], tmp_path: Path) -> None:
    assert inspect(models["vision"]).problems == []
    folder = changed(models["vision"], tmp_path / "bad", {"vocab_size": 10**12}, "text_config")
    assert [line for line in inspect(folder).problems if "vocab_size is 1000000000000" in line]
    config = {"num_hidden_layers": 1, "num_nextn_predict_layers": 1}
    assert inspect(changed(models["dense"], tmp_path / "further", config)).problems == []


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 10**9}, {"hidden_size": -5}, {"hidden_size": 128}])
@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_evaluate_refuses_contradictions(
    kind: str, changes: dict[str, Any], models: dict[str, Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    changed(models[kind], tmp_path / "bad", changes)
    text = save_text(tmp_path)
    said = refused("evaluate", "bad", "--data", text, "--window", "16", "--windows", "1")
    assert "bad cannot be loaded" in said or "config.json says num_hidden_layers" in said or "size (-5)" in said


# --- tokenizers and templates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0", "model": {"type": "BPE"}}', "\0" * 100])
def test_broken_tokenizers(content: str, models: dict[str, Path], tmp_path: Path, refused: Callable[..., str]) -> None:
    folder = changed(models["dense"], tmp_path / "bad", {})
    (folder / "tokenizer.json").write_text(content)
    assert "tokenizer.json cannot be read" in refused(*QUANTIZE)
    assert [line for line in inspect(folder).problems if "tokenizer.json cannot be read" in line]


CHAT = [{"role": "user", "content": "hello"}]
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
TEMPLATES = {
    "loops": (f"{LOOPS}{{% endfor %}}{{% endfor %}}{{% endfor %}}", "did not finish a conversation within"),
    "doubling": (
        "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
        "needs more than 1024 MiB",
    ),
    "long output": ("{{ 'x' * 100000000 }}", "wrote 100000000 characters"),
    "endless recursion": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "calls itself without end|recursion"),
    "unsafe": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "unsafe call": ("{{ messages.append(1) }}", "not safely callable|unsafe"),
    "range": ("{% for i in range(10**9) %}{% endfor %}", "[Rr]ange"),
    "refusal": ("{{ raise_exception('no user may speak') }}", "no user may speak"),
    "syntax": ("{% for %}", "."),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_hostile_chat_templates(
    name: str,
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., str],
) -> None:
    monkeypatch.setattr("fp4.calibration.chat_template._SECONDS", 2 if name == "loops" else 60)
    template, message = TEMPLATES[name]
    folder = changed(models["dense"], tmp_path / "bad", {})
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    (folder / "chat_template.jinja").write_text(template)
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path.parent / "datasets"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path.parent / "datasets")
    said = refused("quantize", "bad", "out", "--method", "gptq", "--data", "chat.jsonl", "--samples", "1")
    assert re.search(message, said), said


def test_templates_are_rendered_as_transformers_renders_them() -> None:
    tokenizer = make_tokenizer()
    bounded = BoundedTemplate(tokenizer)
    for content in ("hello", "again"):
        turns = [{"role": "user", "content": content}]
        expected = tokenizer.apply_chat_template(turns, tokenize=False)
        assert bounded.apply_chat_template(turns, tokenize=False) == expected
    with pytest.raises(UndefinedError):
        BoundedTemplate(make_tokenizer("{{ nothing.more }}")).apply_chat_template(CHAT, tokenize=False)
    process = bounded._process
    assert process.is_alive()
    del bounded
    process.join(60)
    assert not process.is_alive()


# --- recipes and notes -----------------------------------------------------------------------------------------------

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
YAML = {
    "bomb": (BOMB, "line 2.*|aliases"),
    "itself": ("datasets: &a [*a]\n", "aliases"),
    "merged bomb": ("a: &a {x: 1}\nb: {<<: [*a, *a]}\n", "aliases"),
    "deep lists": ("[" * 5000, "nested more than 50 deep"),
    "deep mappings": ("{a: " * 5000, "nested more than 50 deep"),
    "deep blocks": ("\n".join(" " * i + "a:" for i in range(2000)), "nested more than 50 deep"),
    "deep dashes": ("- " * 5000 + "a", "nested more than 50 deep"),
    "a day that is none": ("datasets: 2001-99-99\n", "no valid YAML"),
    "a number without end": (f"datasets: {'9' * 100_000}\n", "no valid YAML"),
    "objects": ("datasets: !!python/object/apply:os.mkdir [exploded]\n", "no valid YAML"),
    "a list as a key": ("? [a]\n: b\n", "no valid YAML"),
    "bytes": ("datasets: \0\n", "no valid YAML"),
}


@pytest.mark.parametrize("name", YAML)
def test_hostile_yaml(name: str, models: dict[str, Path], tmp_path: Path, refused: Callable[..., str]) -> None:
    content, message = YAML[name]
    assert len(BOMB) < 700
    (tmp_path / "recipe.yaml").write_text(content)
    base = ["quantize", models["dense"], "out", "--method", "gptq"]
    said = refused(*base, "--data", "recipe.yaml")
    assert re.search(message, said), said
    assert "recipe.yaml" in said
    assert not (tmp_path / "exploded").exists()
    card = tmp_path / "source"
    card.mkdir()
    (card / "README.md").write_text(f"---\n{content}\n---\n")
    write_model_card(card, {})  # a card that cannot be read gives nothing
    assert "license" not in yaml.safe_load((card / "README.md").read_text().split("---")[1])


def test_options_of_a_method_are_plain_yaml(models: dict[str, Path], refused: Callable[..., str]) -> None:
    for value in ("[", "*a", "[" * 5000):
        said = refused("quantize", models["dense"], "out", "--method", "gptq", "--option", f"damping={value}")
        assert "option damping is no valid YAML" in said


def test_recipes_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"datasets: \xff")
    with pytest.raises(ValueError, match=r"recipe\.yaml is no text in UTF-8"):
        read_recipe(tmp_path / "recipe.yaml")


COMPARED = {"original_perplexity": 20.0, "kl_mean": 0.1, "kl_p99": 0.2, "top1_agreement": 0.9}


@pytest.mark.parametrize(
    ("evaluation", "missing"),
    [
        ({}, "perplexity"),
        ({"perplexity": "low"}, "perplexity"),
        ({"perplexity": 0}, "perplexity"),
        ({"perplexity": 2.0, "data": []}, None),
        ({"perplexity": 2.0, "data": [1], "runs": "x"}, "data, runs"),
        ({"perplexity": 2.0, "comparison": {"kl_mean": 0.1}}, "original_perplexity, kl_p99, top1_agreement"),
        ({"perplexity": 2.0, "comparison": COMPARED | {"original_perplexity": 0}}, "original_perplexity"),
        ({"perplexity": 2.0, "comparison": COMPARED | {"kl_p99": None}}, "kl_p99"),
    ],
)
def test_evaluations_of_junk(
    evaluation: dict[str, Any],
    missing: str | None,
    models: dict[str, Path],
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    folder = changed(models["packed"], tmp_path / "bad", {})
    (folder / "report.json").write_text(json.dumps({"layers": [], "kept": []}))
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    if missing is None:
        write_model_card(folder, {})
        return
    assert f"evaluation.json says nothing usable as {missing};" in refused("report", "bad")
    with pytest.raises(ValueError, match=missing):
        write_model_card(folder, {})


def test_an_evaluation_of_the_original_is_not_one_of_the_result(models: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(models["dense"], tmp_path / "source", {})
    (folder / "evaluation.json").write_text(json.dumps({"perplexity": 1.5}))
    fp4.quantize(folder, tmp_path / "out", "nvfp4a16", "rtn", rule="abs_max")
    assert not (tmp_path / "out/evaluation.json").exists()
    assert "Measured quality" not in (tmp_path / "out/README.md").read_text()


def test_cards_link_no_project_page() -> None:
    card = model_card({"scheme": "nvfp4", "source": "x"})
    assert "pypi.org" not in card
    assert "pip install" not in card
