#include <algorithm>

#include "matmul.h"
#include "scratch.h"

namespace fp4::cpu {

namespace {

// Rows up to which each tile decodes a panel for itself: storing decoded weights and loading them again costs as much.
constexpr int64_t kFewRows = 8;

// Rows from which on all values of a panel are decoded for the residuals, which few rows look up code by code.
constexpr int64_t kManyResidualRows = 24;

// Columns whose values are decoded at a time: 128 KB, a part of a second-level cache.
constexpr int64_t kResidualChunk = 2048;
static_assert(kResidualChunk % kFixedPointChunk == 0);

// Panels that share a pass over x.
constexpr int64_t kPanelGroup = 8;

int64_t words_bytes(const Product& product) {
  return product.k / block_size(product.format) * fixed_point_block_bytes(product.format, 1);
}

}  // namespace

FixedPoint::FixedPoint(const Product& product, const Input& input, int64_t rows, uint8_t* memory)
    : Matmul(product,
             {.few = matmul_kernels().fixed_point->rows,
              .few_rows = kFewRows,
              .many = matmul_kernels().fixed_point->decoded_rows},
             kFixedPointChunk),
      input_(input),
      fixed_point_(*kernels_.fixed_point),
      fixed_point_format_(fixed_point_.formats[product.format]),
      tiles_(memory),
      residuals_(reinterpret_cast<Residual*>(memory + rows * words_bytes(product))),
      residual_starts_(reinterpret_cast<int32_t*>(residuals_ + rows * product.k)) {}

int64_t FixedPoint::memory_bytes(const Product& product, int64_t rows) {
  const int64_t starts = residual_chunks(product.k) + 1;
  return rows * (words_bytes(product) + static_cast<int64_t>(product.k * sizeof(Residual) + starts * sizeof(int32_t)));
}

int64_t FixedPoint::residual_chunks(int64_t k) { return (k + kResidualChunk - 1) / kResidualChunk; }

float FixedPoint::unit(const Segment& segment) const {
  return fixed_point_format_.unit * static_cast<float>(segment.global_scale);
}

void FixedPoint::prepare(int64_t begin, int64_t end) const {
  const int64_t k = product_.k;
  const int block = block_size(product_.format);
  auto values = scratch<float>(k);
  for (int64_t task = begin; task < end; ++task) {
    const Tile tile = tile_at(task);
    const Segment& segment = *tile.segment;
    const int64_t start = tile.tiling.start(tile.index), rows = tile.tiling.start(tile.index + 1) - start;
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t row = segment.first_row + start + m;
      load_row(input_, row, values.get());
      int32_t* starts = residual_starts(row);
      int32_t left = 0;
      for (int64_t c = 0; c < k; c += chunk_) {
        if (c % kResidualChunk == 0) *starts++ = left;
        const int64_t blocks = std::min(chunk_, k - c) / block;
        uint8_t* to = tiles_ + segment.first_row * words_bytes(product_) +
                      fixed_point_block_bytes(product_.format, c / block * segment.rows + blocks * start);
        const int64_t count = fixed_point_format_.split(
            values.get() + c, blocks, static_cast<int32_t>(c),
            {.tile = to, .rows = static_cast<int>(rows), .row = static_cast<int>(m)}, residuals(row) + left);
        left += static_cast<int32_t>(count);
      }
      *starts = left;
    }
  }
}

void FixedPoint::run(int64_t begin, int64_t end) const {
  while (begin < end) {
    const Piece piece = piece_at(begin, end);
    begin += piece.last_panel - piece.first_panel;
    if (piece.segment->rows <= kFewRows) {
      run_few_rows(piece);
    } else {
      run_tiles(piece);
    }
  }
}

// Few rows: weights are decoded in registers, and for a lone tile read in one go.
void FixedPoint::run_few_rows(const Piece& piece) const {
  const Segment& segment = *piece.segment;
  const int block = block_size(product_.format);
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
        fixed_point_format_.multiply(blocks_of(segment, p, c, blocks * block),
                                     x + fixed_point_block_bytes(product_.format, at * rows + blocks * start),
                                     static_cast<int>(tiles.start(t + 1) - start), sums.get() + start * kPanelRows);
      }
    }
    add_residuals(segment, p, 0, rows, sums.get());
    finish(segment, 0, rows, p, sums.get(), unit(segment));
  }
}

// Many rows: a chunk of a panel is decoded once for all of them.
void FixedPoint::run_tiles(const Piece& piece) const {
  const Segment& segment = *piece.segment;
  const int block = block_size(product_.format);
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
      const DecodedBlocks<int16_t> decoded = {.values = weights.get(), .scales = weight_scales.get(), .count = blocks};
      for (int64_t p = 0; p < panels; ++p) {
        float* panel_sums = sums.get() + p * rows * kPanelRows;
        fixed_point_format_.decode(blocks_of(segment, group + p, c, blocks * block), weights.get(),
                                   weight_scales.get());
        for (int64_t t = piece.first_tile; t < piece.last_tile; ++t) {
          const int64_t start = tiles.start(t);
          fixed_point_format_.multiply_decoded(
              decoded, x + fixed_point_block_bytes(product_.format, at * segment.rows + blocks * start),
              static_cast<int>(tiles.start(t + 1) - start), panel_sums + (start - first_row) * kPanelRows);
        }
      }
    }
    for (int64_t p = 0; p < panels; ++p) {
      float* panel_sums = sums.get() + p * rows * kPanelRows;
      add_residuals(segment, group + p, first_row, rows, panel_sums);
      finish(segment, first_row, rows, group + p, panel_sums, unit(segment));
    }
  }
}

// Adds the products of the residuals of `rows` rows (from `first_row` on) with a panel to its sums.
void FixedPoint::add_residuals(const Segment& segment, int64_t panel, int64_t first_row, int64_t rows,
                               float* sums) const {
  const int64_t k = product_.k, row = segment.first_row + first_row;
  if (rows < kManyResidualRows) {
    for (int64_t m = 0; m < rows; ++m) {
      const int32_t count = residual_starts(row + m)[residual_chunks(k)];
      if (count == 0) continue;
      fixed_point_format_.add_residuals(blocks_of(segment, panel, 0, k), residuals(row + m), count,
                                        sums + m * kPanelRows);
    }
    return;
  }
  auto values = scratch<float>(std::min(kResidualChunk, k) * kPanelRows);
  for (int64_t c = 0; c < k; c += kResidualChunk) {
    const int64_t columns = std::min(kResidualChunk, k - c);
    format_kernels_.decode_float(blocks_of(segment, panel, c, columns), 1 / fixed_point_format_.unit, values.get());
    for (int64_t m = 0; m < rows; ++m) {
      const int32_t* starts = residual_starts(row + m) + c / kResidualChunk;
      fixed_point_.add_residuals_to_values(values.get(), static_cast<int32_t>(c), residuals(row + m) + starts[0],
                                      starts[1] - starts[0], sums + m * kPanelRows);
    }
  }
}

}  // namespace fp4::cpu
