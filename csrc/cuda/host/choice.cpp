// The choice of gemm_table.cpp as a plain library, for test_cutlass_choice.py: tables that hold the tiles of
// gemm_sm*_{small,large}.cu, and no kernels.
#include "gemm.h"

namespace fp4::cuda {

namespace {

Gemms tiles(int m, int n, int k, bool splits_k) {
  Gemms table{};
  for (const Format format : {Format::nvfp4, Format::mxfp4}) {
    for (const Output output : {Output::bfloat16, Output::float16, Output::float32}) {
      table.at(format, output) = {.tile_m = m, .tile_n = n, .tile_k = k, .splits_k = splits_k};
    }
  }
  return table;
}

}  // namespace

extern const Gemms kSm100Small = tiles(128, 64, 256, true);
extern const Gemms kSm100Large = tiles(256, 256, 256, false);
extern const Gemms kSm120Small = tiles(128, 128, 128, true);
extern const Gemms kSm120Large = tiles(256, 128, 128, false);

}  // namespace fp4::cuda

// Writes tile_m, tile_n, tile_k and the parts of K.
extern "C" void choose_configuration(int major, int multiprocessors, int m, int n, int k, int* out) {
  using namespace fp4::cuda;
  GemmProblem problem{};
  problem.m = m;
  problem.n = n;
  problem.k = k;
  problem.multiprocessors = multiprocessors;
  const Gemm* gemm = choose(major == 12 ? Family::sm120 : Family::sm100, Format::nvfp4, Output::bfloat16, problem);
  out[0] = gemm->tile_m;
  out[1] = gemm->tile_n;
  out[2] = gemm->tile_k;
  out[3] = problem.splits;
}
