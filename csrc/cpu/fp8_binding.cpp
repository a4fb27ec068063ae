#include "fp8_binding.h"

#include "fp8.h"
#include "scratch.h"

namespace fp4::cpu {

namespace {

// Rounds the rows of x [.., K] to FP8; returns their values in float32.
Tensor fake_quantized(const Tensor& x, const std::optional<Tensor>& scale) {
  const int64_t k = x.size(x.dim() - 1), rows = x.numel() / k;
  float static_scale = 0;
  if (scale.has_value()) {
    STD_TORCH_CHECK(scale->numel() == 1, "FP8 activations have one scale, got ", shape_text(*scale));
    const Tensor value = torch::stable::to(*scale, ScalarType::Float);
    static_scale = *static_cast<const float*>(value.const_data_ptr());
  }
  const Tensor from = dense(x);
  const Dtype dtype = dtype_of(from, "x");
  Tensor out = torch::stable::new_empty(x, {rows, k}, ScalarType::Float);
  const auto* source = static_cast<const uint8_t*>(from.const_data_ptr());
  auto* target = static_cast<float*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrainElements / k), [&](int64_t begin, int64_t end) {
    fake_quantize_fp8(source + begin * k * element_size(dtype), dtype, end - begin, k, static_scale,
                      target + begin * k);
  });
  return out;
}

}  // namespace

Tensor multiply_fp8(const LinearArguments& arguments, const Fp8Activation& activation) {
  const auto& [x, weight, weight_scale, global_scale, format, bias, offsets, out_features, rotation] = arguments;
  STD_TORCH_CHECK(!global_scale.has_value(), "FP8 weights have no global scale");
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float8_e4m3fn, "weight of fp8 must be float8_e4m3fn");
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) > 0, "x ", shape_text(x), " must have columns");
  const bool grouped = offsets.has_value();
  const int64_t k = x.size(x.dim() - 1), n = out_features, panels = panels_of(n);
  const int64_t lead = grouped ? 1 : 0, experts = grouped && weight.dim() > 0 ? weight.size(0) : 1;
  const bool fits = weight.dim() == lead + 3 && weight_scale.dim() == lead + 2 && weight.size(lead) == panels &&
                    weight.size(lead + 1) == k && weight.size(lead + 2) == kPanelRows &&
                    (!grouped || weight_scale.size(0) == experts) && weight_scale.size(lead) == panels &&
                    weight_scale.size(lead + 1) == kPanelRows && weight.is_contiguous() &&
                    weight_scale.is_contiguous();
  STD_TORCH_CHECK(fits, "weight ", shape_text(weight), " and weight_scale ", shape_text(weight_scale),
                  " are not the cpu layout of ", n, " x ", k, " in FP8: expected contiguous [",
                  grouped ? "experts, " : "", panels, ", ", k, ", ", kPanelRows, "] and [", grouped ? "experts, " : "",
                  panels, ", ", kPanelRows, "]");
  const Dtype dtype = dtype_of(x, "x"), scale_dtype = dtype_of(weight_scale, "weight_scale");
  const std::vector<int64_t> ranges = row_ranges(offsets, experts, x.numel() / k);
  const int64_t rows = ranges.back();
  const std::optional<Tensor> bias_values = checked_bias(bias, experts, n);
  std::vector<int64_t> shape;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) shape.push_back(x.size(d));
  shape.push_back(n);
  Tensor out = torch::stable::new_empty(x, shape);
  if (rows == 0 || n == 0) return out;

  Product product{
      .format = Format::nvfp4,  // FP8 has no blocks, and Fp8WeightOnly reads no format.
      .n = n,
      .k = k,
      .bias_dtype = Dtype::float32,
      .out_dtype = dtype,
      .out = out.mutable_data_ptr(),
  };
  add_segments(product, ranges, weight, weight_scale, std::vector<double>(experts, 1.0), bias_values);
  Tensor source = dense(x);
  std::optional<Tensor> matrix;
  if (rotation.has_value()) {
    check_rotation(*rotation, x);
    matrix = dense(torch::stable::to(*rotation, ScalarType::Float));
  }
  Input input{.x = nullptr, .dtype = dtype};
  if (activation.quantizes) {
    // Quantized activations keep the float32 of a rotation; unquantized ones are rounded to the dtype of x first.
    source = fake_quantized(rotation.has_value() ? torch::stable::reshape(rotated(x, *rotation), {-1, k}) : source,
                            activation.scale);
    input.dtype = Dtype::float32;
  } else if (matrix.has_value()) {
    input.rotation = static_cast<const float*>(matrix->const_data_ptr());
    input.h = rotation->size(0);
  }
  input.x = source.const_data_ptr();
  const auto memory = scratch<uint8_t>(WeightOnly::memory_bytes(product, rows));
  execute(Fp8WeightOnly(product, scale_dtype, input, memory.get()), product, rows);
  return out;
}

}  // namespace fp4::cpu
