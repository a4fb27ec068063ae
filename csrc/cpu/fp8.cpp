#include "fp8.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace fp4::cpu {

namespace {

constexpr float kE4m3Max = 448.0f;

uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float decode_e4m3(uint8_t code) {
  const uint32_t sign = static_cast<uint32_t>(code & 0x80) << 24;
  const uint32_t magnitude = code & 0x7F;
  if (magnitude == 0x7F) return std::numeric_limits<float>::quiet_NaN();
  if (magnitude < 8) return from_bits(sign | to_bits(static_cast<float>(magnitude) * 0x1p-9f));
  return from_bits(sign | ((magnitude << 20) + (120u << 23)));
}

void gemv(const uint8_t* codes, const float* scales, int64_t k, const float* x, int rows, float* y) {
  for (int m = 0; m < rows; ++m, y += kPanelRows) {
    float sums[kPanelRows] = {};
    for (int64_t i = 0; i < k; ++i) {
      for (int r = 0; r < kPanelRows; ++r) sums[r] += x[i * rows + m] * decode_e4m3(codes[i * kPanelRows + r]);
    }
    for (int r = 0; r < kPanelRows; ++r) y[r] = sums[r] * scales[r];
  }
}

void decode(const uint8_t* codes, const float* scales, int64_t k, float* out) {
  for (int64_t i = 0; i < k * kPanelRows; ++i) out[i] = decode_e4m3(codes[i]) * scales[i % kPanelRows];
}

// The nearest number of E4M3, ties to even, saturating; NaN stays NaN.
float round_e4m3(float value) {
  const float magnitude = std::fabs(value);
  const uint32_t bits = to_bits(magnitude);
  // Normal numbers lose all but three bits of the mantissa; below 2^-6 they are multiples of 2^-9, the unit in the last
  // place of 2^14.
  const float normal = from_bits((bits + 0x7FFFF + (bits >> 20 & 1)) & 0xFFF00000);
  const float small = (magnitude + 0x1p14f) - 0x1p14f;
  float rounded = magnitude < 0x1p-6f ? small : normal;
  rounded = magnitude > kE4m3Max ? kE4m3Max : rounded;
  return value == value ? from_bits(to_bits(rounded) | (to_bits(value) & 0x80000000)) : value;
}

}  // namespace

const Fp8Kernels kScalarFp8 = {.gemv_rows = 1, .gemv = gemv, .decode = decode};

Fp8WeightOnly::Fp8WeightOnly(const Product& product, Dtype scale_dtype, const Input& input, uint8_t* memory)
    : WeightOnly(product, input, memory),
#ifdef FP4_X86
      fp8_(isa() == Isa::scalar ? kScalarFp8 : kAvx2Fp8),
#else
      fp8_(kScalarFp8),
#endif
      scale_dtype_(scale_dtype) {
}

void Fp8WeightOnly::load_scales(const Segment& segment, int64_t panel, float* scales) const {
  const int64_t offset = panel * kPanelRows * element_size(scale_dtype_);
  kernels_.load(segment.scales + offset, scale_dtype_, kPanelRows, scales);
}

void Fp8WeightOnly::gemv(const Segment& segment, int64_t panel, const float* x, float* sums) const {
  float scales[kPanelRows];
  load_scales(segment, panel, scales);
  fp8_.gemv(segment.codes + panel * product_.k * kPanelRows, scales, product_.k, x, static_cast<int>(segment.rows),
            sums);
}

void Fp8WeightOnly::decode(const Segment& segment, int64_t panel, int64_t column, int64_t columns, float* out) const {
  float scales[kPanelRows];
  load_scales(segment, panel, scales);
  fp8_.decode(segment.codes + (panel * product_.k + column) * kPanelRows, scales, columns, out);
}

void fake_quantize_fp8(const void* x, Dtype dtype, int64_t rows, int64_t k, float static_scale, float* out) {
  const auto* from = static_cast<const uint8_t*>(x);
  for (int64_t row = 0; row < rows; ++row, from += k * element_size(dtype), out += k) {
    matmul_kernels().load(from, dtype, k, out);
    float scale = static_scale != 0 ? static_scale : abs_max(out, Dtype::float32, k) / kE4m3Max;
    if (scale == 0) scale = std::numeric_limits<float>::epsilon();
    for (int64_t i = 0; i < k; ++i) out[i] = round_e4m3(out[i] / scale) * scale;
  }
}

}  // namespace fp4::cpu
