// Activations as digits: how one or two rows of 16-bit x meet packed weights faster than by float32 multiplications,
// and no less exactly.
//
// Widening 4-bit codes to float32 costs more instructions than the multiplications do, so that a matrix-vector product
// would be bound by them and not by memory. Instead each block of x is written in fixed point with digits of seven
// bits,
//
//   x[k] = unit * (d0 * 128^2 + d1 * 128 + d2) + residual[k],      -64 <= d <= 64,
//
// where unit = 2^(e - 19) for a block whose largest |x| is below 2^(e + 1). Digits meet the doubled codes (stored 12
// too large, as the instruction wants one factor unsigned) in exact integer arithmetic: sixteen products of a digit
// stay below 2^15. Three digits hold a bfloat16 exactly down to 2^-12 of its block's largest, a float16 down to 2^-9.
// What they do not hold is not dropped: the residual is exact in float32, and its products are added in float32. Where
// there is much of it (outliers over small values) the call goes through float32 altogether. Five digits, which float32
// would need, are no faster than that.
#pragma once

#include <cstdint>

#include "layout.h"

namespace fp4::cpu {

constexpr int kDigits = 3;

// What follows the digits of a block. The digits are, for each four columns and each digit d, those of columns
// (0, 2, 0, 2) and (1, 3, 1, 3): pairs that meet the words of layout.h, ready to be broadcast.
struct DigitTail {
  int32_t correction;  // -12 * sum of the fixed-point values
  float unit;          // half of the unit above: codes are doubled
};

constexpr int64_t digit_block_bytes(Format format) {
  return block_size(format) / 4 * kDigits * 8 + static_cast<int64_t>(sizeof(DigitTail));
}

// Groups of four columns that have a residual.
struct Residuals {
  static constexpr int kMost = 32;
  int32_t count;  // -1: more than kMost, or x is not finite
  int32_t group[kMost];
  float x[kMost][4];
};

}  // namespace fp4::cpu
