"""A model without weights on the meta device, parts of which are loaded from the checkpoint and unloaded again.

The model is built by Transformers' own classes, and a part is loaded by Transformers' own weight conversion, so that a
checkpoint loads here exactly as ``from_pretrained`` loads it, only one part at a time.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Transpose,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from fp4.checkpoint.contradictions import refuse_endless
from fp4.checkpoint.io.headers import Checkpoint, TensorInfo, load
from fp4.host_memory import tells_out_of_memory
from fp4.linear_like import linear_like
from fp4.pipeline.token_embeddings import reads_rows, rows_filled

if TYPE_CHECKING:
    from transformers import PretrainedConfig


# Limits on the number of modules. A model has more modules than stored tensors: activations, dropouts, and experts that
# are stored in stacks.
_MODULES = 50_000
_MODULES_A_TENSOR = 30


class _Lazy:
    """A stored tensor that is read when Transformers indexes it, like a slice of safetensors."""

    def __init__(self, info: TensorInfo) -> None:
        self.info = info

    def __getitem__(self, index: Any) -> Tensor:
        try:
            return load(self.info)[index]
        except OSError as error:
            raise OSError(error.errno or errno.EIO, f"{self.info.file} could not be read: {error}") from error


@dataclass
class Source:
    """The stored tensors that a parameter of the model comes from.

    Attributes:
        keys: names of stored tensors; several where Transformers merges them (experts).
        converter: how Transformers merges or splits them; None where the stored tensor is the parameter.
    """

    keys: list[str] = field(default_factory=list)
    converter: WeightConverter | None = None


class Skeleton:
    """A model on the meta device, its decoder's blocks, and where each parameter is stored.

    Attributes:
        checkpoint: what the model is loaded from.
        dtype: dtype of the parameters.
        model: the model that config.json describes, with ``nn.Linear`` in place of other classes that compute the same.
        decoder: the part that turns tokens into hidden states of text.
        decoder_name: its name in the model; empty for the model itself.
        conversions: Transformers' renamings and conversions of stored tensors for this model.
        blocks: full names of the decoder's blocks, in order.
        sources: stored tensors of each parameter, by its full name (of its first target, where one is split).
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, trust_remote_code: bool = False) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.model = _build(checkpoint, dtype, trust_remote_code).eval()
        self.decoder_name, self.decoder = _decoder(self.model)
        self.blocks = find_blocks(self.decoder, self.decoder_name)
        self.conversions = [*get_model_conversion_mapping(self.model), *plain_linears(self.model)]
        self.sources = self._sources()
        self._refuse_contradictions()

    def _sources(self) -> dict[str, Source]:
        renamings = [entry for entry in self.conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self.conversions if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        parameters = self.model.state_dict()
        prefix = self.model.base_model_prefix
        sources: dict[str, Source] = {}
        for key in sorted(self.checkpoint.tensors):
            name, pattern = rename_source_key(key, renamings, converters, prefix, parameters)
            if name not in parameters and key in parameters:
                name, pattern = rename_source_key(key, [], [], prefix, parameters)
            if name in parameters:
                source = sources.setdefault(name, Source())
                source.keys.append(key)
                source.converter = None if pattern is None else by_pattern[pattern]
        return sources

    def _refuse_contradictions(self) -> None:
        """ValueError where tensors do not have the shapes that config.json gives them, or blocks lack some."""
        parameters = self.model.state_dict()
        problems = []
        for name, source in self.sources.items():
            stored = self.checkpoint.tensors[source.keys[0]].shape
            if source.converter is None and stored != tuple(parameters[name].shape):
                problems.append(f"{source.keys[0]} is stored as {stored}, expected {tuple(parameters[name].shape)}")
        if problems:
            raise ValueError(
                f"config.json contradicts the weights: {len(problems)} tensors have other shapes ({problems[0]}); "
                "take both from the same model"
            )
        # Where Transformers splits a tensor, only the first part is among the sources. Tied parameters need no source.
        targets = [target for entry in self.conversions for target in entry.target_patterns[1:]]
        needless = [re.escape(re.split(r"\\\d|[*^$]", target.rstrip("$"))[-1]) for target in targets]
        needless += self.model._keys_to_ignore_on_load_missing or []
        absent = [
            name
            for name, _ in self.model.named_parameters()
            if _below(name, self.blocks[0].rpartition(".")[0])
            and name not in self.sources
            and name not in self.model.all_tied_weights_keys
            and not any(re.search(pattern, name) for pattern in needless)
        ]
        if absent:
            raise ValueError(
                f"config.json contradicts the weights: it describes {len(self.blocks)} blocks, and the checkpoint has "
                f"no weight for {absent[0]} ({len(absent)} are missing in all); take both from the same model"
            )

    def keys_below(self, name: str) -> list[str]:
        """Names of the stored tensors of everything in the module ``name``."""
        return [key for parameter, source in self.sources.items() if _below(parameter, name) for key in source.keys]

    def keys_outside(self) -> list[str]:
        """Names of the stored tensors of the decoder, without those of its blocks."""
        outside = [
            source
            for parameter, source in self.sources.items()
            if (_below(parameter, self.decoder_name) or not self.decoder_name)
            and not any(_below(parameter, block) for block in self.blocks)
        ]
        return [key for source in outside for key in source.keys]

    def table(self) -> tuple[nn.Embedding, str] | None:
        """The token embedding and the name of its stored tensor; None where rows cannot be read one by one."""
        embedding = self.model.get_input_embeddings()
        path = next((name for name, module in self.decoder.named_modules() if module is embedding), None)
        source = self.sources.get(".".join(filter(None, (self.decoder_name, path, "weight"))))
        if path is None or source is None or source.converter is not None or not isinstance(embedding, nn.Embedding):
            return None
        return (embedding, source.keys[0]) if reads_rows(embedding, self.checkpoint.tensors[source.keys[0]]) else None

    def fill(self, keys: list[str], device: torch.device) -> None:
        """Load the parameters that come from the stored tensors ``keys``, and the buffers of their modules.

        Raises:
            ValueError: a tensor cannot be converted, or does not fit the model.
            OSError: a file cannot be read.
            MemoryError: memory was too small for a conversion.
        """
        state = {key: _Lazy(self.checkpoint.tensors[key]) for key in keys}
        options = LoadStateDictConfig(
            device_map={"": device},
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),  # keeps some routers in float32
            weight_mapping=self.conversions,
        )
        with _quiet():
            found, _ = convert_and_load_state_dict_in_model(self.model, state, options)
        if found.conversion_errors or found.mismatched_keys:
            full = next((error for error in found.conversion_errors.values() if tells_out_of_memory(error)), None)
            if full is not None:
                raise MemoryError(full.splitlines()[-1])
            problems = [f"{name}: {error.splitlines()[-1]}" for name, error in found.conversion_errors.items()]
            problems += [
                f"{name}: stored as {tuple(has)}, the model has {tuple(wants)}"
                for name, has, wants in found.mismatched_keys
            ]
            raise ValueError(f"{len(problems)} tensors do not fit the model: {'; '.join(problems[:5])}")

    @contextlib.contextmanager
    def filled(self, name: str, device: torch.device) -> Iterator[nn.Module]:
        """The module ``name`` (a block), with its weights within this context."""
        module = self.model.get_submodule(name)
        replaced = list(self.model.get_submodule(name).named_modules())
        try:
            self.fill(self.keys_below(name), device)
            self.settle(module, device, name)
            yield module
        finally:
            for path, child in replaced:
                if path:
                    module.set_submodule(path, child)
            module.to_empty(device="meta")

    @contextlib.contextmanager
    def outside_filled(self, device: torch.device, batches: Sequence[Tensor]) -> Iterator[None]:
        """Within this context the decoder without its blocks (embeddings, rotary tables, norms) is in memory.

        Args:
            device: the device to load onto.
            batches: the token ids that the decoder will run on, which decide about the rows of the embedding.
        """
        parts = [
            (name, module)
            for name, module in self.model.named_modules()
            if (_below(name, self.decoder_name) or not self.decoder_name)
            and not any(_below(f"{name}.", block) for block in self.blocks)
        ]
        keys, table = self.keys_outside(), self.table()
        with contextlib.ExitStack() as stack:
            for _, module in parts:
                stack.callback(module.to_empty, device="meta", recurse=False)
            if table is not None:
                embedding, stored = table
                keys.remove(stored)
                info = self.checkpoint.tensors[stored]
                stack.enter_context(rows_filled(embedding, info, batches, self.dtype, device))
            self.fill(keys, device)
            for path, module in parts:
                self.settle(module, device, path, recurse=False)
            yield

    def settle(self, part: nn.Module, device: torch.device, name: str, recurse: bool = True) -> None:
        """Initialise the buffers that no checkpoint holds (rotary tables and the like), as Transformers does.

        Args:
            part: a module whose parameters are in memory.
            device: the device of the buffers.
            name: the module's name, for errors.
            recurse: whether its child modules are included.

        Raises:
            ValueError: the checkpoint had no weight for a parameter.
        """
        for module in part.modules() if recurse else [part]:
            empty = [key for key, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
            for key in empty:
                setattr(module, key, torch.empty_like(getattr(module, key), device=device))
            if empty:
                for value in module.parameters(recurse=False):
                    # Transformers does not initialise parameters with this mark.
                    setattr(value, "_is_hf_initialized", True)  # noqa: B010
                with torch.no_grad():  # Transformers after 5.23 no longer does this itself
                    self.model._init_weights(module)
        missing = [key for key, value in part.named_parameters(recurse=recurse) if value.is_meta]
        if missing:
            raise ValueError(
                f"the checkpoint has no weight for {name}.{missing[0]} ({len(missing)} are missing in all)"
            )


def _below(name: str, module: str) -> bool:
    return name.startswith(f"{module}.") if module else True


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within this context Transformers shows no progress bar, since it would show one for each block."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _build(checkpoint: Checkpoint, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
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
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        return model


def _decoder(model: PreTrainedModel) -> tuple[str, nn.Module]:
    decoder = model.get_decoder()
    if not isinstance(decoder, nn.Module):
        decoder = model
    return next(((name, module) for name, module in model.named_modules() if module is decoder), ("", model))


def plain_linears(model: nn.Module) -> list[WeightConverter]:
    """Replace layers of other classes that compute what ``nn.Linear`` does by one, so that methods meet no others.

    Args:
        model: a model on the meta device; changed in place.

    Returns:
        conversions that transpose the stored weights of those whose class stores them so.
    """
    transposed: dict[str, None] = {}
    for name, module in list(model.named_modules()):
        form = linear_like(module)
        if form is None or type(module) is nn.Linear:
            continue
        weight, bias = module.get_parameter("weight"), module._parameters.get("bias")
        plain = nn.Linear(form.in_features, form.out_features, bias is not None, weight.device, weight.dtype)
        model.set_submodule(name, plain.train(module.training))
        if form.is_transposed:
            transposed[".".join(name.split(".")[-2:])] = None
    return [WeightConverter(f"{re.escape(end)}\\.weight$", f"{end}.weight", [Transpose(0, 1)]) for end in transposed]


def find_blocks(decoder: nn.Module, prefix: str = "") -> list[str]:
    """Names of the decoder's blocks, which are the outermost ModuleList that holds most of its parameters.

    Raises:
        ValueError: there is no list of blocks.
    """
    lists: list[tuple[int, str, nn.ModuleList]] = []
    for name, module in decoder.named_modules():
        if isinstance(module, nn.ModuleList) and not any(_below(name, outer) for _, outer, _ in lists):
            lists.append((sum(parameter.numel() for parameter in module.parameters()), name, module))
    size, name, blocks = max(lists, key=lambda entry: entry[0], default=(0, "", nn.ModuleList()))
    if not size:
        raise ValueError(
            f"{type(decoder).__name__} has no list of decoder blocks (an nn.ModuleList with weights); fp4 quantizes "
            "decoder models"
        )
    start = f"{prefix}.{name}" if prefix else name
    return [f"{start}.{index}" for index in range(len(blocks))]
