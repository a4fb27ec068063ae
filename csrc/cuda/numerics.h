// The arithmetic of src/fp4/numerics/formats.py for numbers, codes and scales, on the GPU and, compiled by any C++ compiler, on
// the host, where tests hold it to the reference. On the host compile with -ffp-contract=off.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FP4_BOTH __host__ __device__ __forceinline__
#else
#define FP4_BOTH inline
#include <cmath>
#endif

// cvt.rn.satfinite.e2m1x2 exists for architecture- and family-specific targets of Blackwell alone.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 &&                                                             \
    (defined(__CUDA_ARCH_SPECIFIC__) || defined(__CUDA_ARCH_FAMILY_SPECIFIC__) || defined(__CUDA_ARCH_FEAT_SM100_ALL) || \
     defined(__CUDA_ARCH_FEAT_SM120_ALL))
#define FP4_HARDWARE_E2M1 1
#endif

namespace fp4::cuda {

constexpr float kE4m3Tiny = 0x1p-9f;
constexpr float kE4m3Max = 448.0f;
constexpr uint32_t kMagnitude = 0x7fffffffu;

// Single roundings. The compiler must not fuse them: block scales are compared by errors that the reference rounds
// after every operation.
#if defined(__CUDA_ARCH__)
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float subtract(float a, float b) { return __fsub_rn(a, b); }
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float divide(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ float square_root(float a) { return __fsqrt_rn(a); }
__device__ __forceinline__ float smaller(float a, float b) { return fminf(a, b); }  // the number beside a NaN
#else
FP4_BOTH float add(float a, float b) { return a + b; }
FP4_BOTH float subtract(float a, float b) { return a - b; }
FP4_BOTH float multiply(float a, float b) { return a * b; }
FP4_BOTH float divide(float a, float b) { return a / b; }
FP4_BOTH float fused(float a, float b, float c) { return fmaf(a, b, c); }
FP4_BOTH float square_root(float a) { return sqrtf(a); }
FP4_BOTH float smaller(float a, float b) { return a < b || b != b ? a : b; }
#endif

FP4_BOTH uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FP4_BOTH float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

FP4_BOTH int clamp_int(int value, int low, int high) { return value < low ? low : value > high ? high : value; }

// --- element types ---------------------------------------------------------------------------------------------------

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

FP4_BOTH float widen(float value) { return value; }
FP4_BOTH float widen(Bfloat16 value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }
FP4_BOTH float widen(Float16 value) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t exponent = value.bits >> 10 & 31, mantissa = value.bits & 0x3ff;
  if (exponent == 31) return from_bits(sign | 0x7f800000u | mantissa << 13);
  // As a float32 with the same fields, the exponent is 112 too low; a product with 2^112 is exact for subnormals too.
  return from_bits(sign | bits_of(from_bits((exponent << 10 | mantissa) << 13) * 0x1p112f));
#endif
}

template <typename T>
FP4_BOTH T narrow(float value);
template <>
FP4_BOTH float narrow<float>(float value) {
  return value;
}
template <>
FP4_BOTH Bfloat16 narrow<Bfloat16>(float value) {
  const uint32_t bits = bits_of(value);
  if (value != value) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
FP4_BOTH Float16 narrow<Float16>(float value) {
#if defined(__CUDA_ARCH__)
  Float16 half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half.bits) : "f"(value));
  return half;
#else
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000;
  uint32_t magnitude = bits & kMagnitude;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00)};  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {
    // Subnormal: multiples of 2^-24, the unit in the last place of 0.5.
    const float shifted = from_bits(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (bits_of(shifted) - bits_of(0.5f)))};
  }
  magnitude += 0xfff + (magnitude >> 13 & 1);
  return {static_cast<uint16_t>(sign | ((magnitude >> 13) - (112 << 10)))};
#endif
}

// --- scales ----------------------------------------------------------------------------------------------------------

// formats.encode_e4m3: nearest, ties to even, in [2^-9, 448]; NaN stays NaN.
FP4_BOTH uint8_t encode_e4m3(float scale) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %1;" : "=h"(pair) : "f"(scale));
  const uint8_t byte = static_cast<uint8_t>(pair);
  return byte == 0 ? 1 : byte;
#else
  if (scale != scale) return 0x7f;
  if (!(scale > kE4m3Tiny)) return 1;
  if (scale >= kE4m3Max) return 126;
  // Below 2^-6 the codes are multiples of 2^-9, the unit in the last place of 2^14.
  if (scale < 0x1p-6f) return static_cast<uint8_t>(bits_of(add(scale, 16384.0f)) - bits_of(16384.0f));
  const uint32_t bits = bits_of(scale);
  return static_cast<uint8_t>(((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3));
#endif
}

FP4_BOTH float decode_e4m3(uint8_t byte) {
  if ((byte & 0x7f) == 0x7f) return from_bits(0x7fc00000u);
  // As a float32 with the same fields, the exponent is 120 too low; the product is exact for subnormals too.
  const float magnitude = multiply(from_bits(static_cast<uint32_t>(byte & 0x7f) << 20), 0x1p120f);
  return byte & 0x80 ? -magnitude : magnitude;
}

FP4_BOTH float decode_e8m0(uint8_t byte) {
  if (byte == 0xff) return from_bits(0x7fc00000u);
  return from_bits(byte ? static_cast<uint32_t>(byte) << 23 : 0x00400000u);
}

// formats.effective_scales: float32 of block scale * global scale. A block of 16 is NVFP4, one of 32 MXFP4.
template <int B>
FP4_BOTH float effective_scale(uint8_t byte, double global_scale) {
  const float scale = B == 16 ? decode_e4m3(byte) : decode_e8m0(byte);
#if defined(__CUDA_ARCH__)
  return __double2float_rn(__dmul_rn(static_cast<double>(scale), global_scale));
#else
  return static_cast<float>(static_cast<double>(scale) * global_scale);
#endif
}

// --- codes -----------------------------------------------------------------------------------------------------------

FP4_BOTH float decode_e2m1(uint32_t code) {
  // As a float32 with the same fields, the exponent is 126 too low.
  const float magnitude = multiply(from_bits((code & 7) << 22), 0x1p126f);
  return code & 8 ? -magnitude : magnitude;
}

// formats.encode_e2m1 for |q| alone, at most 6.5: nearest, ties to even. The code in the lowest three bits, others above.
//
// The value of code c grows by 0.5 to code 4, by 1 to code 6 and then by 2, so c is the least of 2 q, q + 2 and q / 2 + 4
// for the value q. Adding 2^23 rounds each to whole numbers, once, ties to even, and keeps their order.
FP4_BOTH uint32_t round_magnitude(float q) {
  const uint32_t fine = bits_of(fused(q, 2.0f, 0x1p23f)), middle = bits_of(add(q, 0x1p23f + 2));
  const uint32_t coarse = bits_of(fused(q, 0.5f, 0x1p23f + 4));
  // As integers they order alike, and Hopper takes the least of three at once.
  const uint32_t least = middle < coarse ? middle : coarse;
  return fine < least ? fine : least;
}
constexpr uint32_t kRounded = 0x4b000000u;  // what round_magnitude has above the code: the bits of 2^23

// The same for any q >= 0, saturating at 6, and nothing but the code.
FP4_BOTH uint32_t encode_magnitude(float q) { return round_magnitude(smaller(q, 6.0f)) - kRounded; }

// The highest bits of eight words as those of the nibbles of one, the first in the lowest.
FP4_BOTH uint32_t signs_of_eight(const float* x) {
#if defined(__CUDA_ARCH__)
  const auto high_bytes = [](float a, float b, float c, float d) {
    return __byte_perm(__byte_perm(bits_of(a), bits_of(b), 0x0073), __byte_perm(bits_of(c), bits_of(d), 0x0073), 0x5410);
  };
  return (high_bytes(x[0], x[2], x[4], x[6]) >> 4 & 0x08080808u) | (high_bytes(x[1], x[3], x[5], x[7]) & 0x80808080u);
#else
  uint32_t signs = 0;
  for (int i = 0; i < 8; ++i) signs |= bits_of(x[i]) >> 31 << (4 * i + 3);
  return signs;
#endif
}

// Codes of eight quotients |q| <= 6.5 with the signs of x, the first in the lowest nibble.
FP4_BOTH uint32_t encode_eight(const float* q, const float* x) {
#if defined(FP4_HARDWARE_E2M1)
  uint32_t codes;
  asm("{\n"
      ".reg .b8 b0, b1, b2, b3;\n"
      "cvt.rn.satfinite.e2m1x2.f32 b0, %2, %1;\n"
      "cvt.rn.satfinite.e2m1x2.f32 b1, %4, %3;\n"
      "cvt.rn.satfinite.e2m1x2.f32 b2, %6, %5;\n"
      "cvt.rn.satfinite.e2m1x2.f32 b3, %8, %7;\n"
      "mov.b32 %0, {b0, b1, b2, b3};\n"
      "}"
      : "=r"(codes)
      : "f"(q[0]), "f"(q[1]), "f"(q[2]), "f"(q[3]), "f"(q[4]), "f"(q[5]), "f"(q[6]), "f"(q[7]));
  return codes | signs_of_eight(x);
#else
  uint32_t codes = 0;
#pragma unroll
  for (int i = 7; i >= 0; --i) codes = (codes << 4) + round_magnitude(q[i]);
  // What is above each code shifts out of the word, but for the two lowest places.
  return codes - (kRounded + (kRounded << 4)) + signs_of_eight(x);
#endif
}

// 1 / x of a float32 in [2^-100, 2^76] in two: correctly rounded, and what is then missing. `rough` is within two units
// in the last place. A step of Newton's rounds correctly but where the mantissa of x is all ones; 1 / x is then next to
// the least float of its exponent, below which none is.
struct Reciprocal {
  float high, low;

  FP4_BOTH Reciprocal(float x, float rough) {
    const float step = fused(fused(-x, rough, 1.0f), rough, rough);
    const float least = from_bits(0x7e800001u - (bits_of(x) & 0x7f800000u));
    high = step < least ? least : step;
    const float rest = fused(-x, high, 1.0f), first = multiply(rest, high);
    low = fused(rest, first, first);
  }
};

FP4_BOTH float rough_reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float rough;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(rough) : "f"(x));
  return rough;
#else
  return 1.0f / x;
#endif
}

// |x| / scale of one scale and many x without a division each: x times a reciprocal of twice float32's precision, in one
// rounding but for 2^-46 of the result. That E2M1 and E4M3 make of it what they make of the IEEE quotient is checked for
// every mantissa of the scale and all x near each threshold (test_cutlass_quantize.py); exponents only shift it.
class Divider {
 public:
  FP4_BOTH explicit Divider(float scale) : Divider(scale, kUnknown) {}

  // `rough` as for Reciprocal.
  FP4_BOTH Divider(float scale, float rough) {
    // Both sides are multiplied by a power of two where remainders would underflow or the reciprocal overflow: without
    // loss, but of quotients far below the first threshold. An effective scale that underflowed to zero leaves nothing
    // to represent: all quotients are zero.
    const bool is_usable = scale > 0.0f && scale < from_bits(0x7f800000u);
    factor_ = !is_usable ? 0.0f : scale < 0x1p-80f ? 0x1p96f : scale > 0x1p80f ? 0x1p-96f : 1.0f;
    const float divisor = is_usable ? multiply(scale, factor_) : 1.0f;
    const Reciprocal reciprocal(divisor, rough == kUnknown ? rough_reciprocal(divisor) : rough);
    high_ = reciprocal.high;
    low_ = reciprocal.low;
    limit_ = multiply(6.0f, divisor);
  }

  // At most about 6: E2M1 saturates there, and infinity must not get further.
  FP4_BOTH float operator()(float x) const {
    const float magnitude = smaller(multiply(from_bits(bits_of(x) & kMagnitude), factor_), limit_);
    return fused(magnitude, high_, multiply(magnitude, low_));
  }

 private:
  static constexpr float kUnknown = 0.0f;
  float factor_, high_, low_, limit_;
};

}  // namespace fp4::cuda
