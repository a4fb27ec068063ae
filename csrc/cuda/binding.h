// What the bindings share: they check tensors and turn them into the plain types of quantize.h and gemm.h.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "quantize.h"

namespace fp4::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Type type_of(ScalarType type, const char* what);

std::vector<int64_t> shape_of(const Tensor& tensor);
std::string shape_text(const Tensor& tensor);

// Contiguous, and at an address that vector loads can take.
Tensor readable(const Tensor& tensor);

// Whether the tensor is on the GPU of x. A kernel that reads another GPU's memory fails long after the call, or is slow.
inline bool is_beside(const Tensor& tensor, const Tensor& x) {
  return tensor.is_cuda() && tensor.get_device_index() == x.get_device_index();
}

// The tensor memory accelerator reads from addresses that are multiples of this.
constexpr uintptr_t kTmaAlignment = 16;
inline bool is_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kTmaAlignment == 0;
}

// A global scale: float64 on the GPU of x with one of `counts` elements. Returns its data.
const double* global_scale_data(const Tensor& scale, const Tensor& x, std::initializer_list<int64_t> counts);

// Raises an error unless the launch succeeded (`error` is null).
void require_launched(const char* error, const char* what);

// The GPU of a call, made current for its duration.
struct Device {
  explicit Device(const Tensor& x);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  int index, previous;
  cudaStream_t stream;  // torch's current one
  int multiprocessors;
  int major;  // of the compute capability
};

}  // namespace fp4::cuda
