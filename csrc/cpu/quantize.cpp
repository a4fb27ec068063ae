// Scale tables, the work common to all instruction sets, and the choice between them.
//
// Why comparing bits equals dividing. The code of x is the number of ties t in {.25, .75, 1.25, 1.75, 2.5, 3.5, 5} that
// q = float32(|x| / s) passes, where s is the block's effective scale; a tie itself goes to the even code, hence q > t
// at .25, 1.25, 2.5, 5 and q >= t at the others. Each t has a float32 with an even significand, so the reals that round
// to t include both midpoints to its neighbours: q > t iff |x| / s > t + u/2 and q >= t iff |x| / s >= t - u'/2, with u
// and u' the gaps above and below t (quotients near t are normal numbers, and an overflow passes every t either way).
// b = s * (t +- gap / 2) has at most 24 + 26 significant bits: exact in float64. Its second factor is odd in its 25th
// bit or later, so no float32 equals b, and |x| passes t iff |x| > b rounded towards zero to float32 (or to the dtype of
// x, which is coarser). Positive floats are ordered as their bit patterns. So seven integer comparisons with thresholds
// that depend on the scale byte alone give the code of the IEEE quotient, without a division and without exceptions.
#include "quantize.h"

#include <cmath>
#include <cstddef>

#include "isa.h"
#include "quantize_kernels.h"

namespace fp4::cpu {

using namespace detail;

namespace {

// The float64 factors t +- gap / 2 of the proof above.
constexpr double kBoundaries[7] = {0.25 + 0x1p-26, 0.75 - 0x1p-25, 1.25 + 0x1p-24, 1.75 - 0x1p-24,
                                   2.5 + 0x1p-23,  3.5 - 0x1p-23,  5.0 + 0x1p-22};

uint32_t truncated_to_float(double value) {  // value >= 0
  const float nearest = static_cast<float>(value);
  return bits_of(nearest) - (static_cast<double>(nearest) > value ? 1 : 0);
}

uint32_t truncated_to_half(float value) {  // value >= 0
  if (bits_of(value) >= kInfinityBits) return 0x7c00;
  if (value >= 65504.0f) return 0x7bff;
  if (value >= 0x1p-14f) return (bits_of(value) >> 13) - (112 << 10);
  return static_cast<uint32_t>(value * 0x1p24f);
}

void fill_row(ScaleRow& row, float effective, Dtype dtype) {
  for (int code = 0; code < 8; ++code) row.values[(8 - code) % 8] = kE2m1[code] * effective;
  for (int i = 0; i < 7; ++i) {
    // A scale that underflowed to zero represents nothing: every code is 0.
    const uint32_t bits = effective == 0 ? kInfinityBits : truncated_to_float(effective * kBoundaries[i]);
    uint32_t word = bits;
    if (dtype == Dtype::bfloat16) word = (bits >> 16) * 0x10001u;
    if (dtype == Dtype::float16) word = truncated_to_half(from_bits(bits)) * 0x10001u;
    for (uint32_t& lane : row.thresholds[i]) lane = word;
  }
}

double e4m3_value(int byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  if ((byte & 127) == 127) return NAN;
  const double magnitude = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return byte < 128 ? magnitude : -magnitude;
}

double e8m0_value(int byte) { return byte == 255 ? NAN : std::ldexp(1.0, byte - 127); }

float effective_scale(Format format, int byte, double global_scale) {
  static const struct Table {
    double value[2][256];
    Table() {
      for (int i = 0; i < 256; ++i) {
        value[static_cast<int>(Format::nvfp4)][i] = e4m3_value(i);
        value[static_cast<int>(Format::mxfp4)][i] = e8m0_value(i);
      }
    }
  } table;
  return static_cast<float>(table.value[static_cast<int>(format)][byte] * global_scale);
}

const ScaleRow* mxfp4_rows(Dtype dtype) {
  static const struct Table {
    ScaleRow row[3][256];
    Table() {
      for (int d = 0; d < 3; ++d) {
        for (int byte = 0; byte < 256; ++byte) fill_row(row[d][byte], effective_scale(Format::mxfp4, byte, 1.0), static_cast<Dtype>(d));
      }
    }
  } table;
  return table.row[static_cast<int>(dtype)];
}

// AVX-512 machines run the AVX2 form too: it already waits for memory.
const QuantizeKernels& quantize_kernels() {
#ifdef FP4_X86
  if (isa() >= Isa::avx2) return kAvx2Quantize;
#endif
  return kScalarQuantize;
}

const ValueKernels& value_kernels() {
#ifdef FP4_X86
  if (isa() >= Isa::avx2) return kAvx2Values;
#endif
  return kScalarValues;
}

const uint8_t* advance(const void* x, int64_t elements, Dtype dtype) {
  return static_cast<const uint8_t*>(x) + elements * element_size(dtype);
}

// Codes written past this many bytes in one call would only evict what the caller still needs from the cache.
constexpr int64_t kStreamBytes = 1 << 20;

// Runs the group kernel over blocks [first, last): whole groups in place, a last partial one through a padded copy.
void run_groups(const Quantizer& q, const void* x, int64_t first, int64_t last, void* codes, int64_t code_bytes,
                uint8_t* scales, bool doubled) {
  const int block = block_size(q.format());
  const QuantizeKernels& kernels = quantize_kernels();
  const QuantizeGroups run = (doubled ? kernels.doubled : kernels.packed)[q.format()][q.dtype()];
  uint8_t* out = static_cast<uint8_t*>(codes) + first * code_bytes;
  const int64_t groups = (last - first) / kBlockGroup;
  const bool stream = !doubled && groups * kBlockGroup * code_bytes >= kStreamBytes &&
                      reinterpret_cast<uintptr_t>(out) % 32 == 0;
  run(q, advance(x, first * block, q.dtype()), groups, out, scales + first, stream);
  const int64_t at = first + groups * kBlockGroup, blocks = last - at;
  if (blocks == 0) return;
  alignas(64) uint8_t part[kBlockGroup * 32 * sizeof(float)] = {};
  alignas(64) uint8_t part_codes[kBlockGroup * 32];
  uint8_t part_scales[kBlockGroup];
  std::memcpy(part, advance(x, at * block, q.dtype()), static_cast<size_t>(blocks) * block * element_size(q.dtype()));
  run(q, part, 1, part_codes, part_scales, false);
  std::memcpy(out + groups * kBlockGroup * code_bytes, part_codes, static_cast<size_t>(blocks * code_bytes));
  std::memcpy(scales + at, part_scales, static_cast<size_t>(blocks));
}

}  // namespace

namespace detail {

float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return from_bits(sign | kInfinityBits | (magnitude & 0x3ff) << 13);
  if (magnitude >= 0x400) return from_bits(sign | ((magnitude << 13) + (112u << 23)));
  return from_bits(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));
}

uint16_t float_to_half(float value) {
  const uint32_t sign = bits_of(value) >> 16 & 0x8000;
  const uint32_t bits = bits_of(value) & 0x7fffffffu;
  if (bits > kInfinityBits) return static_cast<uint16_t>(sign | 0x7e00);
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and more
  if (bits < 0x38800000u) {
    // Below 2^-14: adding 1/2 leaves the subnormal's integer, rounded to nearest even, in the low bits.
    return static_cast<uint16_t>(sign | (bits_of(from_bits(bits) + 0.5f) - bits_of(0.5f)));
  }
  return static_cast<uint16_t>(sign | (((bits + 0xfffu + (bits >> 13 & 1)) >> 13) - (112u << 10)));
}

uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > kInfinityBits) return static_cast<uint16_t>((bits >> 16 & 0x8000u) | 0x7fc0u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

}  // namespace detail

double global_scale_for(float amax, Rule rule) {
  const float scale = amax / (6.0f * (rule == Rule::four_over_six ? 256.0f : kE4m3Max));
  return scale == 0 ? 1.0 : static_cast<double>(scale);
}

Quantizer::Quantizer(Format format, Rule rule, Dtype dtype, double global_scale)
    : format_(format),
      rule_(rule),
      dtype_(dtype),
      global_scale_(static_cast<float>(global_scale)),
      six_global_scales_(global_scale_ * 6.0f),
      four_global_scales_(global_scale_ * 4.0f) {
  if (format == Format::mxfp4 && global_scale == 1.0) {
    rows_ = mxfp4_rows(dtype_);
    return;
  }
  const int count = format == Format::nvfp4 ? 128 : 256;
  table_.reset(new ScaleRow[static_cast<size_t>(count)]);
  rows_ = table_.get();
  for (int byte = 0; byte < count; ++byte) {
    fill_row(table_[byte], effective_scale(format, byte, global_scale), dtype_);
  }
}

void Quantizer::quantize(const void* x, int64_t first, int64_t last, uint8_t* codes, uint8_t* scales) const {
  run_groups(*this, x, first, last, codes, block_size(format_) / 2, scales, false);
}

void Quantizer::quantize_doubled(const void* x, int64_t first, int64_t last, int8_t* doubled, float* effective) const {
  constexpr int64_t kChunk = 64 * kBlockGroup;
  const int block = block_size(format_);
  uint8_t scales[kChunk];
  for (int64_t at = first; at < last; at += kChunk) {
    const int64_t blocks = last - at < kChunk ? last - at : kChunk;
    run_groups(*this, advance(x, at * block, dtype_), 0, blocks, doubled + at * block, block, scales, true);
    for (int64_t i = 0; i < blocks; ++i) effective[at + i] = rows_[scales[i]].effective();
  }
}

void dequantize(Format format, const uint8_t* codes, const uint8_t* scales, double global_scale, Dtype dtype,
                int64_t first, int64_t last, void* out) {
  float effective[256];
  for (int byte = 0; byte < 256; ++byte) effective[byte] = effective_scale(format, byte, global_scale);
  const int block = block_size(format);
  value_kernels().dequantize[format][dtype](
      codes + first * (block / 2), scales + first, effective, last - first,
      static_cast<uint8_t*>(out) + first * block * element_size(dtype));
}

float abs_max(const void* x, Dtype dtype, int64_t n) {
  const ValueKernels& k = value_kernels();
  if (dtype == Dtype::float32) return from_bits(k.abs_max32(x, n));
  const uint32_t bits = k.abs_max16(x, n);
  return dtype == Dtype::bfloat16 ? from_bits(bits << 16) : half_to_float(static_cast<uint16_t>(bits));
}

}  // namespace fp4::cpu
