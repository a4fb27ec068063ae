// Quantization and dequantization of the canonical form, to the bit as src/fp4/numerics/formats.py defines it. No torch here.
//
// Everything works on a contiguous run of blocks: a tensor [..., K] is rows * K / block_size of them, so a caller splits
// work by blocks (multiples of kBlockGroup keep the vector paths whole) and gives each range of blocks to a thread.
//
// Compile with -ffp-contract=off: the squared errors that `mse` and `four_over_six` compare are not fused in the
// reference.
#pragma once

#include <cstdint>
#include <memory>

#include "../formats.h"

namespace fp4::cpu {

using fp4::block_size;
using fp4::blocks_in;
using fp4::Format;
using fp4::Rule;

enum class Dtype { float32, bfloat16, float16 };

// A table with one entry for each format.
template <typename T>
struct PerFormat {
  T nvfp4, mxfp4;
  constexpr const T& operator[](Format format) const { return format == Format::nvfp4 ? nvfp4 : mxfp4; }
};

// A table with one entry for each dtype.
template <typename T>
struct PerDtype {
  T float32, bfloat16, float16;
  constexpr const T& operator[](Dtype dtype) const {
    return dtype == Dtype::float32 ? float32 : dtype == Dtype::bfloat16 ? bfloat16 : float16;
  }
};

constexpr int kBlockGroup = 8;  // blocks that a vector path handles at a time

// The thresholds and values that one byte of a block scale leads to: the code of x is the number of thresholds below
// the bits of |x|. Each threshold, in the bits of the dtype, is repeated to fill a vector, so that a comparison reads it
// from memory without a broadcast before it.
struct alignas(32) ScaleRow {
  uint32_t thresholds[7][8];  // a 16-bit pattern stands in both halves of a word
  float values[8];            // of codes 0 7 6 5 4 3 2 1: comparing counts thresholds downwards

  float effective() const { return values[6]; }  // float32(block scale * global scale), the value of code 2
};

// How to quantize: built once per matrix (microseconds), shared by all threads that work on it.
class Quantizer {
 public:
  Quantizer(const Quantizer&) = delete;
  Quantizer& operator=(const Quantizer&) = delete;

  // global_scale is 1 where there is none. The rule must be one that the format defines (is_defined).
  Quantizer(Format format, Rule rule, Dtype dtype, double global_scale);

  // Blocks [first, last) of x, which holds them from block 0: block_size / 2 bytes of codes and one scale byte each.
  void quantize(const void* x, int64_t first, int64_t last, uint8_t* codes, uint8_t* scales) const;

  // The same for integer matmuls: block_size bytes of *doubled* values (0, 1, 2, 3, 4, 6, 8, 12 and their
  // negatives) and one float32 effective scale per block, so that value = 0.5 * doubled * effective.
  void quantize_doubled(const void* x, int64_t first, int64_t last, int8_t* doubled, float* effective) const;

  const ScaleRow* rows() const { return rows_; }
  Format format() const { return format_; }
  Rule rule() const { return rule_; }
  Dtype dtype() const { return dtype_; }
  float global_scale() const { return global_scale_; }              // float32(global scale)
  float six_global_scales() const { return six_global_scales_; }    // float32(6 * global scale)
  float four_global_scales() const { return four_global_scales_; }  // float32(4 * global scale)

 private:
  Format format_;
  Rule rule_;
  Dtype dtype_;
  float global_scale_;
  float six_global_scales_;
  float four_global_scales_;
  const ScaleRow* rows_;  // table_, or a table that all quantizers share for mxfp4 without a global scale
  std::unique_ptr<ScaleRow[]> table_;
};

// float32 global scale of formats.global_scale_for: amax / 2688 (1536 for four_over_six), 1 where that is zero.
double global_scale_for(float amax, Rule rule);

// Values of blocks [first, last): codes and scales hold blocks from 0, and so does out.
void dequantize(Format format, const uint8_t* codes, const uint8_t* scales, double global_scale, Dtype dtype,
                int64_t first, int64_t last, void* out);

// Largest |x| of n elements, 0 for none; NaN if there is one.
float abs_max(const void* x, Dtype dtype, int64_t n);

}  // namespace fp4::cpu
