"""ggml's matrix multiplications, called through ctypes on the libraries that llama-cpp-python carries.

Build it for the machine it runs on, or it will be slow:

    CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python --no-binary llama-cpp-python
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TYPES = {"f32": 0, "f16": 1, "mxfp4": 39, "nvfp4": 40}  # enum ggml_type

_CONTEXT_BYTES = 1 << 20  # of tensor and graph descriptions; tensor data lives in backend buffers


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def library_directory() -> Path | None:
    """Where libggml-base.so is: FP4_BENCH_GGML (a directory), or that of an installed ``llama_cpp``; None without."""
    chosen = os.environ.get("FP4_BENCH_GGML")
    if chosen:
        if not (Path(chosen) / "libggml-base.so").exists():
            raise FileNotFoundError(f"FP4_BENCH_GGML is {chosen}, but there is no libggml-base.so in it")
        return Path(chosen)
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return None
    directory = Path(spec.origin).parent / "lib"
    return directory if (directory / "libggml-base.so").exists() else None


class _Library:
    """The few functions of ggml.h, ggml-backend.h and ggml-cpu.h that are used, with their types."""

    def __init__(self, directory: Path) -> None:
        self._base = ctypes.CDLL(str(directory / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self._cpu = ctypes.CDLL(str(directory / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
        pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
        base, cpu = self._base, self._cpu
        self.init = self._declare(base, "ggml_init", pointer, _InitParams)
        self.free = self._declare(base, "ggml_free", None, pointer)
        self.tensor = self._declare(
            base, "ggml_new_tensor_2d", pointer, pointer, integer, ctypes.c_int64, ctypes.c_int64
        )
        self.mul_mat = self._declare(base, "ggml_mul_mat", pointer, pointer, pointer, pointer)
        self.graph = self._declare(base, "ggml_new_graph", pointer, pointer)
        self.expand = self._declare(base, "ggml_build_forward_expand", None, pointer, pointer)
        self.allocate = self._declare(base, "ggml_backend_alloc_ctx_tensors_from_buft", pointer, pointer, pointer)
        self.free_buffer = self._declare(base, "ggml_backend_buffer_free", None, pointer)
        self.set = self._declare(base, "ggml_backend_tensor_set", None, pointer, pointer, size, size)
        self.get = self._declare(base, "ggml_backend_tensor_get", None, pointer, pointer, size, size)
        self.nbytes = self._declare(base, "ggml_nbytes", size, pointer)
        self.row_size = self._declare(base, "ggml_row_size", size, integer, ctypes.c_int64)
        self.quantize = self._declare(
            base, "ggml_quantize_chunk", size, integer, pointer, pointer, *[ctypes.c_int64] * 3, pointer
        )
        self.compute = self._declare(base, "ggml_backend_graph_compute", integer, pointer, pointer)
        self.plain_buffers = self._declare(base, "ggml_backend_cpu_buffer_type", pointer)()
        self.backend = self._declare(cpu, "ggml_backend_cpu_init", pointer)()
        self.set_threads = self._declare(cpu, "ggml_backend_cpu_set_n_threads", None, pointer, integer)
        self.repacked_buffers = self._extra_buffers()
        log = ctypes.CFUNCTYPE(None, integer, ctypes.c_char_p, pointer)
        self._silent = log(lambda level, text, data: None)  # kept alive: ggml holds only its address
        self._declare(base, "ggml_log_set", None, log, pointer)(self._silent, None)

    @staticmethod
    def _declare(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
        return function  # type: ignore[no-any-return]

    def _extra_buffers(self) -> int | None:
        """The buffer type in which the CPU backend repacks weights for its widest kernels, if it has one."""
        pointer = ctypes.c_void_p
        registry = self._declare(self._cpu, "ggml_backend_cpu_reg", pointer)()
        find = self._declare(self._base, "ggml_backend_reg_get_proc_address", pointer, pointer, ctypes.c_char_p)
        device = self._declare(self._base, "ggml_backend_reg_dev_get", pointer, pointer, ctypes.c_size_t)(registry, 0)
        address = find(registry, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return None
        listed = ctypes.CFUNCTYPE(ctypes.POINTER(pointer), pointer)(address)(device)
        return listed[0] if listed else None


@cache
def _library() -> _Library:
    directory = library_directory()
    if directory is None:
        raise RuntimeError("llama-cpp-python is not installed")
    return _Library(directory)


def quantize(weight: Tensor, kind: str) -> Tensor:
    """ggml's own rounding of ``weight`` ``[N, K]`` to a type of :data:`TYPES`: uint8 ``[N, bytes of a row]``."""
    lib, (n, k) = _library(), weight.shape
    data = torch.empty(n, lib.row_size(TYPES[kind], k), dtype=torch.uint8)
    source = weight.float().contiguous()
    lib.quantize(TYPES[kind], source.data_ptr(), data.data_ptr(), 0, n, k, None)
    return data


class GgmlLinear:
    """``copies`` equal weights ``[N, K]`` of one type, and x ``[M, K]`` float32 to multiply with any of them.

    Args:
        weight: float32 ``[N, K]``, quantized by ggml.
        kind: a key of :data:`TYPES`.
        repacked: hold the weights in the layout of ggml's widest kernels (only types that have one: mxfp4).
    """

    def __init__(self, weight: Tensor, kind: str, x: Tensor, copies: int, repacked: bool = False) -> None:
        lib = self._lib = _library()
        (n, k), m, type_ = weight.shape, x.shape[0], TYPES[kind]
        lib.set_threads(lib.backend, torch.get_num_threads())
        buffers = lib.repacked_buffers if repacked else lib.plain_buffers
        if buffers is None:
            raise RuntimeError("this ggml has no repacked CPU buffers")
        data = quantize(weight, kind)
        self.weight_bytes = data.numel()
        self._shape = (m, n)

        self._contexts = [lib.init(_InitParams(_CONTEXT_BYTES, None, True)) for _ in range(2)]
        weights = [lib.tensor(self._contexts[0], type_, k, n) for _ in range(copies)]
        self._buffers = [lib.allocate(self._contexts[0], buffers)]
        for tensor in weights:
            lib.set(tensor, data.data_ptr(), 0, data.numel())
        input_ = lib.tensor(self._contexts[1], TYPES["f32"], k, m)
        self._outputs = [lib.mul_mat(self._contexts[1], tensor, input_) for tensor in weights]
        self._buffers.append(lib.allocate(self._contexts[1], lib.plain_buffers))
        values = x.float().contiguous()
        lib.set(input_, values.data_ptr(), 0, values.numel() * 4)
        self._graphs = []
        for output in self._outputs:
            self._contexts.append(lib.init(_InitParams(_CONTEXT_BYTES, None, True)))
            graph = lib.graph(self._contexts[-1])
            lib.expand(graph, output)
            self._graphs.append(graph)

    def __call__(self, i: int) -> None:
        """Multiply with weight ``i`` modulo the number of copies."""
        status = self._lib.compute(self._lib.backend, self._graphs[i % len(self._graphs)])
        if status != 0:
            raise RuntimeError(f"ggml_backend_graph_compute failed with status {status}")

    def result(self) -> Tensor:
        """The last product of weight 0: float32 ``[M, N]``."""
        out = torch.empty(self._shape)
        self._lib.get(self._outputs[0], out.data_ptr(), 0, out.numel() * 4)
        return out

    def close(self) -> None:
        for buffer in self._buffers:
            self._lib.free_buffer(buffer)
        for context in self._contexts:
            self._lib.free(context)
