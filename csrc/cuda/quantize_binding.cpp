// fp4::cutlass_quantize, cutlass_dequantize and cutlass_largest_magnitude. Schemas are in src/fp4/ops/canonical.py.
#include <algorithm>
#include <array>
#include <initializer_list>
#include <mutex>
#include <tuple>

#include "../named_formats.h"
#include "binding.h"

// Exported by CUDA builds of torch alone: weak, so that the library loads into the others too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace fp4::cuda {

Type type_of(ScalarType type, const char* what) {
  if (type == ScalarType::Float) return Type::float32;
  if (type == ScalarType::BFloat16) return Type::bfloat16;
  STD_TORCH_CHECK(type == ScalarType::Half, what, " must be float32, bfloat16 or float16");
  return Type::float16;
}

std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}

std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + "]";
}

Tensor readable(const Tensor& tensor) {
  const Tensor dense = torch::stable::contiguous(tensor);
  return reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 ? torch::stable::clone(dense) : dense;
}

const double* global_scale_data(const Tensor& scale, const Tensor& x, std::initializer_list<int64_t> counts) {
  STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Double && is_beside(scale, x) && scale.is_contiguous(),
                  "a global scale must be float64, contiguous and on the GPU of what it scales");
  const int64_t count = scale.numel();
  STD_TORCH_CHECK(std::find(counts.begin(), counts.end(), count) != counts.end(), "got ", count,
                  " global scales; expected ", *(counts.end() - 1));
  return static_cast<const double*>(scale.const_data_ptr());
}

void require_launched(const char* error, const char* what) {
  STD_TORCH_CHECK(error == nullptr, what, ": ", error);
}

Device::Device(const Tensor& x) : index(x.get_device_index()), previous(index) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
  struct Properties {
    std::once_flag once;
    int multiprocessors = 0, major = 0;
  };
  constexpr int kMostDevices = 64;
  static std::array<Properties, kMostDevices> all;
  STD_TORCH_CHECK(index >= 0 && index < kMostDevices, "GPU ", index, " is beyond the ", kMostDevices, " that fp4 counts");
  Properties& properties = all[static_cast<size_t>(index)];
  std::call_once(properties.once, [&] {
    cudaDeviceGetAttribute(&properties.multiprocessors, cudaDevAttrMultiProcessorCount, index);
    cudaDeviceGetAttribute(&properties.major, cudaDevAttrComputeCapabilityMajor, index);
  });
  multiprocessors = properties.multiprocessors;
  major = properties.major;
  STD_TORCH_CHECK(multiprocessors > 0, "CUDA does not know GPU ", index);
  void* current = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &current));
  stream = static_cast<cudaStream_t>(current);
  // Last: where a constructor throws, no destructor gives the GPU back.
  cudaGetDevice(&previous);
  if (previous != index) cudaSetDevice(index);
}

Device::~Device() {
  if (previous != index) cudaSetDevice(previous);
}

namespace {

// Matrices of a tensor [..., N, K].
int64_t matrices_of(const std::vector<int64_t>& shape) {
  int64_t matrices = 1;
  for (size_t i = 0; i + 2 < shape.size(); ++i) matrices *= shape[i];
  return matrices;
}

std::tuple<Tensor, Tensor> quantize_tensor(const Tensor& x, const std::optional<Tensor>& global_scale,
                                           const std::string& format_name, const std::string& rule_name) {
  const Format format = format_named(format_name);
  const int block = block_size(format);
  std::vector<int64_t> shape = shape_of(x);
  STD_TORCH_CHECK(!shape.empty() && shape.back() % block == 0, "the last axis of x must be a multiple of ", block);
  STD_TORCH_CHECK(format == Format::mxfp4 || global_scale.has_value(), "nvfp4 needs a global scale");
  const Device device(x);
  const Tensor input = readable(x);
  QuantizeTask task{};
  task.x = input.const_data_ptr();
  task.type = type_of(x.scalar_type(), "x");
  task.k = shape.back();
  task.rows = task.k ? x.numel() / task.k : 0;
  task.format = format;
  task.rule = rule_named(format, rule_name);
  task.rows_per_scale = task.rows;
  if (global_scale.has_value()) {
    const int64_t matrices = matrices_of(shape);
    task.global_scale = global_scale_data(*global_scale, x, {1, matrices});
    if (global_scale->numel() > 1) task.rows_per_scale = task.rows / matrices;
  }
  shape.back() = task.k / 2;
  Tensor codes = torch::stable::new_empty(x, shape, ScalarType::Byte);
  shape.back() = task.k / block;
  Tensor scales = torch::stable::new_empty(x, shape, scale_type(format));
  if (x.numel() == 0) return {codes, scales};
  task.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  task.scales = static_cast<uint8_t*>(scales.mutable_data_ptr());
  require_launched(quantize(task, device.multiprocessors, device.stream), "quantize");
  return {codes, scales};
}

Tensor dequantize_tensor(const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& global_scale,
                         const std::string& format_name, ScalarType type) {
  const Format format = format_named(format_name);
  STD_TORCH_CHECK(scales.scalar_type() == scale_type(format), "block scales of ", format_name, " must be ",
                  format == Format::nvfp4 ? "float8_e4m3fn" : "float8_e8m0fnu");
  const int block = block_size(format);
  std::vector<int64_t> shape = shape_of(codes), expected = shape;
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && !shape.empty(), "codes must be uint8 [..., K / 2]");
  shape.back() *= 2;
  expected.back() = shape.back() / block;
  STD_TORCH_CHECK(shape_of(scales) == expected && shape.back() % block == 0 && is_beside(scales, codes),
                  "codes and block scales do not match");
  const Device device(codes);
  const Tensor code_bytes = readable(codes), scale_bytes = torch::stable::contiguous(scales);
  Tensor out = torch::stable::new_empty(codes, shape, type);
  DequantizeTask task{};
  task.codes = static_cast<const uint8_t*>(code_bytes.const_data_ptr());
  task.scales = static_cast<const uint8_t*>(scale_bytes.const_data_ptr());
  task.blocks = task.blocks_per_scale = scales.numel();
  if (global_scale.has_value()) {
    const int64_t matrices = matrices_of(shape);
    task.global_scale = global_scale_data(*global_scale, codes, {1, matrices});
    if (global_scale->numel() > 1) task.blocks_per_scale = task.blocks / matrices;
  }
  task.format = format;
  task.type = type_of(type, "dtype");
  task.out = out.mutable_data_ptr();
  if (task.blocks == 0) return out;
  require_launched(dequantize(task, device.multiprocessors, device.stream), "dequantize");
  return out;
}

Tensor largest_magnitude_of(const Tensor& x) {
  std::vector<int64_t> shape = shape_of(x);
  STD_TORCH_CHECK(shape.size() >= 2, "x must be [..., N, K]");
  const Device device(x);
  const Tensor input = readable(x);
  shape.resize(shape.size() - 2);
  Tensor out = torch::stable::new_empty(x, shape, ScalarType::Float);
  const int64_t matrices = out.numel();
  if (matrices == 0) return out;
  require_launched(largest_magnitude(input.const_data_ptr(), type_of(x.scalar_type(), "x"), matrices,
                                     x.numel() / matrices, static_cast<float*>(out.mutable_data_ptr()),
                                     device.multiprocessors, device.stream),
                   "largest_magnitude");
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fp4, CUDA, m) {
  m.impl("cutlass_quantize", TORCH_BOX(&quantize_tensor));
  m.impl("cutlass_dequantize", TORCH_BOX(&dequantize_tensor));
  m.impl("cutlass_largest_magnitude", TORCH_BOX(&largest_magnitude_of));
}

}  // namespace fp4::cuda
