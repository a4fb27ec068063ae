// AVX2 kernels. Groups of eight blocks: their largest magnitudes fill one vector, so that the division and the rounding
// of a block scale cost an eighth each; then seven integer comparisons per vector of elements give the codes.
#include "isa.h"

#ifdef FP4_X86
#include <immintrin.h>

#include "quantize.h"
#include "quantize_impl.h"

// FMA is left out of the target on purpose: a compiler must not fuse what the reference rounds twice.
#define FP4_INLINE FP4_TARGET_AVX2 static inline

namespace fp4::cpu::detail {

namespace {

FP4_INLINE __m256 magnitudes_of_codes() { return _mm256_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f); }

FP4_INLINE __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

FP4_INLINE __m256i broadcast(uint32_t word) { return _mm256_set1_epi32(static_cast<int>(word)); }

// --- codes -----------------------------------------------------------------------------------------------------------

// Minus the number of thresholds that each of 8 (or, for 16-bit lanes, 16) magnitudes passes.
FP4_INLINE __m256i passed32(__m256i magnitude, const ScaleRow& row) {
  __m256i sum = _mm256_cmpgt_epi32(magnitude, broadcast(row.thresholds[0]));
  for (int i = 1; i < 7; ++i) {
    sum = _mm256_add_epi32(sum, _mm256_cmpgt_epi32(magnitude, broadcast(row.thresholds[i])));
  }
  return sum;
}

FP4_INLINE __m256i passed16(__m256i magnitude, const ScaleRow& row) {
  __m256i sum = _mm256_cmpgt_epi16(magnitude, broadcast(row.thresholds[0]));
  for (int i = 1; i < 7; ++i) {
    sum = _mm256_add_epi16(sum, _mm256_cmpgt_epi16(magnitude, broadcast(row.thresholds[i])));
  }
  return sum;
}

FP4_INLINE __m256i codes_of_8(const uint32_t* x, const ScaleRow& row) {
  const __m256i bits = load(x);
  const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(bits, 28), _mm256_set1_epi32(8));
  return _mm256_sub_epi32(sign, passed32(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)), row));
}

FP4_INLINE __m256i codes_of_16(const uint16_t* x, const ScaleRow& row) {
  const __m256i bits = load(x);
  const __m256i sign = _mm256_and_si256(_mm256_srli_epi16(bits, 12), _mm256_set1_epi16(8));
  return _mm256_sub_epi16(sign, passed16(_mm256_and_si256(bits, _mm256_set1_epi16(0x7fff)), row));
}

// Codes of 32 elements in order, one a byte; `low` scales the first 16, `high` the others.
FP4_INLINE __m256i codes_of_32(const uint16_t* x, const ScaleRow& low, const ScaleRow& high) {
  const __m256i packed = _mm256_packus_epi16(codes_of_16(x, low), codes_of_16(x + 16, high));
  return _mm256_permute4x64_epi64(packed, 0xd8);
}

FP4_INLINE __m256i codes_of_32(const uint32_t* x, const ScaleRow& low, const ScaleRow& high) {
  const __m256i first = _mm256_packs_epi32(codes_of_8(x, low), codes_of_8(x + 8, low));
  const __m256i second = _mm256_packs_epi32(codes_of_8(x + 16, high), codes_of_8(x + 24, high));
  return _mm256_permutevar8x32_epi32(_mm256_packus_epi16(first, second), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// --- block scales ----------------------------------------------------------------------------------------------------

FP4_INLINE float largest_of_block(const uint16_t* x, int block, bool is_half) {
  const __m256i mask = _mm256_set1_epi16(0x7fff);
  __m256i all = _mm256_and_si256(load(x), mask);
  if (block == 32) all = _mm256_max_epi16(all, _mm256_and_si256(load(x + 16), mask));
  const __m128i half = _mm_max_epi16(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  // The only horizontal instruction there is finds a minimum.
  const __m128i ones = _mm_set1_epi16(-1);
  const __m128i most = _mm_xor_si128(_mm_minpos_epu16(_mm_xor_si128(half, ones)), ones);
  if (is_half) return _mm_cvtss_f32(_mm_cvtph_ps(most));
  return from_bits(static_cast<uint32_t>(_mm_cvtsi128_si32(most)) << 16);
}

FP4_INLINE float largest_of_block(const uint32_t* x, int block, bool) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  __m256i all = _mm256_setzero_si256();
  for (int i = 0; i < block; i += 8) all = _mm256_max_epi32(all, _mm256_and_si256(load(x + i), mask));
  __m128i most = _mm_max_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4e));
  most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0xb1));
  return from_bits(static_cast<uint32_t>(_mm_cvtsi128_si32(most)));
}

// Eight scales to the nearest E4M3 byte, ties to even, kept in [2^-9, 448]; NaN stays NaN. See quantize_scalar.cpp.
FP4_INLINE __m256i encode_e4m3(__m256 scale) {
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(scale, scale, _CMP_UNORD_Q));
  const __m256 kept = _mm256_min_ps(_mm256_max_ps(scale, _mm256_set1_ps(kE4m3Tiny)), _mm256_set1_ps(kE4m3Max));
  const __m256i bits = _mm256_castps_si256(kept);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 20), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7ffff)), odd);
  const __m256i normal = _mm256_sub_epi32(_mm256_srli_epi32(up, 20), _mm256_set1_epi32(120 << 3));
  const __m256 magic = _mm256_set1_ps(16384.0f);
  const __m256i subnormal =
      _mm256_sub_epi32(_mm256_castps_si256(_mm256_add_ps(kept, magic)), _mm256_castps_si256(magic));
  const __m256i is_small = _mm256_castps_si256(_mm256_cmp_ps(kept, _mm256_set1_ps(0x1p-6f), _CMP_LT_OQ));
  const __m256i byte = _mm256_blendv_epi8(normal, subnormal, is_small);
  return _mm256_blendv_epi8(byte, _mm256_set1_epi32(0x7f), nan);
}

FP4_INLINE __m256i mx_exponents(__m256 amax, const Quantizer& q) {
  const __m256i bits = _mm256_castps_si256(_mm256_div_ps(amax, _mm256_set1_ps(q.unit())));
  const __m256i sixth = _mm256_castps_si256(_mm256_div_ps(amax, _mm256_set1_ps(q.six_units())));
  __m256i biased;
  if (q.rule() == Rule::even) {
    biased = _mm256_sub_epi32(_mm256_srai_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(1 << 21)), 23),
                              _mm256_set1_epi32(2));
  } else if (q.rule() == Rule::ceil) {
    biased = _mm256_srai_epi32(_mm256_add_epi32(sixth, _mm256_set1_epi32(0x7fffff)), 23);
  } else if (q.rule() == Rule::below_six) {
    biased = _mm256_add_epi32(_mm256_srai_epi32(sixth, 23), _mm256_set1_epi32(1));
  } else {
    biased = _mm256_sub_epi32(_mm256_srai_epi32(bits, 23), _mm256_set1_epi32(2));
  }
  return _mm256_min_epi32(_mm256_max_epi32(biased, _mm256_setzero_si256()), _mm256_set1_epi32(254));
}

FP4_INLINE void store_bytes(__m256i words, uint8_t* out) {
  const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packus_epi16(shorts, shorts));
}

// Sum of B floats, the upper half added to the lower until one is left. B / 8 vectors.
template <int B>
FP4_INLINE float sum_by_halving(const __m256* v) {
  const __m256 eight = B == 16 ? _mm256_add_ps(v[0], v[1])
                               : _mm256_add_ps(_mm256_add_ps(v[0], v[2]), _mm256_add_ps(v[1], v[3]));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

template <int B>
FP4_INLINE float squared_error(const float* x, const ScaleRow& row) {
  const __m256 table = magnitudes_of_codes();
  const __m256 scale = _mm256_set1_ps(row.effective);
  __m256 errors[B / 8];
  for (int i = 0; i < B / 8; ++i) {
    const __m256i magnitude = _mm256_and_si256(load(x + 8 * i), _mm256_set1_epi32(0x7fffffff));
    const __m256i code = _mm256_sub_epi32(_mm256_setzero_si256(), passed32(magnitude, row));
    const __m256 value = _mm256_mul_ps(_mm256_permutevar8x32_ps(table, code), scale);
    const __m256 error = _mm256_sub_ps(value, _mm256_castsi256_ps(magnitude));
    errors[i] = _mm256_mul_ps(error, error);
  }
  return sum_by_halving<B>(errors);
}

template <int B>
FP4_INLINE uint8_t quest_scale(const float* x, float unit) {
  __m256 v[B / 8];
  for (int i = 0; i < B / 8; ++i) v[i] = _mm256_loadu_ps(x + 8 * i);
  const __m256 mean = _mm256_set1_ps(sum_by_halving<B>(v) / B);
  for (int i = 0; i < B / 8; ++i) {
    const __m256 deviation = _mm256_sub_ps(v[i], mean);
    v[i] = _mm256_mul_ps(deviation, deviation);
  }
  const float std = _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(sum_by_halving<B>(v) / B)));
  const int32_t bits = static_cast<int32_t>(bits_of((std * kQuestFactor + 1e-8f) / unit));
  return static_cast<uint8_t>(clamp_int(bits >> 23, 0, 254));
}

// The better of scale bytes: `first`, then `count` candidates, an earlier one on a tie.
template <int B>
FP4_INLINE uint8_t best_scale(const Quantizer& q, const float* x, uint8_t first, const uint8_t* candidates, int count) {
  uint8_t best = first;
  float least = squared_error<B>(x, q.rows()[first]);
  for (int i = 0; i < count; ++i) {
    const float error = squared_error<B>(x, q.rows()[candidates[i]]);
    if (error < least) {
      least = error;
      best = candidates[i];
    }
  }
  return best;
}

template <int B>
FP4_INLINE void search_scales(const Quantizer& q, const float* x, const uint8_t* alternative, uint8_t* scales) {
  for (int block = 0; block < kBlockGroup; ++block, x += B) {
    if (q.rule() == Rule::quest) {
      scales[block] = quest_scale<B>(x, q.unit());
    } else if (q.rule() == Rule::four_over_six) {
      scales[block] = best_scale<B>(q, x, scales[block], alternative + block, 1);
    } else {
      constexpr int kCount = B == 16 ? 17 : 4;
      const int8_t* offsets = B == 16 ? kNvfp4Offsets : kMxfp4Offsets;
      uint8_t candidates[kCount];
      for (int i = 0; i < kCount; ++i) {
        candidates[i] = static_cast<uint8_t>(clamp_int(scales[block] + offsets[i], B == 16 ? 1 : 0, B == 16 ? 126 : 254));
      }
      scales[block] = best_scale<B>(q, x, candidates[0], candidates + 1, kCount - 1);
    }
  }
}

template <int B>
FP4_INLINE void choose_scales(const Quantizer& q, const float* amax, const void* lanes, uint8_t* scales) {
  const __m256 largest = _mm256_load_ps(amax);
  uint8_t alternative[kBlockGroup] = {};
  if (B == 16) {
    store_bytes(encode_e4m3(_mm256_div_ps(largest, _mm256_set1_ps(q.six_units()))), scales);
    if (q.rule() == Rule::abs_max) return;
    if (q.rule() == Rule::four_over_six) {
      store_bytes(encode_e4m3(_mm256_div_ps(largest, _mm256_set1_ps(q.four_units()))), alternative);
    }
  } else {
    store_bytes(mx_exponents(largest, q), scales);
    if (q.rule() != Rule::mse && q.rule() != Rule::quest) return;
  }
  search_scales<B>(q, static_cast<const float*>(lanes), alternative, scales);
}

// --- groups ----------------------------------------------------------------------------------------------------------

FP4_INLINE __m256i pack_64(__m256i first, __m256i second) {  // 64 codes, one a byte -> 32 bytes of two
  const __m256i nibbles = _mm256_set1_epi16(0x1001);         // even column + 16 * odd column
  const __m256i packed = _mm256_packus_epi16(_mm256_maddubs_epi16(first, nibbles), _mm256_maddubs_epi16(second, nibbles));
  return _mm256_permute4x64_epi64(packed, 0xd8);
}

FP4_INLINE __m256i doubled_values(__m256i codes) {
  const __m256i table = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
  return _mm256_shuffle_epi8(table, codes);
}

template <int B, typename Bits, bool kIsHalf, bool kIsDoubled>
FP4_TARGET_AVX2 void quantize_groups(const Quantizer& q, const void* lanes, int64_t groups, void* codes,
                                     uint8_t* scales, bool stream) {
  const Bits* x = static_cast<const Bits*>(lanes);
  uint8_t* out = static_cast<uint8_t*>(codes);
  const ScaleRow* rows = q.rows();
  for (int64_t group = 0; group < groups; ++group) {
    alignas(32) float amax[kBlockGroup];
    for (int block = 0; block < kBlockGroup; ++block) amax[block] = largest_of_block(x + block * B, B, kIsHalf);
    choose_scales<B>(q, amax, x, scales);
    for (int at = 0; at < kBlockGroup * B; at += 64) {
      const __m256i first = codes_of_32(x + at, rows[scales[at / B]], rows[scales[(at + 16) / B]]);
      const __m256i second = codes_of_32(x + at + 32, rows[scales[(at + 32) / B]], rows[scales[(at + 48) / B]]);
      if (kIsDoubled) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + at), doubled_values(first));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + at + 32), doubled_values(second));
      } else if (stream) {
        _mm256_stream_si256(reinterpret_cast<__m256i*>(out + at / 2), pack_64(first, second));
      } else {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + at / 2), pack_64(first, second));
      }
    }
    x += kBlockGroup * B;
    out += kBlockGroup * B / (kIsDoubled ? 1 : 2);
    scales += kBlockGroup;
  }
  if (stream) _mm_sfence();
}

// --- the way back ----------------------------------------------------------------------------------------------------

FP4_INLINE __m256i round_to_bfloat16(__m256 value) {  // 8 words; a NaN made by a NaN scale has no low bits to carry
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
}

template <int B, Dtype D>
FP4_TARGET_AVX2 void dequantize_blocks(const uint8_t* codes, const uint8_t* scales, const float* effective,
                                       int64_t blocks, void* out) {
  const __m256 table = magnitudes_of_codes();
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

// --- whole runs ------------------------------------------------------------------------------------------------------

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

FP4_TARGET_AVX2 void widen(const void* x, Dtype dtype, int64_t n, float* out) {  // n is a multiple of 16
  const auto* bits = static_cast<const uint16_t*>(x);
  for (int64_t at = 0; at < n; at += 8) {
    const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bits + at));
    const __m256 values = dtype == Dtype::float16
                              ? _mm256_cvtph_ps(eight)
                              : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16));
    _mm256_storeu_ps(out + at, values);
  }
}

template <int B, typename Bits, bool kIsHalf>
constexpr QuantizeGroups kPacked = quantize_groups<B, Bits, kIsHalf, false>;
template <int B, typename Bits, bool kIsHalf>
constexpr QuantizeGroups kDoubled = quantize_groups<B, Bits, kIsHalf, true>;

}  // namespace

const Kernels kAvx2Kernels = {
    {{{kPacked<16, uint32_t, false>, kDoubled<16, uint32_t, false>},
      {kPacked<16, uint16_t, false>, kDoubled<16, uint16_t, false>},
      {kPacked<16, uint16_t, true>, kDoubled<16, uint16_t, true>}},
     {{kPacked<32, uint32_t, false>, kDoubled<32, uint32_t, false>},
      {kPacked<32, uint16_t, false>, kDoubled<32, uint16_t, false>},
      {kPacked<32, uint16_t, true>, kDoubled<32, uint16_t, true>}}},
    {{dequantize_blocks<16, Dtype::float32>, dequantize_blocks<16, Dtype::bfloat16>,
      dequantize_blocks<16, Dtype::float16>},
     {dequantize_blocks<32, Dtype::float32>, dequantize_blocks<32, Dtype::bfloat16>,
      dequantize_blocks<32, Dtype::float16>}},
    abs_max16,
    abs_max32,
    widen};

}  // namespace fp4::cpu::detail

#endif  // FP4_X86
