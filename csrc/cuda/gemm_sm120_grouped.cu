// The matmuls of the experts of a layer, in one launch.
#include "grouped_config.cuh"

namespace fp4::cuda {

using namespace cute;

template <class Element, class Output>
using Config = GroupedConfig<cutlass::arch::Sm120, Element, Output, Shape<_128, _128, _128>,
                             cutlass::gemm::collective::KernelScheduleAuto,
                             cutlass::epilogue::collective::EpilogueScheduleAuto>;

extern const GroupedGemms kSm120Grouped = kernel_table<GroupedGemm, Config>();

}  // namespace fp4::cuda
