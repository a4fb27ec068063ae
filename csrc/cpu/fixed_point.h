// Activations in fixed point, which multiply bfloat16 x by packed weights faster than float32 does, and as exactly.
//
// Widening 4-bit codes to float32 costs more instructions than the multiplications do, and a float32 multiply-add takes
// one column where an integer one takes two. So each block of x is written as 16-bit integers,
//
//   x[k] = unit * word[k] + residual[k],      unit = 2^(e - 14) for a block whose largest |x| is below 2^(e + 1),
//
// which meet the doubled codes (stored 12 too large, so that zero bytes widen them) in exact integer arithmetic: a
// block's sum stays below 2^24, so that not even its conversion to float32 rounds. Words hold a bfloat16 exactly down
// to 2^-7 of its block's largest. The rest of an x that a word does not hold, its residual, is exact in float32 and
// rare, and its products are added in float32. In a block with an infinity or a NaN every x is a residual. float16 and
// float32 x, which would leave many residuals, are multiplied in float32.
#pragma once

#include <cstdint>

#include "layout.h"
#include "operands.h"

namespace fp4::cpu {

constexpr int kCodeBias = 12;

// One block of a tile of `rows` rows of x:
//   int16 words[block_size / 4][rows][4]   columns in kIntegerColumn order: pairs that meet the words of layout.h
//   int32 correction[rows]                 -12 * sum of the row's words
//   float unit[rows]                       half of the unit above: codes are doubled
constexpr int64_t fixed_point_block_bytes(Format format, int64_t rows) { return rows * (2 * block_size(format) + 8); }

struct Residual {
  int32_t column;
  float x;
};

// Columns of a panel that are decoded at a time where there are many rows of x: 16 KB, half of a first-level cache.
constexpr int64_t kFixedPointChunk = 512;

// The kernels of one format of weights.
struct FixedPointFormatKernels {
  float unit;  // the sums of the kernels below are to be multiplied by this, besides the global scale

  // Writes one row of x into a tile and appends its residuals; returns their number. x[0] is in column `first_column`.
  int64_t (*split)(const float* x, int64_t blocks, int32_t first_column, const TileRow& to, Residual* residuals);

  // sum[m][16] += sum over k of x[m][k] * value[k][16], without the residuals. The tile x is of as many blocks as w.
  void (*multiply)(const PackedBlocks& w, const uint8_t* x, int rows, float* sum);

  // Decodes codes to int16, 16 for each column, and block scales, 16 for each block. `multiply_decoded` is `multiply`
  // on these, for more rows.
  void (*decode)(const PackedBlocks& w, int16_t* values, float* scales);
  void (*multiply_decoded)(const DecodedBlocks<int16_t>& w, const uint8_t* x, int rows, float* sum);

  // sum[16] += sum over residuals. The panel begins with the first block of w.
  void (*add_residuals)(const PackedBlocks& w, const Residual* residuals, int64_t count, float* sum);
};

struct FixedPointKernels {
  int rows;          // most rows that `multiply` takes
  int decoded_rows;  // most rows that `multiply_decoded` takes
  PerFormat<FixedPointFormatKernels> formats;

  // `add_residuals` on the weights' values over `unit`: 16 for each column, from `first_column` on.
  void (*add_residuals_to_values)(const float* values, int32_t first_column, const Residual* residuals, int64_t count,
                                  float* sum);
};

}  // namespace fp4::cpu
