// The matmul of FP8 weights, which the operators of matmul_binding.cpp call.
#pragma once

#include <optional>

#include "tensors.h"

namespace fp4::cpu {

// Whether activations are quantized to FP8, and with which scale: a float64 [], or one from the amax of each row.
struct Fp8Activation {
  bool quantizes;
  std::optional<Tensor> scale;
};

// x [.., K] times weight float8_e4m3fn [(experts,) panels, K, 16] under scales [(experts,) panels, 16] (fp8.h).
Tensor multiply_fp8(const LinearArguments& arguments, const Fp8Activation& activation);

}  // namespace fp4::cpu
