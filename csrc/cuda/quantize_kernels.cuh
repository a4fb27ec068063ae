// The kernels that quantize.cu launches. Besides nvcc, a host compiler builds this file for the tests, where
// host/cuda_runtime_api.h stands in for CUDA.
#pragma once

#include <type_traits>

#include "quantize.h"
#include "swizzle.h"

namespace fp4::cuda {

constexpr int kWarp = 32;
constexpr int kWarps = 4;
constexpr unsigned kAllLanes = 0xffffffffu;

// --- reading and writing ---------------------------------------------------------------------------------------------

// N values from an address aligned to 16 bytes (or to their size, where that is less).
template <typename T, int N>
__device__ __forceinline__ void load(const T* from, float (&to)[N]) {
  constexpr int kEach = 16 / sizeof(T);
  static_assert(N % kEach == 0, "whole vectors");
#pragma unroll
  for (int i = 0; i < N; i += kEach) {
    const uint4 raw = *reinterpret_cast<const uint4*>(from + i);
    T narrow[kEach];
    memcpy(narrow, &raw, sizeof raw);
#pragma unroll
    for (int j = 0; j < kEach; ++j) to[i + j] = widen(narrow[j]);
  }
}

__device__ __forceinline__ void load_words(const void* from, uint32_t (&words)[2]) {
  const uint2 raw = *static_cast<const uint2*>(from);
  words[0] = raw.x, words[1] = raw.y;
}
__device__ __forceinline__ void load_words(const void* from, uint32_t (&words)[4]) {
  const uint4 raw = *static_cast<const uint4*>(from);
  words[0] = raw.x, words[1] = raw.y, words[2] = raw.z, words[3] = raw.w;
}

__device__ __forceinline__ void store(uint8_t* to, const uint32_t (&words)[2]) {
  *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
}
__device__ __forceinline__ void store(uint8_t* to, const uint32_t (&words)[4]) {
  *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ float wide_at(const void* values, Type type, int64_t i) {
  if (type == Type::float32) return static_cast<const float*>(values)[i];
  if (type == Type::bfloat16) return widen(static_cast<const Bfloat16*>(values)[i]);
  return widen(static_cast<const Float16*>(values)[i]);
}

// Largest of the bits of a CTA's threads (all must call; valid in thread 0): NaN is larger than infinity as bits.
__device__ __forceinline__ uint32_t largest_of_block(uint32_t bits) {
  __shared__ uint32_t largest[kWarps];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int distance = kWarp / 2; distance; distance /= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, bits, distance);
    bits = other > bits ? other : bits;
  }
  if (thread % kWarp == 0) largest[thread / kWarp] = bits;
  __syncthreads();
  if (thread == 0) {
    for (int warp = 1; warp < kWarps; ++warp) bits = largest[warp] > bits ? largest[warp] : bits;
  }
  return bits;
}

// --- shared by the kernels that quantize ----------------------------------------------------------------------------

// The number of rows that belong to an expert. Rows after the last expert's may hold anything, so not even a global scale
// that is taken from the data may depend on them.
__device__ __forceinline__ int64_t used_rows(int64_t rows, const int32_t* end) {
  return end == nullptr || *end > rows ? rows : *end;
}

__device__ __forceinline__ int64_t used_rows(const QuantizeTask& task) {
  return used_rows(task.rows, task.offsets == nullptr ? nullptr : task.offsets + task.experts);
}

// The global scale where it is the same for all rows. All threads of the CTA must call.
__device__ __forceinline__ double shared_global_scale(const QuantizeTask& task) {
  if (task.maxima_count == 0) return task.global_scale != nullptr ? task.global_scale[0] : 1.0;  // or of the first expert
  __shared__ double scale;
  uint32_t bits = 0;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  for (int i = thread; i < task.maxima_count; i += kWarps * kWarp) {
    const uint32_t other = bits_of(task.maxima[i]);
    bits = other > bits ? other : bits;
  }
  bits = largest_of_block(bits);
  if (thread == 0) scale = global_scale_for(from_bits(bits), task.rule);
  __syncthreads();
  return scale;
}

// Writes the factors and the float32 bias that the matmul after this kernel reads besides codes and scales.
__device__ __forceinline__ void prepare_matmul(const QuantizeTask& task, double global_scale) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * gridDim.y * (kWarps * kWarp);
  const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  const int64_t first = block * (kWarps * kWarp) + threadIdx.y * blockDim.x + threadIdx.x;
  for (int64_t i = first; i < task.alphas; i += threads) {
    const double of_input = task.scale_of_expert ? task.global_scale[i] : global_scale;
    task.alpha[i] = static_cast<float>((task.weight_scale != nullptr ? task.weight_scale[i] : 1.0) * of_input);
  }
  for (int64_t i = first; i < task.bias_elements; i += threads) {
    task.wide_bias[i] = wide_at(task.bias, task.bias_type, i);
  }
}

// Whether and where the scales of a row of x are stored, and its global scale.
struct Place {
  bool is_used = false;
  int64_t scale_row = 0;  // of the swizzled scales
  double global_scale = 1.0;
};

__device__ __forceinline__ Place place_of(const QuantizeTask& task, int64_t row, double shared_scale) {
  if (task.offsets == nullptr) {
    const bool is_shared = task.rows_per_scale >= task.rows;
    return {true, row, is_shared ? shared_scale : task.global_scale[row / task.rows_per_scale]};
  }
  if (row >= task.offsets[task.experts]) return Place{};  // no expert's
  int expert = 0, end = task.experts;  // offsets[expert] <= row < offsets[end]
  while (end - expert > 1) {
    const int middle = (expert + end) / 2;
    if (task.offsets[middle] <= row) {
      expert = middle;
    } else {
      end = middle;
    }
  }
  const int64_t first = task.offsets[expert];
  return {true, expert_scale_row(expert, first) + row - first,
          task.scale_of_expert ? task.global_scale[expert] : shared_scale};
}

template <int B>
__device__ __forceinline__ void quantize_and_store(const QuantizeTask& task, const float (&values)[B], int64_t row,
                                                   int64_t block, const Place& place) {
  uint32_t codes[B / 8];
  const uint8_t scale = quantize_block(values, task.rule, place.global_scale, codes);
  store(task.codes + row * (task.k / 2) + block * (B / 2), codes);
  const int64_t columns = task.k / B;
  task.scales[task.swizzled ? swizzled_offset(place.scale_row, block, columns) : row * columns + block] = scale;
}

// --- without a rotation ----------------------------------------------------------------------------------------------

// A thread quantizes one block at a time; a warp reads 32 neighbouring blocks of a row.
template <typename T, int B>
__global__ void __launch_bounds__(kWarps* kWarp) quantize_blocks(QuantizeTask task) {
  const double shared_scale = shared_global_scale(task);
  prepare_matmul(task, shared_scale);
  const int64_t columns = task.k / B;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  const bool is_padding = task.swizzled && block >= columns && block < padded_columns(columns);
  if (block >= columns && !is_padding) return;
  const auto* x = static_cast<const T*>(task.x);
  const int64_t step = static_cast<int64_t>(gridDim.y) * kWarps;
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * kWarps + threadIdx.y; row < task.rows; row += step) {
    const Place place = place_of(task, row, shared_scale);
    if (!place.is_used) continue;
    if (is_padding) {
      // The codes beyond K are read as zero; a scale that is NaN there would spoil the sum.
      task.scales[swizzled_offset(place.scale_row, block, columns)] = 0;
      continue;
    }
    float values[B];
    load(x + row * task.k + block * B, values);
    quantize_and_store<B>(task, values, row, block, place);
  }
}

template <typename T>
__global__ void __launch_bounds__(kWarps* kWarp)
    reduce_magnitude(const T* x, int64_t rows, int64_t k, const int32_t* end, float* maxima, bool one_per_matrix) {
  constexpr int kEach = 16 / sizeof(T);
  const int64_t elements = used_rows(rows, end) * k;
  const T* from = x + blockIdx.y * elements;
  uint32_t largest = 0;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * (kWarps * kWarp) + threadIdx.x) * kEach;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kWarps * kWarp) * kEach;
  // Matrices after the first may begin anywhere.
  const bool is_aligned = blockIdx.y * elements % kEach == 0;
  for (int64_t i = first; i < elements; i += step) {
    float values[kEach] = {};
    if (is_aligned && i + kEach <= elements) {
      load(from + i, values);
    } else {
      for (int j = 0; j < kEach && i + j < elements; ++j) values[j] = widen(from[i + j]);
    }
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const uint32_t magnitude = bits_of(values[j]) & kMagnitude;
      largest = magnitude > largest ? magnitude : largest;
    }
  }
  largest = largest_of_block(largest);
  if (threadIdx.x != 0) return;
  if (one_per_matrix) {
    atomicMax(reinterpret_cast<unsigned*>(maxima) + blockIdx.y, largest);
  } else {
    maxima[blockIdx.x] = from_bits(largest);
  }
}

// --- with a rotation -------------------------------------------------------------------------------------------------

// A warp rotates tiles of 16 rows x max(H, 32) columns on the tensor cores, 32 columns of the result at a time, stages
// them in shared memory, and quantizes a block a lane from there. With kOnlyMagnitude it reduces |x R| instead.
//
// The rotation is exact in T wherever the package made it (rotation_for rounds it to the model's dtype). Where it is
// not, and for float32, the same sums are taken by fused multiply-adds.
template <typename T, int B, int H, bool kOnlyMagnitude>
struct Rotation {
  static constexpr int kTileRows = 16;
  static constexpr int kTileColumns = H < 32 ? 32 : H;
  static constexpr int kStride = 36;  // floats of a staged row: 16-byte aligned, and free of bank conflicts when read
  static constexpr bool kHasTensorCores = sizeof(T) == 2;
  static constexpr int kChunk = H < 32 ? 16 : 32;  // columns that a quad of lanes loads at once
  static constexpr int kEach = kChunk / 4;         // of them, neighbours that one lane loads
  static constexpr int kLoads = kTileColumns / kChunk;
  static constexpr int kWords = kEach / 2;

  struct Shared {
    // R transposed, so that neighbours along k are one 32-bit word; rows are padded against bank conflicts.
    alignas(16) uint16_t transposed[kHasTensorCores ? H : 1][kHasTensorCores ? H + 8 : 1];
    alignas(16) float staged[kWarps][kTileRows][kStride];
  };

  // Copies R as T; false if a value does not fit. All threads of the CTA must call.
  static __device__ __forceinline__ bool load_rotation(const QuantizeTask& task, Shared& shared) {
    int is_inexact = !kHasTensorCores;
    if constexpr (kHasTensorCores) {
      for (int i = threadIdx.x; i < H * H; i += kWarps * kWarp) {
        const float value = task.rotation[i];
        const T narrowed = narrow<T>(value);
        is_inexact |= widen(narrowed) != value;
        shared.transposed[i % H][i / H] = narrowed.bits;
      }
    }
    return !__syncthreads_or(is_inexact);
  }

  // sums[tile][i]: columns 8 * tile + 2 * (lane % 4) + i % 2 of rows lane / 4 (i < 2) and lane / 4 + 8, of the 32
  // columns from `column` on. Lane t of a quad holds columns kEach * t.. of a chunk, so the k of its fragments are
  // permuted; those of R are permuted alike, and the order of a sum is free.
  static __device__ __forceinline__ void multiply_tensor_cores(const uint32_t (&x)[kLoads][2][kWords],
                                                               const Shared& shared, int column,
                                                               float (&sums)[4][4]) {
    const int lane = threadIdx.x % kWarp, group = lane / 4, quad = lane % 4;
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[tile][i] = 0.0f;
      const int n = (column + 8 * tile) % H + group;
#pragma unroll
      for (int chunk = 0; chunk < H / kChunk; ++chunk) {
        // With H = 16 the four tiles of 8 columns belong to two groups of columns of x, i.e. to two loads.
        const int at = H < 32 ? tile / 2 : chunk;
        uint32_t r[kWords];
        load_words(&shared.transposed[n][chunk * kChunk + quad * kEach], r);
#pragma unroll
        for (int step = 0; step < kWords / 2; ++step) {
          multiply_add<T>(sums[tile], x[at][0][2 * step], x[at][1][2 * step], x[at][0][2 * step + 1],
                          x[at][1][2 * step + 1], r[2 * step], r[2 * step + 1]);
        }
      }
    }
  }

  // One lane a column.
  static __device__ __forceinline__ void multiply_plain(const QuantizeTask& task, int64_t end, int64_t row,
                                                        int64_t first_column, float (&sums)[kTileRows]) {
    const int lane = threadIdx.x % kWarp;
    const auto* x = static_cast<const T*>(task.x) + row * task.k + (first_column + lane) / H * H;
    const float* r = task.rotation + (first_column + lane) % H;
    const int rows = end - row < kTileRows ? static_cast<int>(end - row) : kTileRows;
#pragma unroll
    for (int i = 0; i < kTileRows; ++i) sums[i] = 0.0f;
    for (int k = 0; k < H; ++k) {
      const float factor = r[k * H];
#pragma unroll
      for (int i = 0; i < kTileRows; ++i) {
        if (i < rows) sums[i] = fused(widen(x[i * task.k + k]), factor, sums[i]);
      }
    }
  }

  static __device__ __forceinline__ void run(const QuantizeTask& task) {
    __shared__ Shared shared;
    double global_scale = 1.0;
    if constexpr (!kOnlyMagnitude) {
      global_scale = shared_global_scale(task);
      prepare_matmul(task, global_scale);
    }
    const bool is_exact = load_rotation(task, shared);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, group = lane / 4, quad = lane % 4;
    float(*staged)[kStride] = shared.staged[warp];
    const int64_t tiles_across = task.k / kTileColumns;
    const int64_t rows = used_rows(task);
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows * tiles_across;
    uint32_t largest = 0;
    for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarps + warp; tile < tiles;
         tile += static_cast<int64_t>(gridDim.x) * kWarps) {
      const int64_t row = tile / tiles_across * kTileRows, column = tile % tiles_across * kTileColumns;
      uint32_t x[kLoads][2][kWords] = {};
      if (kHasTensorCores && is_exact) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t at = row + group + 8 * half;
          if (at >= rows) continue;
          const auto* from = static_cast<const uint16_t*>(task.x) + at * task.k + column + quad * kEach;
#pragma unroll
          for (int i = 0; i < kLoads; ++i) load_words(from + i * kChunk, x[i][half]);
        }
      }
#pragma unroll 1
      for (int part = 0; part < kTileColumns; part += 32) {
        if (kHasTensorCores && is_exact) {
          float sums[4][4];
          if constexpr (kHasTensorCores) multiply_tensor_cores(x, shared, part, sums);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              if constexpr (kOnlyMagnitude) {
                const uint32_t magnitude = bits_of(sums[i][j]) & kMagnitude;
                largest = magnitude > largest ? magnitude : largest;
              } else {
                staged[group + j / 2 * 8][8 * i + 2 * quad + j % 2] = sums[i][j];
              }
            }
          }
        } else {
          float sums[kTileRows];
          multiply_plain(task, rows, row, column + part, sums);
#pragma unroll
          for (int i = 0; i < kTileRows; ++i) {
            if constexpr (kOnlyMagnitude) {
              const uint32_t magnitude = bits_of(sums[i]) & kMagnitude;
              largest = magnitude > largest ? magnitude : largest;
            } else {
              staged[i][lane] = sums[i];
            }
          }
        }
        if constexpr (!kOnlyMagnitude) {
          __syncwarp();
          constexpr int kBlocks = 32 / B;  // of a staged row
          const int64_t at = row + lane / kBlocks;
          Place place;
          if (lane < kTileRows * kBlocks && at < rows) place = place_of(task, at, global_scale);
          if (place.is_used) {
            float values[B];
            load(&staged[lane / kBlocks][lane % kBlocks * B], values);
            const int64_t block = (column + part) / B + lane % kBlocks;
            quantize_and_store<B>(task, values, at, block, place);
            const int64_t columns = task.k / B;
            if (task.swizzled && block == columns - 1) {
              for (int64_t pad = columns; pad < padded_columns(columns); ++pad) {
                task.scales[swizzled_offset(place.scale_row, pad, columns)] = 0;
              }
            }
          }
          __syncwarp();
        }
      }
    }
    if constexpr (kOnlyMagnitude) {
      largest = largest_of_block(largest);
      if (threadIdx.x == 0) task.maxima[blockIdx.x] = from_bits(largest);
    }
  }
};

// The second number, CTAs of a multiprocessor, is the one that fits anyway: without it ptxas spills a few registers in
// some of these kernels to fit one more.
template <typename T, int B, int H, bool kOnlyMagnitude>
__global__ void __launch_bounds__(kWarps* kWarp, H <= 32 ? 4 : 2) rotate_blocks(QuantizeTask task) {
  Rotation<T, B, H, kOnlyMagnitude>::run(task);
}

// --- dequantizing ---------------------------------------------------------------------------------------------------

// A thread takes eight codes, four bytes.
template <typename T, int B>
__global__ void __launch_bounds__(kWarps* kWarp) dequantize_blocks(DequantizeTask task) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kWarps * kWarp);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * (kWarps * kWarp) + threadIdx.x; i < task.blocks * (B / 8);
       i += step) {
    const int64_t block = i / (B / 8);
    const double global_scale =
        task.global_scale == nullptr
            ? 1.0
            : task.global_scale[task.blocks_per_scale < task.blocks ? block / task.blocks_per_scale : 0];
    const float effective = effective_scale<B>(task.scales[block], global_scale);
    const uint32_t codes = reinterpret_cast<const uint32_t*>(task.codes)[i];
    T values[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) values[j] = narrow<T>(multiply(decode_e2m1(codes >> 4 * j), effective));
    uint4 raw[sizeof values / 16];
    memcpy(raw, values, sizeof values);
#pragma unroll
    for (int j = 0; j < static_cast<int>(sizeof values / 16); ++j) {
      reinterpret_cast<uint4*>(static_cast<T*>(task.out) + i * 8)[j] = raw[j];
    }
  }
}

}  // namespace fp4::cuda
