// Which configuration a shape gets, decided by its sizes alone: no kernel has been timed on a GPU yet, so the rule uses
// no estimate of speed, only how tiles cover the output and the multiprocessors.
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
};

// How a kernel would cover the output of a problem.
struct Cover {
  const Gemm* gemm = nullptr;
  int64_t tiles = 0;
  int64_t at_once = 1;  // tiles that run at a time
  int64_t splits = 1;   // parts of K
  int64_t work = 0;     // elements of the output that one multiprocessor computes, each over all of K
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Each part of a split K takes at least this many steps of tile_k, since a part costs another pass over its results.
constexpr int kStepsPerSplit = 4;

Cover cover(const Candidate& candidate, const Gemm& gemm, const GemmProblem& problem) {
  const int64_t tiles = ceil_div(problem.m, gemm.tile_m) * ceil_div(problem.n, gemm.tile_n);
  const int64_t at_once = std::max(1, problem.multiprocessors / candidate.multiprocessors_per_tile);
  int64_t splits = 1;
  if (gemm.splits_k) {
    const int64_t steps = ceil_div(problem.k, gemm.tile_k);
    splits = std::max<int64_t>(1, std::min(at_once / tiles, steps / kStepsPerSplit));
  }
  const int64_t tile = static_cast<int64_t>(gemm.tile_m) * gemm.tile_n / candidate.multiprocessors_per_tile;
  return {
      .gemm = &gemm,
      .tiles = tiles,
      .at_once = at_once,
      .splits = splits,
      .work = ceil_div(ceil_div(tiles * splits, at_once) * tile, splits),
  };
}

// Whether the kernel of the larger tile is to run. A larger tile reads the operands less often, so it is preferred
// unless it wastes more: by rows that do not exist, where the smaller tile holds all rows, or by idle multiprocessors,
// where there are too few tiles for all of them.
bool prefers_larger(const Cover& larger, const Cover& smaller, const GemmProblem& problem) {
  const bool has_rows = problem.m > smaller.gemm->tile_m;
  const bool fills = larger.tiles >= larger.at_once;
  return (has_rows && fills) || larger.work <= smaller.work;
}

}  // namespace

const Gemm* choose(Family family, Format format, Output output, GemmProblem& problem) {
  // Candidates come in the order of their tiles, the smallest first.
  const auto best_of = [&](std::initializer_list<Candidate> candidates) {
    Cover best;
    for (const Candidate& candidate : candidates) {
      const Cover next = cover(candidate, candidate.gemms->at(format, output), problem);
      if (best.gemm == nullptr || prefers_larger(next, best, problem)) best = next;
    }
    problem.splits = static_cast<int>(best.splits);
    return best.gemm;
  };
  if (family == Family::sm100) {
    return best_of({
#if FP4_SM100_SMALL
        {.gemms = &kSm100Small, .multiprocessors_per_tile = 1},
#endif
#if FP4_SM100_LARGE
        {.gemms = &kSm100Large, .multiprocessors_per_tile = 2},
#endif
    });
  }
  return best_of({
#if FP4_SM120_SMALL
      {.gemms = &kSm120Small, .multiprocessors_per_tile = 1},
#endif
#if FP4_SM120_LARGE
      {.gemms = &kSm120Large, .multiprocessors_per_tile = 1},
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
  return grouped == nullptr ? nullptr : &grouped->at(format, output);
}

}  // namespace fp4::cuda
