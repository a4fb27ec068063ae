// Products of activations with FP8 weights: one E4M3 code an element, one scale a row. The work is cut as in matmul.h.
//
// A panel is sixteen rows (the last one padded with zero bytes), stored column after column:
//
//   codes   [panel][K][16]   one byte for each row, in order
//   scales  [panel][16]      float32, bfloat16 or float16
//
// so that a column of sixteen rows meets one broadcast of x, as in the FP4 layout. E4M3 becomes float16 by moving its
// bits (the same sign, an exponent one bit wider whose bias is 8 larger: value / 2^8, subnormals included), and float32
// from there by the conversion instruction, which does not depend on the processor's denormal mode.
#pragma once

#include <cstdint>

#include "matmul.h"

namespace fp4::cpu {

struct Fp8Kernels {
  int gemv_rows;  // most rows of x that `gemv` takes

  // y[m][16] = scales[16] * sum over k of x[k][m] * code[k][16]: codes are decoded in registers and used at once.
  void (*gemv)(const uint8_t* codes, const float* scales, int64_t k, const float* x, int rows, float* y);

  // out[k][16] = the weights' values.
  void (*decode)(const uint8_t* codes, const float* scales, int64_t k, float* out);
};

extern const Fp8Kernels kScalarFp8;
#ifdef FP4_X86
extern const Fp8Kernels kAvx2Fp8;
#endif

// Weight-only, as its base. `product.format` and the global scales of segments are not used.
class Fp8WeightOnly : public WeightOnly {
 public:
  // Segments' `scales` hold elements of `scale_dtype`.
  Fp8WeightOnly(const Product& product, Dtype scale_dtype, const Input& input, uint8_t* memory);

 protected:
  int gemv_rows() const override { return fp8_.gemv_rows; }
  void gemv(const Segment& segment, int64_t panel, const float* x, float* sums) const override;
  void decode(const Segment& segment, int64_t panel, int64_t column, int64_t columns, float* out) const override;

 private:
  void load_scales(const Segment& segment, int64_t panel, float* scales) const;

  const Fp8Kernels& fp8_;
  const Dtype scale_dtype_;
};

// Rounds each row of x to FP8 and writes its values (code * scale) in float32. The scale is `static_scale`, or amax / 448
// of the row if that is 0; results are those of formats.fake_quantize_fp8 to the bit.
void fake_quantize_fp8(const void* x, Dtype dtype, int64_t rows, int64_t k, float static_scale, float* out);

}  // namespace fp4::cpu
