"""Importing fp4 imports nothing large, and registers with Transformers in any order of imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fp4
from fp4.checkpoint import CODECS
from fp4.cli import choices
from fp4.methods import METHODS
from fp4.scheme import SCHEMES

LARGE = ("torch", "transformers", "numpy", "datasets", "huggingface_hub")

# Prints which large packages the command imported, after what it prints itself.
COMMAND = f"""
import atexit, runpy, sys
atexit.register(lambda: print("imported:", *[name for name in {LARGE!r} if name in sys.modules], flush=True))
sys.argv[0] = "fp4"
runpy.run_module("fp4", run_name="__main__")
"""

REGISTERED = """
from transformers.quantizers import auto
names = ("fp_quant", "compressed-tensors", "auto-round", "mxfp4", "modelopt")
tables = (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
own = [table[name].__module__.startswith("fp4.") for table in tables for name in names if name in table]
from transformers.configuration_utils import PreTrainedConfig
import fp4.config
assert own == 10 * [True], own
assert getattr(PreTrainedConfig.get_config_dict, "_fp4", False)
assert fp4.config.FPQuantConfig in auto.LOADING_ATTRIBUTES_CONFIG_TYPES
"""

ORDERS = [
    "import fp4",
    "import transformers, fp4",
    "import fp4; from transformers import AutoModelForCausalLM",
    "import fp4; from transformers import LlamaForCausalLM",
    "from transformers import AutoModelForCausalLM; import fp4",
    "import fp4; from transformers import AutoConfig; import transformers.modeling_utils",
    "import fp4; import transformers.quantizers.auto",
    "import transformers.quantizers.auto; import fp4",
    "from fp4 import FPQuantConfig",
    "from fp4 import quantize",
    "import fp4.integrations.transformers",
    "import fp4.integrations.transformers.prequantized",
    "import fp4.pipeline.skeleton",
    "import fp4.methods",
    "import fp4.calibration.expert_linears",
    "import fp4.quality.evaluate",
    "from fp4 import *",
]


# What Transformers itself needs, imported once for all forks of a process.
BEFORE = "import torch, accelerate, torch._dynamo, torch.distributed.fsdp, torch.nn.attention.flex_attention"


def in_forks(codes: list[str], before: str = BEFORE) -> dict[str, str]:
    """What goes wrong, by code, where each runs in a process of its own that has run ``before``."""
    parent = f"""
import json, os, sys, traceback
{before}
found = {{}}
for code in json.loads(sys.argv[1]):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            exec(code, {{"__name__": "__main__"}})
            text = ""
        except BaseException:
            text = traceback.format_exc()
        os.write(writer, text[-4000:].encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as stream:
        text = stream.read()
    os.waitpid(child, 0)
    if text:
        found[code] = text
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", parent, json.dumps(codes)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    problems: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return problems


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FP4_")}
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments], capture_output=True, text=True, cwd=cwd, env=environment
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--help"], 0, "convert"),
        (["-h"], 0, "convert"),
        (["--version"], 0, f"fp4 {fp4.__version__}"),
        (["quantize", "-h"], 0, "--scheme"),
        (["evaluate", "--help"], 0, "--against"),
        (["inspect", "--help"], 0, "--values"),
        (["quantise"], 2, "No such command"),
        (["quantize", "model", "out", "--sampels", "2"], 2, "--samples"),
        (["quantize", "model"], 2, "Missing argument"),
        (["quantize", "model", "out", "--samples", "none"], 2, "Invalid value for '--samples'"),
        (["quantize", "model", "out", "--scheme", "nvpf4"], 2, "scheme is 'nvpf4'; expected one of nvfp4, "),
        (["quantize", "model", "out", "--method", "gtpq"], 2, "(did you mean gptq?)"),
        (["quantize", "model", "out", "--format", "gguf"], 2, "format is 'gguf'; expected one of compressed-tensors, "),
        (["quantize", "model", "out", "--experts", "some"], 2, "experts is 'some'; expected one of all, routed"),
        (["quantize", "model", "out", "--option", "damping"], 2, "expected NAME=VALUE"),
        (["convert", "model", "out", "--to", "gguf"], 2, "target format is 'gguf'; expected one of compressed-tensors"),
        (["evaluate", "model", "--data", "a.txt", "--activations", "fp5"], 2, "'fp5' is not one of"),
    ],
)
def test_help_and_mistakes_import_nothing_large(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert message in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "imported:"


def test_names_in_the_help_are_those_of_the_registries() -> None:
    assert tuple(SCHEMES) == choices.SCHEMES
    assert tuple(CODECS) == choices.FORMATS
    assert {name: method.cost for name, method in METHODS.items()} == choices.METHODS


def test_importing_fp4_imports_nothing_large() -> None:
    problems = in_forks([f"import fp4, sys\nassert not [name for name in {LARGE!r} if name in sys.modules]"], "")
    assert problems == {}


def test_public_names_are_given_when_they_are_asked_for() -> None:
    code = (
        "import fp4\n"
        "assert set(fp4.__all__) <= set(dir(fp4))\n"
        "for name in fp4.__all__: assert getattr(fp4, name) is not None\n"
        "import fp4.nn\n"
        "assert fp4.FP4Linear is fp4.nn.FP4Linear\n"
        "assert fp4.numerics.formats.NVFP4 is fp4.NVFP4\n"
        "try: fp4.FPQuantConfg\n"
        "except AttributeError as error: assert 'FPQuantConfg' in str(error)\n"
        "else: raise AssertionError('no error')\n"
    )
    assert in_forks([code]) == {}


@pytest.mark.slow
def test_quantizers_are_registered_in_any_order_of_imports() -> None:
    assert in_forks([f"{order}\n{REGISTERED}" for order in ORDERS]) == {}


def test_a_forked_process_registers_when_it_imports_transformers() -> None:
    assert in_forks([REGISTERED], f"{BEFORE}, fp4") == {}


def test_a_spawned_process_registers_with_a_config_that_it_gets(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(f"def check(config):\n    exec({REGISTERED!r}, {{}})\n")
    code = (
        "import multiprocessing, work\n"
        "from fp4 import FPQuantConfig\n"
        "if __name__ == '__main__':\n"
        "    child = multiprocessing.get_context('spawn').Process(target=work.check, args=[FPQuantConfig('mxfp4')])\n"
        "    child.start()\n"
        "    child.join()\n"
        "    assert child.exitcode == 0\n"
    )
    (tmp_path / "main.py").write_text(code)
    done = subprocess.run([sys.executable, "main.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_modules_are_found_and_loaded_as_without_fp4() -> None:
    code = (
        "import fp4, importlib, inspect\n"
        "from transformers.quantizers import auto\n"
        "from importlib.machinery import SourceFileLoader\n"
        "assert type(auto.__loader__) is SourceFileLoader and type(auto.__spec__.loader) is SourceFileLoader\n"
        "assert 'AUTO_QUANTIZER_MAPPING' in inspect.getsource(auto)\n"
    )
    assert in_forks([code]) == {}


def test_a_stock_configuration_is_run_by_fp4(llama: Path) -> None:
    code = (
        "import fp4\n"
        "from transformers import AutoModelForCausalLM, FPQuantConfig\n"
        "stock = FPQuantConfig(forward_dtype='mxfp4', transform_init='identity')\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(llama)!r}, quantization_config=stock)\n"
        "assert isinstance(model.hf_quantizer, fp4.FPQuantHfQuantizer)\n"
    )
    assert in_forks([code]) == {}
