"""What the plugin does in a process of vLLM before a model is loaded. Where it refuses, a few lines stand for vLLM."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

VLLM = {
    "__init__.py": "__version__ = '{version}'",
    "logger.py": """
class Logger:
    def warning(self, text, *values): print(text % values)
init_logger = lambda name: Logger()
""",
    "platforms.py": """
class Platform:
    _enum = None
    def is_cpu(self): return {is_cpu}
    def is_cuda(self): return not {is_cpu}
current_platform = Platform()
""",
}
SAY = "import sys, fp4_vllm_plugin; fp4_vllm_plugin.register(); print(sorted(n for n in sys.modules if n == 'fp4'))"


def run(script: str, *path: Path, **variables: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*path, *sys.path])), **variables}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def stand_in(folder: Path, version: str, is_cpu: bool = True) -> Path:
    (folder / "vllm").mkdir()
    for name, text in VLLM.items():
        (folder / "vllm" / name).write_text(text.replace("{version}", version).replace("{is_cpu}", str(is_cpu)))
    return folder


def test_the_entry_point_is_installed() -> None:
    found = {point.name: point.value for point in entry_points(group="vllm.general_plugins")}
    assert found["fp4"] == "fp4_vllm_plugin:register"


def test_other_releases_are_refused_by_a_sentence(tmp_path: Path) -> None:
    assert run(SAY, stand_in(tmp_path, "0.31.2")) == (
        "fp4 registers no kernels, since it knows vLLM 0.32 and this is 0.31.2; install a release of fp4 for it, or "
        "set FP4_VLLM=0\n[]\n"
    )


def test_a_changed_vllm_is_left_alone(tmp_path: Path) -> None:
    said = run(SAY, stand_in(tmp_path, "0.32.1"))
    assert said == (
        "fp4 registers no kernels, since this vLLM 0.32.1 differs: No module named 'vllm.model_executor'\n[]\n"
    )


@pytest.mark.parametrize(("is_cpu", "wanted"), [(True, "0"), (False, "1")], ids=["switched off", "on a GPU"])
def test_nothing_is_imported_where_nothing_is_to_be_done(is_cpu: bool, wanted: str, tmp_path: Path) -> None:
    assert run(SAY, stand_in(tmp_path, "0.31.2", is_cpu), FP4_VLLM=wanted) == "[]\n"


def test_an_unknown_value_is_named(tmp_path: Path) -> None:
    said = run(SAY, stand_in(tmp_path, "0.32.0"), FP4_VLLM="yes")
    assert said == "FP4_VLLM is 'yes'; expected 0, 1 or cuda, so fp4 registers no kernels\n[]\n"


REGISTERED = """
import sys
from vllm.plugins import load_general_plugins
load_general_plugins()
import fp4_vllm_plugin
fp4_vllm_plugin.register()  # once more changes nothing
from vllm.model_executor.kernels import linear
from vllm.platforms import PlatformEnum
for kernels in (linear._POSSIBLE_NVFP4_KERNELS, linear._POSSIBLE_MXFP4_KERNELS):
    print([kernel.__name__ for kernel in kernels.get(PlatformEnum.CPU, [])])
print([name for name in ("fp4", "fp4.integrations.transformers", "fp4.nn", "fp4.pipeline") if name in sys.modules])
import fp4
print("fp4.integrations.transformers" in sys.modules)
"""


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; make vllm installs it")
def test_kernels_are_registered_and_quantizers_are_not() -> None:
    """Not until a script imports fp4, which is the same before and after vLLM has loaded the plugin."""
    assert run(REGISTERED).splitlines()[-4:] == [
        "['Fp4NvFp4LinearKernel']",
        "['Fp4MxFp4LinearKernel']",
        "[]",
        "True",
    ]
