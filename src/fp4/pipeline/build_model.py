"""The model that a checkpoint's config.json describes, built by Transformers' classes on the meta device."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoConfig, PreTrainedModel

from fp4.checkpoint.contradictions import refuse_endless
from fp4.checkpoint.io.headers import Checkpoint

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Limits on the number of modules. A model has more modules than stored tensors: activations, dropouts, and experts that
# are stored in stacks.
_MODULES = 50_000
_MODULES_A_TENSOR = 30


def build_model(checkpoint: Checkpoint, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """The model that config.json describes.

    Raises:
        ValueError: no model can be built from the file, or only one far larger than the checkpoint.
    """
    refuse_endless(checkpoint.config, len(checkpoint.tensors))
    try:
        with _few_modules(_MODULES + _MODULES_A_TENSOR * len(checkpoint.tensors)):
            return _built(checkpoint.folder, dtype, trust_remote_code)
    except (MemoryError, OSError, ImportError):
        raise
    except Exception as error:  # model classes raise any error for a configuration that they cannot handle
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"no model can be built from {checkpoint.folder / 'config.json'}: {said}") from error


@contextlib.contextmanager
def _few_modules(limit: int) -> Iterator[None]:
    """Within this context no more than ``limit`` modules can be built, which take time and memory on meta too.

    Raises:
        ValueError: there are more.
    """
    count = itertools.count(1)

    def check(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if next(count) > limit:
            raise ValueError(f"it would have more than {limit} modules ({name} of {type(parent).__name__}, ...)")

    handle = register_module_module_registration_hook(check)
    try:
        yield
    finally:
        handle.remove()


def _built(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    import transformers

    config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    names = config.architectures or []
    cls: Any = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
    with torch.device("meta"):
        model: PreTrainedModel
        if cls is not None:
            model = cls._from_config(config, dtype=dtype)
        else:
            # Code that comes with the checkpoint: its configuration says which of the auto classes builds it.
            references = getattr(config, "auto_map", None) or {}
            autos = [auto for auto, reference in references.items() if str(reference).rpartition(".")[2] in names]
            auto = getattr(transformers, next(iter(autos), "AutoModelForCausalLM"))
            model = auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        return model
