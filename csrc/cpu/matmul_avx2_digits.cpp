// AVX2 kernels for activations as digits (digits.h). AVX-512 decodes codes in one instruction and does without.
#include "matmul_avx2.h"

#ifdef FP4_X86

#include <cstring>

#include "digits.h"

namespace fp4::cpu::avx2 {
namespace {

AVX2_INLINE int32_t sum(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}

AVX2_INLINE __m256 power_of_two(int exponent_field) {
  return _mm256_castsi256_ps(_mm256_set1_epi32(exponent_field << 23));
}

// Stores a digit of eight columns: two groups of four, which lie `group` bytes apart.
AVX2_INLINE void store_digit(__m256i digit, uint8_t* out, int64_t group) {
  const __m256i pairs = _mm256_shuffle_epi8(
      digit, _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 8, 0, 8, 4, 12, 4, 12, -1, -1, -1, -1, -1, -1, -1, -1)));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(pairs));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out + group), _mm256_extracti128_si256(pairs, 1));
}

// Stores the lowest digit of eight fixed-point values and returns what is above it.
AVX2_INLINE __m256i take_digit(__m256i value, uint8_t* out, int64_t group) {
  const __m256i bias = _mm256_set1_epi32(64);
  const __m256i digit = _mm256_sub_epi32(_mm256_and_si256(_mm256_add_epi32(value, bias), _mm256_set1_epi32(127)), bias);
  store_digit(digit, out, group);
  return _mm256_srai_epi32(_mm256_sub_epi32(value, digit), 7);
}

AVX2_INLINE void note(Residuals& residuals, int32_t group, __m128 residual) {
  if (_mm_movemask_ps(_mm_cmpneq_ps(residual, _mm_setzero_ps())) == 0 || residuals.count < 0) return;
  if (residuals.count == Residuals::kMost) {
    residuals.count = -1;
    return;
  }
  residuals.group[residuals.count] = group;
  _mm_storeu_ps(residuals.x[residuals.count], residual);
  ++residuals.count;
}

template <Format F>
AVX2 void split_digits(const float* x, int64_t blocks, int32_t first_group, uint8_t* out, Residuals& residuals) {
  constexpr int size = block_size(F);
  constexpr int64_t group = kDigits * 8;
  for (int64_t b = 0; b < blocks; ++b, x += size, out += digit_block_bytes(F), first_group += size / 4) {
    __m256i largest = _mm256_setzero_si256();
    for (int i = 0; i < size; i += 8) {
      const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(x + i));
      largest = _mm256_max_epi32(largest, _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF)));
    }
    __m128i most = _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4E));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0xB1));
    int exponent = _mm_cvtsi128_si32(most) >> 23;
    if (exponent == 255) {
      residuals.count = -1;
      return;
    }
    if (exponent < 40) exponent = 40;  // keeps every power of two below a normal number
    const __m256 unit = power_of_two(exponent - 19), per_unit = power_of_two(254 + 19 - exponent);
    __m256i total = _mm256_setzero_si256();
    for (int i = 0; i < size; i += 8) {
      uint8_t* to = out + i / 4 * group;
      __m256 rest = _mm256_loadu_ps(x + i);
      __m256i fixed = _mm256_cvtps_epi32(_mm256_mul_ps(rest, per_unit));
      rest = _mm256_sub_ps(rest, _mm256_mul_ps(_mm256_cvtepi32_ps(fixed), unit));
      total = _mm256_add_epi32(total, fixed);
      fixed = take_digit(fixed, to + 16, group);
      fixed = take_digit(fixed, to + 8, group);
      store_digit(fixed, to, group);
      note(residuals, first_group + i / 4, _mm256_castps256_ps128(rest));
      note(residuals, first_group + i / 4 + 1, _mm256_extractf128_ps(rest, 1));
    }
    const DigitTail tail = {-kIntegerBias * sum(total), 0.5f * _mm256_cvtss_f32(unit)};
    std::memcpy(out + size / 4 * group, &tail, sizeof tail);
  }
}

// Integer sums of rows 0-7 and 8-15.
struct Sums {
  __m256i low, high;
};

// a * scale_a + b * scale_b of sixteen 16-bit sums, widened; `scales` holds the pair.
AVX2_INLINE Sums widen(__m256i a, __m256i b, __m256i scales) {
  return {_mm256_madd_epi16(_mm256_unpacklo_epi16(a, b), scales),
          _mm256_madd_epi16(_mm256_unpackhi_epi16(a, b), scales)};
}

AVX2_INLINE Sums operator+(Sums a, Sums b) {
  return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}

template <Format F, int M>
AVX2 void multiply(const uint8_t* codes, const uint8_t* scales, int64_t blocks, float global_scale, const uint8_t* x,
                   int64_t stride, float* y) {
  constexpr int size = block_size(F);
  const __m256 unit = scale_unit<F>(global_scale);
  const __m256i table =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
  const __m256i nibble = _mm256_set1_epi8(0x0F);
  const __m256i high_pair = _mm256_set1_epi32(1 << 14), low_pair = _mm256_set1_epi32(1 << 16 | 128);
  __m256 low[M], high[M];
  for (int m = 0; m < M; ++m) low[m] = high[m] = _mm256_setzero_ps();
  for (int64_t b = 0; b < blocks; ++b, scales += kPanelRows, x += digit_block_bytes(F)) {
    prefetch_block<F>(codes, scales);
    Sums total[M] = {};
    // Sixteen columns at a time: more would overflow the 16-bit sums.
    for (int half = 0; half < size / 16; ++half) {
      __m256i dot[M][kDigits];
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g, codes += 32) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
        const __m256i even = _mm256_shuffle_epi8(table, _mm256_and_si256(bytes, nibble));
        const __m256i odd = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble));
#pragma GCC unroll 2
        for (int m = 0; m < M; ++m) {
#pragma GCC unroll 3
          for (int d = 0; d < kDigits; ++d) {
            int32_t x02, x13;
            std::memcpy(&x02, x + m * stride + ((half * 4 + g) * kDigits + d) * 8, 4);
            std::memcpy(&x13, x + m * stride + ((half * 4 + g) * kDigits + d) * 8 + 4, 4);
            const __m256i first = _mm256_maddubs_epi16(even, _mm256_set1_epi32(x02));
            const __m256i second = _mm256_maddubs_epi16(odd, _mm256_set1_epi32(x13));
            dot[m][d] = g == 0 ? first : _mm256_add_epi16(dot[m][d], first);
            FP4_KEEP_ORDER(dot[m][d]);
            dot[m][d] = _mm256_add_epi16(dot[m][d], second);
            FP4_KEEP_ORDER(dot[m][d]);
          }
        }
      }
#pragma GCC unroll 2
      for (int m = 0; m < M; ++m) {
        const Sums sums = widen(dot[m][0], dot[m][0], high_pair) + widen(dot[m][1], dot[m][2], low_pair);
        total[m] = half == 0 ? sums : total[m] + sums;
      }
    }
    const Scales s = load_scales<F>(scales, unit);
#pragma GCC unroll 2
    for (int m = 0; m < M; ++m) {
      DigitTail tail;
      std::memcpy(&tail, x + m * stride + size / 4 * kDigits * 8, sizeof tail);
      const __m256i correction = _mm256_set1_epi32(tail.correction);
      const __m256 x_unit = _mm256_set1_ps(tail.unit);
      const __m256 part_low = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(total[m].low, correction)), x_unit);
      const __m256 part_high = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(total[m].high, correction)), x_unit);
      low[m] = _mm256_fmadd_ps(part_low, s.low, low[m]);
      high[m] = _mm256_fmadd_ps(part_high, s.high, high[m]);
    }
  }
  for (int m = 0; m < M; ++m) {
    _mm256_storeu_ps(y + m * kPanelRows, low[m]);
    _mm256_storeu_ps(y + m * kPanelRows + 8, high[m]);
  }
}

template <Format F>
AVX2 void gemv_digits(const uint8_t* codes, const uint8_t* scales, int64_t blocks, float global_scale,
                      const uint8_t* x, int64_t stride, int rows, float* y) {
  if (rows == 1) return multiply<F, 1>(codes, scales, blocks, global_scale, x, stride, y);
  multiply<F, 2>(codes, scales, blocks, global_scale, x, stride, y);
}

template <Format F>
AVX2 void add_residuals(const uint8_t* codes, const uint8_t* scales, float global_scale, const Residuals& residuals,
                        float* y) {
  const __m256 unit = scale_unit<F>(global_scale);
  __m256 low = _mm256_loadu_ps(y), high = _mm256_loadu_ps(y + 8);
  for (int i = 0; i < residuals.count; ++i) {
    const int64_t group = residuals.group[i];
    const float* x = residuals.x[i];
    const Columns w = load_columns(codes + group * 32);
    const Scales s = load_scales<F>(scales + group / (block_size(F) / 4) * kPanelRows, unit);
    const __m256 x0 = _mm256_set1_ps(x[0]), x1 = _mm256_set1_ps(x[1]);
    const __m256 x2 = _mm256_set1_ps(x[2]), x3 = _mm256_set1_ps(x[3]);
    __m256 part_low = _mm256_mul_ps(first(w.k02_low), x0), part_high = _mm256_mul_ps(first(w.k02_high), x0);
    part_low = _mm256_fmadd_ps(first(w.k13_low), x1, part_low);
    part_high = _mm256_fmadd_ps(first(w.k13_high), x1, part_high);
    part_low = _mm256_fmadd_ps(second(w.k02_low), x2, part_low);
    part_high = _mm256_fmadd_ps(second(w.k02_high), x2, part_high);
    part_low = _mm256_fmadd_ps(second(w.k13_low), x3, part_low);
    part_high = _mm256_fmadd_ps(second(w.k13_high), x3, part_high);
    low = _mm256_fmadd_ps(part_low, s.low, low);
    high = _mm256_fmadd_ps(part_high, s.high, high);
  }
  _mm256_storeu_ps(y, low);
  _mm256_storeu_ps(y + 8, high);
}

}  // namespace

const DigitKernels kDigitKernels = {
    2,
    {split_digits<Format::nvfp4>, split_digits<Format::mxfp4>},
    {gemv_digits<Format::nvfp4>, gemv_digits<Format::mxfp4>},
    {add_residuals<Format::nvfp4>, add_residuals<Format::mxfp4>},
};

}  // namespace fp4::cpu::avx2

#endif
