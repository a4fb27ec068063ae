#include "matmul_avx2.h"

#include "kernels_by_rows.h"

#ifdef FP4_X86

#include <cstring>

namespace fp4::cpu {

using namespace avx2;

namespace {

// Writes a row into a tile (matmul_kernels.h). `kept` are the bits of a correction that are stored.
template <Format F, uint32_t kept>
AVX2_INLINE void lay_out(const int8_t* codes, const float* scales, int64_t blocks, const TileRow& to) {
  constexpr int size = block_size(F);
  auto [tile, rows, m] = to;
  const __m128i columns = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);  // kIntegerColumn
  for (int64_t b = 0; b < blocks; ++b, codes += size, tile += integer_block_bytes(F, rows)) {
    __m128i correction = _mm_setzero_si128();
    for (int i = 0; i < size; i += 16) {
      const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i));
      const __m128i pairs = _mm_maddubs_epi16(_mm_set1_epi8(1), values);
      correction = _mm_add_epi32(correction, _mm_madd_epi16(pairs, _mm_set1_epi16(-kCodeBias)));
      const __m128i fours = _mm_shuffle_epi8(values, columns);
      uint8_t* four = tile + (i / 4 * rows + m) * 4;
      _mm_storeu_si32(four, fours);
      _mm_storeu_si32(four + rows * 4, _mm_shuffle_epi32(fours, 0x55));
      _mm_storeu_si32(four + rows * 8, _mm_shuffle_epi32(fours, 0xAA));
      _mm_storeu_si32(four + rows * 12, _mm_shuffle_epi32(fours, 0xFF));
    }
    correction = _mm_add_epi32(correction, _mm_shuffle_epi32(correction, 0x4E));
    correction = _mm_add_epi32(correction, _mm_shuffle_epi32(correction, 0xB1));
    _mm_storeu_si32(tile + rows * size + m * 4, _mm_and_si128(correction, _mm_set1_epi32(static_cast<int>(kept))));
    std::memcpy(tile + rows * (size + 4) + m * 4, &scales[b], 4);
  }
}

template <Format F, int M>
AVX2 void gemv_rows(const PackedBlocks& panel, float global_scale, const float* x, float* y) {
  constexpr int size = block_size(F);
  auto [codes, scales, blocks] = panel;
  const __m256 unit = scale_unit<F>(global_scale);
  __m256 low[M], high[M];
  for (int m = 0; m < M; ++m) low[m] = high[m] = _mm256_setzero_ps();
  for (int64_t b = 0; b < blocks; ++b, codes += block_bytes(F), scales += kPanelRows, x += size * M) {
    prefetch_block<F>(codes, scales);
    // Two partial sums a vector (a, b) hide the latency of the FMAs.
    __m256 low_a[M], low_b[M], high_a[M], high_b[M];
    for (int m = 0; m < M; ++m) low_a[m] = low_b[m] = high_a[m] = high_b[m] = _mm256_setzero_ps();
#pragma GCC unroll 8
    for (int k = 0; k < size; k += 4) {
      const Columns w = load_columns(codes + 8 * k);
#pragma GCC unroll 2
      for (int m = 0; m < M; ++m) {
        const __m256 x0 = _mm256_set1_ps(x[(k + 0) * M + m]), x1 = _mm256_set1_ps(x[(k + 1) * M + m]);
        const __m256 x2 = _mm256_set1_ps(x[(k + 2) * M + m]), x3 = _mm256_set1_ps(x[(k + 3) * M + m]);
        low_a[m] = _mm256_fmadd_ps(first(w.k02_low), x0, low_a[m]);
        high_a[m] = _mm256_fmadd_ps(first(w.k02_high), x0, high_a[m]);
        low_b[m] = _mm256_fmadd_ps(first(w.k13_low), x1, low_b[m]);
        high_b[m] = _mm256_fmadd_ps(first(w.k13_high), x1, high_b[m]);
        low_a[m] = _mm256_fmadd_ps(second(w.k02_low), x2, low_a[m]);
        high_a[m] = _mm256_fmadd_ps(second(w.k02_high), x2, high_a[m]);
        low_b[m] = _mm256_fmadd_ps(second(w.k13_low), x3, low_b[m]);
        high_b[m] = _mm256_fmadd_ps(second(w.k13_high), x3, high_b[m]);
      }
    }
    const Scales s = load_scales<F>(scales, unit);
    for (int m = 0; m < M; ++m) {
      low[m] = _mm256_fmadd_ps(_mm256_add_ps(low_a[m], low_b[m]), s.low, low[m]);
      high[m] = _mm256_fmadd_ps(_mm256_add_ps(high_a[m], high_b[m]), s.high, high[m]);
    }
  }
  for (int m = 0; m < M; ++m) {
    _mm256_storeu_ps(y + m * kPanelRows, low[m]);
    _mm256_storeu_ps(y + m * kPanelRows + 8, high[m]);
  }
}

template <Format F>
constexpr auto kGemv = kernels_by_rows<2>([](auto m) { return gemv_rows<F, m>; });

template <Format F>
void gemv(const PackedBlocks& w, float global_scale, const float* x, int rows, float* y) {
  kGemv<F>[rows - 1](w, global_scale, x, y);
}

template <Format F>
AVX2 void decode_float(const PackedBlocks& panel, float global_scale, float* out) {
  constexpr int size = block_size(F);
  auto [codes, scales, blocks] = panel;
  const __m256 unit = scale_unit<F>(global_scale);
  for (int64_t b = 0; b < blocks; ++b, scales += kPanelRows) {
    const Scales s = load_scales<F>(scales, unit);
    for (int k = 0; k < size; k += 4, codes += 32, out += 4 * kPanelRows) {
      const Columns w = load_columns(codes);
      _mm256_storeu_ps(out + 0, _mm256_mul_ps(first(w.k02_low), s.low));
      _mm256_storeu_ps(out + 8, _mm256_mul_ps(first(w.k02_high), s.high));
      _mm256_storeu_ps(out + 16, _mm256_mul_ps(first(w.k13_low), s.low));
      _mm256_storeu_ps(out + 24, _mm256_mul_ps(first(w.k13_high), s.high));
      _mm256_storeu_ps(out + 32, _mm256_mul_ps(second(w.k02_low), s.low));
      _mm256_storeu_ps(out + 40, _mm256_mul_ps(second(w.k02_high), s.high));
      _mm256_storeu_ps(out + 48, _mm256_mul_ps(second(w.k13_low), s.low));
      _mm256_storeu_ps(out + 56, _mm256_mul_ps(second(w.k13_high), s.high));
    }
  }
}

template <int M>
AVX2 void multiply_float_rows(const float* x, const float* w, int64_t k, float* sum) {
  __m256 low[M], high[M];
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
    low[m] = _mm256_loadu_ps(sum + m * kPanelRows);
    high[m] = _mm256_loadu_ps(sum + m * kPanelRows + 8);
  }
  for (int64_t i = 0; i < k; ++i, x += M, w += kPanelRows) {
    const __m256 w_low = _mm256_loadu_ps(w), w_high = _mm256_loadu_ps(w + 8);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const __m256 value = _mm256_set1_ps(x[m]);
      low[m] = _mm256_fmadd_ps(w_low, value, low[m]);
      high[m] = _mm256_fmadd_ps(w_high, value, high[m]);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
    _mm256_storeu_ps(sum + m * kPanelRows, low[m]);
    _mm256_storeu_ps(sum + m * kPanelRows + 8, high[m]);
  }
}

constexpr auto kMultiplyFloat = kernels_by_rows<6>([](auto m) { return multiply_float_rows<m>; });

void multiply_float(const float* x, int rows, const float* w, int64_t k, float* sum) {
  kMultiplyFloat[rows - 1](x, w, k, sum);
}

template <Format F>
AVX2 void lay_out_integer(const int8_t* codes, const float* scales, int64_t blocks, const TileRow& to) {
  lay_out<F, 0x0000FFFF>(codes, scales, blocks, to);
}

template <Format F>
AVX2 void decode_integer(const PackedBlocks& panel, uint8_t* out, float* out_scales) {
  constexpr int size = block_size(F);
  auto [codes, scales, blocks] = panel;
  const __m256 unit = scale_unit<F>(1.0f);
  const __m256i table = biased_table();
  for (int64_t b = 0; b < blocks; ++b, scales += kPanelRows, out_scales += kPanelRows) {
    prefetch_block<F>(codes, scales);
    const Scales s = load_scales<F>(scales, unit);
    _mm256_storeu_ps(out_scales, s.low);
    _mm256_storeu_ps(out_scales + 8, s.high);
    for (int k = 0; k < size; k += 4, codes += 32, out += 4 * kPanelRows) {
      const LookedUp w = look_up(table, codes);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_unpacklo_epi16(w.even, w.odd));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32), _mm256_unpackhi_epi16(w.even, w.odd));
    }
  }
}

alignas(32) constexpr int16_t kOnes[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// The scales of the decoded weights are those of WholeScales (`whole`) or float32.
template <Format F, int M, bool whole>
AVX2 void multiply_integer_rows(const uint8_t* x, const DecodedBlocks<uint8_t>& decoded, float* sum) {
  constexpr int size = block_size(F);
  auto [w, w_scales, blocks] = decoded;
  __m256 low[M], high[M];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    low[m] = _mm256_loadu_ps(sum + m * kPanelRows);
    high[m] = _mm256_loadu_ps(sum + m * kPanelRows + 8);
  }
  for (int64_t b = 0; b < blocks; ++b, x += integer_block_bytes(F, M), w_scales += kPanelRows) {
    // A product is at most 24 * 12, so that a lane stays below 2 * 8 * 288 = 4608 through a block, and below twice that
    // with the correction: no saturation.
    __m256i low16[M], high16[M];
#pragma GCC unroll 8
    for (int q = 0; q < size / 4; ++q, w += 4 * kPanelRows) {
      const __m256i w_low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
      const __m256i w_high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32));
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const __m256i codes = broadcast(x + (q * M + m) * 4);
        const __m256i l = _mm256_maddubs_epi16(w_low, codes), h = _mm256_maddubs_epi16(w_high, codes);
        low16[m] = q == 0 ? l : _mm256_add_epi16(low16[m], l);
        high16[m] = q == 0 ? h : _mm256_add_epi16(high16[m], h);
        FP4_KEEP_ORDER(low16[m]);
        FP4_KEEP_ORDER(high16[m]);
      }
    }
    const __m256* s = reinterpret_cast<const __m256*>(w_scales);
    const __m256i* times = reinterpret_cast<const __m256i*>(kOnes);
    if constexpr (whole) times = reinterpret_cast<const __m256i*>(w_scales);
    asm("" : "+r"(times));  // Keeps these in memory: the loop needs one register more than there are.
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const __m256i c = broadcast(x + M * size + 4 * m);
      const __m256 scale = _mm256_castsi256_ps(broadcast(x + M * (size + 4) + 4 * m));
      const __m256i l = _mm256_madd_epi16(_mm256_add_epi16(low16[m], c), times[0]);
      const __m256i h = _mm256_madd_epi16(_mm256_add_epi16(high16[m], c), times[whole ? 1 : 0]);
      if constexpr (whole) {
        low[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(l), scale, low[m]);
        high[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(h), scale, high[m]);
      } else {
        // Not dot * (scale * s): the product of two scales can overflow where that of the values does not.
        low[m] = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(l), scale), s[0], low[m]);
        high[m] = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(h), scale), s[1], high[m]);
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    _mm256_storeu_ps(sum + m * kPanelRows, low[m]);
    _mm256_storeu_ps(sum + m * kPanelRows + 8, high[m]);
  }
}

template <Format F, bool whole>
constexpr auto kMultiplyInteger = kernels_by_rows<3>([](auto m) { return multiply_integer_rows<F, m, whole>; });

template <Format F, bool whole>
void multiply_integer(const uint8_t* x, int rows, const DecodedBlocks<uint8_t>& w, float* sum) {
  kMultiplyInteger<F, whole>[rows - 1](x, w, sum);
}

// E4M3 scales from 2^-3 on are whole numbers of 2^-6, of which 448 fits into 16 bits. Smaller ones are rare: those of
// blocks whose largest weight is below a thousandth of its tensor's.
constexpr float kScaleUnit = 0x1p-6f;

AVX2 bool convert_scales(float* scales, int64_t blocks) {
  const __m256 per_unit = _mm256_set1_ps(1 / kScaleUnit);
  __m256 equal = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
  for (int64_t i = 0; i < blocks * kPanelRows; i += 8) {
    const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(scales + i), per_unit);
    _mm256_storeu_ps(scales + i, scaled);
    equal = _mm256_and_ps(equal, _mm256_cmp_ps(scaled, _mm256_cvtepi32_ps(_mm256_cvtps_epi32(scaled)), _CMP_EQ_OQ));
  }
  if (_mm256_movemask_ps(equal) != 0xFF) return false;
  for (int64_t i = 0; i < blocks * kPanelRows; i += 8) {
    const __m256i whole = _mm256_cvtps_epi32(_mm256_loadu_ps(scales + i));
    const __m256i pairs = _mm256_blend_epi16(whole, _mm256_slli_epi32(whole, 16), 0xAA);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(scales + i), pairs);
  }
  return true;
}

constexpr WholeScales kWholeScales = {
    .unit = kScaleUnit,
    .convert = convert_scales,
    .multiply = multiply_integer<Format::nvfp4, true>,
};

template <int N>
AVX2_INLINE void rotate_columns(const float* x, const float* rotation, int64_t h, float* out) {
  __m256 sum[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) sum[n] = _mm256_setzero_ps();
  for (int64_t i = 0; i < h; ++i, rotation += h) {
    const __m256 value = _mm256_set1_ps(x[i]);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sum[n] = _mm256_fmadd_ps(value, _mm256_loadu_ps(rotation + 8 * n), sum[n]);
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) _mm256_storeu_ps(out + 8 * n, sum[n]);
}

AVX2 void rotate(const float* x, int64_t groups, const float* rotation, int64_t h, float* out) {
  if (h % 16 != 0) return kScalarMatmul.rotate(x, groups, rotation, h, out);
  for (int64_t g = 0; g < groups; ++g, x += h, out += h) {
    int64_t j = 0;
    for (; j + 64 <= h; j += 64) rotate_columns<8>(x, rotation + j, h, out + j);
    for (; j < h; j += 16) rotate_columns<2>(x, rotation + j, h, out + j);
  }
}

AVX2 void load(const void* from, Dtype dtype, int64_t n, float* to) {
  const uint16_t* half = static_cast<const uint16_t*>(from);
  const int64_t whole = n / 8 * 8;
  if (dtype == Dtype::bfloat16) {
    for (int64_t i = 0; i < whole; i += 8) {
      const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(half + i));
      _mm256_storeu_ps(to + i, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)));
    }
  } else if (dtype == Dtype::float16) {
    for (int64_t i = 0; i < whole; i += 8) {
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half + i))));
    }
  } else {
    return kScalarMatmul.load(from, dtype, n, to);
  }
  kScalarMatmul.load(half + whole, dtype, n - whole, to + whole);
}

AVX2 void store(const float* from, Dtype dtype, int64_t n, void* to) {
  uint16_t* half = static_cast<uint16_t*>(to);
  const int64_t whole = n / 8 * 8;
  if (dtype == Dtype::bfloat16) {
    for (int64_t i = 0; i < whole; i += 8) {
      const __m256 value = _mm256_loadu_ps(from + i);
      const __m256i bits = _mm256_castps_si256(value);
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
      const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
      const __m256 is_nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
      const __m256i words = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(is_nan)), 16);
      const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(half + i), _mm256_castsi256_si128(packed));
    }
  } else if (dtype == Dtype::float16) {
    for (int64_t i = 0; i < whole; i += 8) {
      const __m128i packed = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(half + i), packed);
    }
  } else {
    return kScalarMatmul.store(from, dtype, n, to);
  }
  kScalarMatmul.store(from + whole, dtype, n - whole, half + whole);
}

template <Format F>
constexpr FormatKernels kFormatKernels = {
    .gemv = gemv<F>,
    .decode_float = decode_float<F>,
    .lay_out_integer = lay_out_integer<F>,
    .decode_integer = decode_integer<F>,
    .multiply_integer = multiply_integer<F, /*whole=*/false>,
    .whole_scales = F == Format::nvfp4 ? &kWholeScales : nullptr,
};

}  // namespace

namespace avx2 {

template <Format F>
AVX2 void lay_out_integer_32(const int8_t* codes, const float* scales, int64_t blocks, const TileRow& to) {
  lay_out<F, 0xFFFFFFFF>(codes, scales, blocks, to);
}

template AVX2 void lay_out_integer_32<Format::nvfp4>(const int8_t*, const float*, int64_t, const TileRow&);
template AVX2 void lay_out_integer_32<Format::mxfp4>(const int8_t*, const float*, int64_t, const TileRow&);

}  // namespace avx2

const MatmulKernels kAvx2Matmul = {
    .fixed_point = &kFixedPointKernels,
    .gemv_rows = kGemv<Format::nvfp4>.size(),
    .float_tile = kMultiplyFloat.size(),
    .integer_tile = kMultiplyInteger<Format::nvfp4, false>.size(),
    .formats = {.nvfp4 = kFormatKernels<Format::nvfp4>, .mxfp4 = kFormatKernels<Format::mxfp4>},
    .multiply_float = multiply_float,
    .rotate = rotate,
    .load = load,
    .store = store,
};

}  // namespace fp4::cpu

#endif
