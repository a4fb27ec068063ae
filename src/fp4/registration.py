"""Registration with Transformers and PEFT when they are imported, so that ``import fp4`` need not import them.

If Transformers has been imported already, the quantizers are registered at once. Otherwise an import hook registers
them as soon as Transformers' own registry of quantizers has been imported.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Keyword arguments of from_pretrained that decide where and with which token a file is looked up.
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "subfolder", "token")


def is_switched_off() -> bool:
    """Whether registration is disabled by FP4_TAKE_OVER=0 in the environment."""
    return os.environ.get("FP4_TAKE_OVER", "1") == "0"


def when_transformers_is_imported() -> None:
    """Register the quantizers with Transformers: now if it has been imported, else when it is. Idempotent."""
    if is_switched_off():
        return
    hooks: dict[str, Callable[[Any], None]] = {
        "transformers.configuration_utils": _read_older_modelopt,
        "transformers.quantizers.auto": _register_quantizers,
        "peft.tuners.lora.model": _show_experts,
    }
    later = {}
    for name, hook in hooks.items():
        if name in sys.modules:
            hook(importlib.import_module(name))  # waits if another thread is importing it
        else:
            later[name] = hook
    if later and not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(later))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Import hook that calls a function with a module right after the module has been imported.

    Finding and loading are left to the other finders. The package wrapt offers the same, but importing it would double
    the time of ``fp4 --help``.
    """

    def __init__(self, hooks: dict[str, Callable[[Any], None]]) -> None:
        self.hooks = hooks

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.hooks:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _ThenHook(spec.loader, self.hooks[fullname])
                return spec
        return None


class _ThenHook(importlib.abc.Loader):
    """Loader that delegates to ``loader``, which the module then shows as its own, and calls ``hook`` afterwards."""

    def __init__(self, loader: Any, hook: Callable[[Any], None]) -> None:
        self.loader, self.hook = loader, hook

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self.loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.hook(module)


def _register_quantizers(auto: Any) -> None:
    # Importing this package registers the quantizers. If the package itself triggered this hook, by importing the
    # module of Transformers, its import is still under way and it registers them at its end.
    importlib.import_module("fp4.integrations.transformers")


def _show_experts(lora_model: Any) -> None:
    """Let LoRA find the weights of packed experts. Idempotent.

    PEFT looks for ``target_parameters`` among the parameters of a model, skips those that it does not find, and has no
    hook to tell it of more.
    """
    stock: Any = lora_model.LoraModel.inject_adapter
    if getattr(stock, "_fp4", False):
        return

    @functools.wraps(stock)
    def inject_adapter(self: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        if "fp4.nn" not in sys.modules:
            return stock(self, model, adapter_name, *args, **kwargs)
        peft = importlib.import_module("fp4.integrations.peft")
        with peft.experts_shown(model, self.peft_config[adapter_name]):
            return stock(self, model, adapter_name, *args, **kwargs)

    wrapped: Any = inject_adapter
    wrapped._fp4 = True
    lora_model.LoraModel.inject_adapter = wrapped


def _read_older_modelopt(configuration_utils: Any) -> None:
    """Make ``get_config_dict`` read hf_quant_config.json if config.json has no quantization_config. Idempotent.

    This is installed before the quantizers are imported, because a configuration can be read before that and then be
    passed to ``from_pretrained``.
    """
    stock: Any = configuration_utils.PreTrainedConfig.get_config_dict
    if getattr(stock, "_fp4", False):
        return

    @functools.wraps(stock.__func__)
    def get_config_dict(cls: Any, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        config, rest = stock.__func__(cls, pretrained_model_name_or_path, **kwargs)
        holders = [config, config.get("text_config")]
        said = any(isinstance(holder, dict) and holder.get("quantization_config") for holder in holders)
        if config.get("architectures") and not said:
            reader = importlib.import_module("fp4.integrations.transformers.hf_quant_config")
            hub = {key: kwargs.get(key) for key in _HUB_OPTIONS}
            commit = config.get("_commit_hash") or kwargs.get("revision")
            found = reader.stored_beside(str(pretrained_model_name_or_path), commit, **hub)
            if found is not None:
                config["quantization_config"] = found
        return config, rest

    wrapped: Any = get_config_dict
    wrapped._fp4 = True
    configuration_utils.PreTrainedConfig.get_config_dict = classmethod(wrapped)
