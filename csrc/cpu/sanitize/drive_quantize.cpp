// Quantization kernels over random ranges of blocks of random bits, in buffers of exactly their size.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "isa.h"
#include "quantize.h"

using namespace fp4::cpu;

namespace {

constexpr int kDoubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

bool run(std::mt19937& random, Format format, Rule rule, Dtype dtype) {
  const int block = block_size(format);
  const int64_t blocks = 1 + random() % 40, first = random() % blocks, last = first + 1 + random() % (blocks - first);
  const double global_scale = std::ldexp(1.3, static_cast<int>(random() % 260) - 140);
  const int64_t elements = blocks * block;
  std::vector<uint8_t> x(elements * (dtype == Dtype::float32 ? 4 : 2)), codes(elements / 2), scales(blocks);
  for (uint8_t& byte : x) byte = static_cast<uint8_t>(random());
  const Quantizer quantizer(format, rule, dtype, global_scale);
  quantizer.quantize(x.data(), first, last, codes.data(), scales.data());

  std::vector<int8_t> doubled(elements);
  std::vector<float> effective(blocks);
  quantizer.quantize_doubled(x.data(), first, last, doubled.data(), effective.data());
  for (int64_t i = first * block; i < last * block; ++i) {
    if (doubled[i] != kDoubled[codes[i / 2] >> (i % 2 * 4) & 15]) return false;
  }
  for (const Dtype out : {Dtype::float32, Dtype::bfloat16, Dtype::float16}) {
    std::vector<uint8_t> values(elements * (out == Dtype::float32 ? 4 : 2));
    dequantize(format, codes.data(), scales.data(), global_scale, out, first, last, values.data());
  }
  abs_max(x.data(), dtype, elements - random() % 16);
  return true;
}

}  // namespace

int main() {
  const char* const names[] = {"scalar", "avx2", "avx512"};
  const char* const wanted = std::getenv("FP4_CPU_ISA");
  if (wanted != nullptr && std::strcmp(wanted, names[static_cast<int>(isa())]) != 0) {
    std::printf("quantize: skipped, this CPU has no %s\n", wanted);
    return 0;
  }
  std::mt19937 random(1);
  int cases = 0;
  for (const Format format : {Format::nvfp4, Format::mxfp4}) {
    for (int rule = 0; rule < 7; ++rule) {
      if (!is_defined(format, static_cast<Rule>(rule))) continue;
      for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16}) {
        for (int i = 0; i < 60; ++i, ++cases) {
          if (!run(random, format, static_cast<Rule>(rule), dtype)) {
            std::printf("quantize: doubled codes differ from codes\n");
            return 1;
          }
        }
      }
    }
  }
  std::printf("quantize: %d cases clean with %s\n", cases, names[static_cast<int>(isa())]);
  return 0;
}
