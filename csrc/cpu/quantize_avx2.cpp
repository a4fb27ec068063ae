// AVX2 kernels. Groups of eight blocks: their largest magnitudes fill one vector, so that the division and the rounding
// of a block scale cost an eighth each; then seven integer comparisons per vector of elements give the codes.
#include "isa.h"

#ifdef FP4_X86
#include <immintrin.h>

#include "quantize.h"
#include "quantize_kernels.h"

// FMA is left out of the target on purpose: a compiler must not fuse what the reference rounds twice.
#define FP4_MEMBER FP4_TARGET_AVX2 __attribute__((always_inline)) inline
#define FP4_INLINE static FP4_MEMBER

namespace fp4::cpu::detail {

namespace {

FP4_INLINE __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// --- codes -----------------------------------------------------------------------------------------------------------

// Minus the number of thresholds that each of 8 (or, for 16-bit lanes, 16) magnitudes passes.
FP4_INLINE __m256i passed32(__m256i magnitude, const ScaleRow& row) {
  __m256i sum = _mm256_cmpgt_epi32(magnitude, load(row.thresholds[0]));
  for (int i = 1; i < 7; ++i) sum = _mm256_add_epi32(sum, _mm256_cmpgt_epi32(magnitude, load(row.thresholds[i])));
  return sum;
}

FP4_INLINE __m256i passed16(__m256i magnitude, const ScaleRow& row) {
  __m256i sum = _mm256_cmpgt_epi16(magnitude, load(row.thresholds[0]));
  for (int i = 1; i < 7; ++i) sum = _mm256_add_epi16(sum, _mm256_cmpgt_epi16(magnitude, load(row.thresholds[i])));
  return sum;
}

// Codes of 32 elements, one a byte, from elements and sums of `passed` both narrowed to bytes (whose sign they keep).
FP4_INLINE __m256i join(__m256i narrow_x, __m256i narrow_sum) {
  const __m256i sign = _mm256_and_si256(_mm256_srli_epi16(narrow_x, 4), _mm256_set1_epi8(8));
  return _mm256_sub_epi8(sign, narrow_sum);
}

// Codes of 32 elements, the first 16 under scale `low`. Eight-byte pieces come in the order 0 2 1 3.
FP4_INLINE __m256i codes_of_32(const uint16_t* x, const ScaleRow& low, const ScaleRow& high) {
  const __m256i mask = _mm256_set1_epi16(0x7fff);
  const __m256i a = load(x), b = load(x + 16);
  return join(_mm256_packs_epi16(a, b), _mm256_packs_epi16(passed16(_mm256_and_si256(a, mask), low),
                                                           passed16(_mm256_and_si256(b, mask), high)));
}

FP4_INLINE __m256i codes_of_32(const uint32_t* x, const ScaleRow& low, const ScaleRow& high) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  __m256i bits[4], sum[4];
  for (int i = 0; i < 4; ++i) {
    bits[i] = load(x + 8 * i);
    sum[i] = passed32(_mm256_and_si256(bits[i], mask), i < 2 ? low : high);
  }
  const __m256i narrow_x = _mm256_packs_epi16(_mm256_packs_epi32(bits[0], bits[1]), _mm256_packs_epi32(bits[2], bits[3]));
  const __m256i narrow_sum = _mm256_packs_epi16(_mm256_packs_epi32(sum[0], sum[1]), _mm256_packs_epi32(sum[2], sum[3]));
  // Four-byte pieces 0 2 4 6 1 3 5 7 become those of the 16-bit form: 0 1 4 5 2 3 6 7.
  return _mm256_permutevar8x32_epi32(join(narrow_x, narrow_sum), _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7));
}

// --- block scales ----------------------------------------------------------------------------------------------------

// Folds each of eight vectors of eight lanes in half until one lane is left, with Op: lane i of the result is vector i's.
template <typename Op>
FP4_INLINE __m256 fold(const __m256* v) {
  __m256 pair[4];
  for (int i = 0; i < 4; ++i) {
    pair[i] = Op::apply(_mm256_permute2f128_ps(v[2 * i], v[2 * i + 1], 0x20),
                        _mm256_permute2f128_ps(v[2 * i], v[2 * i + 1], 0x31));
  }
  __m256 four[2];
  for (int i = 0; i < 2; ++i) {
    const __m256d a = _mm256_castps_pd(pair[2 * i]), b = _mm256_castps_pd(pair[2 * i + 1]);
    four[i] = Op::apply(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
  }
  const __m256 all = Op::apply(_mm256_shuffle_ps(four[0], four[1], 0x88), _mm256_shuffle_ps(four[0], four[1], 0xdd));
  return _mm256_permutevar8x32_ps(all, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

struct Add {
  FP4_INLINE __m256 apply(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
};
struct Max32 {
  FP4_INLINE __m256 apply(__m256 a, __m256 b) {
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
  }
};
struct Max16 {
  FP4_INLINE __m256 apply(__m256 a, __m256 b) {
    return _mm256_castsi256_ps(_mm256_max_epi16(_mm256_castps_si256(a), _mm256_castps_si256(b)));
  }
};

// The largest magnitude of each block of a group.
template <int B, bool kIsHalf>
FP4_INLINE __m256 largest_of_blocks(const uint16_t* x) {
  const __m256i mask = _mm256_set1_epi16(0x7fff);
  __m256 v[kBlockGroup];
  for (int block = 0; block < kBlockGroup; ++block) {
    __m256i most = _mm256_and_si256(load(x + block * B), mask);
    if (B == 32) most = _mm256_max_epi16(most, _mm256_and_si256(load(x + block * B + 16), mask));
    v[block] = _mm256_castsi256_ps(most);
  }
  const __m256i pairs = _mm256_castps_si256(fold<Max16>(v));
  const __m256i most = _mm256_max_epi16(pairs, _mm256_slli_epi32(pairs, 16));  // in the upper half of each lane
  if (!kIsHalf) return _mm256_castsi256_ps(_mm256_and_si256(most, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  const __m256i words = _mm256_srli_epi32(most, 16);
  return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

template <int B, bool kIsHalf>
FP4_INLINE __m256 largest_of_blocks(const uint32_t* x) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  __m256 v[kBlockGroup];
  for (int block = 0; block < kBlockGroup; ++block) {
    __m256i most = _mm256_and_si256(load(x + block * B), mask);
    for (int i = 8; i < B; i += 8) most = _mm256_max_epi32(most, _mm256_and_si256(load(x + block * B + i), mask));
    v[block] = _mm256_castsi256_ps(most);
  }
  return fold<Max32>(v);
}

// Eight scales to the nearest E4M3 byte, ties to even, kept in [2^-9, 448]; NaN stays NaN. See quantize_scalar.cpp.
FP4_INLINE __m256i encode_e4m3(__m256 scale) {
  const __m256 kept = _mm256_min_ps(_mm256_max_ps(scale, _mm256_set1_ps(kE4m3Tiny)), _mm256_set1_ps(kE4m3Max));
  const __m256i bits = _mm256_castps_si256(kept);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 20), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7ffff - (120 << 23))), odd);
  const __m256i normal = _mm256_srli_epi32(up, 20);
  const __m256 is_rare = _mm256_cmp_ps(scale, _mm256_set1_ps(0x1p-6f), _CMP_NGE_UQ);  // subnormal, or NaN
  if (__builtin_expect(_mm256_movemask_ps(is_rare) == 0, 1)) return normal;
  const __m256 magic = _mm256_set1_ps(16384.0f);
  const __m256i subnormal =
      _mm256_sub_epi32(_mm256_castps_si256(_mm256_add_ps(kept, magic)), _mm256_castps_si256(magic));
  const __m256i byte = _mm256_blendv_epi8(normal, subnormal, _mm256_castps_si256(is_rare));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(scale, scale, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(byte, _mm256_set1_epi32(0x7f), nan);
}

FP4_INLINE __m256i mx_exponents(__m256 amax, const Quantizer& q) {
  const __m256i bits = _mm256_castps_si256(_mm256_div_ps(amax, _mm256_set1_ps(q.global_scale())));
  const __m256i sixth = _mm256_castps_si256(_mm256_div_ps(amax, _mm256_set1_ps(q.six_global_scales())));
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
  return _mm256_min_epi32(_mm256_max_epi32(biased, _mm256_setzero_si256()), _mm256_set1_epi32(kE8m0Max));
}

FP4_INLINE void store_bytes(__m256i words, uint8_t* out) {
  const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packus_epi16(shorts, shorts));
}

FP4_INLINE __m256i load_bytes(const uint8_t* bytes) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
}

// A block's B floats down to eight, the upper half added to the lower one.
template <int B>
FP4_INLINE __m256 halve_to_8(const __m256* v) {
  return B == 16 ? _mm256_add_ps(v[0], v[1]) : _mm256_add_ps(_mm256_add_ps(v[0], v[2]), _mm256_add_ps(v[1], v[3]));
}

// --- errors ----------------------------------------------------------------------------------------------------------

template <bool kIsHalf>
FP4_INLINE __m256 eight_floats(const uint16_t* x) {
  const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return kIsHalf ? _mm256_cvtph_ps(eight) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16));
}

template <bool kIsHalf>
FP4_INLINE __m256 eight_floats(const uint32_t* x) {
  return _mm256_castsi256_ps(load(x));
}

// The squared error of each element of a block under one scale, eight to a vector. `magnitudes` are those of x.
template <int B>
FP4_INLINE void errors_of_block(const uint16_t* x, const float* magnitudes, const ScaleRow& row, __m256* errors) {
  const __m256 values = _mm256_load_ps(row.values);
  for (int i = 0; i < B; i += 16) {
    const __m256i passed = passed16(_mm256_and_si256(load(x + i), _mm256_set1_epi16(0x7fff)), row);
    const __m256i codes[2] = {_mm256_cvtepi16_epi32(_mm256_castsi256_si128(passed)),
                              _mm256_cvtepi16_epi32(_mm256_extracti128_si256(passed, 1))};
    for (int half = 0; half < 2; ++half) {
      const __m256 value = _mm256_permutevar8x32_ps(values, codes[half]);
      const __m256 error = _mm256_sub_ps(value, _mm256_load_ps(magnitudes + i + 8 * half));
      errors[i / 8 + half] = _mm256_mul_ps(error, error);
    }
  }
}

template <int B>
FP4_INLINE void errors_of_block(const uint32_t*, const float* magnitudes, const ScaleRow& row, __m256* errors) {
  const __m256 values = _mm256_load_ps(row.values);
  for (int i = 0; i < B; i += 8) {
    const __m256i magnitude = load(magnitudes + i);
    const __m256 value = _mm256_permutevar8x32_ps(values, passed32(magnitude, row));
    const __m256 error = _mm256_sub_ps(value, _mm256_castsi256_ps(magnitude));
    errors[i / 8] = _mm256_mul_ps(error, error);
  }
}

// The scales of a group's blocks that have the least squared error of those tried.
template <int B, bool kIsHalf, typename Bits>
class Search {
 public:
  FP4_MEMBER Search(const Quantizer& q, const Bits* x, __m256i first) : q_(q), x_(x), best_(first) {
    const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    for (int i = 0; i < kBlockGroup * B; i += 8) {
      _mm256_store_ps(magnitudes_ + i, _mm256_and_ps(eight_floats<kIsHalf>(x + i), mask));
    }
    least_ = squared_errors(first);
  }

  // Takes a block's candidate if its error is smaller than the least so far.
  FP4_MEMBER void offer(__m256i candidates) {
    const __m256 errors = squared_errors(candidates);
    const __m256 better = _mm256_cmp_ps(errors, least_, _CMP_LT_OQ);
    least_ = _mm256_blendv_ps(least_, errors, better);
    best_ = _mm256_blendv_epi8(best_, candidates, _mm256_castps_si256(better));
  }

  // Whether these scales, and smaller ones still, are no better for any block, because of what clipping its largest
  // magnitude costs alone: that is one term of the error, and rounded sums of what is not negative never fall below it.
  FP4_MEMBER bool clip_too_much(__m256i candidates, __m256 largest) const {
    static_assert(sizeof(ScaleRow) == 256, "scale bytes count rows of 64 floats");
    const __m256 six = _mm256_i32gather_ps(q_.rows()->values + 1, _mm256_slli_epi32(candidates, 6), 4);
    const __m256 excess = _mm256_max_ps(_mm256_sub_ps(largest, six), _mm256_setzero_ps());
    const __m256 hopeless = _mm256_cmp_ps(_mm256_mul_ps(excess, excess), least_, _CMP_NLT_UQ);
    return _mm256_movemask_ps(hopeless) == 0xff;
  }

  FP4_MEMBER __m256i best() const { return best_; }

 private:
  FP4_MEMBER __m256 squared_errors(__m256i scales) const {
    uint8_t bytes[kBlockGroup];
    store_bytes(scales, bytes);
    __m256 sums[kBlockGroup];
    for (int block = 0; block < kBlockGroup; ++block) {
      __m256 errors[B / 8];
      errors_of_block<B>(x_ + block * B, magnitudes_ + block * B, q_.rows()[bytes[block]], errors);
      sums[block] = halve_to_8<B>(errors);
    }
    return fold<Add>(sums);
  }

  const Quantizer& q_;
  const Bits* x_;
  __m256i best_;
  __m256 least_;
  alignas(32) float magnitudes_[kBlockGroup * B];
};

// The `mse` rule: the best of the neighbours of the abs_max scales.
template <int B, bool kIsHalf, typename Bits>
FP4_TARGET_AVX2 __attribute__((noinline)) __m256i best_neighbour(const Quantizer& q, const Bits* x, __m256i start,
                                                                 __m256 largest) {
  const __m256i low = _mm256_set1_epi32(B == 16 ? 1 : 0), high = _mm256_set1_epi32(B == 16 ? 126 : kE8m0Max);
  const int8_t* offsets = B == 16 ? kNvfp4Offsets : kMxfp4Offsets;
  Search<B, kIsHalf, Bits> search(q, x, _mm256_min_epi32(_mm256_max_epi32(start, low), high));
  bool smaller = true;  // whether smaller scales than these are worth a try
  for (int i = 1; i < (B == 16 ? 17 : 3); ++i) {
    const __m256i moved = _mm256_add_epi32(start, _mm256_set1_epi32(offsets[i]));
    const __m256i candidates = _mm256_min_epi32(_mm256_max_epi32(moved, low), high);
    if (offsets[i] < 0) {
      smaller = smaller && !search.clip_too_much(candidates, largest);
      if (!smaller) continue;
    }
    search.offer(candidates);
  }
  return search.best();
}

template <int B, bool kIsHalf, typename Bits>
FP4_INLINE __m256i quest_exponents(const Bits* x, float global_scale) {
  __m256 v[kBlockGroup][B / 8], sums[kBlockGroup];
  for (int block = 0; block < kBlockGroup; ++block) {
    for (int i = 0; i < B / 8; ++i) v[block][i] = eight_floats<kIsHalf>(x + block * B + 8 * i);
    sums[block] = halve_to_8<B>(v[block]);
  }
  alignas(32) float mean[kBlockGroup];
  _mm256_store_ps(mean, _mm256_mul_ps(fold<Add>(sums), _mm256_set1_ps(1.0f / B)));
  for (int block = 0; block < kBlockGroup; ++block) {
    for (int i = 0; i < B / 8; ++i) {
      const __m256 deviation = _mm256_sub_ps(v[block][i], _mm256_set1_ps(mean[block]));
      v[block][i] = _mm256_mul_ps(deviation, deviation);
    }
    sums[block] = halve_to_8<B>(v[block]);
  }
  const __m256 std = _mm256_sqrt_ps(_mm256_mul_ps(fold<Add>(sums), _mm256_set1_ps(1.0f / B)));
  const __m256 scaled = _mm256_add_ps(_mm256_mul_ps(std, _mm256_set1_ps(kQuestFactor)), _mm256_set1_ps(1e-8f));
  const __m256i biased = _mm256_srai_epi32(_mm256_castps_si256(_mm256_div_ps(scaled, _mm256_set1_ps(global_scale))), 23);
  return _mm256_min_epi32(_mm256_max_epi32(biased, _mm256_setzero_si256()), _mm256_set1_epi32(kE8m0Max));
}

// Block scales of a group.
template <int B, bool kIsHalf, typename Bits>
FP4_INLINE void choose_scales(const Quantizer& q, const Bits* x, uint8_t* scales) {
  const __m256 largest = largest_of_blocks<B, kIsHalf>(x);
  __m256i best;
  if constexpr (B == 32) {
    best = mx_exponents(largest, q);
  } else {
    best = encode_e4m3(_mm256_div_ps(largest, _mm256_set1_ps(q.six_global_scales())));
    if (q.rule() == Rule::abs_max) return store_bytes(best, scales);
  }
  if (q.rule() == Rule::mse) best = best_neighbour<B, kIsHalf>(q, x, best, largest);
  if (B == 32 && q.rule() == Rule::quest) best = quest_exponents<B, kIsHalf>(x, q.global_scale());
  if (B == 16 && q.rule() == Rule::four_over_six) {
    Search<B, kIsHalf, Bits> search(q, x, best);
    search.offer(encode_e4m3(_mm256_div_ps(largest, _mm256_set1_ps(q.four_global_scales()))));
    best = search.best();
  }
  const __m256 nan = _mm256_cmp_ps(largest, largest, _CMP_UNORD_Q);
  store_bytes(_mm256_blendv_epi8(best, _mm256_set1_epi32(nan_scale(B)), _mm256_castps_si256(nan)), scales);
}

// --- groups ----------------------------------------------------------------------------------------------------------

// Two results of codes_of_32 -> 32 bytes of two codes, in order.
FP4_INLINE __m256i pack_64(__m256i first, __m256i second) {
  const __m256i nibbles = _mm256_set1_epi16(0x1001);  // even column + 16 * odd column
  const __m256i packed = _mm256_packus_epi16(_mm256_maddubs_epi16(first, nibbles), _mm256_maddubs_epi16(second, nibbles));
  return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

FP4_INLINE __m256i doubled_values(__m256i codes) {
  const __m256i table = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
  return _mm256_shuffle_epi8(table, _mm256_permute4x64_epi64(codes, 0xd8));
}

template <int B, typename Bits, bool kIsHalf, bool kIsDoubled>
FP4_TARGET_AVX2 void quantize_groups(const Quantizer& q, const void* elements, int64_t groups, void* codes,
                                     uint8_t* scales, bool stream) {
  const Bits* x = static_cast<const Bits*>(elements);
  uint8_t* out = static_cast<uint8_t*>(codes);
  const ScaleRow* rows = q.rows();
  // Scales of a few groups first, then their codes: the long way from a magnitude to its scale overlaps between groups.
  constexpr int64_t kAhead = 8;
  while (groups > 0) {
    const int64_t now = groups < kAhead ? groups : kAhead;
    for (int64_t group = 0; group < now; ++group) {
      choose_scales<B, kIsHalf>(q, x + group * kBlockGroup * B, scales + group * kBlockGroup);
    }
    const uint8_t* scale = scales;
    const Bits* next = x + now * kBlockGroup * B;  // fetched meanwhile: comparing leaves the memory idle
    for (int64_t i = 0; i < now * kBlockGroup * B / 64; ++i, x += 64, scale += 64 / B) {
      for (size_t line = 0; line < sizeof(Bits); ++line) {
        _mm_prefetch(reinterpret_cast<const char*>(next) + line * 64, _MM_HINT_T0);
      }
      next += 64;
      const ScaleRow* row[4];  // of each 16 elements
      for (int j = 0; j < 4; ++j) row[j] = rows + scale[j * 16 / B];
      const __m256i first = codes_of_32(x, *row[0], *row[1]);
      const __m256i second = codes_of_32(x + 32, *row[2], *row[3]);
      if (kIsDoubled) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), doubled_values(first));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32), doubled_values(second));
        out += 64;
      } else {
        if (stream) {
          _mm256_stream_si256(reinterpret_cast<__m256i*>(out), pack_64(first, second));
        } else {
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), pack_64(first, second));
        }
        out += 32;
      }
    }
    scales += now * kBlockGroup;
    groups -= now;
  }
  if (stream) _mm_sfence();
}

template <Format F, bool kIsDoubled>
constexpr PerDtype<QuantizeGroups> kQuantize = {
    .float32 = quantize_groups<block_size(F), uint32_t, /*kIsHalf=*/false, kIsDoubled>,
    .bfloat16 = quantize_groups<block_size(F), uint16_t, /*kIsHalf=*/false, kIsDoubled>,
    .float16 = quantize_groups<block_size(F), uint16_t, /*kIsHalf=*/true, kIsDoubled>,
};

}  // namespace

const QuantizeKernels kAvx2Quantize = {
    .packed = {.nvfp4 = kQuantize<Format::nvfp4, false>, .mxfp4 = kQuantize<Format::mxfp4, false>},
    .doubled = {.nvfp4 = kQuantize<Format::nvfp4, true>, .mxfp4 = kQuantize<Format::mxfp4, true>},
};

}  // namespace fp4::cpu::detail

#endif  // FP4_X86
