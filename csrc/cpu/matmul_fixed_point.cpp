#include <algorithm>

#include "matmul.h"
#include "scratch.h"

namespace fp4::cpu {

namespace {

constexpr int64_t kChunk = 1024;  // columns of a panel: 8 KB, a quarter of a first-level cache, as a tile of x takes

// Panels that share a pass over x.
constexpr int64_t kPanelGroup = 8;

int64_t words_bytes(const Product& product) {
  return product.k / block_size(product.format) * fixed_point_block_bytes(product.format, 1);
}

}  // namespace

FixedPoint::FixedPoint(const Product& product, const Input& input, int64_t rows, uint8_t* memory)
    : Matmul(product, matmul_kernels().fixed_point->rows, kChunk),
      input_(input),
      tiles_(memory),
      residual_counts_(reinterpret_cast<int64_t*>(memory + rows * words_bytes(product))),
      residuals_(reinterpret_cast<Residual*>(residual_counts_ + rows)) {}

int64_t FixedPoint::memory_bytes(const Product& product, int64_t rows) {
  return rows * (words_bytes(product) + static_cast<int64_t>(sizeof(int64_t) + product.k * sizeof(Residual)));
}

void FixedPoint::prepare(int64_t begin, int64_t end) const {
  const int64_t k = product_.k;
  const int f = static_cast<int>(product_.format), block = block_size(product_.format);
  auto values = scratch<float>(k);
  for (int64_t task = begin; task < end; ++task) {
    const Tile tile = tile_at(task);
    const Segment& segment = *tile.segment;
    const int64_t start = tile.tiling.start(tile.index), rows = tile.tiling.start(tile.index + 1) - start;
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t row = segment.first_row + start + m;
      load_row(input_, row, values.get());
      int64_t count = 0;
      for (int64_t c = 0; c < k; c += chunk_) {
        const int64_t blocks = std::min(chunk_, k - c) / block;
        uint8_t* to = tiles_ + segment.first_row * words_bytes(product_) +
                      fixed_point_block_bytes(product_.format, c / block * segment.rows + blocks * start);
        count += kernels_.fixed_point->split[f](values.get() + c, blocks, static_cast<int>(rows), to,
                                                static_cast<int>(m), static_cast<int32_t>(c), residuals(row) + count);
      }
      residual_counts_[row] = count;
    }
  }
}

void FixedPoint::run(int64_t begin, int64_t end) const {
  const int64_t k = product_.k;
  const int f = static_cast<int>(product_.format), block = block_size(product_.format);
  const int64_t panel_codes = k / block * block_bytes(product_.format), panel_scales = k / block * kPanelRows;
  while (begin < end) {
    const Piece piece = piece_at(begin, end);
    begin += piece.last_panel - piece.first_panel;
    const Segment& segment = *piece.segment;
    const Tiling tiles = tiling(segment);
    const int64_t first_row = tiles.start(piece.first_tile), rows = tiles.start(piece.last_tile) - first_row;
    // A lone tile needs no second look at the weights: they are read in one go.
    const int64_t chunk = tiles.count == 1 ? k : chunk_, together = tiles.count == 1 ? 1 : kPanelGroup;
    const uint8_t* x = tiles_ + segment.first_row * words_bytes(product_);
    auto sums = scratch<float>(std::min(together, piece.last_panel - piece.first_panel) * rows * kPanelRows);
    for (int64_t group = piece.first_panel; group < piece.last_panel; group += together) {
      const int64_t panels = std::min(together, piece.last_panel - group);
      std::fill_n(sums.get(), panels * rows * kPanelRows, 0.0f);
      for (int64_t c = 0; c < k; c += chunk) {
        const int64_t at = c / block, blocks = std::min(chunk, k - c) / block;
        for (int64_t p = 0; p < panels; ++p) {
          const uint8_t* codes = segment.codes + (group + p) * panel_codes + at * block_bytes(product_.format);
          const uint8_t* scales = segment.scales + (group + p) * panel_scales + at * kPanelRows;
          for (int64_t t = piece.first_tile; t < piece.last_tile; ++t) {
            const int64_t start = tiles.start(t);
            kernels_.fixed_point->multiply[f](
                codes, scales, blocks, x + fixed_point_block_bytes(product_.format, at * segment.rows + blocks * start),
                static_cast<int>(tiles.start(t + 1) - start), sums.get() + (p * rows + start - first_row) * kPanelRows);
          }
        }
      }
      for (int64_t p = 0; p < panels; ++p) {
        finish_panel(segment, first_row, rows, group + p, sums.get() + p * rows * kPanelRows);
      }
    }
  }
}

void FixedPoint::finish_panel(const Segment& segment, int64_t first_row, int64_t rows, int64_t panel,
                              float* sums) const {
  const int f = static_cast<int>(product_.format);
  const int64_t blocks = product_.k / block_size(product_.format);
  const uint8_t* codes = segment.codes + panel * blocks * block_bytes(product_.format);
  const uint8_t* scales = segment.scales + panel * blocks * kPanelRows;
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t row = segment.first_row + first_row + m, count = residual_counts_[row];
    if (count == 0) continue;
    kernels_.fixed_point->add_residuals[f](codes, scales, residuals(row), count, sums + m * kPanelRows);
  }
  const float unit = kernels_.fixed_point->unit[f] * static_cast<float>(segment.global_scale);
  finish(segment, first_row, rows, panel, sums, unit);
}

}  // namespace fp4::cpu
