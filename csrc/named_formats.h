// Formats and rules by the names that operators take, and the dtypes of their tensors, for the bindings of both libraries.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>

#include "formats.h"

namespace fp4 {

constexpr const char* name_of(Format format) { return format == Format::nvfp4 ? "nvfp4" : "mxfp4"; }

inline Format format_named(const std::string& name) {
  if (name == name_of(Format::nvfp4)) return Format::nvfp4;
  STD_TORCH_CHECK(name == name_of(Format::mxfp4), "format is ", name, "; expected nvfp4 or mxfp4");
  return Format::mxfp4;
}

// The dtype of block scales.
inline torch::headeronly::ScalarType scale_type(Format format) {
  using torch::headeronly::ScalarType;
  return format == Format::nvfp4 ? ScalarType::Float8_e4m3fn : ScalarType::Float8_e8m0fnu;
}

inline Rule rule_named(Format format, const std::string& name) {
  struct Named {
    const char* name;
    Rule rule;
  };
  constexpr Named kRules[] = {
      {.name = "abs_max", .rule = Rule::abs_max},
      {.name = "mse", .rule = Rule::mse},
      {.name = "four_over_six", .rule = Rule::four_over_six},
      {.name = "even", .rule = Rule::even},
      {.name = "ceil", .rule = Rule::ceil},
      {.name = "below_six", .rule = Rule::below_six},
      {.name = "quest", .rule = Rule::quest},
  };
  for (const Named& named : kRules) {
    if (name == named.name && is_defined(format, named.rule)) return named.rule;
  }
  STD_TORCH_CHECK(false, "scale rule ", name, " is not defined for ", name_of(format));
  return Rule::abs_max;
}

}  // namespace fp4
