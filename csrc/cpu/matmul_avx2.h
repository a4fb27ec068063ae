// What the AVX2 kernels share: decoding codes and block scales. Every function carries its target, so that the files
// are compiled with the default flags and their code runs only where isa.h found the instructions.
#pragma once

#include <cstring>

#include "matmul_kernels.h"

#ifdef FP4_X86

#include <immintrin.h>

#define AVX2 FP4_TARGET_AVX2_FMA
#define AVX2_INLINE FP4_TARGET_AVX2_FMA __attribute__((always_inline)) inline

// Stops the compiler from regrouping a chain of additions: it would hold many terms at once and spill them.
#define FP4_KEEP_ORDER(vector) asm("" : "+x"(vector))

// Stops the compiler from keeping copies of what lies behind a pointer.
#define FP4_FORGET(pointer) asm("" : "+r"(pointer) : : "memory")

namespace fp4::cpu::avx2 {

// Asks for the codes and scales of a block well ahead of its use: panels are read once, in order, across page borders,
// where the hardware's own prefetching stops. Asking beyond the last panel is harmless.
template <Format F>
AVX2_INLINE void prefetch_block(const uint8_t* codes, const uint8_t* scales) {
  constexpr int kAhead = 4096;  // bytes of codes
  const char* const next = reinterpret_cast<const char*>(codes) + kAhead;
  for (int i = 0; i < block_bytes(F); i += 64) _mm_prefetch(next + i, _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(scales) + kAhead / block_bytes(F) * kPanelRows, _MM_HINT_T0);
}

// Block scales of the rows 0-7 and 8-15 of a panel.
struct Scales {
  __m256 low, high;
};

// E4M3 passes through float16, whose exponent is one bit wider: the conversion instruction handles subnormals whatever
// the processor's denormal mode, and leaves a factor 2^8 between the biases.
template <Format F>
constexpr float kRawScaleUnit = F == Format::nvfp4 ? 256.0f : 1.0f;

// Block scales over kRawScaleUnit.
template <Format F>
AVX2_INLINE Scales raw_scales(const uint8_t* scales) {
  if constexpr (F == Format::nvfp4) {
    const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)));
    const __m256i shifted = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 1);
    const __m256i half = _mm256_and_si256(shifted, _mm256_set1_epi16(static_cast<short>(0xBFFF)));
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(half)), _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1))};
  } else {
    // An E8M0 byte is a float32 exponent field, except that 0 means the subnormal 2^-127.
    const __m256i smallest = _mm256_set1_epi32(0x00400000);
    const __m256i low = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales)));
    const __m256i high = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales + 8)));
    return {_mm256_castsi256_ps(_mm256_max_epi32(_mm256_slli_epi32(low, 23), smallest)),
            _mm256_castsi256_ps(_mm256_max_epi32(_mm256_slli_epi32(high, 23), smallest))};
  }
}

// Block scales times `unit` (scale_unit) over kRawScaleUnit.
template <Format F>
AVX2_INLINE Scales load_scales(const uint8_t* scales, __m256 unit) {
  const Scales raw = raw_scales<F>(scales);
  return {_mm256_mul_ps(raw.low, unit), _mm256_mul_ps(raw.high, unit)};
}

template <Format F>
AVX2_INLINE __m256 scale_unit(float global_scale) {
  return _mm256_set1_ps(global_scale * kRawScaleUnit<F>);
}

// Four columns as bfloat16 pairs: in each 32-bit lane of k02 column 0 (low half) and 2 of a row, in k13 columns 1 and
// 3.
struct Columns {
  __m256i k02_low, k02_high, k13_low, k13_high;  // rows 0-7 and 8-15
};

AVX2_INLINE Columns load_columns(const uint8_t* codes) {
  // The bytes of the bfloat16 values of the sixteen codes.
  const __m256i high_bytes = _mm256_broadcastsi128_si256(_mm_setr_epi8(
      0, 0x3F, 0x3F, 0x3F, 0x40, 0x40, 0x40, 0x40, static_cast<char>(0x80), static_cast<char>(0xBF),
      static_cast<char>(0xBF), static_cast<char>(0xBF), static_cast<char>(0xC0), static_cast<char>(0xC0),
      static_cast<char>(0xC0), static_cast<char>(0xC0)));
  const __m256i low_bytes = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 0, static_cast<char>(0x80), static_cast<char>(0xC0), 0, 0x40, static_cast<char>(0x80),
                    static_cast<char>(0xC0), 0, 0, static_cast<char>(0x80), static_cast<char>(0xC0), 0, 0x40,
                    static_cast<char>(0x80), static_cast<char>(0xC0)));
  const __m256i nibble = _mm256_set1_epi8(0x0F);
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  const __m256i even = _mm256_and_si256(bytes, nibble);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
  const __m256i even_high = _mm256_shuffle_epi8(high_bytes, even), even_low = _mm256_shuffle_epi8(low_bytes, even);
  const __m256i odd_high = _mm256_shuffle_epi8(high_bytes, odd), odd_low = _mm256_shuffle_epi8(low_bytes, odd);
  return {_mm256_unpacklo_epi8(even_low, even_high), _mm256_unpackhi_epi8(even_low, even_high),
          _mm256_unpacklo_epi8(odd_low, odd_high), _mm256_unpackhi_epi8(odd_low, odd_high)};
}

// What a table of sixteen bytes, in both of its halves, holds for the codes of four columns (layout.h).
struct LookedUp {
  __m256i even, odd;  // columns 0 and 2, 1 and 3
};

AVX2_INLINE LookedUp look_up(__m256i table, const uint8_t* codes) {
  const __m256i nibble = _mm256_set1_epi8(0x0F);
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  return {_mm256_shuffle_epi8(table, _mm256_and_si256(bytes, nibble)),
          _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble))};
}

// The table of doubled E2M1 values, kCodeBias too large.
AVX2_INLINE __m256i biased_table() {
  return _mm256_broadcastsi128_si256(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
}

// Four bytes to all lanes.
AVX2_INLINE __m256i broadcast(const uint8_t* from) {
  int32_t four;
  std::memcpy(&four, from, 4);
  return _mm256_set1_epi32(four);
}

AVX2_INLINE __m256 first(__m256i pair) { return _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16)); }

AVX2_INLINE __m256 second(__m256i pair) {
  return _mm256_castsi256_ps(_mm256_and_si256(pair, _mm256_set1_epi32(static_cast<int>(0xFFFF0000))));
}

extern const FixedPointKernels kFixedPointKernels;

// lay_out_integer with corrections of 32 bits.
template <Format F>
AVX2 void lay_out_integer_32(const int8_t* codes, const float* scales, int64_t blocks, const TileRow& to);

}  // namespace fp4::cpu::avx2

#endif
