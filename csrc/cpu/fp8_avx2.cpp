#include "fp8.h"
#include "kernels_by_rows.h"
#include "matmul_avx2.h"

#ifdef FP4_X86

namespace fp4::cpu {

namespace {

constexpr float kUnit = 256.0f;  // what decoded codes are divided by: 2 to the difference of the biases

// Two columns of a panel over kUnit: float32 of the rows 0-7 (low) and 8-15 (high).
struct Pair {
  __m256 first_low, first_high, second_low, second_high;
};

AVX2_INLINE __m256i as_float16(__m256i codes_in_high_bytes) {
  const __m256i shifted = _mm256_srai_epi16(codes_in_high_bytes, 1);
  return _mm256_and_si256(shifted, _mm256_set1_epi16(static_cast<short>(0xBFFF)));
}

AVX2_INLINE Pair decode_pair(__m256i codes) {
  const __m256i zero = _mm256_setzero_si256();
  const __m256i low = as_float16(_mm256_unpacklo_epi8(zero, codes));
  const __m256i high = as_float16(_mm256_unpackhi_epi8(zero, codes));
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(low)), _mm256_cvtph_ps(_mm256_castsi256_si128(high)),
          _mm256_cvtph_ps(_mm256_extracti128_si256(low, 1)), _mm256_cvtph_ps(_mm256_extracti128_si256(high, 1))};
}

// Moving bits makes a number of the code that means NaN (0x7F). Kernels collect the largest magnitude that they saw, and
// leave those rare panels to the portable ones.
AVX2_INLINE __m256i larger_magnitude(__m256i seen, __m256i codes) {
  return _mm256_max_epu8(seen, _mm256_and_si256(codes, _mm256_set1_epi8(0x7F)));
}

AVX2_INLINE bool holds_nan(__m256i largest) {
  return _mm256_movemask_epi8(_mm256_cmpeq_epi8(largest, _mm256_set1_epi8(0x7F))) != 0;
}

AVX2_INLINE __m256i load_two(const uint8_t* codes) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
}

// One column, and one of zeros.
AVX2_INLINE __m256i load_one(const uint8_t* codes) {
  return _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
}

// Returns false where a code means NaN. With few rows, neighbouring columns have separate sums, so that additions do not
// wait for each other.
template <int M>
AVX2 bool gemv_rows(const uint8_t* codes, const float* scales, int64_t k, const float* x, float* y) {
  constexpr int kSets = M == 1 ? 4 : M == 2 ? 2 : 1;
  constexpr int kAhead = 4096;  // bytes: panels are read once, in order, across page borders
  __m256 low[kSets][M], high[kSets][M];
  for (int s = 0; s < kSets; ++s) {
    for (int m = 0; m < M; ++m) low[s][m] = high[s][m] = _mm256_setzero_ps();
  }
  __m256i largest = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 4 <= k; i += 4, codes += 4 * kPanelRows, x += 4 * M) {
    _mm_prefetch(reinterpret_cast<const char*>(codes) + kAhead, _MM_HINT_T0);
#pragma GCC unroll 2
    for (int c = 0; c < 4; c += 2) {
      const __m256i two = load_two(codes + c * kPanelRows);
      largest = larger_magnitude(largest, two);
      const Pair w = decode_pair(two);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const __m256 x0 = _mm256_set1_ps(x[c * M + m]), x1 = _mm256_set1_ps(x[(c + 1) * M + m]);
        const int s = c % kSets, t = (c + 1) % kSets;
        low[s][m] = _mm256_fmadd_ps(w.first_low, x0, low[s][m]);
        high[s][m] = _mm256_fmadd_ps(w.first_high, x0, high[s][m]);
        low[t][m] = _mm256_fmadd_ps(w.second_low, x1, low[t][m]);
        high[t][m] = _mm256_fmadd_ps(w.second_high, x1, high[t][m]);
      }
    }
  }
  for (; i < k; ++i, codes += kPanelRows, x += M) {
    const __m256i one = load_one(codes);
    largest = larger_magnitude(largest, one);
    const Pair w = decode_pair(one);
    for (int m = 0; m < M; ++m) {
      const __m256 value = _mm256_set1_ps(x[m]);
      low[0][m] = _mm256_fmadd_ps(w.first_low, value, low[0][m]);
      high[0][m] = _mm256_fmadd_ps(w.first_high, value, high[0][m]);
    }
  }
  if (holds_nan(largest)) return false;
  const __m256 unit = _mm256_set1_ps(kUnit);
  const __m256 low_scales = _mm256_mul_ps(_mm256_loadu_ps(scales), unit);
  const __m256 high_scales = _mm256_mul_ps(_mm256_loadu_ps(scales + 8), unit);
  for (int m = 0; m < M; ++m) {
    for (int s = 1; s < kSets; ++s) {
      low[0][m] = _mm256_add_ps(low[0][m], low[s][m]);
      high[0][m] = _mm256_add_ps(high[0][m], high[s][m]);
    }
    _mm256_storeu_ps(y + m * kPanelRows, _mm256_mul_ps(low[0][m], low_scales));
    _mm256_storeu_ps(y + m * kPanelRows + 8, _mm256_mul_ps(high[0][m], high_scales));
  }
  return true;
}

constexpr auto kGemv = kernels_by_rows<4>([](auto m) { return gemv_rows<m>; });

void gemv(const uint8_t* codes, const float* scales, int64_t k, const float* x, int rows, float* y) {
  if (!kGemv[rows - 1](codes, scales, k, x, y)) kScalarFp8.gemv(codes, scales, k, x, rows, y);
}

AVX2 void decode(const uint8_t* codes, const float* scales, int64_t k, float* out) {
  const __m256 unit = _mm256_set1_ps(kUnit);
  const __m256 low = _mm256_mul_ps(_mm256_loadu_ps(scales), unit);
  const __m256 high = _mm256_mul_ps(_mm256_loadu_ps(scales + 8), unit);
  __m256i largest = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 2 <= k; i += 2) {
    const __m256i two = load_two(codes + i * kPanelRows);
    largest = larger_magnitude(largest, two);
    const Pair w = decode_pair(two);
    float* const to = out + i * kPanelRows;
    _mm256_storeu_ps(to, _mm256_mul_ps(w.first_low, low));
    _mm256_storeu_ps(to + 8, _mm256_mul_ps(w.first_high, high));
    _mm256_storeu_ps(to + 16, _mm256_mul_ps(w.second_low, low));
    _mm256_storeu_ps(to + 24, _mm256_mul_ps(w.second_high, high));
  }
  if (i < k) {
    const __m256i one = load_one(codes + i * kPanelRows);
    largest = larger_magnitude(largest, one);
    const Pair w = decode_pair(one);
    _mm256_storeu_ps(out + i * kPanelRows, _mm256_mul_ps(w.first_low, low));
    _mm256_storeu_ps(out + i * kPanelRows + 8, _mm256_mul_ps(w.first_high, high));
  }
  if (holds_nan(largest)) kScalarFp8.decode(codes, scales, k, out);
}

}  // namespace

const Fp8Kernels kAvx2Fp8 = {.gemv_rows = kGemv.size(), .gemv = gemv, .decode = decode};

}  // namespace fp4::cpu

#endif
