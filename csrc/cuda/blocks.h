// One block of values: its scale by every rule of src/fp4/numerics/formats.py, and its codes, on the GPU and on the host as
// numerics.h is.
#pragma once

#include "../formats.h"
#include "numerics.h"

namespace fp4::cuda {

using fp4::Rule;

constexpr int kE8m0Max = 252;                                       // 2^125: six times it is still finite
constexpr float kQuestFactor = static_cast<float>(2.92247856 / 6);  // QuEST, arXiv 2502.05003

// formats._sum_by_halving, destroying its input. (A loop over halves is not always unrolled, and arrays then leave
// the registers.)
template <int Half, int B>
FP4_BOTH float sum_of_halves(float (&values)[B]) {
#pragma unroll
  for (int i = 0; i < Half; ++i) values[i] = add(values[i], values[i + Half]);
  if constexpr (Half > 1) return sum_of_halves<Half / 2>(values);
  return values[0];
}

template <int B>
FP4_BOTH float sum_by_halving(float (&values)[B]) {
  return sum_of_halves<B / 2>(values);
}

template <int B>
FP4_BOTH float squared_error(const float (&values)[B], float effective) {
  const Divider quotient(effective);
  float errors[B];
#pragma unroll
  for (int i = 0; i < B; ++i) {
    const float magnitude = from_bits(bits_of(values[i]) & kMagnitude);
    const float error =
        subtract(multiply(decode_e2m1(encode_magnitude(quotient(magnitude))), effective), magnitude);
    errors[i] = multiply(error, error);
  }
  return sum_by_halving(errors);
}

template <int B>
FP4_BOTH uint8_t quest_scale(const float (&values)[B], float global_scale) {
  float sums[B];
#pragma unroll
  for (int i = 0; i < B; ++i) sums[i] = values[i];
  const float mean = divide(sum_by_halving(sums), static_cast<float>(B));
#pragma unroll
  for (int i = 0; i < B; ++i) {
    const float deviation = subtract(values[i], mean);
    sums[i] = multiply(deviation, deviation);
  }
  const float deviation = square_root(divide(sum_by_halving(sums), static_cast<float>(B)));
  const float scale = divide(add(multiply(deviation, kQuestFactor), 1e-8f), global_scale);
  return static_cast<uint8_t>(clamp_int(static_cast<int32_t>(bits_of(scale)) >> 23, 0, kE8m0Max));
}

// A search for the scale of least squared error; on a tie the one offered first wins.
template <int B>
struct Search {
  const float (&values)[B];
  double global_scale;
  uint8_t best;
  float least;

  FP4_BOTH Search(const float (&block)[B], double global, uint8_t first)
      : values(block), global_scale(global), best(first), least(error_of(first)) {}
  FP4_BOTH float error_of(uint8_t scale) const { return squared_error(values, effective_scale<B>(scale, global_scale)); }
  FP4_BOTH void offer(uint8_t scale) {
    const float error = error_of(scale);
    if (error < least) {
      best = scale;
      least = error;
    }
  }
};

// Rules that read every value of a block, rather than its largest magnitude alone.
FP4_BOTH constexpr bool reads_values(Rule rule) {
  return rule == Rule::mse || rule == Rule::four_over_six || rule == Rule::quest;
}

// formats._block_scales for one block whose largest magnitude is amax: the byte of its scale.
template <int B>
FP4_BOTH uint8_t block_scale(const float (&values)[B], float amax, Rule rule, double global_scale) {
  if (amax != amax) return B == 16 ? 0x7f : 0xff;  // a NaN must never be hidden
  const float rounded_global_scale = static_cast<float>(global_scale);
  if (B == 16) {
    const uint8_t scale = encode_e4m3(divide(amax, multiply(rounded_global_scale, 6.0f)));
    if (!reads_values(rule)) return scale;
    Search<B> search(values, global_scale, scale);
    if (rule == Rule::four_over_six) {
      search.offer(encode_e4m3(divide(amax, multiply(rounded_global_scale, 4.0f))));
    } else {
      // Nearest first, so that ties keep the scale closest to abs_max.
#pragma unroll 1
      for (int step = 1; step <= 8; ++step) {
        search.offer(static_cast<uint8_t>(clamp_int(scale - step, 1, 126)));
        search.offer(static_cast<uint8_t>(clamp_int(scale + step, 1, 126)));
      }
    }
    return search.best;
  }
  const int32_t bits = static_cast<int32_t>(bits_of(divide(amax, rounded_global_scale)));
  const int32_t sixth = static_cast<int32_t>(bits_of(divide(amax, multiply(rounded_global_scale, 6.0f))));
  const int floor = clamp_int((bits >> 23) - 2, 0, kE8m0Max);
  switch (rule) {
    case Rule::even:
      return static_cast<uint8_t>(clamp_int(((bits + (1 << 21)) >> 23) - 2, 0, kE8m0Max));
    case Rule::ceil:
      return static_cast<uint8_t>(clamp_int((sixth + 0x7fffff) >> 23, 0, kE8m0Max));
    case Rule::below_six:
      return static_cast<uint8_t>(clamp_int((sixth >> 23) + 1, 0, kE8m0Max));
    case Rule::quest:
      return quest_scale(values, rounded_global_scale);
    case Rule::mse: {
      Search<B> search(values, global_scale, static_cast<uint8_t>(floor));
      search.offer(static_cast<uint8_t>(clamp_int(floor + 1, 0, kE8m0Max)));
      search.offer(static_cast<uint8_t>(clamp_int(floor - 1, 0, kE8m0Max)));
      return search.best;
    }
    default:
      return static_cast<uint8_t>(floor);
  }
}

// One block: codes in B / 8 words, the first value in the lowest nibble; returns the byte of the block's scale.
template <int B>
FP4_BOTH uint8_t quantize_block(const float (&values)[B], Rule rule, double global_scale, uint32_t (&codes)[B / 8]) {
  uint32_t largest = 0;  // as bits, in which NaN is larger than infinity
#pragma unroll
  for (int i = 0; i < B; ++i) {
    const uint32_t magnitude = bits_of(values[i]) & kMagnitude;
    largest = magnitude > largest ? magnitude : largest;
  }
  const uint8_t scale = block_scale(values, from_bits(largest), rule, global_scale);
  const Divider quotient(effective_scale<B>(scale, global_scale));
#pragma unroll
  for (int word = 0; word < B / 8; ++word) {
    float q[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) q[i] = quotient(values[word * 8 + i]);
    codes[word] = largest > 0x7f800000u ? 0 : encode_eight(q, &values[word * 8]);
  }
  return scale;
}

// formats.global_scale_for: amax / 2688, or / 1536 for four_over_six; 1 where that is zero.
FP4_BOTH double global_scale_for(float amax, Rule rule) {
  const float scale = divide(amax, rule == Rule::four_over_six ? 6.0f * 256.0f : 6.0f * 448.0f);
  return scale == 0.0f ? 1.0 : static_cast<double>(scale);
}

}  // namespace fp4::cuda
