// Activations and weights to FP4 and back, on any GPU from compute capability 8.0. No torch here.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "blocks.h"
#include "gemm.h"

namespace fp4::cuda {

enum class Type { float32, bfloat16, float16 };

constexpr int kMaxima = 512;  // floats of scratch that a scale taken from the data needs

// Input, output and settings of one quantization. Pointers are to device memory, aligned to 16 bytes but for scalars.
struct QuantizeTask {
  const void* x;  // [rows, k] of `type`
  Type type;
  int64_t rows, k;
  Format format;
  Rule rule;

  const float* rotation;  // [group, group], applied to groups of the columns first; null for none
  int group;              // 16, 32, 64 or 128

  // float64; row r belongs to scale r / rows_per_scale, or to that of its expert. Null: 1 for MXFP4; for NVFP4 the scale
  // of the (rotated) x itself, which needs kMaxima floats of scratch.
  const double* global_scale;
  int64_t rows_per_scale;
  bool scale_of_expert;
  float* maxima;
  int maxima_count;  // set by quantize()

  uint8_t* codes;   // [rows, k / 2]
  uint8_t* scales;  // canonical [rows, k / B], or in the layout of swizzle.h
  bool swizzled;
  const int32_t* offsets;  // row ranges of experts, [experts + 1]; rows after the last are left out. Null: one matrix
  int experts;

  // What the matmul that follows reads besides, or null: alpha[e] = weight_scale[e] * global scale, and the bias widened
  // to float32.
  const double* weight_scale;
  float* alpha;
  int alphas;
  const void* bias;
  Type bias_type;
  float* wide_bias;
  int64_t bias_elements;
};

// Each enqueues on the stream and returns null, or what went wrong.
const char* quantize(QuantizeTask task, int multiprocessors, cudaStream_t stream);

// Values [matrices * blocks, B] of canonical codes and scales; matrix i has global_scale[i], or [0] for a single one.
struct DequantizeTask {
  const uint8_t* codes;
  const uint8_t* scales;
  const double* global_scale;  // null for 1
  int64_t blocks, blocks_per_scale;
  Format format;
  Type type;
  void* out;
};
const char* dequantize(const DequantizeTask& task, int multiprocessors, cudaStream_t stream);

// largest[i] = max |x| over matrix i of [matrices, elements]; 0 for none, NaN if there is one.
const char* largest_magnitude(const void* x, Type type, int64_t matrices, int64_t elements, float* largest,
                              int multiprocessors, cudaStream_t stream);

}  // namespace fp4::cuda
