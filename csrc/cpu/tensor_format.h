// Formats by the names that operators are given, and the dtypes of their tensors.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>

#include "quantize.h"

namespace fp4::cpu {

inline Format format_of(const std::string& name) {
  if (name == "nvfp4") return Format::nvfp4;
  STD_TORCH_CHECK(name == "mxfp4", "format is ", name, "; expected nvfp4 or mxfp4");
  return Format::mxfp4;
}

inline torch::headeronly::ScalarType scale_type(Format format) {
  using torch::headeronly::ScalarType;
  return format == Format::nvfp4 ? ScalarType::Float8_e4m3fn : ScalarType::Float8_e8m0fnu;
}

}  // namespace fp4::cpu
