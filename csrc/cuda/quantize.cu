// Launches of the quantization kernels.
#include <algorithm>
#include <type_traits>

#include "quantize.h"

namespace fp4::cuda {

// The tests compile this file for the host, with both functions provided by host/cuda_runtime_api.h.
#if defined(__CUDACC__)
template <typename... Parameters, typename... Arguments>
void enqueue(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream, Arguments... arguments) {
  kernel<<<grid, block, 0, stream>>>(arguments...);
}

// c += a b for a [16, 16] and b [16, 8] of T, in fragments as PTX lays them out.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                             uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, Bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}
#endif

}  // namespace fp4::cuda

#include "quantize_kernels.cuh"

namespace fp4::cuda {

namespace {

constexpr int kThreads = kWarps * kWarp;
constexpr int kBlocksPerMultiprocessor = 8;

const char* launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

unsigned grid_for(int64_t work, int multiprocessors, int64_t most = 1 << 30) {
  const int64_t full = static_cast<int64_t>(multiprocessors) * kBlocksPerMultiprocessor;
  return static_cast<unsigned>(std::max<int64_t>(1, std::min({work, full, most})));
}

// Calls body with a value of the element type.
template <typename Body>
void for_type(Type type, const Body& body) {
  if (type == Type::float32) return body(float{});
  if (type == Type::bfloat16) return body(Bfloat16{});
  return body(Float16{});
}

template <typename T, int B, int H>
void launch_rotated(QuantizeTask& task, int multiprocessors, cudaStream_t stream) {
  const int64_t tiles = (task.rows + 15) / 16 * (task.k / std::max(H, 32));
  const int64_t work = (tiles + kWarps - 1) / kWarps;
  if (task.maxima != nullptr) {
    const unsigned grid = grid_for(work, multiprocessors, kMaxima);
    enqueue(rotate_blocks<T, B, H, true>, grid, kThreads, stream, task);
    task.maxima_count = static_cast<int>(grid);
  }
  enqueue(rotate_blocks<T, B, H, false>, grid_for(work, multiprocessors), kThreads, stream, task);
}

template <typename T, int B>
void launch(QuantizeTask& task, int multiprocessors, cudaStream_t stream) {
  if (task.rotation != nullptr) {
    switch (task.group) {
      case 16:
        return launch_rotated<T, B, 16>(task, multiprocessors, stream);
      case 32:
        return launch_rotated<T, B, 32>(task, multiprocessors, stream);
      case 64:
        return launch_rotated<T, B, 64>(task, multiprocessors, stream);
      default:
        return launch_rotated<T, B, 128>(task, multiprocessors, stream);
    }
  }
  if (task.maxima != nullptr) {
    const int64_t elements = task.rows * task.k;
    const unsigned grid = grid_for((elements + kThreads * 8 - 1) / (kThreads * 8), multiprocessors, kMaxima);
    const int32_t* end = task.offsets == nullptr ? nullptr : task.offsets + task.experts;
    enqueue(reduce_magnitude<T>, grid, kThreads, stream, static_cast<const T*>(task.x), task.rows, task.k, end,
            task.maxima, false);
    task.maxima_count = static_cast<int>(grid);
  }
  const int64_t columns = task.swizzled ? padded_columns(task.k / B) : task.k / B;
  const unsigned across = static_cast<unsigned>((columns + kWarp - 1) / kWarp);
  const int64_t most = std::max<int64_t>(1, 16 * static_cast<int64_t>(multiprocessors) / across);
  const unsigned down = static_cast<unsigned>(std::min<int64_t>({(task.rows + kWarps - 1) / kWarps, most, 65535}));
  enqueue(quantize_blocks<T, B>, dim3(across, down), dim3(kWarp, kWarps), stream, task);
}

}  // namespace

const char* quantize(QuantizeTask task, int multiprocessors, cudaStream_t stream) {
  task.maxima_count = 0;
  if (task.global_scale != nullptr || task.format == Format::mxfp4) task.maxima = nullptr;
  for_type(task.type, [&](auto value) {
    using T = decltype(value);
    if (task.format == Format::nvfp4) {
      launch<T, 16>(task, multiprocessors, stream);
    } else {
      launch<T, 32>(task, multiprocessors, stream);
    }
  });
  return launched();
}

const char* dequantize(const DequantizeTask& task, int multiprocessors, cudaStream_t stream) {
  const int64_t words = task.blocks * (task.format == Format::nvfp4 ? 2 : 4);
  const unsigned grid = grid_for((words + kThreads - 1) / kThreads, 2 * multiprocessors);
  for_type(task.type, [&](auto value) {
    using T = decltype(value);
    if (task.format == Format::nvfp4) {
      enqueue(dequantize_blocks<T, 16>, grid, kThreads, stream, task);
    } else {
      enqueue(dequantize_blocks<T, 32>, grid, kThreads, stream, task);
    }
  });
  return launched();
}

const char* largest_magnitude(const void* x, Type type, int64_t matrices, int64_t elements, float* largest,
                              int multiprocessors, cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(largest, 0, matrices * sizeof(float), stream);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (elements == 0) return nullptr;
  const int64_t chunks = (elements + kThreads * 32 - 1) / (kThreads * 32);
  for_type(type, [&](auto value) {
    using T = decltype(value);
    constexpr int64_t kMost = 65535;  // of the grid's second axis
    for (int64_t first = 0; first < matrices; first += kMost) {
      const auto count = static_cast<unsigned>(std::min(kMost, matrices - first));
      const unsigned across = grid_for(chunks, std::max<int>(1, 2 * multiprocessors / static_cast<int>(count)));
      const T* from = static_cast<const T*>(x) + first * elements;
      const int32_t* whole = nullptr;
      enqueue(reduce_magnitude<T>, dim3(across, count), kThreads, stream, from, int64_t{1}, elements, whole,
              largest + first, true);
    }
  });
  return launched();
}

}  // namespace fp4::cuda
