// What the matmul operators call for FP8 weights.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace fp4::cpu {

// Whether activations are quantized to FP8, and their one scale, float64 [], or none: one for each row.
struct Fp8Activation {
  bool quantizes;
  std::optional<torch::stable::Tensor> scale;
};

// x [.., K] times weight float8_e4m3fn [(experts,) panels, K, 16] under scales [(experts,) panels, 16] (fp8.h).
torch::stable::Tensor multiply_fp8(const torch::stable::Tensor& x, const torch::stable::Tensor& weight,
                                   const torch::stable::Tensor& weight_scale,
                                   const std::optional<torch::stable::Tensor>& global_scale,
                                   const std::optional<torch::stable::Tensor>& bias,
                                   const std::optional<torch::stable::Tensor>& offsets, int64_t out_features,
                                   const std::optional<torch::stable::Tensor>& rotation,
                                   const Fp8Activation& activation);

}  // namespace fp4::cpu
