// Many rows: the largest tile of the tensor cores, shared by two multiprocessors.
#include "gemm_config.cuh"

namespace fp4::cuda {

using namespace cute;

// CUTLASS would store 128 columns at once: that many sums and as many biases are more than a thread has registers for.
// 64 is the least: the tensor memory, in which two tiles share what is stored first, has no room for more.
struct Epilogue {
  using Tile = Shape<_128, _64>;
  using Schedule = cutlass::epilogue::TmaWarpSpecialized2Sm;
};

template <class Element, class Output>
using Config = GemmConfig<cutlass::arch::Sm100, Element, Output, Shape<_256, _256, _256>, Shape<_2, _1, _1>,
                          void, Epilogue>;

extern const Gemms kSm100Large = kernel_table<Gemm, Config>();

}  // namespace fp4::cuda
