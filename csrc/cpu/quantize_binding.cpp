// fp4::cpu_quantize and fp4::cpu_dequantize: the canonical form to and from tensors. Schemas: src/fp4/ops/canonical.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../named_formats.h"
#include "quantize.h"

namespace fp4::cpu {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements that a thread takes at least: below this a second thread costs more than it saves.
constexpr int64_t kGrainElements = 1 << 15;

Dtype dtype_of(ScalarType type, const char* what) {
  if (type == ScalarType::Float) return Dtype::float32;
  if (type == ScalarType::BFloat16) return Dtype::bfloat16;
  STD_TORCH_CHECK(type == ScalarType::Half, what, " must be float32, bfloat16 or float16");
  return Dtype::float16;
}

std::vector<int64_t> shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}

// One global scale for each matrix of a tensor [..., N, K]: a list of one (1.0 where there is none) stands for all.
std::vector<double> global_scales(const std::optional<Tensor>& global_scale, Format format, int64_t matrices) {
  if (!global_scale.has_value()) {
    STD_TORCH_CHECK(format == Format::mxfp4, "nvfp4 needs a global scale");
    return {1.0};
  }
  const Tensor values = torch::stable::contiguous(*global_scale);
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Double, "the global scale must be float64");
  STD_TORCH_CHECK(values.numel() == 1 || values.numel() == matrices, "got ", values.numel(), " global scales for ",
                  matrices, " matrices");
  const auto* data = static_cast<const double*>(values.const_data_ptr());
  return std::vector<double>(data, data + values.numel());
}

// Calls body(global_scale, first block, last block) over all blocks: one matrix at a time where they differ in scale.
template <typename Body>
void for_each_range(const std::vector<double>& scales, int64_t blocks, int block, const Body& body) {
  const int64_t per_scale = blocks / static_cast<int64_t>(scales.size());
  const int64_t grain = kGrainElements / block / kBlockGroup;
  for (size_t i = 0; i < scales.size(); ++i) {
    const int64_t from = static_cast<int64_t>(i) * per_scale;
    body(scales[i], [&](const auto& run) {
      const int64_t groups = (per_scale + kBlockGroup - 1) / kBlockGroup;
      torch::stable::parallel_for(0, groups, grain, [&](int64_t begin, int64_t end) {
        const int64_t last = end * kBlockGroup;
        run(from + begin * kBlockGroup, from + (last < per_scale ? last : per_scale));
      });
    });
  }
}

std::tuple<Tensor, Tensor> quantize_tensor(const Tensor& x, const std::optional<Tensor>& global_scale,
                                           const std::string& format_name, const std::string& rule_name) {
  const Format format = format_named(format_name);
  const Rule rule = rule_named(format, rule_name);
  const Dtype dtype = dtype_of(x.scalar_type(), "x");
  const int block = block_size(format);
  std::vector<int64_t> shape = shape_of(x);
  STD_TORCH_CHECK(!shape.empty() && shape.back() % block == 0, "the last axis of x must be a multiple of ", block);
  const Tensor input = torch::stable::contiguous(x);
  const int64_t k = shape.back(), elements = x.numel();
  const int64_t rows = shape.size() > 1 ? shape[shape.size() - 2] : 1;
  shape.back() = k / 2;
  Tensor codes = torch::stable::new_empty(x, shape, ScalarType::Byte);
  shape.back() = k / block;
  Tensor scales = torch::stable::new_empty(x, shape, scale_type(format));
  if (elements == 0) return {codes, scales};
  const auto* from = input.const_data_ptr();
  auto* to_codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  auto* to_scales = static_cast<uint8_t*>(scales.mutable_data_ptr());
  for_each_range(global_scales(global_scale, format, elements / (rows * k)), elements / block, block,
                 [&](double global, const auto& parallel) {
                   const Quantizer quantizer(format, rule, dtype, global);
                   parallel([&](int64_t first, int64_t last) {
                     quantizer.quantize(from, first, last, to_codes, to_scales);
                   });
                 });
  return {codes, scales};
}

Tensor dequantize_tensor(const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& global_scale,
                         const std::string& format_name, ScalarType type) {
  const Format format = format_named(format_name);
  STD_TORCH_CHECK(scales.scalar_type() == scale_type(format), "block scales of ", format_name, " must be ",
                  format == Format::nvfp4 ? "float8_e4m3fn" : "float8_e8m0fnu");
  const int block = block_size(format);
  const Dtype dtype = dtype_of(type, "dtype");
  std::vector<int64_t> shape = shape_of(codes), expected = shape;
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && !shape.empty(), "codes must be uint8 [..., K / 2]");
  shape.back() *= 2;
  expected.back() = shape.back() / block;
  STD_TORCH_CHECK(shape_of(scales) == expected && shape.back() % block == 0, "codes and block scales do not match");
  const Tensor code_bytes = torch::stable::contiguous(codes), scale_bytes = torch::stable::contiguous(scales);
  Tensor out = torch::stable::new_empty(codes, shape, type);
  const int64_t elements = out.numel();
  if (elements == 0) return out;
  const int64_t rows = shape.size() > 1 ? shape[shape.size() - 2] : 1;
  const auto* from_codes = static_cast<const uint8_t*>(code_bytes.const_data_ptr());
  const auto* from_scales = static_cast<const uint8_t*>(scale_bytes.const_data_ptr());
  void* to = out.mutable_data_ptr();
  for_each_range(global_scales(global_scale, format, elements / (rows * shape.back())), elements / block, block,
                 [&](double global, const auto& parallel) {
                   parallel([&](int64_t first, int64_t last) {
                     dequantize(format, from_codes, from_scales, global, dtype, first, last, to);
                   });
                 });
  return out;
}

// max |x| of each matrix [..., N, K] -> float32 [...]; NaN where there is one.
Tensor largest_magnitude(const Tensor& x) {
  const Dtype dtype = dtype_of(x.scalar_type(), "x");
  std::vector<int64_t> shape = shape_of(x);
  STD_TORCH_CHECK(shape.size() >= 2, "x must be [..., N, K]");
  const Tensor input = torch::stable::contiguous(x);
  shape.resize(shape.size() - 2);
  Tensor out = torch::stable::new_empty(x, shape, ScalarType::Float);
  auto* result = static_cast<float*>(out.mutable_data_ptr());
  const int64_t matrices = out.numel(), elements = matrices ? x.numel() / matrices : 0;
  const int64_t chunks = (elements + kGrainElements - 1) / kGrainElements;
  const int64_t bytes = dtype == Dtype::float32 ? 4 : 2;
  std::vector<float> partial(chunks);
  for (int64_t i = 0; i < matrices; ++i) {
    const char* from = static_cast<const char*>(input.const_data_ptr()) + i * elements * bytes;
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t first = chunk * kGrainElements, left = elements - first;
        partial[chunk] = abs_max(from + first * bytes, dtype, left < kGrainElements ? left : kGrainElements);
      }
    });
    float largest = 0;
    for (const float value : partial) {
      if (largest == largest && !(value <= largest)) largest = value;  // NaN compares false, so it is taken and stays
    }
    result[i] = largest;
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fp4, CPU, m) {
  m.impl("cpu_quantize", TORCH_BOX(&quantize_tensor));
  m.impl("cpu_dequantize", TORCH_BOX(&dequantize_tensor));
  m.impl("cpu_largest_magnitude", TORCH_BOX(&largest_magnitude));
}

}  // namespace fp4::cpu
