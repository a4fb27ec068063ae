// The formats of weights and the rules that choose block scales, as src/fp4/numerics/formats.py defines them. Both
// libraries share this file, and nvcc compiles it as C++17, so it needs neither torch nor anything newer.
#pragma once

#include <cstdint>

namespace fp4 {

enum class Format { nvfp4, mxfp4 };
enum class Rule { abs_max, mse, four_over_six, even, ceil, below_six, quest };

constexpr int block_size(Format format) { return format == Format::nvfp4 ? 16 : 32; }

// `elements` over block_size, in whole blocks. A division by a constant is a shift, one by a variable takes far longer.
constexpr int64_t blocks_in(Format format, int64_t elements) {
  return format == Format::nvfp4 ? elements / 16 : elements / 32;
}

// four_over_six needs the finer scales of NVFP4; the rules of the OCP specification and of QuEST choose powers of two.
constexpr bool is_defined(Format format, Rule rule) {
  if (rule == Rule::abs_max || rule == Rule::mse) return true;
  return (rule == Rule::four_over_six) == (format == Format::nvfp4);
}

}  // namespace fp4
