// Which configuration a shape gets. The costs are a model, not a measurement: waves of tiles over the multiprocessors,
// times what a tile takes, where a small tile gets less out of the tensor cores.
#include <algorithm>
#include <initializer_list>

#include "gemm.h"

namespace fp4::cuda {

// The build says which of these it compiled.
extern const Gemms kSm100Small, kSm100Large, kSm120Small, kSm120Large;
extern const GroupedGemms kSm100Grouped, kSm120Grouped;

namespace {

struct Candidate {
  const Gemms* gemms;
  int multiprocessors_per_tile;
  double efficiency;  // of the tensor cores, of the largest tile 1
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// At least this many steps of tile_k for each part of a split K: a part costs a pass over its results.
constexpr int kStepsPerSplit = 4;

double cost(const Candidate& candidate, const Gemm& gemm, GemmProblem& problem) {
  const int64_t tiles = ceil_div(problem.m, gemm.tile_m) * ceil_div(problem.n, gemm.tile_n);
  const int64_t at_once = std::max(1, problem.multiprocessors / candidate.multiprocessors_per_tile);
  int64_t splits = 1;
  if (gemm.splits_k) {
    const int64_t steps = ceil_div(problem.k, gemm.tile_k);
    splits = std::max<int64_t>(1, std::min(at_once / tiles, steps / kStepsPerSplit));
  }
  problem.splits = static_cast<int>(splits);
  const double tile = static_cast<double>(gemm.tile_m) * gemm.tile_n / candidate.multiprocessors_per_tile;
  return static_cast<double>(ceil_div(tiles * splits, at_once)) * tile / candidate.efficiency /
         static_cast<double>(splits);
}

}  // namespace

const Gemm* choose(Family family, Format format, Output output, GemmProblem& problem) {
  const auto best_of = [&](std::initializer_list<Candidate> candidates) {
    const Gemm* best = nullptr;
    double least = 0;
    int splits = 1;
    for (const Candidate& candidate : candidates) {
      const Gemm& gemm = candidate.gemms->kernels[static_cast<int>(format)][static_cast<int>(output)];
      const double its = cost(candidate, gemm, problem);
      if (best != nullptr && its >= least) continue;
      best = &gemm;
      least = its;
      splits = problem.splits;
    }
    problem.splits = splits;
    return best;
  };
  if (family == Family::sm100) {
    return best_of({
#if FP4_SM100_SMALL
        {&kSm100Small, 1, 0.6},
#endif
#if FP4_SM100_LARGE
        {&kSm100Large, 2, 1.0},
#endif
    });
  }
  return best_of({
#if FP4_SM120_SMALL
      {&kSm120Small, 1, 0.8},
#endif
#if FP4_SM120_LARGE
      {&kSm120Large, 1, 1.0},
#endif
  });
}

const GroupedGemm* choose_grouped(Family family, Format format, Output output) {
  const GroupedGemms* grouped = nullptr;
#if FP4_SM100_GROUPED
  if (family == Family::sm100) grouped = &kSm100Grouped;
#endif
#if FP4_SM120_GROUPED
  if (family == Family::sm120) grouped = &kSm120Grouped;
#endif
  static_cast<void>(family);
  return grouped == nullptr ? nullptr : &grouped->kernels[static_cast<int>(format)][static_cast<int>(output)];
}

}  // namespace fp4::cuda
