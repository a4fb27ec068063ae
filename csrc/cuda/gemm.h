// Block-scaled FP4 matmuls on Blackwell tensor cores: what a configuration offers, and which one a shape gets.
//
//     d[m, n] = alpha * sum_k a[m, k] sa[m, k / B] b[n, k] sb[n, k / B] + bias[n]
//
// No torch and no CUTLASS here, so that the table and its choice compile anywhere.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "../formats.h"

namespace fp4::cuda {

using fp4::Format;
enum class Output { bfloat16, float16, float32 };
enum class Family { sm100, sm120 };  // compute capability 10.x and 11.0, or 12.x

// Codes are two to a byte, K along the row; scales are in the layout of swizzle.h. Everything but m, n, k is on the
// device. bias is float32 [n] or null.
struct GemmProblem {
  void* d;
  const void* a;
  const void* b;
  const void* scale_a;
  const void* scale_b;
  const float* alpha;
  const float* bias;
  int m, n, k;
  int splits;  // of K, for configurations that can; the others ignore it
  int multiprocessors;
};

// The same for `experts` weights b[e] (rows of a sorted by expert, offsets as in fp4::cutlass_grouped_linear_w4a4), with
// alpha [experts] and bias [experts, n]. Rows of scale_a begin anew at a multiple of 128 for every expert (swizzle.h).
struct GroupedProblem {
  void* d;
  const void* a;
  const void* b;
  const void* scale_a;
  const void* scale_b;
  const float* alpha;
  const float* bias;
  const int32_t* offsets;
  int rows, n, k, experts;
  int multiprocessors;
};

// One compiled kernel. Only `run` needs a GPU; it returns null, or what went wrong.
struct Gemm {
  int tile_m, tile_n, tile_k;
  bool splits_k;
  bool (*can_implement)(const GemmProblem&);
  size_t (*workspace_bytes)(const GemmProblem&);
  const char* (*run)(const GemmProblem&, void* workspace, cudaStream_t);
};

struct GroupedGemm {
  bool (*can_implement)(const GroupedProblem&);
  size_t (*workspace_bytes)(const GroupedProblem&);
  const char* (*run)(const GroupedProblem&, void* workspace, cudaStream_t);
};

// The kernels of one configuration of tiles, one for each format and output.
template <class Kernel>
struct KernelTable {
  constexpr Kernel& at(Format format, Output output) {
    return kernels[static_cast<int>(format)][static_cast<int>(output)];
  }
  constexpr const Kernel& at(Format format, Output output) const {
    return kernels[static_cast<int>(format)][static_cast<int>(output)];
  }
  Kernel kernels[2][3];
};

using Gemms = KernelTable<Gemm>;
using GroupedGemms = KernelTable<GroupedGemm>;

// The configuration for a shape, or null where none was built for this family, format and output. Sets problem.splits.
const Gemm* choose(Family family, Format format, Output output, GemmProblem& problem);
const GroupedGemm* choose_grouped(Family family, Format format, Output output);

}  // namespace fp4::cuda
