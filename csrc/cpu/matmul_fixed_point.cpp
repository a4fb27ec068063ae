#include <algorithm>

#include "matmul.h"
#include "scratch.h"

namespace fp4::cpu {

namespace {

// Tiles that decode a panel each for itself: storing decoded weights and loading them again costs as much.
constexpr int64_t kFewTiles = 2;

// Panels that share a pass over x.
constexpr int64_t kPanelGroup = 8;

int64_t words_bytes(const Product& product) {
  return product.k / block_size(product.format) * fixed_point_block_bytes(product.format, 1);
}

}  // namespace

FixedPoint::FixedPoint(const Product& product, const Input& input, int64_t rows, uint8_t* memory)
    : Matmul(product, matmul_kernels().fixed_point->rows, kFixedPointChunk),
      input_(input),
      tiles_(memory),
      residuals_(reinterpret_cast<Residual*>(memory + rows * words_bytes(product))),
      residual_starts_(reinterpret_cast<int32_t*>(residuals_ + rows * product.k)) {}

int64_t FixedPoint::memory_bytes(const Product& product, int64_t rows) {
  const int64_t starts = (product.k + kFixedPointChunk - 1) / kFixedPointChunk + 1;
  return rows * (words_bytes(product) + static_cast<int64_t>(product.k * sizeof(Residual) + starts * sizeof(int32_t)));
}

const uint8_t* FixedPoint::codes(const Segment& segment, int64_t panel, int64_t column) const {
  const int block = block_size(product_.format);
  return segment.codes + (panel * product_.k + column) / block * block_bytes(product_.format);
}

const uint8_t* FixedPoint::scales(const Segment& segment, int64_t panel, int64_t column) const {
  return segment.scales + (panel * product_.k + column) / block_size(product_.format) * kPanelRows;
}

float FixedPoint::unit(const Segment& segment) const {
  const float raw = kernels_.fixed_point->unit[static_cast<int>(product_.format)];
  return raw * static_cast<float>(segment.global_scale);
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
      int32_t* starts = residual_starts(row);
      *starts = 0;
      for (int64_t c = 0; c < k; c += chunk_, ++starts) {
        const int64_t blocks = std::min(chunk_, k - c) / block;
        uint8_t* to = tiles_ + segment.first_row * words_bytes(product_) +
                      fixed_point_block_bytes(product_.format, c / block * segment.rows + blocks * start);
        const int64_t left = kernels_.fixed_point->split[f](values.get() + c, blocks, static_cast<int>(rows), to,
                                                            static_cast<int>(m), static_cast<int32_t>(c),
                                                            residuals(row) + *starts);
        starts[1] = *starts + static_cast<int32_t>(left);
      }
    }
  }
}

void FixedPoint::run(int64_t begin, int64_t end) const {
  while (begin < end) {
    const Piece piece = piece_at(begin, end);
    begin += piece.last_panel - piece.first_panel;
    if (tiling(*piece.segment).count <= kFewTiles) {
      run_few_tiles(piece);
    } else {
      run_tiles(piece);
    }
  }
}

// Few rows: weights are decoded in registers, and for a lone tile read in one go.
void FixedPoint::run_few_tiles(const Piece& piece) const {
  const Segment& segment = *piece.segment;
  const FixedPointKernels& kernels = *kernels_.fixed_point;
  const int f = static_cast<int>(product_.format), block = block_size(product_.format);
  const Tiling tiles = tiling(segment);
  const int64_t k = product_.k, rows = segment.rows, chunk = tiles.count == 1 ? k : chunk_;
  const uint8_t* x = tiles_ + segment.first_row * words_bytes(product_);
  auto sums = scratch<float>(rows * kPanelRows);
  for (int64_t p = piece.first_panel; p < piece.last_panel; ++p) {
    std::fill_n(sums.get(), rows * kPanelRows, 0.0f);
    for (int64_t c = 0; c < k; c += chunk) {
      const int64_t at = c / block, blocks = std::min(chunk, k - c) / block;
      for (int64_t t = 0; t < tiles.count; ++t) {
        const int64_t start = tiles.start(t);
        kernels.multiply[f](codes(segment, p, c), scales(segment, p, c), blocks,
                            x + fixed_point_block_bytes(product_.format, at * rows + blocks * start),
                            static_cast<int>(tiles.start(t + 1) - start), sums.get() + start * kPanelRows);
      }
    }
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t row = segment.first_row + m, count = residual_starts(row)[chunks()];
      if (count == 0) continue;
      kernels.add_residuals[f](codes(segment, p, 0), scales(segment, p, 0), residuals(row), count,
                               sums.get() + m * kPanelRows);
    }
    finish(segment, 0, rows, p, sums.get(), unit(segment));
  }
}

// Many rows: a chunk of a panel is decoded once for all of them.
void FixedPoint::run_tiles(const Piece& piece) const {
  const Segment& segment = *piece.segment;
  const FixedPointKernels& kernels = *kernels_.fixed_point;
  const int f = static_cast<int>(product_.format), block = block_size(product_.format);
  const int64_t k = product_.k, together = std::min(kPanelGroup, piece.last_panel - piece.first_panel);
  const Tiling tiles = tiling(segment);
  const int64_t first_row = tiles.start(piece.first_tile), rows = tiles.start(piece.last_tile) - first_row;
  const uint8_t* x = tiles_ + segment.first_row * words_bytes(product_);
  auto sums = scratch<float>(together * rows * kPanelRows);
  auto weights = scratch<int16_t>(std::min(chunk_, k) * kPanelRows);
  auto weight_scales = scratch<float>(std::min(chunk_, k) / block * kPanelRows);
  for (int64_t group = piece.first_panel; group < piece.last_panel; group += together) {
    const int64_t panels = std::min(together, piece.last_panel - group);
    std::fill_n(sums.get(), panels * rows * kPanelRows, 0.0f);
    for (int64_t c = 0; c < k; c += chunk_) {
      const int64_t at = c / block, blocks = std::min(chunk_, k - c) / block;
      for (int64_t p = 0; p < panels; ++p) {
        float* panel_sums = sums.get() + p * rows * kPanelRows;
        kernels.decode[f](codes(segment, group + p, c), scales(segment, group + p, c), blocks, weights.get(),
                          weight_scales.get());
        for (int64_t t = piece.first_tile; t < piece.last_tile; ++t) {
          const int64_t start = tiles.start(t), tile_rows = tiles.start(t + 1) - start;
          float* tile_sums = panel_sums + (start - first_row) * kPanelRows;
          kernels.multiply_decoded[f](
              weights.get(), weight_scales.get(), blocks,
              x + fixed_point_block_bytes(product_.format, at * segment.rows + blocks * start),
              static_cast<int>(tile_rows), tile_sums);
          for (int64_t m = 0; m < tile_rows; ++m) {
            const int64_t row = segment.first_row + start + m;
            const int32_t* starts = residual_starts(row) + c / chunk_;
            if (starts[0] == starts[1]) continue;
            kernels.add_residuals_decoded[f](weights.get(), weight_scales.get(), residuals(row) + starts[0],
                                             starts[1] - starts[0], tile_sums + m * kPanelRows);
          }
        }
      }
    }
    for (int64_t p = 0; p < panels; ++p) {
      finish(segment, first_row, rows, group + p, sums.get() + p * rows * kPanelRows, unit(segment));
    }
  }
}

}  // namespace fp4::cpu
