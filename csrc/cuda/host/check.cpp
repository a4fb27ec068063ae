// The kernels of quantize.cu and the arithmetic of blocks.h as a plain library, for test_cutlass_quantize.py.
#include "quantize.h"
#include "swizzle.h"

using namespace fp4::cuda;

extern "C" {

// Returns null, or what went wrong. Unused pointers are null.
const char* check_quantize(const void* x, int type, int64_t rows, int64_t k, int format, int rule,
                           const float* rotation, int group, const double* global_scale, int64_t rows_per_scale,
                           int scale_of_expert, float* maxima, uint8_t* codes, uint8_t* scales, int swizzled, const int32_t* offsets,
                           int experts, const double* weight_scale, float* alpha, int alphas, const void* bias,
                           int bias_type, float* wide_bias, int64_t bias_elements, int multiprocessors) {
  const QuantizeTask task{
      .x = x,
      .type = static_cast<Type>(type),
      .rows = rows,
      .k = k,
      .format = static_cast<Format>(format),
      .rule = static_cast<Rule>(rule),
      .rotation = rotation,
      .group = group,
      .global_scale = global_scale,
      .rows_per_scale = rows_per_scale,
      .scale_of_expert = scale_of_expert != 0,
      .maxima = maxima,
      .maxima_count = 0,
      .codes = codes,
      .scales = scales,
      .swizzled = swizzled != 0,
      .offsets = offsets,
      .experts = experts,
      .weight_scale = weight_scale,
      .alpha = alpha,
      .alphas = alphas,
      .bias = bias,
      .bias_type = static_cast<Type>(bias_type),
      .wide_bias = wide_bias,
      .bias_elements = bias_elements,
  };
  return quantize(task, multiprocessors, nullptr);
}

const char* check_dequantize(const uint8_t* codes, const uint8_t* scales, const double* global_scale, int64_t blocks,
                             int64_t blocks_per_scale, int format, int type, void* out) {
  const DequantizeTask task{
      .codes = codes,
      .scales = scales,
      .global_scale = global_scale,
      .blocks = blocks,
      .blocks_per_scale = blocks_per_scale,
      .format = static_cast<Format>(format),
      .type = static_cast<Type>(type),
      .out = out,
  };
  return dequantize(task, 2, nullptr);
}

const char* check_largest_magnitude(const void* x, int type, int64_t matrices, int64_t elements, float* largest) {
  return largest_magnitude(x, static_cast<Type>(type), matrices, elements, largest, 2, nullptr);
}

// How many float32 of bits [first, last) encode_magnitude gives another code than counting thresholds below them does.
int64_t check_codes(uint32_t first, uint32_t last, const float* thresholds) {
  int64_t wrong = 0;
  for (uint32_t bits = first; bits < last; ++bits) {
    const float q = from_bits(bits);
    uint32_t expected = 0;
    for (int i = 0; i < 7; ++i) expected += q > thresholds[i];
    wrong += encode_magnitude(q) != expected;
  }
  return wrong;
}

// The same for the codes of x / scale by Divider, for x within `reach` floats of each threshold times each scale.
int64_t check_divider(const float* scales, int64_t count, const float* thresholds, int reach) {
  int64_t wrong = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Divider quotient(scales[i]);
    for (int j = 0; j < 7; ++j) {
      const uint32_t centre = bits_of(thresholds[j] * scales[i]);
      for (int d = -reach; d <= reach; ++d) {
        if (static_cast<int64_t>(centre) + d < 0) continue;
        const float x = from_bits(centre + static_cast<uint32_t>(d));
        wrong += encode_magnitude(quotient(x)) != encode_magnitude(x / scales[i]);
      }
    }
  }
  return wrong;
}

// The same for every stride-th mantissa of a scale from `first` on, where the GPU's rough reciprocal is `off` units in
// the last place beside the rounded one; and for E4M3, whose thresholds are the odd numbers to 31 over powers of two.
int64_t check_mantissas(uint32_t first, uint32_t stride, int off, const float* thresholds) {
  int64_t wrong = 0;
  for (uint32_t mantissa = first; mantissa < 1u << 23; mantissa += stride) {
    const float scale = from_bits(0x3f800000u | mantissa);
    const Reciprocal reciprocal(scale, from_bits(bits_of(1.0f / scale) + static_cast<uint32_t>(off)));
    for (int j = 0; j < 7 + 16; ++j) {
      const float threshold = j < 7 ? thresholds[j] : static_cast<float>(2 * (j - 7) + 1);
      for (int d = -2; d <= 2; ++d) {
        const float x = from_bits(bits_of(threshold * scale) + static_cast<uint32_t>(d));
        const float exact = x / scale, mine = fused(x, reciprocal.high, multiply(x, reciprocal.low));
        wrong += (mine < threshold) != (exact < threshold) || (mine > threshold) != (exact > threshold);
      }
    }
  }
  return wrong;
}

// narrow(widen(.)) of every 16-bit pattern, and narrow of float32.
void check_narrow(const float* values, int64_t count, uint16_t* bfloat16, uint16_t* float16) {
  for (int64_t i = 0; i < count; ++i) {
    bfloat16[i] = narrow<Bfloat16>(values[i]).bits;
    float16[i] = narrow<Float16>(values[i]).bits;
  }
}

int64_t check_swizzled_offset(int64_t m, int64_t j, int64_t columns) { return swizzled_offset(m, j, columns); }
int64_t check_swizzled_bytes(int64_t rows, int64_t columns) { return swizzled_bytes(rows, columns); }
int64_t check_expert_scale_row(int64_t expert, int64_t offset) { return expert_scale_row(expert, offset); }
int64_t check_grouped_scale_rows(int64_t experts, int64_t rows) { return grouped_scale_rows(experts, rows); }
}
