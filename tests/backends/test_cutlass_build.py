"""How setup.py decides about the CUDA kernels; nvcc and GPUs are stood in for by scripts, so nothing is compiled."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
needs_setuptools = pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="setuptools is absent")
pytestmark = [needs_setuptools, pytest.mark.skipif(sys.platform != "linux", reason="the CUDA kernels are for Linux")]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without nvcc and GPU; returns the folder of its programs, the first of PATH."""
    programs = tmp_path / "toolkit" / "bin"
    programs.mkdir(parents=True)
    for name in (
        "CUDA_PATH",
        "CUTLASS_ROOT",
        "FP4_CUDA",
        "FP4_CUDA_ARCHS",
        "FP4_CUDA_CONFIGURATIONS",
        "FP4_BUILD_CACHE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    see_gpus(programs)
    return programs


def program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def see_gpus(programs: Path, *capabilities: str) -> None:
    program(programs / "nvidia-smi", "\n".join(f"echo {c}" for c in capabilities) or "exit 9")


@pytest.fixture
def build(machine: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("build_tools.cuda")


@pytest.mark.parametrize(
    ("gpus", "asked", "built_for"),
    [
        (["9.0", "9.0", "8.0"], None, ["80", "90"]),
        (["12.0", "10.3"], None, ["103a", "120a"]),
        (["7.0"], None, ["100a", "120a"]),
        ([], None, ["100a", "120a"]),
        (["9.0"], "120f; 86", ["120f", "86"]),
    ],
)
def test_architectures(
    build: ModuleType,
    machine: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpus: list[str],
    asked: str | None,
    built_for: list[str],
) -> None:
    see_gpus(machine, *gpus)
    if asked is not None:
        monkeypatch.setenv("FP4_CUDA_ARCHS", asked)
    assert build.find_architectures() == built_for


def test_an_architecture_that_is_none(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP4_CUDA_ARCHS", "sm_100a")
    with pytest.raises(ValueError, match=r"names \['sm_100a'\]"):
        build.find_architectures()


@pytest.mark.parametrize(
    ("gpus", "asked", "choice", "is_left_out"),
    [
        ([], None, None, True),
        (["7.5"], None, None, True),
        (["9.0"], None, None, False),
        ([], "100a", None, False),
        ([], None, "1", False),
        ([], None, "pypi", False),
        (["10.0"], "100a", "0", True),
    ],
)
def test_nobody_waits_for_kernels_unasked(
    build: ModuleType,
    machine: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpus: list[str],
    asked: str | None,
    choice: str | None,
    is_left_out: bool,
) -> None:
    see_gpus(machine, *gpus)
    if asked is not None:
        monkeypatch.setenv("FP4_CUDA_ARCHS", asked)
    assert (build.left_out(choice) is not None) == is_left_out


def test_only_architectures_with_the_instructions_get_matmuls(build: ModuleType) -> None:
    architectures = ["90", "100", "100a", "103f", "120a", "121a"]
    assert build._of_family(architectures, "sm100") == ["100a", "103f"]
    assert build._of_family(architectures, "sm120") == ["120a", "121a"]


def test_configurations(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"gemm_{family}_{name}" for family in build.FAMILIES for name in build.CONFIGURATIONS]
    assert sorted(names) == sorted(path.stem for path in build.SOURCES.glob("gemm_*.cu"))
    assert build.find_configurations() == list(build.CONFIGURATIONS)
    monkeypatch.setenv("FP4_CUDA_CONFIGURATIONS", "grouped; small")
    assert build.find_configurations() == ["small", "grouped"]
    monkeypatch.setenv("FP4_CUDA_CONFIGURATIONS", "tiny")
    with pytest.raises(ValueError, match=r"names \['tiny'\]"):
        build.find_configurations()


def test_the_stamp_changes_with_what_is_linked(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FP4_BUILD_CACHE", str(tmp_path))
    stamp = build._stamp("one")
    os.utime(stamp, (1, 1))
    assert build._stamp("one").stat().st_mtime == 1
    assert build._stamp("two").stat().st_mtime > 1


def test_nvcc_that_is_too_old(build: ModuleType, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(machine / "nvcc", "echo 'Cuda compilation tools, release 12.4, V12.4.131'")
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    if not Path("/usr/local/cuda").exists():
        with pytest.raises(build.CompileError, match=r"12\.8 or newer was not found .*found: 12\.4.*FP4_CUDA=pypi"):
            build.find_toolkit(None)
    program(machine / "nvcc", "echo 'Cuda compilation tools, release 12.8, V12.8.93'")
    assert build.find_toolkit(None).version == (12, 8)


def test_cutlass_root_that_is_none(build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUTLASS_ROOT", str(tmp_path))
    with pytest.raises(build.CompileError, match=r"CUTLASS_ROOT must be a copy of CUTLASS >= 4\.2"):
        build.find_cutlass()


def test_a_job_for_what_it_takes_of_memory(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.os, "sched_getaffinity", lambda pid: set(range(16)))
    for jobs, memory in ((1, 4 << 30), (1, build.BYTES_PER_JOB), (3, 3 * build.BYTES_PER_JOB), (16, 1 << 40)):
        monkeypatch.setattr(build, "_memory", lambda memory=memory: memory)
        assert build._jobs() == jobs


@pytest.mark.parametrize("choice", [None, "1"], ids=["unset", "forced"])
def test_a_failure_is_forgiven_unless_forced(
    machine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, choice: str | None
) -> None:
    """The first nvcc that fails ends the build of the CUDA library, and of nothing else."""
    (machine.parent / "lib64").mkdir()
    (machine.parent / "lib64" / "libcudart_static.a").touch()
    (tmp_path / "cutlass" / "include" / "cutlass").mkdir(parents=True)
    for name in ("cutlass.h", "version.h"):
        (tmp_path / "cutlass" / "include" / "cutlass" / name).touch()
    release = "'Cuda compilation tools, release 13.0, V13.0.88'"
    program(machine / "nvcc", f'[ "$1" = --version ] && echo {release} && exit\necho "out of registers"; exit 2')
    see_gpus(machine, "9.0")
    settings = {"FP4_CPU": "0", "CUTLASS_ROOT": str(tmp_path / "cutlass"), "FP4_BUILD_CACHE": str(tmp_path / "cache")}
    if choice is not None:
        settings["FP4_CUDA"] = choice
    folders = ["--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    command = [sys.executable, "setup.py", "-q", "build_ext", *folders]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True, check=False
    )
    assert (done.returncode == 0) == (choice is None), done.stderr
    assert "nvcc failed on quantize.cu (2):\nout of registers" in done.stderr
    assert ("fp4._C_cuda was NOT built, the package works without it" in done.stderr) == (choice is None)
