// fp4::cpu_linear, cpu_linear_quantized and their grouped forms: checks, and the way from tensors to matmul.h.
// Schemas are in src/fp4/ops/matmul.py.
#include <torch/csrc/stable/library.h>

#include <memory>

#include "../named_formats.h"
#include "fp8_binding.h"
#include "isa.h"
#include "scratch.h"
#include "tensors.h"

namespace fp4::cpu {

namespace {

// The packed weight of a call, checked: [experts or none, panels, K / B, bytes of a block].
struct PackedWeight {
  PackedWeight(const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const std::string& format_name,
               int64_t out_features, bool grouped)
      : format(format_named(format_name)), n(out_features) {
    STD_TORCH_CHECK(weight_scale.scalar_type() == scale_type(format), "weight_scale of ", format_name, " must be ",
                    format == Format::nvfp4 ? "float8_e4m3fn" : "float8_e8m0fnu");
    STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Byte, "weight must be uint8, packed by the cpu backend");
    STD_TORCH_CHECK(x.dim() >= 1, "x must have at least one axis");
    k = x.size(x.dim() - 1);
    const int block = block_size(format);
    STD_TORCH_CHECK(k > 0 && k % block == 0, "x has ", k, " columns; expected a multiple of ", block);
    const int64_t lead = grouped ? 1 : 0, panels = panels_of(n);
    experts = grouped && weight.dim() > 0 ? weight.size(0) : 1;
    const auto fits = [&](const Tensor& t, int64_t bytes) {
      return t.dim() == lead + 3 && (!grouped || t.size(0) == experts) && t.size(lead) == panels &&
             t.size(lead + 1) == k / block && t.size(lead + 2) == bytes && t.is_contiguous();
    };
    STD_TORCH_CHECK(fits(weight, block_bytes(format)) && fits(weight_scale, kPanelRows), "weight ", shape_text(weight),
                    " and weight_scale ", shape_text(weight_scale), " are not the cpu layout of ", n, " x ", k,
                    ": expected contiguous [", grouped ? "experts, " : "", panels, ", ", k / block, ", ",
                    block_bytes(format), "] and [", grouped ? "experts, " : "", panels, ", ", k / block, ", ",
                    kPanelRows, "]");
  }

  Format format;
  int64_t n, k, experts;
};

// float64 [] or [experts]; mxfp4 may have none.
std::vector<double> global_scales(const std::optional<Tensor>& given, const PackedWeight& weight) {
  if (!given.has_value()) {
    STD_TORCH_CHECK(weight.format == Format::mxfp4, "nvfp4 needs a global scale");
    return std::vector<double>(weight.experts, 1.0);
  }
  STD_TORCH_CHECK(given->scalar_type() == ScalarType::Double, "the global scale must be float64");
  STD_TORCH_CHECK(given->numel() == weight.experts, "got ", given->numel(), " global scales for ", weight.experts,
                  " weights");
  const Tensor values = dense(*given);
  const double* data = static_cast<const double*>(values.const_data_ptr());
  return std::vector<double>(data, data + weight.experts);
}

// How activations are quantized, in the operators that quantize them.
struct Activation {
  const std::optional<Tensor>& global_scale;
  const std::string& rule;
};

float largest(const void* x, Dtype dtype, int64_t elements) {
  const int64_t pieces = (elements + kGrainElements - 1) / kGrainElements;
  std::vector<float> partial(pieces);
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t start = i * kGrainElements, n = std::min(kGrainElements, elements - start);
      partial[i] = abs_max(static_cast<const uint8_t*>(x) + start * element_size(dtype), dtype, n);
    }
  });
  float result = 0;
  for (const float value : partial) {
    if (!(value <= result)) result = value;  // a NaN is kept
    if (result != result) break;
  }
  return result;
}

// One quantizer for the rows of all experts, or one for each expert; null for experts without rows.
struct Quantizers {
  const Quantizer* of(int64_t expert) const { return list.size() == 1 ? list[0].get() : list[expert].get(); }
  std::vector<std::unique_ptr<Quantizer>> list;
};

Quantizers quantizers_for(const Activation& activation, const PackedWeight& weight, const std::vector<int64_t>& ranges,
                          const Tensor& x, Dtype dtype) {
  const Rule rule = rule_named(weight.format, activation.rule);
  std::vector<double> scales = {1.0};
  if (activation.global_scale.has_value()) {
    const Tensor given = dense(torch::stable::to(*activation.global_scale, ScalarType::Double));
    STD_TORCH_CHECK(given.numel() == 1 || given.numel() == weight.experts, "input_global_scale must hold one element",
                    weight.experts > 1 ? " or one for each expert" : "", ", got ", shape_text(given));
    const double* data = static_cast<const double*>(given.const_data_ptr());
    scales.assign(data, data + given.numel());
  } else if (weight.format == Format::nvfp4) {
    scales = {global_scale_for(largest(x.const_data_ptr(), dtype, ranges.back() * weight.k), rule)};
  }
  Quantizers made;
  for (size_t e = 0; e < scales.size(); ++e) {
    const bool used = scales.size() == 1 || ranges[e] < ranges[e + 1];
    made.list.push_back(used ? std::make_unique<Quantizer>(weight.format, rule, dtype, scales[e]) : nullptr);
  }
  return made;
}

// Multiplies by FP4 or FP8 weights; `activation` is null where x keeps its dtype.
Tensor multiply(const LinearArguments& arguments, const Activation* activation) {
  const auto& [x, weight, weight_scale, global_scale, format, bias, offsets, out_features, rotation] = arguments;
  if (format == "fp8") {
    const Fp8Activation fp8{
        .quantizes = activation != nullptr,
        .scale = activation == nullptr ? std::nullopt : activation->global_scale,
    };
    return multiply_fp8(arguments, fp8);
  }
  const PackedWeight packed(x, weight, weight_scale, format, out_features, offsets.has_value());
  const Dtype dtype = dtype_of(x, "x");
  std::vector<int64_t> shape;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) shape.push_back(x.size(d));
  shape.push_back(out_features);
  const std::vector<double> scales = global_scales(global_scale, packed);
  const std::vector<int64_t> ranges = row_ranges(offsets, packed.experts, x.numel() / packed.k);
  const int64_t rows = ranges.back();
  const std::optional<Tensor> bias_values = checked_bias(bias, packed.experts, packed.n);
  Tensor out = torch::stable::new_empty(x, shape);
  if (rows == 0 || packed.n == 0) return out;

  Product product{
      .format = packed.format,
      .n = packed.n,
      .k = packed.k,
      .bias_dtype = Dtype::float32,
      .out_dtype = dtype,
      .out = out.mutable_data_ptr(),
  };
  const std::vector<int64_t> experts = add_segments(product, ranges, weight, weight_scale, scales, bias_values);

  if (activation == nullptr) {
    const Tensor source = dense(x);
    Input input{.x = source.const_data_ptr(), .dtype = dtype};
    std::optional<Tensor> matrix;
    if (rotation.has_value()) {
      check_rotation(*rotation, x);
      matrix = dense(torch::stable::to(*rotation, ScalarType::Float));
      input.rotation = static_cast<const float*>(matrix->const_data_ptr());
      input.h = rotation->size(0);
    }
    const bool fixed = FixedPoint::runs(dtype);
    const int64_t bytes = fixed ? FixedPoint::memory_bytes(product, rows) : WeightOnly::memory_bytes(product, rows);
    const auto memory = scratch<uint8_t>(bytes);
    if (fixed) {
      execute(FixedPoint(product, input, rows, memory.get()), product, rows);
    } else {
      execute(WeightOnly(product, input, memory.get()), product, rows);
    }
    return out;
  }
  const bool rotates = rotation.has_value();
  const Tensor input = rotates ? rotated(x, *rotation) : dense(x);
  const Dtype input_dtype = rotates ? Dtype::float32 : dtype;
  const Quantizers quantizers = quantizers_for(*activation, packed, ranges, input, input_dtype);
  for (size_t i = 0; i < experts.size(); ++i) product.segments[i].quantizer = quantizers.of(experts[i]);
  const auto tiles = scratch<uint8_t>(rows * IntegerProduct::tile_bytes(packed.format, packed.k));
  execute(IntegerProduct(product, input.const_data_ptr(), input_dtype, tiles.get()), product, rows);
  return out;
}

Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
              const std::optional<Tensor>& global_scale, const std::string& format, const std::optional<Tensor>& bias,
              int64_t out_features, const std::optional<Tensor>& rotation) {
  return multiply({.x = x,
                   .weight = weight,
                   .weight_scale = weight_scale,
                   .global_scale = global_scale,
                   .format = format,
                   .bias = bias,
                   .offsets = std::nullopt,
                   .out_features = out_features,
                   .rotation = rotation},
                  nullptr);
}

Tensor linear_quantized(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                        const std::optional<Tensor>& global_scale, const std::string& format,
                        const std::optional<Tensor>& bias, int64_t out_features, const std::optional<Tensor>& rotation,
                        const std::optional<Tensor>& input_global_scale, const std::string& rule) {
  const Activation activation{.global_scale = input_global_scale, .rule = rule};
  return multiply({.x = x,
                   .weight = weight,
                   .weight_scale = weight_scale,
                   .global_scale = global_scale,
                   .format = format,
                   .bias = bias,
                   .offsets = std::nullopt,
                   .out_features = out_features,
                   .rotation = rotation},
                  &activation);
}

Tensor grouped_linear(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                      const std::optional<Tensor>& global_scale, const std::string& format,
                      const std::optional<Tensor>& bias, const Tensor& offsets, int64_t out_features,
                      const std::optional<Tensor>& rotation) {
  return multiply({.x = x,
                   .weight = weight,
                   .weight_scale = weight_scale,
                   .global_scale = global_scale,
                   .format = format,
                   .bias = bias,
                   .offsets = offsets,
                   .out_features = out_features,
                   .rotation = rotation},
                  nullptr);
}

Tensor grouped_linear_quantized(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                                const std::optional<Tensor>& global_scale, const std::string& format,
                                const std::optional<Tensor>& bias, const Tensor& offsets, int64_t out_features,
                                const std::optional<Tensor>& rotation, const std::optional<Tensor>& input_global_scale,
                                const std::string& rule) {
  const Activation activation{.global_scale = input_global_scale, .rule = rule};
  return multiply({.x = x,
                   .weight = weight,
                   .weight_scale = weight_scale,
                   .global_scale = global_scale,
                   .format = format,
                   .bias = bias,
                   .offsets = offsets,
                   .out_features = out_features,
                   .rotation = rotation},
                  &activation);
}

std::string isa_name() {
  constexpr const char* kNames[] = {"scalar", "avx2", "avx512"};
  return kNames[static_cast<int>(isa())];
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fp4, CPU, m) {
  m.impl("cpu_linear", TORCH_BOX(&linear));
  m.impl("cpu_linear_quantized", TORCH_BOX(&linear_quantized));
  m.impl("cpu_grouped_linear", TORCH_BOX(&grouped_linear));
  m.impl("cpu_grouped_linear_quantized", TORCH_BOX(&grouped_linear_quantized));
}

// The instruction set that the kernels use. fp4/ops/ lists operators on tensors, so the schema is here.
STABLE_TORCH_LIBRARY_FRAGMENT(fp4, m) { m.def("cpu_isa() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(fp4, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&isa_name)); }

}  // namespace fp4::cpu
