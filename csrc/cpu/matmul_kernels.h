// The inner loops of the matmuls, once for each instruction set. How the work is cut into their calls (matmul.h) is the
// same for all of them.
#pragma once

#include <cstdint>

#include "fixed_point.h"
#include "isa.h"
#include "layout.h"
#include "operands.h"

namespace fp4::cpu {

// Integer activations of one block of a tile of `rows` rows, as matmul_integer.cpp lays them out:
//   int8  codes[block_size / 4][rows][4]   doubled E2M1 values, columns in kIntegerColumn order
//   int32 correction[rows]                 -12 * sum of the row's codes: decoded weights are stored kCodeBias too large
//   float scale[rows]
// where an instruction set that sums in 16 bits holds a correction in the low half of its 32, and 0 in the other.
constexpr int64_t integer_block_bytes(Format format, int64_t rows) { return rows * (block_size(format) + 8); }

// Block scales of weights as whole numbers of a unit, so that the same multiply-add applies them that sums pairs.
struct WholeScales {
  float unit;

  // scales[block][16] of decode_integer, in place: over the unit, as int16 in both halves of 32 bits if all of them are
  // whole numbers of 16 bits (true), or else as float32, for multiply_integer (false).
  bool (*convert)(float* scales, int64_t blocks);

  // multiply_integer on converted scales.
  void (*multiply)(const uint8_t* x, int rows, const DecodedBlocks<uint8_t>& w, float* sum);
};

// The kernels of one format of weights.
struct FormatKernels {
  // y[m][16] = sum over k of x[k][m] * value[k][16]: weights are decoded in registers and used at once.
  void (*gemv)(const PackedBlocks& w, float global_scale, const float* x, int rows, float* y);

  // out[k][16] = the weights' values.
  void (*decode_float)(const PackedBlocks& w, float global_scale, float* out);

  // Writes one row of doubled E2M1 values, with a scale for each block, into a tile.
  void (*lay_out_integer)(const int8_t* codes, const float* scales, int64_t blocks, const TileRow& to);

  // values[k / 4][16][4] = doubled E2M1 + kCodeBias, columns in kIntegerColumn order; scales[block][16].
  void (*decode_integer)(const PackedBlocks& w, uint8_t* values, float* scales);

  // sum[m][16] += sum over blocks of (exact integer dot product) * scale[m] * w.scales[16].
  void (*multiply_integer)(const uint8_t* x, int rows, const DecodedBlocks<uint8_t>& w, float* sum);

  const WholeScales* whole_scales;  // null where multiply_integer is as fast
};

struct MatmulKernels {
  const FixedPointKernels* fixed_point;  // null where float32 is as fast
  int gemv_rows;                         // most rows of x that `gemv` takes
  int float_tile;                        // most rows of x that `multiply_float` takes
  int integer_tile;                      // most rows of x that `multiply_integer` takes
  PerFormat<FormatKernels> formats;

  // sum[m][16] += sum over k of x[k][m] * w[k][16].
  void (*multiply_float)(const float* x, int rows, const float* w, int64_t k, float* sum);

  // out[group][h] = x[group][h] @ rotation[h][h], rows in order: each output is one chain of (fused) multiply-adds.
  void (*rotate)(const float* x, int64_t groups, const float* rotation, int64_t h, float* out);

  // n elements to and from float32 (to nearest even).
  void (*load)(const void* from, Dtype dtype, int64_t n, float* to);
  void (*store)(const float* from, Dtype dtype, int64_t n, void* to);
};

extern const MatmulKernels kScalarMatmul;
#ifdef FP4_X86
extern const MatmulKernels kAvx2Matmul;
extern const MatmulKernels kAvx512Matmul;
#endif

// The kernels of the instruction set in use (isa.h).
const MatmulKernels& matmul_kernels();

constexpr int64_t element_size(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

}  // namespace fp4::cpu
