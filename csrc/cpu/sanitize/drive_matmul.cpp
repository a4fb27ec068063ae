// Runs the matmuls over odd shapes, for sanitize.sh. Every buffer is from the heap and of exactly the size that the
// headers ask for.
#include "fp8.h"
#include "matmul.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

using namespace fp4::cpu;

namespace {

uint32_t state = 1;

uint32_t next() { return state = state * 1664525u + 1013904223u, state >> 8; }

template <typename T>
std::unique_ptr<T[]> exactly(int64_t count) {
  return std::unique_ptr<T[]>(new T[count]);
}

std::unique_ptr<uint8_t[]> random_bytes(int64_t count, uint32_t low, uint32_t high) {
  auto bytes = exactly<uint8_t>(count);
  for (int64_t i = 0; i < count; ++i) bytes[i] = static_cast<uint8_t>(low + next() % (high - low));
  return bytes;
}

void require(bool condition, const char* what, int64_t m, int64_t n, int64_t k) {
  if (condition) return;
  std::fprintf(stderr, "%s: m %lld, n %lld, k %lld\n", what, static_cast<long long>(m), static_cast<long long>(n),
               static_cast<long long>(k));
  std::exit(1);
}

// Two experts of m and (m + 1) / 2 rows.
void run(Format format, Dtype dtype, int64_t m, int64_t n, int64_t k, bool integer) {
  const int block = block_size(format);
  const int64_t panels = panels_of(n), rows = m + (m + 1) / 2;
  const auto codes = random_bytes(2 * panels * kPanelRows * k / 2, 0, 256);
  const uint32_t lowest = format == Format::mxfp4 ? 110 : n == 16 ? 32 : 0;  // from 2^-3 on whole numbers of 2^-6
  const auto scales = random_bytes(2 * panels * kPanelRows * k / block, lowest, 127);
  const auto x = exactly<uint8_t>(rows * k * element_size(dtype));
  const auto values = exactly<float>(rows * k);
  for (int64_t i = 0; i < rows * k; ++i) values[i] = static_cast<float>(next() % 2001) / 1000 - 1;
  kScalarMatmul.store(values.get(), dtype, rows * k, x.get());
  const auto bias = exactly<uint8_t>(2 * n * element_size(dtype));
  std::memset(bias.get(), 0, 2 * n * element_size(dtype));
  const auto out = exactly<uint8_t>(rows * n * element_size(dtype));
  std::memset(out.get(), 0xFF, rows * n * element_size(dtype));  // NaN, so that a place never written shows
  const int64_t half_codes = panels * kPanelRows * k / 2, half_scales = panels * kPanelRows * k / block;
  Product product{.format = format, .n = n, .k = k, .bias_dtype = dtype, .out_dtype = dtype, .out = out.get()};
  product.segments.push_back(
      {.first_row = 0, .rows = m, .codes = codes.get(), .scales = scales.get(), .global_scale = 0.01});
  product.segments.push_back({
      .first_row = m,
      .rows = rows - m,
      .codes = codes.get() + half_codes,
      .scales = scales.get() + half_scales,
      .global_scale = 0.02,
      .bias = bias.get() + n * element_size(dtype),
  });
  const auto drive = [&](const auto& work) {
    work.prepare(0, work.prepare_tasks());
    const int64_t middle = work.tasks() / 2;
    work.run(middle, work.tasks());
    work.run(0, middle);
  };
  if (integer) {
    const Quantizer first(format, Rule::abs_max, dtype, format == Format::nvfp4 ? 1.0 / 2688 : 1.0);
    const Quantizer second(format, Rule::abs_max, dtype, format == Format::nvfp4 ? 1.0 / 1344 : 2.0);
    product.segments[0].quantizer = &first;
    product.segments[1].quantizer = &second;
    const auto tiles = exactly<uint8_t>(rows * IntegerProduct::tile_bytes(format, k));
    drive(IntegerProduct(product, x.get(), dtype, tiles.get()));
  } else {
    const auto rotation = exactly<float>(16 * 16);
    for (int i = 0; i < 16 * 16; ++i) rotation[i] = i % 17 == 0 ? 1.0f : 0.01f;
    for (const bool rotates : {false, true}) {
      const Input input{.x = x.get(), .dtype = dtype, .rotation = rotates ? rotation.get() : nullptr, .h = 16};
      if (FixedPoint::runs(dtype)) {
        const auto memory = exactly<uint8_t>(FixedPoint::memory_bytes(product, rows));
        drive(FixedPoint(product, input, rows, memory.get()));
      }
      const auto memory = exactly<uint8_t>(WeightOnly::memory_bytes(product, rows));
      drive(WeightOnly(product, input, memory.get()));
    }
  }
  const auto result = exactly<float>(rows * n);
  kScalarMatmul.load(out.get(), dtype, rows * n, result.get());
  for (int64_t i = 0; i < rows * n; ++i) require(!std::isnan(result[i]), "an output was not written", m, n, k);
}

// Two experts of m and (m + 1) / 2 rows, FP8 weights; every code, those of NaN in the last panel alone.
void run_fp8(Dtype dtype, int64_t m, int64_t n, int64_t k) {
  const int64_t panels = panels_of(n), rows = m + (m + 1) / 2;
  const auto codes = random_bytes(2 * panels * kPanelRows * k, 0, 127);
  codes[2 * panels * kPanelRows * k - 1] = 0x7F;
  const auto scales = exactly<uint8_t>(2 * panels * kPanelRows * element_size(dtype));
  const std::vector<float> units(2 * panels * kPanelRows, 0.01f);
  kScalarMatmul.store(units.data(), dtype, static_cast<int64_t>(units.size()), scales.get());
  const auto x = exactly<uint8_t>(rows * k * element_size(dtype));
  const auto values = exactly<float>(rows * k);
  for (int64_t i = 0; i < rows * k; ++i) values[i] = static_cast<float>(next() % 2001) / 1000 - 1;
  kScalarMatmul.store(values.get(), dtype, rows * k, x.get());
  const auto out = exactly<uint8_t>(rows * n * element_size(dtype));
  std::memset(out.get(), 0xFF, rows * n * element_size(dtype));
  Product product{
      .format = Format::nvfp4, .n = n, .k = k, .bias_dtype = dtype, .out_dtype = dtype, .out = out.get()};
  product.segments.push_back(
      {.first_row = 0, .rows = m, .codes = codes.get(), .scales = scales.get(), .global_scale = 1});
  product.segments.push_back({
      .first_row = m,
      .rows = rows - m,
      .codes = codes.get() + panels * kPanelRows * k,
      .scales = scales.get() + panels * kPanelRows * element_size(dtype),
      .global_scale = 1,
  });
  const Input input{.x = x.get(), .dtype = dtype};
  const auto memory = exactly<uint8_t>(Fp8WeightOnly::memory_bytes(product, rows));
  const Fp8WeightOnly work(product, dtype, input, memory.get());
  work.prepare(0, work.prepare_tasks());
  work.run(work.tasks() / 2, work.tasks());
  work.run(0, work.tasks() / 2);
  const auto result = exactly<float>(rows * n);
  kScalarMatmul.load(out.get(), dtype, rows * n, result.get());
  for (int64_t i = 0; i < m * n; ++i) require(!std::isnan(result[i]), "an output was not written", m, n, k);
  for (const float scale : {0.0f, 0.01f}) fake_quantize_fp8(x.get(), dtype, rows, k, scale, values.get());
}

}  // namespace

int main() {
  const char* const names[] = {"scalar", "avx2", "avx512"};
  const char* const wanted = std::getenv("FP4_CPU_ISA");
  if (wanted != nullptr && std::strcmp(wanted, names[static_cast<int>(isa())]) != 0) {
    std::printf("matmul: skipped, this CPU has no %s\n", wanted);
    return 0;
  }
  int cases = 0;
  for (const Format format : {Format::nvfp4, Format::mxfp4}) {
    for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16}) {
      run(format, dtype, 49, 33, 2080, false);
      ++cases;
      for (const int64_t m : {1, 2, 3, 5, 7, 13, 200}) {
        for (const int64_t n : {1, 15, 16, 33}) {
          for (const int64_t k : {32, 96, 288, 1056}) {
            if (m == 200 && k > 288) continue;
            run(format, dtype, m, n, k, false);
            run(format, dtype, m, n, k, true);
            cases += 2;
          }
        }
      }
    }
  }
  for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16}) {
    for (const int64_t m : {1, 2, 3, 4, 5, 7, 13}) {
      for (const int64_t n : {1, 15, 16, 33}) {
        for (const int64_t k : {1, 7, 32, 257, 1055}) {
          run_fp8(dtype, m, n, k);
          ++cases;
        }
      }
    }
  }
  std::printf("matmul: %d cases clean with %s\n", cases, names[static_cast<int>(isa())]);
  return 0;
}
