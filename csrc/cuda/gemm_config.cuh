// One block-scaled GEMM configuration as a CUTLASS 3.x kernel: gemm_<family>_*.cu instantiate it, one a file, because
// each takes minutes and gigabytes to compile.
#pragma once

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/detail/sm100_blockscaled_layout.hpp"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/operations.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/dispatch_policy.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/gemm/kernel/tile_scheduler.hpp"
#include "cutlass/util/packed_stride.hpp"
#include "gemm.h"

namespace fp4::cuda {

using Nvfp4 = cutlass::nv_float4_t<cutlass::float_e2m1_t>;
using Mxfp4 = cutlass::mx_float4_t<cutlass::float_e2m1_t>;

// d = alpha * sum + bias in float32, rounded once. alpha and bias have one row a group, or one in all; a missing bias
// is zero.
template <class Tile, class Output>
using ScaleAndBias = cutlass::epilogue::fusion::Sm90EVT<
    cutlass::epilogue::fusion::Sm90Compute<cutlass::homogeneous_multiply_add, Output, float,
                                           cutlass::FloatRoundStyle::round_to_nearest>,
    cutlass::epilogue::fusion::Sm90ScalarBroadcast<float, cute::Stride<cute::_0, cute::_0, int64_t>>,
    cutlass::epilogue::fusion::Sm90AccFetch,
    cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, float, float, cute::Stride<cute::_0, cute::_1, int64_t>>>;

// Bytes of shared memory that a CTA can have: 227 KiB on compute capability 10.x, 99 KiB on 12.x. More would compile, and
// fail when it is launched.
template <class ArchTag>
constexpr int kSharedMemory = cute::is_same_v<ArchTag, cutlass::arch::Sm100> ? 227 << 10 : 99 << 10;

// How the epilogue stores a tile; this leaves it to CUTLASS.
struct AutoEpilogue {
  using Tile = cutlass::epilogue::collective::EpilogueTileAuto;
  using Schedule = cutlass::epilogue::collective::EpilogueScheduleAuto;
};

template <class ArchTag, class Element, class OutputType, class TileShape, class ClusterShape, class Scheduler,
          class EpilogueChoice = AutoEpilogue>
struct GemmConfig {
  using Operator = cutlass::arch::OpClassBlockScaledTensorOp;
  using RowMajor = cutlass::layout::RowMajor;
  using ColumnMajor = cutlass::layout::ColumnMajor;
  static constexpr int kAlignCodes = 32;  // 16 bytes, as the tensor memory accelerator wants
  static constexpr int kAlignOutput = 128 / cutlass::sizeof_bits<OutputType>::value;

  // The number of multiprocessors that share a tile, and the part of the tile that each of them stores.
  static constexpr int kPerTile = cute::is_same_v<ArchTag, cutlass::arch::Sm100> && cute::size<0>(ClusterShape{}) % 2 == 0
                                      ? 2
                                      : 1;
  using StoredTile = decltype(cute::shape_div(TileShape{}, cute::Shape<cute::Int<kPerTile>, cute::_1, cute::_1>{}));

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      ArchTag, Operator, TileShape, ClusterShape, typename EpilogueChoice::Tile, float, float, void, RowMajor,
      kAlignOutput, OutputType, RowMajor, kAlignOutput, typename EpilogueChoice::Schedule,
      ScaleAndBias<StoredTile, OutputType>>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      ArchTag, Operator, Element, RowMajor, kAlignCodes, Element, ColumnMajor, kAlignCodes, float, TileShape,
      ClusterShape,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::collective::KernelScheduleAuto>::CollectiveOp;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue, Scheduler>;
  using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  static_assert(Kernel::SharedStorageSize <= kSharedMemory<ArchTag>, "the tile needs more shared memory than a CTA has");

  static constexpr bool kSplitsK = cute::is_same_v<Scheduler, cutlass::gemm::StreamKScheduler>;

  static typename Device::Arguments arguments(const GemmProblem& p) {
    using Codes = typename Device::ElementA;
    using Scale = typename Mainloop::ElementSF;
    using Layouts = typename Mainloop::Sm1xxBlkScaledConfig;
    const auto stride_a = cutlass::make_cute_packed_stride(typename Kernel::StrideA{}, {p.m, p.k, 1});
    const auto stride_b = cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, {p.n, p.k, 1});
    const auto stride_d = cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, {p.m, p.n, 1});
    const auto shape = cute::make_shape(p.m, p.n, p.k, 1);
    typename Device::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {p.m, p.n, p.k, 1},
        {static_cast<const Codes*>(p.a), stride_a, static_cast<const Codes*>(p.b), stride_b,
         static_cast<const Scale*>(p.scale_a), Layouts::tile_atom_to_shape_SFA(shape),
         static_cast<const Scale*>(p.scale_b), Layouts::tile_atom_to_shape_SFB(shape)},
        {{{{1.0f}, {p.alpha}}, {}, {p.bias}, {}}, nullptr, stride_d, static_cast<OutputType*>(p.d), stride_d}};
    // CUTLASS would ask the driver, on every call, and about GPU 0.
    arguments.hw_info.sm_count = p.multiprocessors;
    if constexpr (kSplitsK) arguments.scheduler.splits = p.splits;
    return arguments;
  }

  static bool can_implement(const GemmProblem& p) {
    return Device::can_implement(arguments(p)) == cutlass::Status::kSuccess;
  }

  static size_t workspace_bytes(const GemmProblem& p) { return Device::get_workspace_size(arguments(p)); }

  static const char* run(const GemmProblem& p, void* workspace, cudaStream_t stream) {
    Device device;
    cutlass::Status status = device.initialize(arguments(p), workspace, stream);
    if (status == cutlass::Status::kSuccess) status = device.run(stream);
    return status == cutlass::Status::kSuccess ? nullptr : cutlass::cutlassGetStatusString(status);
  }

  static constexpr Gemm kernel() {
    Gemm gemm{};
    gemm.tile_m = cute::size<0>(TileShape{});
    gemm.tile_n = cute::size<1>(TileShape{});
    gemm.tile_k = cute::size<2>(TileShape{});
    gemm.splits_k = kSplitsK;
    gemm.can_implement = can_implement;
    gemm.workspace_bytes = workspace_bytes;
    gemm.run = run;
    return gemm;
  }
};

// Config<Element, Output>::kernel() for both formats and all outputs, in one source: reading CUTLASS costs the compiler
// far more than another kernel does.
template <class Kernel, template <class, class> class Config>
constexpr KernelTable<Kernel> kernel_table() {
  using cutlass::bfloat16_t;
  using cutlass::half_t;
  KernelTable<Kernel> table{};
  table.at(Format::nvfp4, Output::bfloat16) = Config<Nvfp4, bfloat16_t>::kernel();
  table.at(Format::nvfp4, Output::float16) = Config<Nvfp4, half_t>::kernel();
  table.at(Format::nvfp4, Output::float32) = Config<Nvfp4, float>::kernel();
  table.at(Format::mxfp4, Output::bfloat16) = Config<Mxfp4, bfloat16_t>::kernel();
  table.at(Format::mxfp4, Output::float16) = Config<Mxfp4, half_t>::kernel();
  table.at(Format::mxfp4, Output::float32) = Config<Mxfp4, float>::kernel();
  return table;
}

}  // namespace fp4::cuda
