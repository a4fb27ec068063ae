// Shared by the instruction-set variants of the quantization kernels; nothing outside csrc/cpu/quantize*.cpp needs it.
#pragma once

#include <cstdint>
#include <cstring>

#include "quantize.h"

namespace fp4::cpu::detail {

constexpr float kE4m3Tiny = 0x1p-9f;
constexpr float kE4m3Max = 448.0f;
constexpr int kE8m0Max = 252;  // 2^125: six times it is still finite
constexpr float kE2m1[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
constexpr uint32_t kInfinityBits = 0x7f800000u;

// Candidates of the `mse` search relative to the abs_max scale, nearest first, so that ties keep that one.
constexpr int8_t kNvfp4Offsets[17] = {0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5, -6, 6, -7, 7, -8, 8};
constexpr int8_t kMxfp4Offsets[3] = {0, 1, -1};

// Gaussian-optimal clipping of a block (QuEST, arXiv 2502.05003).
constexpr float kQuestFactor = static_cast<float>(2.92247856 / 6.0);

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline int clamp_int(int value, int low, int high) { return value < low ? low : value > high ? high : value; }

// A block with a NaN gets a NaN scale.
constexpr uint8_t nan_scale(int block) { return block == 16 ? 0x7f : 0xff; }

inline int element_size(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

float half_to_float(uint16_t half);
uint16_t float_to_half(float value);
uint16_t float_to_bfloat16(float value);

// Quantizes `groups` groups of kBlockGroup blocks whose elements have the quantizer's dtype.
// Packed: codes gets block_size / 2 bytes a block. Doubled: block_size bytes a block. `stream` bypasses the cache for
// the codes, which must then be aligned to 32 bytes.
using QuantizeGroups = void (*)(const Quantizer&, const void* x, int64_t groups, void* codes, uint8_t* scales,
                                bool stream);
using DequantizeBlocks = void (*)(const uint8_t* codes, const uint8_t* scales, const float* effective, int64_t blocks,
                                  void* out);
using AbsMax = uint32_t (*)(const void* x, int64_t n);  // the largest pattern of |x|

struct QuantizeKernels {
  PerFormat<PerDtype<QuantizeGroups>> packed, doubled;
};

struct ValueKernels {
  PerFormat<PerDtype<DequantizeBlocks>> dequantize;
  AbsMax abs_max16;
  AbsMax abs_max32;
};

extern const QuantizeKernels kScalarQuantize;
extern const ValueKernels kScalarValues;
#if defined(__x86_64__)
extern const QuantizeKernels kAvx2Quantize;
extern const ValueKernels kAvx2Values;
#endif

}  // namespace fp4::cpu::detail
