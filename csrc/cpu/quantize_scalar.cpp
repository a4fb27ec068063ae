// Portable kernels: plain loops over one block at a time, the readable form of what the vector paths compute.
#include <cmath>

#include "quantize.h"
#include "quantize_kernels.h"

namespace fp4::cpu::detail {

namespace {

constexpr int8_t kDoubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

template <Dtype D>
struct Lane {
  using Bits = uint16_t;
  static constexpr Bits kMagnitude = 0x7fff;
  static constexpr int kSignShift = 15;
  static float value(Bits bits) {
    return D == Dtype::bfloat16 ? from_bits(static_cast<uint32_t>(bits) << 16) : half_to_float(bits);
  }
  static Bits threshold(uint32_t word) { return static_cast<Bits>(word); }
};

template <>
struct Lane<Dtype::float32> {
  using Bits = uint32_t;
  static constexpr Bits kMagnitude = 0x7fffffff;
  static constexpr int kSignShift = 31;
  static float value(Bits bits) { return from_bits(bits); }
  static Bits threshold(uint32_t word) { return word; }
};

// Nearest E4M3 (ties to even) of a scale, kept in [2^-9, 448]; NaN stays NaN.
uint8_t encode_e4m3(float scale) {
  if (scale != scale) return 0x7f;
  if (!(scale > kE4m3Tiny)) return 1;
  if (scale >= kE4m3Max) return 126;
  // Below 2^-6 the codes are multiples of 2^-9, the unit in the last place of 2^14.
  if (scale < 0x1p-6f) return static_cast<uint8_t>(bits_of(scale + 16384.0f) - bits_of(16384.0f));
  const uint32_t bits = bits_of(scale);
  return static_cast<uint8_t>(((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3));
}

template <int B>
float sum_by_halving(float* values) {
  for (int half = B / 2; half >= 1; half /= 2) {
    for (int i = 0; i < half; ++i) values[i] += values[i + half];
  }
  return values[0];
}

template <int B, Dtype D>
uint8_t quest_scale(const typename Lane<D>::Bits* x, float global_scale) {
  float values[B], sums[B];
  for (int i = 0; i < B; ++i) values[i] = sums[i] = Lane<D>::value(x[i]);
  const float mean = sum_by_halving<B>(sums) / B;
  for (int i = 0; i < B; ++i) {
    const float deviation = values[i] - mean;
    sums[i] = deviation * deviation;
  }
  const float std = std::sqrt(sum_by_halving<B>(sums) / B);
  const int32_t bits = static_cast<int32_t>(bits_of((std * kQuestFactor + 1e-8f) / global_scale));
  return static_cast<uint8_t>(clamp_int(bits >> 23, 0, kE8m0Max));
}

template <int B, Dtype D>
float squared_error(const typename Lane<D>::Bits* x, const ScaleRow& row) {
  using L = Lane<D>;
  float errors[B];
  for (int i = 0; i < B; ++i) {
    const typename L::Bits magnitude = x[i] & L::kMagnitude;
    int code = 0;
    for (const auto& threshold : row.thresholds) code += magnitude > L::threshold(threshold[0]);
    const float error = row.values[(8 - code) % 8] - L::value(magnitude);
    errors[i] = error * error;
  }
  return sum_by_halving<B>(errors);
}

template <int B, Dtype D>
struct Best {
  using Bits = typename Lane<D>::Bits;
  const Quantizer& q;
  const Bits* x;
  uint8_t scale;
  float error;
  Best(const Quantizer& quantizer, const Bits* block, uint8_t first)
      : q(quantizer), x(block), scale(first), error(squared_error<B, D>(block, quantizer.rows()[first])) {}
  void offer(uint8_t candidate) {
    const float its = squared_error<B, D>(x, q.rows()[candidate]);
    if (its < error) {
      error = its;
      scale = candidate;
    }
  }
};

template <int B, Dtype D>
uint8_t scale_of(const Quantizer& q, float amax, const typename Lane<D>::Bits* x) {
  if constexpr (B == 16) {
    const uint8_t scale = encode_e4m3(amax / q.six_global_scales());
    if (q.rule() == Rule::abs_max) return scale;
    if (q.rule() == Rule::four_over_six) {
      Best<B, D> best(q, x, scale);
      best.offer(encode_e4m3(amax / q.four_global_scales()));
      return best.scale;
    }
    Best<B, D> best(q, x, static_cast<uint8_t>(clamp_int(scale, 1, 126)));
    for (int8_t offset : kNvfp4Offsets) best.offer(static_cast<uint8_t>(clamp_int(scale + offset, 1, 126)));
    return best.scale;
  } else {
    const int32_t bits = static_cast<int32_t>(bits_of(amax / q.global_scale()));
    const int32_t sixth = static_cast<int32_t>(bits_of(amax / q.six_global_scales()));
    const int floor = clamp_int((bits >> 23) - 2, 0, kE8m0Max);
    switch (q.rule()) {
      case Rule::even:
        return static_cast<uint8_t>(clamp_int(((bits + (1 << 21)) >> 23) - 2, 0, kE8m0Max));
      case Rule::ceil:
        return static_cast<uint8_t>(clamp_int((sixth + 0x7fffff) >> 23, 0, kE8m0Max));
      case Rule::below_six:
        return static_cast<uint8_t>(clamp_int((sixth >> 23) + 1, 0, kE8m0Max));
      case Rule::quest:
        return quest_scale<B, D>(x, q.global_scale());
      case Rule::mse: {
        Best<B, D> best(q, x, static_cast<uint8_t>(floor));
        for (int8_t offset : kMxfp4Offsets) best.offer(static_cast<uint8_t>(clamp_int(floor + offset, 0, kE8m0Max)));
        return best.scale;
      }
      default:
        return static_cast<uint8_t>(floor);
    }
  }
}

template <int B, Dtype D, bool kIsDoubled>
void quantize_groups(const Quantizer& q, const void* elements, int64_t groups, void* codes, uint8_t* scales, bool) {
  using L = Lane<D>;
  const auto* x = static_cast<const typename L::Bits*>(elements);
  auto* packed = static_cast<uint8_t*>(codes);
  auto* doubled = static_cast<int8_t*>(codes);
  for (int64_t block = 0; block < groups * kBlockGroup; ++block, x += B) {
    typename L::Bits largest = 0;
    for (int i = 0; i < B; ++i) {
      const typename L::Bits magnitude = x[i] & L::kMagnitude;
      if (magnitude > largest) largest = magnitude;
    }
    const float amax = L::value(largest);
    scales[block] = amax == amax ? scale_of<B, D>(q, amax, x) : nan_scale(B);
    const ScaleRow& row = q.rows()[scales[block]];
    uint8_t code[B] = {};
    for (const auto& word : row.thresholds) {
      const typename L::Bits threshold = L::threshold(word[0]);
      for (int i = 0; i < B; ++i) code[i] += (x[i] & L::kMagnitude) > threshold;
    }
    for (int i = 0; i < B; ++i) code[i] |= static_cast<uint8_t>(x[i] >> L::kSignShift << 3);
    if (kIsDoubled) {
      for (int i = 0; i < B; ++i) doubled[block * B + i] = kDoubled[code[i]];
    } else {
      for (int i = 0; i < B / 2; ++i) {
        packed[block * (B / 2) + i] = static_cast<uint8_t>(code[2 * i] | code[2 * i + 1] << 4);
      }
    }
  }
}

template <int B, Dtype D>
void dequantize_blocks(const uint8_t* codes, const uint8_t* scales, const float* effective, int64_t blocks,
                       void* out) {
  for (int64_t block = 0; block < blocks; ++block) {
    const float scale = effective[scales[block]];
    for (int i = 0; i < B; ++i) {
      const int code = codes[block * (B / 2) + i / 2] >> (i % 2 * 4) & 15;
      const float value = (code < 8 ? kE2m1[code] : -kE2m1[code - 8]) * scale;
      const int64_t at = block * B + i;
      if (D == Dtype::float32) static_cast<float*>(out)[at] = value;
      if (D == Dtype::bfloat16) static_cast<uint16_t*>(out)[at] = float_to_bfloat16(value);
      if (D == Dtype::float16) static_cast<uint16_t*>(out)[at] = float_to_half(value);
    }
  }
}

template <typename Bits>
uint32_t abs_max_bits(const void* x, int64_t n) {
  const auto* bits = static_cast<const Bits*>(x);
  const Bits magnitude = static_cast<Bits>(static_cast<Bits>(~Bits{0}) >> 1);
  Bits largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Bits here = bits[i] & magnitude;
    largest = here > largest ? here : largest;
  }
  return largest;
}

template <Format F, bool kIsDoubled>
constexpr PerDtype<QuantizeGroups> kQuantize = {
    .float32 = quantize_groups<block_size(F), Dtype::float32, kIsDoubled>,
    .bfloat16 = quantize_groups<block_size(F), Dtype::bfloat16, kIsDoubled>,
    .float16 = quantize_groups<block_size(F), Dtype::float16, kIsDoubled>,
};

template <Format F>
constexpr PerDtype<DequantizeBlocks> kDequantize = {
    .float32 = dequantize_blocks<block_size(F), Dtype::float32>,
    .bfloat16 = dequantize_blocks<block_size(F), Dtype::bfloat16>,
    .float16 = dequantize_blocks<block_size(F), Dtype::float16>,
};

}  // namespace

const QuantizeKernels kScalarQuantize = {
    .packed = {.nvfp4 = kQuantize<Format::nvfp4, false>, .mxfp4 = kQuantize<Format::mxfp4, false>},
    .doubled = {.nvfp4 = kQuantize<Format::nvfp4, true>, .mxfp4 = kQuantize<Format::mxfp4, true>},
};

const ValueKernels kScalarValues = {
    .dequantize = {.nvfp4 = kDequantize<Format::nvfp4>, .mxfp4 = kDequantize<Format::mxfp4>},
    .abs_max16 = abs_max_bits<uint16_t>,
    .abs_max32 = abs_max_bits<uint32_t>,
};

}  // namespace fp4::cpu::detail
