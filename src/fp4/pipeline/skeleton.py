"""A model without weights on the meta device, parts of which are loaded from the checkpoint and unloaded again.

The model is built by Transformers' own classes, and a part is loaded by Transformers' own weight conversion, so that a
checkpoint loads here exactly as ``from_pretrained`` loads it, only one part at a time.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
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

from fp4.checkpoint.dense_view import oriented
from fp4.checkpoint.io.headers import Checkpoint, LazyTensor, load
from fp4.host_memory import tells_out_of_memory
from fp4.linear_like import linear_like
from fp4.pipeline.build_model import build_model
from fp4.pipeline.token_embeddings import reads_rows, rows_filled


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
        self.dtype = dtype
        self.model = build_model(checkpoint, dtype, trust_remote_code).eval()
        self.checkpoint = oriented(checkpoint, self.model)
        self.decoder_name, self.decoder = _decoder(self.model)
        self.blocks = self._encoder_blocks() + find_blocks(self.decoder, self.decoder_name)
        self.conversions = [*get_model_conversion_mapping(self.model), *plain_linears(self.model)]
        self.sources = self._sources()
        self._refuse_contradictions()

    def _encoder_blocks(self) -> list[str]:
        """The blocks of the encoder that an encoder-decoder has; none for other models."""
        if not self.model.config.is_encoder_decoder:
            return []
        encoder = self.model.get_encoder()
        name = next(name for name, module in self.model.named_modules() if module is encoder)
        return find_blocks(encoder, name)

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

    def unbuilt(self) -> list[str]:
        """Names of stored matrices that no parameter comes from, such as those of heads that predict further tokens."""
        used = {key for source in self.sources.values() for key in source.keys}
        return [key for key, info in self.checkpoint.tensors.items() if key not in used and len(info.shape) > 1]

    def keys_below(self, name: str) -> list[str]:
        """Names of the stored tensors of everything in the module ``name``."""
        return [key for parameter, source in self.sources.items() if _below(parameter, name) for key in source.keys]

    def keys_outside(self, towers: bool = False) -> list[str]:
        """Names of the stored tensors of the decoder without those of its blocks.

        Args:
            towers: those of everything else outside the blocks too, but for the output embedding.
        """
        outside = [
            source
            for parameter, source in self.sources.items()
            if self._is_outside(parameter.rpartition(".")[0], towers)
        ]
        return [key for source in outside for key in source.keys]

    def _is_outside(self, module: str, towers: bool) -> bool:
        """Whether a module is of the decoder but of no block; with ``towers``, of the model but of no block or head."""
        if any(_below(f"{module}.", block) for block in self.blocks):
            return False
        if not towers:
            return _below(f"{module}.", self.decoder_name)
        return self.model.get_submodule(module) is not self.model.get_output_embeddings()

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
        state = {key: LazyTensor(self.checkpoint.tensors[key]) for key in keys}
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
            self._fill_shared(name, device)
            self.settle(module, device, name)
            yield module
        finally:
            for path, child in replaced:
                if path:
                    module.set_submodule(path, child)
            module.to_empty(device="meta")

    def _fill_shared(self, name: str, device: torch.device) -> None:
        """Load the parameters of the module ``name`` that are stored under another block's name (Zamba's shared block).

        Other blocks get copies of their own, so the weights of one may change while the others keep theirs.
        """
        for target, owner in self.model.all_tied_weights_keys.items():
            source = self.sources.get(owner)
            if not _below(target, name) or target in self.sources or source is None or source.converter is not None:
                continue
            module, _, parameter = target.rpartition(".")
            value = load(self.checkpoint.tensors[source.keys[0]]).to(device, self.dtype)
            setattr(self.model.get_submodule(module), parameter, nn.Parameter(value, requires_grad=False))

    @contextlib.contextmanager
    def outside_filled(self, device: torch.device, batches: Sequence[Tensor], towers: bool = False) -> Iterator[None]:
        """Within this context the decoder without its blocks (embeddings, rotary tables, norms) is in memory.

        Args:
            device: the device to load onto.
            batches: the token ids that the decoder will run on, which decide about the rows of the embedding.
            towers: whether everything else outside the blocks is in memory too, to run the model on images.
        """
        parts = [(name, module) for name, module in self.model.named_modules() if self._is_outside(name, towers)]
        # Models replace the tokens of images by others before they look them up, so they need the whole embedding.
        keys, table = self.keys_outside(towers), None if towers else self.table()
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
        for path, module in part.named_modules() if recurse else [("", part)]:
            empty = [key for key, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
            for key in empty:
                setattr(module, key, torch.empty_like(getattr(module, key), device=device))
            if empty:
                for value in module.parameters(recurse=False):
                    # Transformers does not initialise parameters with this mark.
                    setattr(value, "_is_hf_initialized", True)  # noqa: B010
                with torch.no_grad():  # Transformers after 5.23 no longer does this itself
                    self._model_around(f"{name}.{path}")._init_weights(module)
        missing = [key for key, value in part.named_parameters(recurse=recurse) if value.is_meta]
        if missing:
            raise ValueError(
                f"the checkpoint has no weight for {name}.{missing[0]} ({len(missing)} are missing in all)"
            )

    def _model_around(self, name: str) -> PreTrainedModel:
        """The innermost model that a module is of: a tower initialises its own buffers, as Transformers lets it."""
        around: PreTrainedModel = self.model
        for path, module in self.model.named_modules():
            if isinstance(module, PreTrainedModel) and _below(f"{name}.", path):
                around = module
        return around


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


def _decoder(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """The name and the module of what turns tokens into hidden states by a list of blocks."""
    # What encoders call their decoder may be the last layer of a head.
    candidates = [model.get_decoder(), model.base_model]
    decoder = next((part for part in candidates if isinstance(part, nn.Module) and _lists(part)), model)
    return next(((name, module) for name, module in model.named_modules() if module is decoder), ("", model))


def _lists(decoder: nn.Module) -> list[tuple[int, str, nn.ModuleList]]:
    """The outermost lists of modules with weights: number of parameters, name and list."""
    lists: list[tuple[int, str, nn.ModuleList]] = []
    for name, module in decoder.named_modules():
        if isinstance(module, nn.ModuleList) and not any(_below(name, outer) for _, outer, _ in lists):
            size = sum(parameter.numel() for parameter in module.parameters())
            lists += [(size, name, module)] if size else []
    return lists


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
    _, name, blocks = max(_lists(decoder), key=lambda entry: entry[0], default=(0, "", nn.ModuleList()))
    if not blocks:
        raise ValueError(
            f"{type(decoder).__name__} has no list of blocks (an nn.ModuleList with weights), and fp4 quantizes models "
            "made of blocks"
        )
    start = f"{prefix}.{name}" if prefix else name
    return [f"{start}.{index}" for index in range(len(blocks))]
