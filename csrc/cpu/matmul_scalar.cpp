// Portable kernels, for CPUs without AVX2. Tests hold those of the other instruction sets to their results.
#include <cstring>

#include "matmul_kernels.h"

namespace fp4::cpu {
namespace {

constexpr int8_t kDoubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

template <Format F>
float block_scale(uint8_t byte) {
  if constexpr (F == Format::mxfp4) {
    return byte == 0 ? from_bits(0x00400000) : from_bits(static_cast<uint32_t>(byte) << 23);
  } else {
    // E4M3 is a float32 with a smaller exponent field: move the bits, then correct the bias by a product, unless the
    // number is subnormal, which must not depend on the processor's denormals-are-zero mode.
    const uint32_t sign = static_cast<uint32_t>(byte & 0x80) << 24;
    const uint32_t magnitude = byte & 0x7F;
    if (magnitude < 8) return from_bits(sign | to_bits(static_cast<float>(magnitude) * 0x1p-9f));
    return from_bits(sign | ((magnitude << 20) + (120u << 23)));
  }
}

uint8_t nibble(const uint8_t* codes, int64_t k, int row) {
  const uint8_t byte = codes[k / 4 * 32 + byte_position(row, k % 4 / 2)];
  return k % 2 ? byte >> 4 : byte & 0xF;
}

template <Format F>
void decode_float(const PackedBlocks& w, float global_scale, float* out) {
  constexpr int size = block_size(F);
  auto [codes, scales, blocks] = w;
  for (int64_t b = 0; b < blocks; ++b, codes += block_bytes(F), scales += kPanelRows) {
    float effective[kPanelRows];
    for (int r = 0; r < kPanelRows; ++r) effective[r] = 0.5f * (block_scale<F>(scales[r]) * global_scale);
    for (int k = 0; k < size; ++k, out += kPanelRows) {
      for (int r = 0; r < kPanelRows; ++r) out[r] = kDoubled[nibble(codes, k, r)] * effective[r];
    }
  }
}

void multiply_float(const float* x, int rows, const float* w, int64_t k, float* sum) {
  for (int64_t i = 0; i < k; ++i, x += rows, w += kPanelRows) {
    for (int m = 0; m < rows; ++m) {
      for (int r = 0; r < kPanelRows; ++r) sum[m * kPanelRows + r] += x[m] * w[r];
    }
  }
}

template <Format F>
void gemv(const PackedBlocks& w, float global_scale, const float* x, int rows, float* y) {
  constexpr int size = block_size(F);
  auto [codes, scales, blocks] = w;
  float values[size * kPanelRows];
  for (int i = 0; i < rows * kPanelRows; ++i) y[i] = 0;
  for (int64_t b = 0; b < blocks; ++b, codes += block_bytes(F), scales += kPanelRows, x += rows * size) {
    decode_float<F>({.codes = codes, .scales = scales, .count = 1}, global_scale, values);
    multiply_float(x, rows, values, size, y);
  }
}

template <Format F>
void lay_out_integer(const int8_t* codes, const float* scales, int64_t blocks, const TileRow& to) {
  constexpr int size = block_size(F);
  auto [tile, rows, m] = to;
  for (int64_t b = 0; b < blocks; ++b, codes += size, tile += integer_block_bytes(F, rows)) {
    int32_t correction = 0;
    for (int i = 0; i < size; ++i) {
      const int8_t code = codes[i / 4 * 4 + kIntegerColumn[i % 4]];
      correction -= kCodeBias * code;
      tile[(i / 4 * rows + m) * 4 + i % 4] = static_cast<uint8_t>(code);
    }
    std::memcpy(tile + rows * size + m * 4, &correction, 4);
    std::memcpy(tile + rows * (size + 4) + m * 4, &scales[b], 4);
  }
}

template <Format F>
void decode_integer(const PackedBlocks& w, uint8_t* out, float* out_scales) {
  constexpr int size = block_size(F);
  auto [codes, scales, blocks] = w;
  for (int64_t b = 0; b < blocks; ++b, codes += block_bytes(F), scales += kPanelRows, out_scales += kPanelRows) {
    for (int r = 0; r < kPanelRows; ++r) out_scales[r] = block_scale<F>(scales[r]);
    for (int k = 0; k < size; k += 4) {
      for (int r = 0; r < kPanelRows; ++r) {
        for (const int i : kIntegerColumn) *out++ = kDoubled[nibble(codes, k + i, r)] + kCodeBias;
      }
    }
  }
}

template <Format F>
void multiply_integer(const uint8_t* x, int rows, const DecodedBlocks<uint8_t>& w, float* sum) {
  constexpr int size = block_size(F);
  auto [values, scales, blocks] = w;
  for (int64_t b = 0; b < blocks; ++b, x += integer_block_bytes(F, rows), values += size * kPanelRows) {
    for (int m = 0; m < rows; ++m) {
      int32_t correction;
      float scale;
      std::memcpy(&correction, x + rows * size + 4 * m, 4);
      std::memcpy(&scale, x + rows * (size + 4) + 4 * m, 4);
      for (int r = 0; r < kPanelRows; ++r) {
        int32_t dot = correction;
        for (int k = 0; k < size; ++k) {
          const int8_t code = static_cast<int8_t>(x[(k / 4 * rows + m) * 4 + k % 4]);
          dot += code * values[(k / 4 * kPanelRows + r) * 4 + k % 4];
        }
        sum[m * kPanelRows + r] += static_cast<float>(dot) * scale * scales[b * kPanelRows + r];
      }
    }
  }
}

void rotate(const float* x, int64_t groups, const float* rotation, int64_t h, float* out) {
  for (int64_t g = 0; g < groups; ++g, x += h, out += h) {
    for (int64_t j = 0; j < h; ++j) {
      float sum = 0;
      for (int64_t i = 0; i < h; ++i) sum += x[i] * rotation[i * h + j];
      out[j] = sum;
    }
  }
}

float from_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7FFF;
  if (magnitude >= 0x7C00) return from_bits(sign | 0x7F800000 | (magnitude << 13));
  if (magnitude < 0x400) return from_bits(sign | to_bits(static_cast<float>(magnitude) * 0x1p-24f));
  return from_bits(sign | ((magnitude << 13) + (112u << 23)));
}

uint16_t to_half(float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
  if (magnitude >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // 65520 and more
  if (magnitude < 0x38800000) {
    // Subnormal halves are multiples of 2^-24: adding 0.5 rounds to one, in the last bits of the sum.
    return static_cast<uint16_t>(sign | (to_bits(from_bits(magnitude) + 0.5f) - 0x3F000000));
  }
  return static_cast<uint16_t>(sign | ((magnitude - (112u << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13));
}

uint16_t to_bfloat16(float value) {
  const uint32_t bits = to_bits(value);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

void load(const void* from, Dtype dtype, int64_t n, float* to) {
  if (dtype == Dtype::float32) {
    std::memcpy(to, from, n * sizeof(float));
    return;
  }
  const uint16_t* half = static_cast<const uint16_t*>(from);
  for (int64_t i = 0; i < n; ++i) {
    to[i] = dtype == Dtype::float16 ? from_half(half[i]) : from_bits(static_cast<uint32_t>(half[i]) << 16);
  }
}

void store(const float* from, Dtype dtype, int64_t n, void* to) {
  if (dtype == Dtype::float32) {
    std::memcpy(to, from, n * sizeof(float));
    return;
  }
  uint16_t* half = static_cast<uint16_t*>(to);
  for (int64_t i = 0; i < n; ++i) half[i] = dtype == Dtype::float16 ? to_half(from[i]) : to_bfloat16(from[i]);
}

template <Format F>
constexpr FormatKernels kFormatKernels = {
    .gemv = gemv<F>,
    .decode_float = decode_float<F>,
    .lay_out_integer = lay_out_integer<F>,
    .decode_integer = decode_integer<F>,
    .multiply_integer = multiply_integer<F>,
    .whole_scales = nullptr,
};

}  // namespace

const MatmulKernels kScalarMatmul = {
    .fixed_point = nullptr,
    .gemv_rows = 1,
    .float_tile = 4,
    .integer_tile = 4,
    .formats = {.nvfp4 = kFormatKernels<Format::nvfp4>, .mxfp4 = kFormatKernels<Format::mxfp4>},
    .multiply_float = multiply_float,
    .rotate = rotate,
    .load = load,
    .store = store,
};

}  // namespace fp4::cpu
