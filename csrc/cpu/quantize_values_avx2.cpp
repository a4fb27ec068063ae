// AVX2 kernels that read values or make them: dequantization, the largest magnitude.
#include "isa.h"

#ifdef FP4_X86
#include <immintrin.h>

#include "quantize.h"
#include "quantize_kernels.h"

#define FP4_INLINE FP4_TARGET_AVX2 __attribute__((always_inline)) static inline

namespace fp4::cpu::detail {

namespace {

FP4_INLINE __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

FP4_INLINE __m256i round_to_bfloat16(__m256 value) {  // 8 words; a NaN made by a NaN scale has no low bits to carry
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
}

template <int B, Dtype D>
FP4_TARGET_AVX2 void dequantize_blocks(const uint8_t* codes, const uint8_t* scales, const float* effective,
                                       int64_t blocks, void* out) {
  const __m256 table = _mm256_loadu_ps(kE2m1);
  const __m128i nibble = _mm_set1_epi8(15);
  const __m256i sign = _mm256_set1_epi32(static_cast<int>(0x80000000u));
  auto* words = static_cast<float*>(out);
  auto* halves = static_cast<uint16_t*>(out);
  for (int64_t at = 0; at < blocks * B; at += 16) {
    const __m256 scale = _mm256_set1_ps(effective[scales[at / B]]);
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + at / 2));
    const __m128i low = _mm_and_si128(bytes, nibble);
    const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble);
    const __m128i both = _mm_unpacklo_epi8(low, high);
    __m256 value[2];
    for (int i = 0; i < 2; ++i) {
      const __m256i code = _mm256_cvtepu8_epi32(i == 0 ? both : _mm_srli_si128(both, 8));
      const __m256i its_sign = _mm256_and_si256(_mm256_slli_epi32(code, 28), sign);
      const __m256 magnitude = _mm256_mul_ps(_mm256_permutevar8x32_ps(table, code), scale);
      value[i] = _mm256_xor_ps(magnitude, _mm256_castsi256_ps(its_sign));
    }
    if (D == Dtype::float32) {
      _mm256_storeu_ps(words + at, value[0]);
      _mm256_storeu_ps(words + at + 8, value[1]);
    } else if (D == Dtype::bfloat16) {
      const __m256i packed = _mm256_packus_epi32(round_to_bfloat16(value[0]), round_to_bfloat16(value[1]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(halves + at), _mm256_permute4x64_epi64(packed, 0xd8));
    } else {
      for (int i = 0; i < 2; ++i) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(halves + at + 8 * i),
                         _mm256_cvtps_ph(value[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
      }
    }
  }
}

FP4_TARGET_AVX2 uint32_t abs_max16(const void* x, int64_t n) {
  const auto* bits = static_cast<const uint16_t*>(x);
  const __m256i mask = _mm256_set1_epi16(0x7fff);
  __m256i most[4] = {};
  int64_t at = 0;
  for (; at + 64 <= n; at += 64) {
    for (int i = 0; i < 4; ++i) {
      most[i] = _mm256_max_epi16(most[i], _mm256_and_si256(load(bits + at + 16 * i), mask));
    }
  }
  alignas(32) uint16_t lanes[64];
  for (int i = 0; i < 4; ++i) _mm256_store_si256(reinterpret_cast<__m256i*>(lanes + 16 * i), most[i]);
  uint32_t largest = 0;
  for (uint16_t lane : lanes) largest = lane > largest ? lane : largest;
  for (; at < n; ++at) {
    const uint32_t here = bits[at] & 0x7fffu;
    largest = here > largest ? here : largest;
  }
  return largest;
}

FP4_TARGET_AVX2 uint32_t abs_max32(const void* x, int64_t n) {
  const auto* bits = static_cast<const uint32_t*>(x);
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  __m256i most[4] = {};
  int64_t at = 0;
  for (; at + 32 <= n; at += 32) {
    for (int i = 0; i < 4; ++i) {
      most[i] = _mm256_max_epi32(most[i], _mm256_and_si256(load(bits + at + 8 * i), mask));
    }
  }
  alignas(32) uint32_t lanes[32];
  for (int i = 0; i < 4; ++i) _mm256_store_si256(reinterpret_cast<__m256i*>(lanes + 8 * i), most[i]);
  uint32_t largest = 0;
  for (uint32_t lane : lanes) largest = lane > largest ? lane : largest;
  for (; at < n; ++at) {
    const uint32_t here = bits[at] & 0x7fffffffu;
    largest = here > largest ? here : largest;
  }
  return largest;
}

template <Format F>
constexpr PerDtype<DequantizeBlocks> kDequantize = {
    .float32 = dequantize_blocks<block_size(F), Dtype::float32>,
    .bfloat16 = dequantize_blocks<block_size(F), Dtype::bfloat16>,
    .float16 = dequantize_blocks<block_size(F), Dtype::float16>,
};

}  // namespace

const ValueKernels kAvx2Values = {
    .dequantize = {.nvfp4 = kDequantize<Format::nvfp4>, .mxfp4 = kDequantize<Format::mxfp4>},
    .abs_max16 = abs_max16,
    .abs_max32 = abs_max32,
};

}  // namespace fp4::cpu::detail

#endif  // FP4_X86
