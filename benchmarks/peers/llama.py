"""llama.cpp decoding a Llama-shaped model with random weights, through llama-cpp-python's low-level functions."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import torch
from peers.ggml import quantize
from transformers import LlamaConfig

_QUANTIZED = {"mxfp4": gguf.GGMLQuantizationType.MXFP4, "nvfp4": gguf.GGMLQuantizationType.NVFP4}


def write_random_llama(path: Path, config: LlamaConfig, kind: str, head: bool = False) -> None:
    """A GGUF with ``config``'s shapes and no vocabulary.

    Projections are random in ``kind``, as is the output ``head`` if asked for; it and the embedding are float16 if not.
    """
    hidden, inter = config.hidden_size, config.intermediate_size
    kv = hidden // config.num_attention_heads * config.num_key_value_heads
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(hidden)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(inter)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(hidden // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(config.vocab_size, hidden, generator=generator).mul_(0.02).half().numpy()
    writer.add_tensor("token_embd.weight", table)
    if head:
        packed_table = quantize(torch.from_numpy(table), kind).numpy()
        writer.add_tensor("output.weight", packed_table, raw_dtype=_QUANTIZED[kind])
    else:
        writer.add_tensor("output.weight", table)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    shapes = {
        "attn_q": (hidden, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_output": (hidden, hidden),
        "ffn_gate": (inter, hidden),
        "ffn_up": (inter, hidden),
        "ffn_down": (hidden, inter),
    }
    packed = {
        name: quantize(torch.randn(*shape, generator=generator).mul_(0.02), kind).numpy()
        for name, shape in shapes.items()
    }
    for layer in range(config.num_hidden_layers):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(hidden, np.float32))
        for name, data in packed.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", data, raw_dtype=_QUANTIZED[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """A loaded GGUF that decodes greedily, one sequence at a time."""

    def __init__(self, path: Path, threads: int, context: int = 512) -> None:
        silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        self._silent = silent  # kept alive: llama.cpp holds only its address
        llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = context
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def _decode(self, tokens: list[int]) -> int:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(array, len(tokens))) != 0:
            raise RuntimeError("llama_decode failed")
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())

    def token_seconds(self, prompt: list[int], new_tokens: int) -> list[float]:
        """Seconds of each new token after the first, as ``generate`` with a dynamic cache would give them."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        token, seconds = self._decode(prompt), []
        for _ in range(new_tokens - 1):
            start = time.perf_counter()
            token = self._decode([token])
            seconds.append(time.perf_counter() - start)
        return seconds

    def close(self) -> None:
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)
