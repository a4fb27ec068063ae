// The contract with CUTLASS, on the host: a matmul whose operands are read through CUTLASS's own layout functions, from
// the very bytes that the Python backend packed. For test_cutlass_layout.py; compiled with CUTLASS's headers and
// any C++ compiler.
#include <cstdint>

#include "cute/tensor.hpp"
#include "cutlass/detail/sm100_blockscaled_layout.hpp"
#include "numerics.h"
#include "swizzle.h"

namespace {

using namespace fp4::cuda;

template <int V>
float scale_at(const uint8_t* scales, int64_t offset) {
  return V == 16 ? decode_e4m3(scales[offset]) : decode_e8m0(scales[offset]);
}

float code_at(const uint8_t* codes, int64_t row, int64_t k, int64_t column) {
  const uint8_t byte = codes[row * (k / 2) + column / 2];
  return decode_e2m1(column % 2 ? byte >> 4 : byte & 15);
}

// d[m, n] = sum_k a[m, k] b[n, k] in double, alpha left out.
template <int V>
void multiply(const uint8_t* a, const uint8_t* b, const uint8_t* scale_a, const uint8_t* scale_b, int m, int n, int k,
              double* d) {
  using Config = cutlass::detail::Sm1xxBlockScaledConfig<V>;
  const auto layout_a = Config::tile_atom_to_shape_SFA(cute::make_shape(m, n, k, 1));
  const auto layout_b = Config::tile_atom_to_shape_SFB(cute::make_shape(m, n, k, 1));
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      double sum = 0;
      for (int l = 0; l < k; ++l) {
        const double x = static_cast<double>(code_at(a, i, k, l)) * scale_at<V>(scale_a, layout_a(i, l, 0));
        const double w = static_cast<double>(code_at(b, j, k, l)) * scale_at<V>(scale_b, layout_b(j, l, 0));
        sum += x * w;
      }
      d[static_cast<int64_t>(i) * n + j] = sum;
    }
  }
}

// Scales whose place CUTLASS and swizzle.h see differently, and whether a buffer of swizzled_bytes holds all of them.
template <int V>
int64_t disagreements(int m, int n, int k) {
  using Config = cutlass::detail::Sm1xxBlockScaledConfig<V>;
  const auto layout_a = Config::tile_atom_to_shape_SFA(cute::make_shape(m, n, k, 1));
  const auto layout_b = Config::tile_atom_to_shape_SFB(cute::make_shape(m, n, k, 1));
  const int columns = k / V;
  int64_t wrong = cute::cosize(layout_a) > swizzled_bytes(m, columns);
  wrong += cute::cosize(layout_b) > swizzled_bytes(n, columns);
  for (int l = 0; l < k; ++l) {
    for (int i = 0; i < m; ++i) wrong += layout_a(i, l, 0) != swizzled_offset(i, l / V, columns);
    for (int j = 0; j < n; ++j) wrong += layout_b(j, l, 0) != swizzled_offset(j, l / V, columns);
  }
  return wrong;
}

}  // namespace

extern "C" {

void layout_multiply(int block, const uint8_t* a, const uint8_t* b, const uint8_t* scale_a, const uint8_t* scale_b,
                     int m, int n, int k, double* d) {
  if (block == 16) {
    multiply<16>(a, b, scale_a, scale_b, m, n, k, d);
  } else {
    multiply<32>(a, b, scale_a, scale_b, m, n, k, d);
  }
}

int64_t layout_disagreements(int block, int m, int n, int k) {
  return block == 16 ? disagreements<16>(m, n, k) : disagreements<32>(m, n, k);
}
}
