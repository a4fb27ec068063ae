// fp4::cutlass_linear_quantized and cutlass_grouped_linear_quantized: quantize activations, multiply. Schemas are in
// src/fp4/ops/matmul.py; the layout of the weight in src/fp4/backends/cutlass.py.
#include <algorithm>
#include <string>

#include "../named_formats.h"
#include "binding.h"
#include "gemm.h"
#include "swizzle.h"

#if !defined(FP4_CUDA_ARCHS) || !defined(FP4_CUDA_CONFIGURATIONS)
#error "the build says which architectures it compiles for, and which configurations of the matmul"
#endif

namespace fp4::cuda {

namespace {

Family family_of(int major) { return major >= 12 ? Family::sm120 : Family::sm100; }

Output output_of(ScalarType type) {
  const Type plain = type_of(type, "x");
  return plain == Type::float32 ? Output::float32 : plain == Type::bfloat16 ? Output::bfloat16 : Output::float16;
}

// The checked arguments that both operators share.
struct Call {
  Call(const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const std::string& format_name,
       int64_t out_features, const std::optional<Tensor>& rotation, const std::string& rule_name, int64_t lead)
      : format(format_named(format_name)), n(out_features), codes(weight), scales(weight_scale) {
    STD_TORCH_CHECK(weight_scale.scalar_type() == scale_type(format), "weight_scale of ", format_name, " must be ",
                    format == Format::nvfp4 ? "float8_e4m3fn" : "float8_e8m0fnu");
    STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Byte, "weight must be uint8, packed by the cutlass backend");
    STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) > 0, "x must be [..., K]");
    k = x.size(x.dim() - 1);
    rows = x.numel() / k;
    STD_TORCH_CHECK(k % 32 == 0, "x has ", k, " columns; FP4 tensor cores want a multiple of 32");
    STD_TORCH_CHECK(rows <= INT32_MAX && n <= INT32_MAX && k <= INT32_MAX, "x or the weight is too large");
    experts = lead ? weight.size(0) : 1;
    const int64_t columns = k / block_size(format);
    const auto fits = [&](const Tensor& t, int64_t height, int64_t width) {
      return t.dim() == lead + 2 && (!lead || t.size(0) == experts) && t.size(lead) == height &&
             t.size(lead + 1) == width && t.is_contiguous() && is_beside(t, x);
    };
    STD_TORCH_CHECK(fits(weight, n, k / 2) && fits(weight_scale, padded_rows(n), padded_columns(columns)), "weight ",
                    shape_text(weight), " and weight_scale ", shape_text(weight_scale), " are not the cutlass layout of ",
                    n, " x ", k, ": expected contiguous [", lead ? "experts, " : "", n, ", ", k / 2, "] and [",
                    lead ? "experts, " : "", padded_rows(n), ", ", padded_columns(columns), "] on the GPU of x");
    // CUTLASS looks at shapes and strides alone. An address that the tensor memory accelerator cannot take is a fault of
    // the GPU, after which the process can do nothing more.
    STD_TORCH_CHECK(is_aligned(weight) && is_aligned(weight_scale), "weight or weight_scale does not begin at a multiple "
                    "of ", kTmaAlignment, " bytes, from which alone FP4 matmuls can read; pass a copy of it");
    rule = rule_named(format, rule_name);
    if (!rotation.has_value()) return;
    group = rotation->size(0);
    STD_TORCH_CHECK(rotation->scalar_type() == ScalarType::Float && rotation->is_contiguous() && is_beside(*rotation, x) &&
                        rotation->dim() == 2 && rotation->size(1) == group,
                    "the rotation must be float32 [h, h] on the GPU of x");
    STD_TORCH_CHECK(group == 16 || group == 32 || group == 64 || group == 128, "the rotation has size ", group,
                    "; expected 16, 32, 64 or 128");
    STD_TORCH_CHECK(k % group == 0, "x has ", k, " columns; expected a multiple of the rotation's ", group);
  }

  Format format;
  Rule rule;
  int64_t n, k = 0, rows = 0, experts = 1, group = 0;
  const Tensor& codes;
  const Tensor& scales;
};

// One allocation for everything that a call needs besides its result. All pieces are reserved before it is made.
class Scratch {
 public:
  static constexpr int64_t kAlignment = 256;
  int64_t reserve(int64_t bytes) {
    const int64_t at = size_;
    size_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return at;
  }
  void allocate(const Tensor& like) { memory_ = torch::stable::new_empty(like, {size_}, ScalarType::Byte); }
  template <typename T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(memory_->mutable_data_ptr()) + offset);
  }

 private:
  int64_t size_ = 0;
  mutable std::optional<Tensor> memory_;
};

// Quantizes x into scratch memory, beside the factors and the bias that the matmul reads.
struct Prepared {
  Prepared(const Call& call, const Tensor& x, const std::optional<Tensor>& global_scale,
           const std::optional<Tensor>& bias, const std::optional<Tensor>& rotation,
           const std::optional<Tensor>& input_global_scale, const std::optional<Tensor>& offsets)
      : input(readable(x)) {
    const int64_t columns = call.k / block_size(call.format);
    const int64_t scale_rows = offsets.has_value() ? grouped_scale_rows(call.experts, call.rows) : call.rows;
    codes = scratch.reserve(call.rows * (call.k / 2));
    scales = scratch.reserve(swizzled_bytes(scale_rows, columns));
    alpha = scratch.reserve(call.experts * static_cast<int64_t>(sizeof(float)));
    maxima = scratch.reserve(kMaxima * static_cast<int64_t>(sizeof(float)));
    wide_bias = scratch.reserve(bias.has_value() ? call.experts * call.n * static_cast<int64_t>(sizeof(float)) : 0);
    task.x = input.const_data_ptr();
    task.type = type_of(x.scalar_type(), "x");
    task.rows = task.rows_per_scale = call.rows;
    task.k = call.k;
    task.format = call.format;
    task.rule = call.rule;
    if (rotation.has_value()) {
      task.rotation = static_cast<const float*>(rotation->const_data_ptr());
      task.group = static_cast<int>(call.group);
    }
    if (input_global_scale.has_value()) {
      task.global_scale = global_scale_data(*input_global_scale, x, {1, call.experts});
      task.scale_of_expert = input_global_scale->numel() > 1;
    }
    task.swizzled = true;
    if (offsets.has_value()) {
      STD_TORCH_CHECK(offsets->scalar_type() == ScalarType::Int && offsets->dim() == 1 && offsets->is_contiguous() &&
                          offsets->size(0) == call.experts + 1 && is_beside(*offsets, x),
                      "offsets must be int32 [", call.experts + 1, "] on the GPU of x, got ", shape_text(*offsets));
      task.offsets = static_cast<const int32_t*>(offsets->const_data_ptr());
      task.experts = static_cast<int>(call.experts);
    }
    task.alphas = static_cast<int>(call.experts);
    if (global_scale.has_value()) {
      task.weight_scale = global_scale_data(*global_scale, x, {call.experts});
    } else {
      STD_TORCH_CHECK(call.format == Format::mxfp4, "nvfp4 needs a global scale");
    }
    if (bias.has_value()) {
      STD_TORCH_CHECK(bias->numel() == call.experts * call.n && is_beside(*bias, x), "bias must have ",
                      call.experts * call.n, " elements on the GPU of x, got ", shape_text(*bias));
      dense_bias = torch::stable::contiguous(*bias);
      task.bias = dense_bias->const_data_ptr();
      task.bias_type = type_of(bias->scalar_type(), "bias");
      task.bias_elements = bias->numel();
    }
  }

  // Allocates the scratch memory and quantizes, once all pieces are reserved.
  void run(const Tensor& x, const Device& device) {
    scratch.allocate(x);
    task.codes = scratch.at<uint8_t>(codes);
    task.scales = scratch.at<uint8_t>(scales);
    task.alpha = scratch.at<float>(alpha);
    task.maxima = scratch.at<float>(maxima);
    if (task.bias != nullptr) task.wide_bias = scratch.at<float>(wide_bias);
    require_launched(quantize(task, device.multiprocessors, device.stream), "quantizing activations");
  }

  Tensor input;
  std::optional<Tensor> dense_bias;
  QuantizeTask task{};
  Scratch scratch;
  int64_t codes, scales, alpha, maxima, wide_bias;
};

[[noreturn]] void refuse(const Call& call, int major) {
  STD_TORCH_CHECK(false, "no FP4 matmul of ", call.rows, " x ", call.n, " x ", call.k, " for compute capability ", major,
                  ".x: the library was built for ", FP4_CUDA_ARCHS);
  std::abort();
}

Tensor linear_quantized(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                        const std::optional<Tensor>& global_scale, const std::string& format,
                        const std::optional<Tensor>& bias, int64_t out_features, const std::optional<Tensor>& rotation,
                        const std::optional<Tensor>& input_global_scale, const std::string& rule) {
  const Call call(x, weight, weight_scale, format, out_features, rotation, rule, 0);
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = call.n;
  const Device device(x);
  Tensor out = torch::stable::new_empty(x, shape, x.scalar_type());
  if (out.numel() == 0) return out;
  Prepared prepared(call, x, global_scale, bias, rotation, input_global_scale, std::nullopt);
  GemmProblem problem{};
  problem.m = static_cast<int>(call.rows);
  problem.n = static_cast<int>(call.n);
  problem.k = static_cast<int>(call.k);
  problem.multiprocessors = device.multiprocessors;
  const Gemm* gemm = choose(family_of(device.major), call.format, output_of(x.scalar_type()), problem);
  if (device.major < 10 || gemm == nullptr || !gemm->can_implement(problem)) refuse(call, device.major);
  const int64_t workspace = prepared.scratch.reserve(static_cast<int64_t>(gemm->workspace_bytes(problem)));
  prepared.run(x, device);
  problem.d = out.mutable_data_ptr();
  problem.a = prepared.task.codes;
  problem.b = call.codes.const_data_ptr();
  problem.scale_a = prepared.task.scales;
  problem.scale_b = call.scales.const_data_ptr();
  problem.alpha = prepared.task.alpha;
  problem.bias = prepared.task.wide_bias;
  require_launched(gemm->run(problem, prepared.scratch.at<void>(workspace), device.stream), "FP4 matmul");
  return out;
}

Tensor grouped_linear_quantized(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                                const std::optional<Tensor>& global_scale, const std::string& format,
                                const std::optional<Tensor>& bias, const Tensor& offsets, int64_t out_features,
                                const std::optional<Tensor>& rotation, const std::optional<Tensor>& input_global_scale,
                                const std::string& rule) {
  STD_TORCH_CHECK(x.dim() == 2, "x must be [T, K], sorted by expert");
  const Call call(x, weight, weight_scale, format, out_features, rotation, rule, 1);
  const Device device(x);
  Tensor out = torch::stable::new_empty(x, {call.rows, call.n}, x.scalar_type());
  if (out.numel() == 0) return out;
  Prepared prepared(call, x, global_scale, bias, rotation, input_global_scale, offsets);
  GroupedProblem problem{};
  problem.offsets = prepared.task.offsets;
  problem.rows = static_cast<int>(call.rows);
  problem.n = static_cast<int>(call.n);
  problem.k = static_cast<int>(call.k);
  problem.experts = static_cast<int>(call.experts);
  problem.multiprocessors = device.multiprocessors;
  const GroupedGemm* gemm = choose_grouped(family_of(device.major), call.format, output_of(x.scalar_type()));
  if (device.major < 10 || gemm == nullptr || !gemm->can_implement(problem)) refuse(call, device.major);
  const int64_t workspace = prepared.scratch.reserve(static_cast<int64_t>(gemm->workspace_bytes(problem)));
  prepared.run(x, device);
  problem.d = out.mutable_data_ptr();
  problem.a = prepared.task.codes;
  problem.b = call.codes.const_data_ptr();
  problem.scale_a = prepared.task.scales;
  problem.scale_b = call.scales.const_data_ptr();
  problem.alpha = prepared.task.alpha;
  problem.bias = prepared.task.wide_bias;
  require_launched(gemm->run(problem, prepared.scratch.at<void>(workspace), device.stream), "grouped FP4 matmul");
  return out;
}

std::string architectures() { return FP4_CUDA_ARCHS; }
std::string configurations() { return FP4_CUDA_CONFIGURATIONS; }

// Bytes of workspace that a matmul would take on a GPU of this compute capability and number of multiprocessors, or -1
// where there is none for the shape. Needs no GPU. `experts` is 0 for a plain matmul.
int64_t workspace_bytes(int64_t major, int64_t multiprocessors, const std::string& format, ScalarType dtype, int64_t m,
                        int64_t n, int64_t k, int64_t experts) {
  const Format of = format_named(format);
  const Family family = family_of(static_cast<int>(major));
  if (experts > 0) {
    GroupedProblem problem{};
    problem.rows = static_cast<int>(m);
    problem.n = static_cast<int>(n);
    problem.k = static_cast<int>(k);
    problem.experts = static_cast<int>(experts);
    problem.multiprocessors = static_cast<int>(multiprocessors);
    const GroupedGemm* gemm = choose_grouped(family, of, output_of(dtype));
    if (gemm == nullptr || !gemm->can_implement(problem)) return -1;
    return static_cast<int64_t>(gemm->workspace_bytes(problem));
  }
  GemmProblem problem{};
  problem.m = static_cast<int>(m);
  problem.n = static_cast<int>(n);
  problem.k = static_cast<int>(k);
  problem.multiprocessors = static_cast<int>(multiprocessors);
  const Gemm* gemm = choose(family, of, output_of(dtype), problem);
  if (gemm == nullptr || !gemm->can_implement(problem)) return -1;
  return static_cast<int64_t>(gemm->workspace_bytes(problem));
}

// The tile [m, n, k] and the parts of K that such a matmul would take; empty where there is none.
std::vector<int64_t> configuration(int64_t major, int64_t multiprocessors, const std::string& format, ScalarType dtype,
                                   int64_t m, int64_t n, int64_t k) {
  GemmProblem problem{};
  problem.m = static_cast<int>(m);
  problem.n = static_cast<int>(n);
  problem.k = static_cast<int>(k);
  problem.multiprocessors = static_cast<int>(multiprocessors);
  const Gemm* gemm = choose(family_of(static_cast<int>(major)), format_named(format), output_of(dtype), problem);
  if (gemm == nullptr) return {};
  return {gemm->tile_m, gemm->tile_n, gemm->tile_k, problem.splits};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fp4, CUDA, m) {
  m.impl("cutlass_linear_quantized", TORCH_BOX(&linear_quantized));
  m.impl("cutlass_grouped_linear_quantized", TORCH_BOX(&grouped_linear_quantized));
}

STABLE_TORCH_LIBRARY_FRAGMENT(fp4, m) {
  m.def("cutlass_architectures() -> str");
  m.def("cutlass_configurations() -> str");
  m.def(
      "cutlass_workspace_bytes(int major, int multiprocessors, str format, ScalarType dtype, int m, int n, int k, "
      "int experts) -> int");
  m.def(
      "cutlass_configuration(int major, int multiprocessors, str format, ScalarType dtype, int m, int n, int k) "
      "-> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(fp4, CompositeExplicitAutograd, m) {
  m.impl("cutlass_architectures", TORCH_BOX(&architectures));
  m.impl("cutlass_configurations", TORCH_BOX(&configurations));
  m.impl("cutlass_workspace_bytes", TORCH_BOX(&workspace_bytes));
  m.impl("cutlass_configuration", TORCH_BOX(&configuration));
}

}  // namespace fp4::cuda
