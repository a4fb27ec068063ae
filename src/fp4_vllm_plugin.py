"""The entry point by which vLLM finds fp4 (``vllm.general_plugins``).

It stands outside the package because importing ``fp4`` registers quantizers with Transformers, which no process of vLLM
asked for. Where the plugin has nothing to do, as on a GPU, nothing of fp4 is imported at all.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator

#: The releases of vLLM whose interfaces the plugin knows, as far as their numbers matter.
SUPPORTED = ("0.32",)


def register() -> None:
    """Register fp4's kernels with vLLM, which calls this once in each of its processes.

    ``FP4_VLLM=0`` turns it off. ``FP4_VLLM=cuda`` registers the kernels of linear layers for CUDA GPUs as well, on
    which they have not been tried. What fp4 cannot serve is left to vLLM, with a warning; nothing is raised.
    """
    wanted = os.environ.get("FP4_VLLM", "1")
    if wanted == "0":
        return
    import vllm
    from vllm.logger import init_logger
    from vllm.platforms import current_platform

    logger = init_logger("vllm.fp4")  # below "vllm", for vLLM shows no other logger
    if wanted not in ("1", "cuda"):
        logger.warning("FP4_VLLM is %r; expected 0, 1 or cuda, so fp4 registers no kernels", wanted)
        return
    if not current_platform.is_cpu() and not (wanted == "cuda" and current_platform.is_cuda()):
        return
    if ".".join(vllm.__version__.split(".")[:2]) not in SUPPORTED:
        logger.warning(
            "fp4 registers no kernels, since it knows vLLM %s and this is %s; install a release of fp4 for it, or set "
            "FP4_VLLM=0",
            " and ".join(SUPPORTED),
            vllm.__version__,
        )
        return
    try:
        with _left_unregistered():
            importlib.import_module("fp4.integrations.vllm").register(current_platform._enum)
    except (ImportError, AttributeError) as error:
        logger.warning("fp4 registers no kernels, since this vLLM %s differs: %s", vllm.__version__, error)


@contextlib.contextmanager
def _left_unregistered() -> Iterator[None]:
    """Import modules of fp4 without registering quantizers with Transformers.

    The entry of ``fp4`` itself is taken out again, so that ``import fp4`` of a script, which does want them registered,
    runs as if it were the first.
    """
    if "fp4" in sys.modules:
        yield
        return
    before = os.environ.get("FP4_TAKE_OVER")
    os.environ["FP4_TAKE_OVER"] = "0"
    try:
        yield
    finally:
        sys.modules.pop("fp4", None)
        if before is None:
            del os.environ["FP4_TAKE_OVER"]
        else:
            os.environ["FP4_TAKE_OVER"] = before
