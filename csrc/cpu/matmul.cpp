#include "matmul.h"

#include <algorithm>

#include "scratch.h"

namespace fp4::cpu {

namespace {

// Most rows of x that are multiplied with a panel while it is decoded: many, so that decoding costs little beside
// them, but few enough for their chunk of x to stay in the second-level cache.
constexpr int64_t kRowsPerTask = 144;

}  // namespace

Matmul::Matmul(const Product& product, TileSize tile, int64_t chunk)
    : product_(product),
      kernels_(matmul_kernels()),
      format_kernels_(kernels_.formats[product.format]),
      tile_(tile),
      chunk_(chunk),
      panels_(panels_of(product.n)),
      starts_{0},
      prepare_starts_{0} {
  for (const Segment& segment : product.segments) {
    starts_.push_back(starts_.back() + batches(segment).count * panels_);
    prepare_starts_.push_back(prepare_starts_.back() + tiling(segment).count);
  }
}

// Tiles are shared out evenly, so that all tasks take the same time.
Tiling Matmul::batches(const Segment& segment) const {
  return Tiling(tiling(segment).count, kRowsPerTask / tile_.of(segment.rows));
}

Matmul::Piece Matmul::piece_at(int64_t task, int64_t end) const {
  const size_t index = std::upper_bound(starts_.begin(), starts_.end(), task) - starts_.begin() - 1;
  const Segment& segment = product_.segments[index];
  const int64_t within = task - starts_[index], batch = within / panels_, panel = within % panels_;
  const Tiling batches = this->batches(segment);
  return {
      .segment = &segment,
      .first_tile = batches.start(batch),
      .last_tile = batches.start(batch + 1),
      .first_panel = panel,
      .last_panel = std::min(panels_, panel + end - task),
  };
}

Matmul::Tile Matmul::tile_at(int64_t task) const {
  const auto& starts = prepare_starts_;
  const size_t index = std::upper_bound(starts.begin(), starts.end(), task) - starts.begin() - 1;
  const Segment& segment = product_.segments[index];
  return {.segment = &segment, .tiling = tiling(segment), .index = task - starts[index]};
}

void Matmul::load_row(const Input& input, int64_t row, float* to) const {
  const int64_t k = product_.k;
  const void* from = static_cast<const uint8_t*>(input.x) + row * k * element_size(input.dtype);
  if (input.rotation == nullptr) return kernels_.load(from, input.dtype, k, to);
  auto unrotated = scratch<float>(k);
  kernels_.load(from, input.dtype, k, unrotated.get());
  kernels_.rotate(unrotated.get(), k / input.h, input.rotation, input.h, to);
  if (input.dtype == Dtype::float32) return;
  auto rounded = scratch<uint16_t>(k);
  kernels_.store(to, input.dtype, k, rounded.get());
  kernels_.load(rounded.get(), input.dtype, k, to);
}

void Matmul::finish(const Segment& segment, int64_t row, int64_t rows, int64_t panel, const float* sums,
                    float unit) const {
  const int64_t column = panel * kPanelRows;
  const int64_t columns = std::min<int64_t>(kPanelRows, product_.n - column);
  float bias[kPanelRows] = {};
  if (segment.bias != nullptr) {
    const int64_t offset = column * element_size(product_.bias_dtype);
    kernels_.load(static_cast<const uint8_t*>(segment.bias) + offset, product_.bias_dtype, columns, bias);
  }
  for (int64_t m = 0; m < rows; ++m, sums += kPanelRows) {
    float values[kPanelRows];
    for (int r = 0; r < kPanelRows; ++r) values[r] = sums[r] * unit + bias[r];
    const int64_t offset = ((segment.first_row + row + m) * product_.n + column) * element_size(product_.out_dtype);
    kernels_.store(values, product_.out_dtype, columns, static_cast<uint8_t*>(product_.out) + offset);
  }
}

}  // namespace fp4::cpu
