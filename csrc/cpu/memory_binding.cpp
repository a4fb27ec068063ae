// Where packed weights lie: every token reads all of them once, in order, and with pages of 4 KB the processor spends a
// tenth of that time on finding the next page. Asked for before the memory is first written, Linux gives pages of 2 MB.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fp4::cpu {

namespace {

using torch::stable::Tensor;

// Asks for large pages where whole ones fit into the memory of `x`, which nothing was written to. A wish, not a demand.
void prefer_large_pages(Tensor x) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kLargePage = 1 << 21;
  const auto start = reinterpret_cast<uintptr_t>(x.mutable_data_ptr());
  const uintptr_t first = (start + kLargePage - 1) & ~(kLargePage - 1);
  const uintptr_t last = (start + static_cast<uintptr_t>(x.numel() * x.element_size())) & ~(kLargePage - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)x;
#endif
}

}  // namespace

// About memory rather than about values, so it is no operator of ops.py.
STABLE_TORCH_LIBRARY_FRAGMENT(fp4, m) { m.def("cpu_prefer_large_pages(Tensor(a!) x) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(fp4, CPU, m) { m.impl("cpu_prefer_large_pages", TORCH_BOX(&prefer_large_pages)); }

}  // namespace fp4::cpu
