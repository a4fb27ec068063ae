// AVX-512 kernels (F, BW, VL, DQ, VNNI), in which the sixteen rows of a panel are one vector. Kernels that are no inner
// loop are those of AVX2.
#include "matmul_avx2.h"

#ifdef FP4_X86

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own header (_mm512_undefined_epi32)
#endif

#include <immintrin.h>

#include <cstring>

#include "kernels_by_rows.h"

#define AVX512 FP4_TARGET_AVX512
#define AVX512_INLINE FP4_TARGET_AVX512 __attribute__((always_inline)) inline

namespace fp4::cpu {
namespace {

// Block scales of the sixteen rows (see matmul_avx2.cpp).
template <Format F>
AVX512_INLINE __m512 load_scales(const uint8_t* scales, __m512 unit) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales));
  if constexpr (F == Format::nvfp4) {
    const __m256i shifted = _mm256_srai_epi16(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8), 1);
    const __m256i half = _mm256_and_si256(shifted, _mm256_set1_epi16(static_cast<short>(0xBFFF)));
    return _mm512_mul_ps(_mm512_cvtph_ps(half), unit);
  } else {
    const __m512i exponent = _mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 23);
    return _mm512_mul_ps(_mm512_castsi512_ps(_mm512_max_epi32(exponent, _mm512_set1_epi32(0x00400000))), unit);
  }
}

template <Format F>
AVX512_INLINE __m512 scale_unit(float global_scale) {
  return _mm512_set1_ps(F == Format::nvfp4 ? global_scale * 256.0f : global_scale);
}

// Four columns of the sixteen rows.
struct Columns {
  __m512 k0, k1, k2, k3;
};

AVX512_INLINE Columns load_columns(const uint8_t* codes) {
  const __m512 values = _mm512_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6);
  // Words in kWordRow order -> rows in order. A permutation by values looks at the low four bits of an index only.
  const __m256i words = _mm256_permute4x64_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)), 0xD8);
  const __m512i rows = _mm512_cvtepu16_epi32(words);
  return {_mm512_permutexvar_ps(rows, values), _mm512_permutexvar_ps(_mm512_srli_epi32(rows, 4), values),
          _mm512_permutexvar_ps(_mm512_srli_epi32(rows, 8), values),
          _mm512_permutexvar_ps(_mm512_srli_epi32(rows, 12), values)};
}

template <Format F, int M>
AVX512 void gemv_rows(const PackedBlocks& panel, float global_scale, const float* x, float* y) {
  constexpr int size = block_size(F);
  auto [codes, scales, blocks] = panel;
  const __m512 unit = scale_unit<F>(global_scale);
  __m512 sum[M];
  for (int m = 0; m < M; ++m) sum[m] = _mm512_setzero_ps();
  for (int64_t b = 0; b < blocks; ++b, codes += block_bytes(F), scales += kPanelRows, x += size * M) {
    __m512 even[M], odd[M];
    for (int m = 0; m < M; ++m) even[m] = odd[m] = _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int k = 0; k < size; k += 4) {
      const Columns w = load_columns(codes + 8 * k);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        even[m] = _mm512_fmadd_ps(w.k0, _mm512_set1_ps(x[(k + 0) * M + m]), even[m]);
        odd[m] = _mm512_fmadd_ps(w.k1, _mm512_set1_ps(x[(k + 1) * M + m]), odd[m]);
        even[m] = _mm512_fmadd_ps(w.k2, _mm512_set1_ps(x[(k + 2) * M + m]), even[m]);
        odd[m] = _mm512_fmadd_ps(w.k3, _mm512_set1_ps(x[(k + 3) * M + m]), odd[m]);
      }
    }
    const __m512 s = load_scales<F>(scales, unit);
    for (int m = 0; m < M; ++m) sum[m] = _mm512_fmadd_ps(_mm512_add_ps(even[m], odd[m]), s, sum[m]);
  }
  for (int m = 0; m < M; ++m) _mm512_storeu_ps(y + m * kPanelRows, sum[m]);
}

template <Format F>
constexpr auto kGemv = kernels_by_rows<4>([](auto m) { return gemv_rows<F, m>; });

template <Format F>
void gemv(const PackedBlocks& w, float global_scale, const float* x, int rows, float* y) {
  kGemv<F>[rows - 1](w, global_scale, x, y);
}

template <Format F>
AVX512 void decode_float(const PackedBlocks& panel, float global_scale, float* out) {
  constexpr int size = block_size(F);
  auto [codes, scales, blocks] = panel;
  const __m512 unit = scale_unit<F>(global_scale);
  for (int64_t b = 0; b < blocks; ++b, scales += kPanelRows) {
    const __m512 s = load_scales<F>(scales, unit);
    for (int k = 0; k < size; k += 4, codes += 32, out += 4 * kPanelRows) {
      const Columns w = load_columns(codes);
      _mm512_storeu_ps(out + 0, _mm512_mul_ps(w.k0, s));
      _mm512_storeu_ps(out + 16, _mm512_mul_ps(w.k1, s));
      _mm512_storeu_ps(out + 32, _mm512_mul_ps(w.k2, s));
      _mm512_storeu_ps(out + 48, _mm512_mul_ps(w.k3, s));
    }
  }
}

template <int M>
AVX512 void multiply_float_rows(const float* x, const float* w, int64_t k, float* sum) {
  __m512 total[M];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) total[m] = _mm512_loadu_ps(sum + m * kPanelRows);
  for (int64_t i = 0; i < k; ++i, x += M, w += kPanelRows) {
    const __m512 column = _mm512_loadu_ps(w);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) total[m] = _mm512_fmadd_ps(column, _mm512_set1_ps(x[m]), total[m]);
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) _mm512_storeu_ps(sum + m * kPanelRows, total[m]);
}

constexpr auto kMultiplyFloat = kernels_by_rows<12>([](auto m) { return multiply_float_rows<m>; });

void multiply_float(const float* x, int rows, const float* w, int64_t k, float* sum) {
  kMultiplyFloat[rows - 1](x, w, k, sum);
}

template <Format F, int M>
AVX512 void multiply_integer_rows(const uint8_t* x, const DecodedBlocks<uint8_t>& decoded, float* sum) {
  constexpr int size = block_size(F);
  auto [w, w_scales, blocks] = decoded;
  __m512 total[M];
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) total[m] = _mm512_loadu_ps(sum + m * kPanelRows);
  for (int64_t b = 0; b < blocks; ++b, x += integer_block_bytes(F, M), w_scales += kPanelRows) {
    __m512i dot[M];
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      int32_t correction;
      std::memcpy(&correction, x + M * size + 4 * m, 4);
      dot[m] = _mm512_set1_epi32(correction);
    }
#pragma GCC unroll 8
    for (int q = 0; q < size / 4; ++q, w += 4 * kPanelRows) {
      const __m512i weights = _mm512_loadu_si512(w);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        int32_t four;
        std::memcpy(&four, x + (q * M + m) * 4, 4);
        dot[m] = _mm512_dpbusd_epi32(dot[m], weights, _mm512_set1_epi32(four));
      }
    }
    const __m512 s = _mm512_loadu_ps(w_scales);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      float scale;
      std::memcpy(&scale, x + M * (size + 4) + 4 * m, 4);
      total[m] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(dot[m]), _mm512_set1_ps(scale)), s, total[m]);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) _mm512_storeu_ps(sum + m * kPanelRows, total[m]);
}

template <Format F>
constexpr auto kMultiplyInteger = kernels_by_rows<6>([](auto m) { return multiply_integer_rows<F, m>; });

template <Format F>
void multiply_integer(const uint8_t* x, int rows, const DecodedBlocks<uint8_t>& w, float* sum) {
  kMultiplyInteger<F>[rows - 1](x, w, sum);
}

template <Format F>
FormatKernels format_kernels() {
  return {
      .gemv = gemv<F>,
      .decode_float = decode_float<F>,
      .lay_out_integer = avx2::lay_out_integer_32<F>,
      .decode_integer = kAvx2Matmul.formats[F].decode_integer,
      .multiply_integer = multiply_integer<F>,
      .whole_scales = nullptr,
  };
}

}  // namespace

// kAvx2Matmul is a constant, so it is there before this table is filled when the library is loaded.
const MatmulKernels kAvx512Matmul = {
    .fixed_point = nullptr,
    .gemv_rows = kGemv<Format::nvfp4>.size(),
    .float_tile = kMultiplyFloat.size(),
    .integer_tile = kMultiplyInteger<Format::nvfp4>.size(),
    .formats = {.nvfp4 = format_kernels<Format::nvfp4>(), .mxfp4 = format_kernels<Format::mxfp4>()},
    .multiply_float = multiply_float,
    .rotate = kAvx2Matmul.rotate,
    .load = kAvx2Matmul.load,
    .store = kAvx2Matmul.store,
};

}  // namespace fp4::cpu

#endif
