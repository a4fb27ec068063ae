"""Mutation testing: small faults put into the code one by one, and whether the nearest tests notice.

    python tests/mutation/run.py src/fp4/methods/gptq.py       # or folders; nothing for all that TESTS names
    python tests/mutation/run.py --sample 60 src/fp4/pipeline  # of each file so many, drawn at random

The mutants are cosmic-ray's (its operators, as a library). Its own runner starts a process for every mutant, which here
is ten seconds of importing torch and Transformers for a second of tests; mutmut changes no function that has a
decorator, which here are those that run without gradients and all context managers. So this script imports what is slow
once and forks for each mutant, for the tests that call the function that was changed. Mutants are put into a copy of
the package, beside its compiled modules, never into the working tree. A test that fails, an error at import and a run
without end count as noticed.

Survivors are written to ``survivors.yaml`` beside this file, where each keeps the reason that was given for it.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import gc
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
import yaml
from operators import Mutant, mutants_of

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src/fp4"
SURVIVORS = Path(__file__).with_name("survivors.yaml")

#: The tests that are nearest to each file, the fastest to notice first; of a folder, where its files are not named.
TESTS = {
    "calibration/block.py": "test_methods_block test_layer_order test_methods_equalise test_global_scales "
    "test_methods_experts",
    "calibration/channel_statistics.py": "test_global_scales test_methods_equalise",
    "calibration/chat_template.py": "test_data test_hostile_models",
    "calibration/data.py": "test_data",
    "calibration/expert_linears.py": "test_expert_linears test_methods_experts",
    "calibration/formatters.py": "test_data",
    "calibration/global_scales.py": "test_global_scales test_methods_block",
    "calibration/layer_order.py": "test_layer_order test_methods_block test_methods_experts",
    "calibration/observers.py": "test_methods_gptq test_global_scales test_layer_order",
    "calibration/recipe.py": "test_data",
    "checkpoint/contradictions.py": "test_reading test_hostile_models",
    "checkpoint/convert.py": "test_convert test_kv_cache",
    "checkpoint/expert_names.py": "test_reading test_convert test_experts_loading",
    "checkpoint/formats": "test_checkpoint_configurations test_checkpoint_codecs test_adding_a_format "
    "test_checkpoint_writing test_convert",
    "checkpoint/formats/config_fields.py": "test_reading test_hostile_config",
    "checkpoint/fusing.py": "test_reading",
    "checkpoint/inspect.py": "test_inspect",
    "checkpoint/io/headers.py": "test_reading test_hostile test_damaged",
    "checkpoint/io/hub.py": "test_reading test_convert",
    "checkpoint/io/publish.py": "test_files test_convert test_pipeline_resume test_saving",
    "checkpoint/io/shards.py": "test_files test_convert",
    "checkpoint/kv_cache.py": "test_kv_cache",
    "checkpoint/layers.py": "test_reading test_inspect test_convert",
    "methods/autoround.py": "test_methods_autoround test_methods_block test_methods_experts",
    "methods/best.py": "test_methods_best test_methods_descent test_methods_block test_methods_experts",
    "methods/descent.py": "test_methods_descent test_methods_block",
    "methods/equalise.py": "test_methods_equalise test_methods_block",
    "methods/gptq.py": "test_methods_gptq test_methods_descent test_methods_block",
    "methods/grid.py": "test_methods_gptq test_methods_descent test_methods_autoround",
    "methods/hessian.py": "test_methods_gptq test_methods_descent test_layer_order test_methods_block",
    "methods/layerwise.py": "test_layer_order test_methods_block test_methods_experts test_methods_autoround",
    "methods/rtn.py": "test_methods_rtn test_global_scales test_methods_block",
    "methods/scale_search.py": "test_methods_gptq test_methods_descent test_methods_autoround",
    "methods/tiling.py": "test_methods_tiling test_methods_gptq test_methods_descent test_methods_experts",
    "nn": "test_experts test_gradient test_training test_copies test_quantizer test_experts_loading test_fp8_experts "
    "test_saving test_resizing",
    "pipeline": "test_pipeline_parts test_pipeline_plan test_pipeline_report test_pipeline_reference "
    "test_pipeline_failures test_pipeline_resume test_pipeline",
    "pipeline/duration.py": "test_pipeline_duration",
    "pipeline/estimate.py": "test_pipeline_estimate",
    "pipeline/expert_layers.py": "test_experts_pipeline",
    "pipeline/half_precision.py": "test_pipeline_half",
    "pipeline/job.py": "test_progress test_pipeline_resume test_cli_quantize test_pipeline",
    "pipeline/memory_budget.py": "test_pipeline_estimate test_pipeline_failures",
    "pipeline/storage.py": "test_pipeline_plan test_experts_pipeline test_pipeline_reference",
    "rounding.py": "test_methods_rtn test_global_scales test_methods_block test_checkpoint_rtn",
}


def tests_for(source: Path) -> list[str]:
    """The test files of one source file."""
    name = source.relative_to(PACKAGE)
    names = next(TESTS[str(path)] for path in (name, *name.parents) if str(path) in TESTS)
    return [str(path) for test in names.split() for path in (ROOT / "tests").rglob(f"{test}.py")]


def sources(named: list[str]) -> list[Path]:
    """The files that are named, those of folders that are named, or all that have tests in the table."""
    paths = [Path(name).resolve() for name in named] or [PACKAGE / name for name in TESTS]
    files = {file for path in paths for file in ([path] if path.is_file() else path.rglob("*.py"))}
    return sorted(file for file in files if file.name != "__init__.py")


def copy_package(folder: Path) -> Path:
    """A copy of the package to be changed, with links to its compiled modules."""
    target = folder / "fp4"
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for library in PACKAGE.rglob("*.so"):
        (target / library.relative_to(PACKAGE)).symlink_to(library)
    return target


class Recorder:
    """A plugin of pytest that notes how long each test takes, and which functions of the package it calls.

    Attributes:
        package: path of the package.
        seconds: of each test, by its id.
        called: by file, the first lines of the functions that each test calls. Processes that a test starts are not
            followed.
    """

    def __init__(self, package: Path) -> None:
        self.package = str(package)
        self.seconds: dict[str, float] = {}
        self.called: dict[str, dict[str, list[int]]] = {}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Run one test, with the fixtures that it is the first to ask for."""
        called: set[tuple[str, int]] = set()

        def trace(frame: FrameType, event: str, argument: object) -> None:
            code = frame.f_code
            if code.co_filename.startswith(self.package):
                called.add((code.co_filename, code.co_firstlineno))

        started = time.monotonic()
        threading.settrace(trace)
        sys.settrace(trace)
        yield
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
        self.seconds[item.nodeid] = time.monotonic() - started
        for file, line in called:
            self.called.setdefault(file, {}).setdefault(item.nodeid, []).append(line)


class Notes(NamedTuple):
    """What a run of tests has shown: what :class:`Recorder` notes, and the libraries in use."""

    seconds: dict[str, float]
    called: dict[str, dict[str, list[int]]]
    libraries: list[str]

    def tests_of(self, file: Path, line: int, code: str) -> list[str]:
        """The tests that call the function around a line, or all where that is none: quick ones and files first."""
        around = [
            min(part.lineno for part in (node, *node.decorator_list))
            for node in ast.walk(ast.parse(code))
            if isinstance(node, ast.FunctionDef) and node.body[0].lineno <= line <= (node.end_lineno or 0)
        ]
        called = self.called.get(str(file), {})
        chosen = [test for test in self.seconds if not around or max(around) in called.get(test, ())]
        files: dict[str, float] = {}
        for test in chosen:
            name = test.partition("::")[0]
            files[name] = files.get(name, 0) + self.seconds[test]
        return sorted(chosen, key=lambda test: (files[test.partition("::")[0]], self.seconds[test]))


def import_libraries(names: list[str]) -> None:
    """Imports the libraries that a run of tests has noted, so that the forks that follow need not.

    fp4 is not among them: each fork has its own, and its operators can be registered once in a process.
    """
    for name in names:
        with contextlib.suppress(Exception):  # such as parts of a library that are imported in one order alone
            importlib.import_module(name)
    gc.freeze()  # so that collections in the forks do not visit these modules, and copy their memory


def _libraries() -> list[str]:
    """The names of all imported modules that are installed, in this environment or in one that it builds on."""
    return [
        name for name, module in list(sys.modules.items()) if "site-packages" in str(getattr(module, "__file__", ""))
    ]


def passes(tests: list[str], folder: Path, limit: float, recorder: Recorder | None = None) -> bool:
    """Whether the tests pass on the package in ``folder`` within ``limit`` seconds, in a fork of this process.

    What ``recorder`` notes is left in a file of ``folder``.
    """
    child = os.fork()
    if child == 0:
        os.setsid()  # so that whatever it starts is ended with it
        null = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(null, stream)
        os.environ["PYTHONPATH"] = str(folder)  # for the processes that tests start
        sys.path.insert(0, str(folder))
        sys.dont_write_bytecode = True
        os.chdir(ROOT)
        options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
        status = int(pytest.main([*options, *tests], plugins=[recorder] if recorder else []))
        if recorder is not None:
            notes = Notes(recorder.seconds, recorder.called, _libraries())
            (folder / "notes.json").write_text(json.dumps(notes), encoding="utf-8")
        os._exit(status)
    ends = time.monotonic() + limit
    status = None
    while status is None and time.monotonic() < ends:
        ended, code = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if ended else None
        time.sleep(0.02)
    if status is None:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return status == 0


@functools.cache
def notes_of(tests: tuple[str, ...], package: Path) -> Notes:
    """What a run of the tests without a fault shows, whose libraries are imported here."""
    if not passes(list(tests), package.parent, 3600, Recorder(package)):
        sys.exit(f"{' '.join(tests)} fail without a fault; mend them first")
    notes = Notes(*json.loads((package.parent / "notes.json").read_text(encoding="utf-8")))
    import_libraries(notes.libraries)
    return notes


def survivors_of(source: Path, mutants: list[Mutant], package: Path) -> list[Mutant]:
    """Those of ``mutants`` that the tests of ``source`` do not notice."""
    target, code = package / source.relative_to(PACKAGE), source.read_text(encoding="utf-8")
    notes = notes_of(tuple(tests_for(source)), package)
    alive = []
    for number, mutant in enumerate(mutants, 1):
        print(f"\r{number} of {len(mutants)}", end="\r", file=sys.stderr, flush=True)
        target.write_text(mutant.code, encoding="utf-8")
        tests = notes.tests_of(target, mutant.line, code)
        limit = 5 * sum(notes.seconds[test] for test in tests) + 30
        if not tests or passes(tests, package.parent, limit):
            alive.append(mutant)
            print(f"  {mutant.line}: {mutant.was}\n   -> {mutant.now}", flush=True)
    shutil.copyfile(source, target)
    return alive


def listed_survivors() -> list[dict[str, Any]]:
    """The entries of survivors.yaml."""
    return (yaml.safe_load(SURVIVORS.read_text(encoding="utf-8")) if SURVIVORS.exists() else None) or []


def record(source: Path, alive: list[Mutant], tried: list[Mutant]) -> None:
    """Brings the list of survivors up to date with what was tried of one file; reasons stay with their mutants."""
    known, name = listed_survivors(), str(source.relative_to(ROOT))
    reasons = {(entry["was"], entry["now"]): entry["reason"] for entry in known if entry["file"] == name}
    again = {(mutant.was, mutant.now) for mutant in tried}
    listed = [entry for entry in known if entry["file"] != name or (entry["was"], entry["now"]) not in again]
    keys = dict.fromkeys((mutant.was, mutant.now) for mutant in alive)
    listed += [{"file": name, "was": was, "now": now, "reason": reasons.get((was, now), "")} for was, now in keys]
    listed.sort(key=lambda entry: entry["file"])
    SURVIVORS.write_text(yaml.safe_dump(listed, sort_keys=False, width=1000, allow_unicode=True), encoding="utf-8")


def print_shares(totals: list[tuple[Path, int, list[Mutant]]]) -> None:
    """How many mutants were noticed, by file, by package and in all.

    Those that compute the same (or the same in another time) cannot be noticed: they have a reason in survivors.yaml,
    and do not count.

    Args:
        totals: a file, how many mutants of it were tried, and those that were not noticed.
    """
    reasons = {(entry["file"], entry["was"], entry["now"]) for entry in listed_survivors() if entry["reason"]}
    rows: dict[str, list[int]] = {}
    for source, tried, alive in totals:
        name, file = source.relative_to(PACKAGE), str(source.relative_to(ROOT))
        same = sum((file, mutant.was, mutant.now) in reasons for mutant in alive)
        for row in dict.fromkeys((str(name), name.parts[0], "in all")):  # a file outside any package is one row
            sums = rows.setdefault(row, [0, 0, 0])
            for place, number in enumerate((tried, len(alive), same)):
                sums[place] += number
    for row, (tried, left, same) in sorted(rows.items(), key=lambda entry: (entry[0] == "in all", entry[0])):
        share = (tried - left) / max(tried - same, 1)
        print(f"{row}: {tried} tried, {tried - left} noticed, {same} of the others change nothing: {share:.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="*", help="files or folders of src/fp4 (default: all that have tests)")
    parser.add_argument("--sample", type=int, help="try so many mutants of each file, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--survivors", action="store_true", help="try those alone that survivors.yaml lists")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)  # threads do not survive a fork
    totals = []
    with tempfile.TemporaryDirectory() as folder:
        package = copy_package(Path(folder))
        for source in sources(arguments.sources):
            mutants = mutants_of(source.read_text(encoding="utf-8"))
            if arguments.survivors:
                name = str(source.relative_to(ROOT))
                listed = {(entry["was"], entry["now"]) for entry in listed_survivors() if entry["file"] == name}
                mutants = [mutant for mutant in mutants if (mutant.was, mutant.now) in listed]
                if not mutants:
                    continue
            elif arguments.sample and len(mutants) > arguments.sample:
                mutants = random.Random(arguments.seed).sample(mutants, arguments.sample)
            print(f"{source.relative_to(ROOT)}: {len(mutants)} mutants", flush=True)
            alive = survivors_of(source, mutants, package)
            record(source, alive, mutants)
            totals.append((source, len(mutants), alive))
    print_shares(totals)


if __name__ == "__main__":
    main()
