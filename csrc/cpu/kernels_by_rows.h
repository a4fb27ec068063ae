// Tables of kernels that are compiled once for each number of rows of x, so that the sums of all rows stay in registers.
#pragma once

#include <array>
#include <type_traits>
#include <utility>

namespace fp4::cpu {

// The table of instance(M) for M from 1 to kMostRows, where M is a std::integral_constant; M rows stand at M - 1.
template <int kMostRows, typename Instance>
constexpr auto kernels_by_rows(Instance instance) {
  return [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
    return std::array{instance(std::integral_constant<int, kIndex + 1>{})...};
  }(std::make_integer_sequence<int, kMostRows>{});
}

}  // namespace fp4::cpu
