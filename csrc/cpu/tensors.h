// What the bindings of the matmuls share: they check tensors, turn them into a Product, and run it on torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "matmul.h"

namespace fp4::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The arguments that all matmul operators share. `offsets` are those of the grouped forms.
struct LinearArguments {
  const Tensor& x;
  const Tensor& weight;
  const Tensor& weight_scale;
  const std::optional<Tensor>& global_scale;
  const std::string& format;
  const std::optional<Tensor>& bias;
  const std::optional<Tensor>& offsets;
  int64_t out_features;
  const std::optional<Tensor>& rotation;
};

// The fewest multiplications and elements for a thread: below this a second thread costs more than it saves.
inline constexpr int64_t kGrainProducts = 1 << 16;
inline constexpr int64_t kGrainElements = 1 << 15;

inline Dtype dtype_of(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::Float) return Dtype::float32;
  if (type == ScalarType::BFloat16) return Dtype::bfloat16;
  STD_TORCH_CHECK(type == ScalarType::Half, name, " must be float32, bfloat16 or float16");
  return Dtype::float16;
}

// The tensor itself where it is contiguous: a call through the dispatcher takes about as long as a small product.
inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + "]";
}

// Row ranges of the experts: offsets int32 [experts + 1], or one range over all rows. Rows beyond the last expert's are
// left alone.
inline std::vector<int64_t> row_ranges(const std::optional<Tensor>& offsets, int64_t experts, int64_t rows) {
  if (!offsets.has_value()) return {0, rows};
  STD_TORCH_CHECK(offsets->scalar_type() == ScalarType::Int && offsets->dim() == 1 && offsets->size(0) == experts + 1,
                  "offsets must be int32 [", experts + 1, "], got ", shape_text(*offsets));
  const Tensor values = dense(*offsets);
  const int32_t* data = static_cast<const int32_t*>(values.const_data_ptr());
  std::vector<int64_t> ranges(data, data + experts + 1);
  STD_TORCH_CHECK(ranges.front() == 0 && ranges.back() <= rows && std::is_sorted(ranges.begin(), ranges.end()),
                  "offsets must rise from 0 to at most the ", rows, " rows of x");
  return ranges;
}

// The bias of a call, checked and contiguous: [n], or [experts, n].
inline std::optional<Tensor> checked_bias(const std::optional<Tensor>& bias, int64_t experts, int64_t n) {
  if (!bias.has_value()) return std::nullopt;
  STD_TORCH_CHECK(bias->numel() == experts * n && bias->size(bias->dim() - 1) == n, "bias ", shape_text(*bias),
                  " does not fit ", experts, " weights with ", n, " rows");
  return dense(*bias);
}

// A segment for each expert with rows; `codes` and `scales` are those of all experts, one after the other. Returns the
// experts of the segments.
inline std::vector<int64_t> add_segments(Product& product, const std::vector<int64_t>& ranges, const Tensor& codes,
                                         const Tensor& scales, const std::vector<double>& global_scales,
                                         const std::optional<Tensor>& bias) {
  std::vector<int64_t> found;
  const int64_t experts = static_cast<int64_t>(ranges.size()) - 1;
  if (bias.has_value()) product.bias_dtype = dtype_of(*bias, "bias");
  const auto at = [&](const Tensor& tensor, int64_t expert) {
    return static_cast<const uint8_t*>(tensor.const_data_ptr()) +
           expert * (tensor.numel() / experts) * static_cast<int64_t>(tensor.element_size());
  };
  for (int64_t e = 0; e < experts; ++e) {
    if (ranges[e] == ranges[e + 1]) continue;
    product.segments.push_back({
        .first_row = ranges[e],
        .rows = ranges[e + 1] - ranges[e],
        .codes = at(codes, e),
        .scales = at(scales, e),
        .global_scale = global_scales[e],
        .bias = bias.has_value() ? at(*bias, e) : nullptr,
    });
    found.push_back(e);
  }
  return found;
}

template <typename Work>
void execute(const Work& work, const Product& product, int64_t rows) {
  torch::stable::parallel_for(0, work.prepare_tasks(), std::max<int64_t>(1, kGrainElements / product.k),
                              [&](int64_t begin, int64_t end) { work.prepare(begin, end); });
  const int64_t products_per_task = rows * kPanelRows * product.k * panels_of(product.n) / work.tasks();
  torch::stable::parallel_for(0, work.tasks(), std::max<int64_t>(1, kGrainProducts / products_per_task),
                              [&](int64_t begin, int64_t end) { work.run(begin, end); });
}

inline void check_rotation(const Tensor& rotation, const Tensor& x) {
  STD_TORCH_CHECK(rotation.dim() == 2 && rotation.size(0) == rotation.size(1) && rotation.size(0) > 0 &&
                      x.size(x.dim() - 1) % rotation.size(0) == 0,
                  "rotation ", shape_text(rotation), " must be square and its size divide the columns of x ",
                  shape_text(x));
}

// float32 of x [.., K] in groups times the rotation [h, h], as rotation.py computes it: the same operation of torch, so
// that no code differs from the reference by the order of a sum.
inline Tensor rotated(const Tensor& x, const Tensor& rotation) {
  check_rotation(rotation, x);
  const Tensor groups = torch::stable::reshape(torch::stable::to(x, ScalarType::Float), {-1, rotation.size(0)});
  return dense(torch::stable::matmul(groups, torch::stable::to(rotation, ScalarType::Float)));
}

}  // namespace fp4::cpu
