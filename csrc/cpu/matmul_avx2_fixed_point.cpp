// AVX2 kernels for activations in fixed point (fixed_point.h). AVX-512 decodes codes to float32 in one instruction and
// does without.
#include "matmul_avx2.h"

#ifdef FP4_X86

#include <cstring>

#include "fixed_point.h"
#include "kernels_by_rows.h"

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

template <Format F>
AVX2 int64_t split(const float* x, int64_t blocks, int32_t first_column, const TileRow& to, Residual* residuals) {
  constexpr int size = block_size(F);
  auto [tile, rows, m] = to;
  const __m256i pairs = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, -1, -1, -1, -1, -1, -1, -1, -1));
  Residual* const first = residuals;
  for (int64_t b = 0; b < blocks; ++b, x += size, tile += fixed_point_block_bytes(F, rows), first_column += size) {
    __m256i largest = _mm256_setzero_si256();
    for (int i = 0; i < size; i += 8) {
      const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(x + i));
      largest = _mm256_max_epi32(largest, _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF)));
    }
    __m128i most = _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4E));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0xB1));
    int exponent = _mm_cvtsi128_si32(most) >> 23;
    if (exponent < 40) exponent = 40;  // keeps every power of two below a normal number
    const bool finite = exponent < 255;
    const __m256 unit = power_of_two(exponent - 14);
    const __m256 per_unit = finite ? power_of_two(254 + 14 - exponent) : _mm256_setzero_ps();
    __m256i total = _mm256_setzero_si256();
    for (int i = 0; i < size; i += 8) {
      const __m256 values = _mm256_loadu_ps(x + i);
      __m256i words = _mm256_setzero_si256();
      if (finite) words = _mm256_cvtps_epi32(_mm256_mul_ps(values, per_unit));
      total = _mm256_add_epi32(total, words);
      const __m256i stored = _mm256_shuffle_epi8(_mm256_packs_epi32(words, words), pairs);
      uint8_t* group = tile + (i / 4 * rows + m) * 8;
      _mm_storel_epi64(reinterpret_cast<__m128i*>(group), _mm256_castsi256_si128(stored));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(group + rows * 8), _mm256_extracti128_si256(stored, 1));
      const __m256 rest = _mm256_sub_ps(values, _mm256_mul_ps(_mm256_cvtepi32_ps(words), unit));
      int left = _mm256_movemask_ps(_mm256_cmp_ps(rest, _mm256_setzero_ps(), _CMP_NEQ_UQ));
      if (left == 0) continue;
      alignas(32) float residual[8];
      _mm256_store_ps(residual, rest);
      for (; left != 0; left &= left - 1) {
        const int lane = __builtin_ctz(static_cast<unsigned>(left));
        *residuals++ = {.column = first_column + i + lane, .x = residual[lane]};
      }
    }
    const int32_t correction = -kCodeBias * sum(total);
    const float half_unit = 0.5f * _mm256_cvtss_f32(unit);
    std::memcpy(tile + rows * 2 * size + m * 4, &correction, 4);
    std::memcpy(tile + rows * (2 * size + 4) + m * 4, &half_unit, 4);
  }
  return residuals - first;
}

// A block's sums of row m of a tile of M rows, times the unit of its words.
template <Format F, int M>
AVX2_INLINE __m256 in_units(__m256i sums, const uint8_t* x, int m) {
  const __m256 unit = _mm256_castsi256_ps(broadcast(x + M * (2 * block_size(F) + 4) + 4 * m));
  return _mm256_mul_ps(_mm256_cvtepi32_ps(sums), unit);
}

template <Format F, int M>
AVX2 void multiply_rows(const PackedBlocks& panel, const uint8_t* x, float* sum) {
  constexpr int size = block_size(F);
  auto [codes, scales, blocks] = panel;
  const __m256i table = biased_table(), zero = _mm256_setzero_si256();
  __m256 low[M], high[M];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    low[m] = _mm256_loadu_ps(sum + m * kPanelRows);
    high[m] = _mm256_loadu_ps(sum + m * kPanelRows + 8);
  }
  for (int64_t b = 0; b < blocks; ++b, codes += block_bytes(F), scales += kPanelRows) {
    prefetch_block<F>(codes, scales);
    __m256i low32[M], high32[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) low32[m] = high32[m] = broadcast(x + M * 2 * size + 4 * m);
#pragma GCC unroll 8
    for (int g = 0; g < size / 4; ++g) {
      const LookedUp w = look_up(table, codes + 32 * g);
      const __m256i even_low = _mm256_unpacklo_epi8(w.even, zero), even_high = _mm256_unpackhi_epi8(w.even, zero);
      const __m256i odd_low = _mm256_unpacklo_epi8(w.odd, zero), odd_high = _mm256_unpackhi_epi8(w.odd, zero);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const __m256i x02 = broadcast(x + (g * M + m) * 8), x13 = broadcast(x + (g * M + m) * 8 + 4);
        low32[m] = _mm256_add_epi32(low32[m], _mm256_madd_epi16(even_low, x02));
        FP4_KEEP_ORDER(low32[m]);
        high32[m] = _mm256_add_epi32(high32[m], _mm256_madd_epi16(even_high, x02));
        FP4_KEEP_ORDER(high32[m]);
        low32[m] = _mm256_add_epi32(low32[m], _mm256_madd_epi16(odd_low, x13));
        FP4_KEEP_ORDER(low32[m]);
        high32[m] = _mm256_add_epi32(high32[m], _mm256_madd_epi16(odd_high, x13));
        FP4_KEEP_ORDER(high32[m]);
      }
    }
    const Scales s = raw_scales<F>(scales);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      low[m] = _mm256_fmadd_ps(in_units<F, M>(low32[m], x, m), s.low, low[m]);
      high[m] = _mm256_fmadd_ps(in_units<F, M>(high32[m], x, m), s.high, high[m]);
    }
    x += fixed_point_block_bytes(F, M);
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    _mm256_storeu_ps(sum + m * kPanelRows, low[m]);
    _mm256_storeu_ps(sum + m * kPanelRows + 8, high[m]);
  }
}

template <Format F>
constexpr auto kMultiply = kernels_by_rows<4>([](auto m) { return multiply_rows<F, m>; });

template <Format F>
void multiply(const PackedBlocks& w, const uint8_t* x, int rows, float* sum) {
  kMultiply<F>[rows - 1](w, x, sum);
}

template <Format F>
AVX2 void add_residuals(const PackedBlocks& panel, const Residual* residuals, int64_t count, float* sum) {
  const uint8_t* const codes = panel.codes;
  const uint8_t* const scales = panel.scales;
  const __m256 magnitudes = _mm256_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6);
  const __m256i sign = _mm256_set1_epi32(static_cast<int>(0x80000000u)), zero = _mm256_setzero_si256();
  __m256 low = _mm256_loadu_ps(sum), high = _mm256_loadu_ps(sum + 8);
  for (int64_t i = 0; i < count; ++i) {
    const int32_t column = residuals[i].column;
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + column / 4 * 32));
    const __m128i down = _mm_cvtsi32_si128(column % 4 * 4), up = _mm_cvtsi32_si128(28 - column % 4 * 4);
    const auto value = [&](__m256i rows) FP4_TARGET_AVX2_FMA {
      const __m256 magnitude = _mm256_permutevar8x32_ps(magnitudes, _mm256_srl_epi32(rows, down));
      return _mm256_xor_ps(magnitude, _mm256_castsi256_ps(_mm256_and_si256(_mm256_sll_epi32(rows, up), sign)));
    };
    const Scales s = raw_scales<F>(scales + column / block_size(F) * kPanelRows);
    const __m256 x = _mm256_set1_ps(residuals[i].x);
    low = _mm256_fmadd_ps(_mm256_mul_ps(value(_mm256_unpacklo_epi16(words, zero)), x), s.low, low);
    high = _mm256_fmadd_ps(_mm256_mul_ps(value(_mm256_unpackhi_epi16(words, zero)), x), s.high, high);
  }
  _mm256_storeu_ps(sum, low);
  _mm256_storeu_ps(sum + 8, high);
}

// Signed int16 in the order in which `multiply_decoded` meets the words of x: per four columns the pairs (0, 2) of rows
// 0-7 and of rows 8-15, then the pairs (1, 3).
template <Format F>
AVX2 void decode(const PackedBlocks& panel, int16_t* out, float* out_scales) {
  auto [codes, scales, blocks] = panel;
  const __m256i table =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
  const __m256i zero = _mm256_setzero_si256();
  for (int64_t b = 0; b < blocks; ++b, scales += kPanelRows, out_scales += kPanelRows) {
    prefetch_block<F>(codes, scales);
    const Scales s = raw_scales<F>(scales);
    _mm256_storeu_ps(out_scales, s.low);
    _mm256_storeu_ps(out_scales + 8, s.high);
    for (int k = 0; k < block_size(F); k += 4, codes += 32, out += 4 * kPanelRows) {
      const LookedUp w = look_up(table, codes);
      __m256i* to = reinterpret_cast<__m256i*>(out);
      _mm256_storeu_si256(to + 0, _mm256_srai_epi16(_mm256_unpacklo_epi8(zero, w.even), 8));
      _mm256_storeu_si256(to + 1, _mm256_srai_epi16(_mm256_unpackhi_epi8(zero, w.even), 8));
      _mm256_storeu_si256(to + 2, _mm256_srai_epi16(_mm256_unpacklo_epi8(zero, w.odd), 8));
      _mm256_storeu_si256(to + 3, _mm256_srai_epi16(_mm256_unpackhi_epi8(zero, w.odd), 8));
    }
  }
}

template <Format F, int M>
AVX2 void multiply_decoded_rows(const DecodedBlocks<int16_t>& decoded, const uint8_t* x, float* sum) {
  constexpr int size = block_size(F);
  auto [w, w_scales, blocks] = decoded;
  for (int64_t b = 0; b < blocks; ++b, w_scales += kPanelRows) {
    __m256i low32[M], high32[M];
#pragma GCC unroll 16
    for (int h = 0; h < size / 2; ++h, w += 2 * kPanelRows) {
      const __m256i w_low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
      const __m256i w_high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + kPanelRows));
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        const __m256i words = broadcast(x + (h / 2 * M + m) * 8 + h % 2 * 4);
        const __m256i l = _mm256_madd_epi16(w_low, words);
        low32[m] = h == 0 ? l : _mm256_add_epi32(low32[m], l);
        FP4_KEEP_ORDER(low32[m]);
        const __m256i u = _mm256_madd_epi16(w_high, words);
        high32[m] = h == 0 ? u : _mm256_add_epi32(high32[m], u);
        FP4_KEEP_ORDER(high32[m]);
      }
    }
    // The sums of all rows do not fit into registers beside these.
    const __m256 s_low = _mm256_loadu_ps(w_scales), s_high = _mm256_loadu_ps(w_scales + 8);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      float* to = sum + m * kPanelRows;
      const __m256 l = in_units<F, M>(low32[m], x, m), u = in_units<F, M>(high32[m], x, m);
      _mm256_storeu_ps(to, _mm256_fmadd_ps(l, s_low, _mm256_loadu_ps(to)));
      _mm256_storeu_ps(to + 8, _mm256_fmadd_ps(u, s_high, _mm256_loadu_ps(to + 8)));
    }
    FP4_FORGET(sum);  // or the compiler keeps the sums on the stack besides
    x += fixed_point_block_bytes(F, M);
  }
}

template <Format F>
constexpr auto kMultiplyDecoded = kernels_by_rows<6>([](auto m) { return multiply_decoded_rows<F, m>; });

template <Format F>
void multiply_decoded(const DecodedBlocks<int16_t>& w, const uint8_t* x, int rows, float* sum) {
  kMultiplyDecoded<F>[rows - 1](w, x, sum);
}

AVX2 void add_residuals_to_values(const float* values, int32_t first_column, const Residual* residuals, int64_t count,
                                  float* sum) {
  // Two sums of each half take turns, to hide the latency of the FMAs.
  __m256 low[2] = {_mm256_loadu_ps(sum), _mm256_setzero_ps()};
  __m256 high[2] = {_mm256_loadu_ps(sum + 8), _mm256_setzero_ps()};
  const auto add = [&](const Residual& residual, int turn) FP4_TARGET_AVX2_FMA {
    const float* weights = values + (residual.column - first_column) * kPanelRows;
    const __m256 x = _mm256_set1_ps(residual.x);
    low[turn] = _mm256_fmadd_ps(x, _mm256_loadu_ps(weights), low[turn]);
    high[turn] = _mm256_fmadd_ps(x, _mm256_loadu_ps(weights + 8), high[turn]);
  };
  int64_t i = 0;
  for (; i + 2 <= count; i += 2) {
    add(residuals[i], 0);
    add(residuals[i + 1], 1);
  }
  if (i < count) add(residuals[i], 0);
  _mm256_storeu_ps(sum, _mm256_add_ps(low[0], low[1]));
  _mm256_storeu_ps(sum + 8, _mm256_add_ps(high[0], high[1]));
}

template <Format F>
constexpr FixedPointFormatKernels kFormatKernels = {
    .unit = kRawScaleUnit<F>,
    .split = split<F>,
    .multiply = multiply<F>,
    .decode = decode<F>,
    .multiply_decoded = multiply_decoded<F>,
    .add_residuals = add_residuals<F>,
};

}  // namespace

const FixedPointKernels kFixedPointKernels = {
    .rows = kMultiply<Format::nvfp4>.size(),
    .decoded_rows = kMultiplyDecoded<Format::nvfp4>.size(),
    .formats = {.nvfp4 = kFormatKernels<Format::nvfp4>, .mxfp4 = kFormatKernels<Format::mxfp4>},
    .add_residuals_to_values = add_residuals_to_values,
};

}  // namespace fp4::cpu::avx2

#endif
