#include <algorithm>

#include "matmul.h"
#include "scratch.h"

namespace fp4::cpu {

namespace {

// A decoded panel of this many columns takes 16 KB: half of a first-level cache, where x needs the rest.
constexpr int64_t kChunk = 256;

// Panels that share a pass over x: their sums fill the second-level cache together with a chunk of x.
constexpr int64_t kPanelGroup = 8;

constexpr int kMostGemvRows = 4;  // the largest gemv_rows of all instruction sets and formats

}  // namespace

WeightOnly::WeightOnly(const Product& product, const Input& input, uint8_t* memory)
    : Matmul(product, matmul_kernels().float_tile, kChunk), input_(input), tiles_(reinterpret_cast<float*>(memory)) {}

void WeightOnly::prepare(int64_t begin, int64_t end) const {
  const int64_t k = product_.k;
  auto row = scratch<float>(k);
  for (int64_t task = begin; task < end; ++task) {
    const Tile tile = tile_at(task);
    const Segment& segment = *tile.segment;
    const int64_t start = tile.tiling.start(tile.index), rows = tile.tiling.start(tile.index + 1) - start;
    for (int64_t m = 0; m < rows; ++m) {
      load_row(input_, segment.first_row + start + m, row.get());
      for (int64_t c = 0; c < k; c += chunk_) {
        const int64_t length = std::min(chunk_, k - c);
        float* to = tiles(segment.first_row) + c * segment.rows + start * length + m;
        for (int64_t i = 0; i < length; ++i) to[i * rows] = row[c + i];
      }
    }
  }
}

void WeightOnly::run(int64_t begin, int64_t end) const {
  while (begin < end) {
    const Piece piece = piece_at(begin, end);
    begin += piece.last_panel - piece.first_panel;
    if (piece.segment->rows <= gemv_rows()) {
      run_rows(piece);
    } else {
      run_tiles(piece);
    }
  }
}

void WeightOnly::gemv(const Segment& segment, int64_t panel, const float* x, float* sums) const {
  format_kernels_.gemv(blocks_of(segment, panel, 0, product_.k), static_cast<float>(segment.global_scale), x,
                       static_cast<int>(segment.rows), sums);
}

void WeightOnly::decode(const Segment& segment, int64_t panel, int64_t column, int64_t columns, float* out) const {
  format_kernels_.decode_float(blocks_of(segment, panel, column, columns), static_cast<float>(segment.global_scale),
                               out);
}

void WeightOnly::run_rows(const Piece& piece) const {
  const Segment& segment = *piece.segment;
  for (int64_t p = piece.first_panel; p < piece.last_panel; ++p) {
    float sums[kPanelRows * kMostGemvRows];
    gemv(segment, p, tiles(segment.first_row), sums);
    finish(segment, 0, segment.rows, p, sums);
  }
}

void WeightOnly::run_tiles(const Piece& piece) const {
  const Segment& segment = *piece.segment;
  const Tiling tiling = this->tiling(segment);
  const int64_t k = product_.k;
  const int64_t first_row = tiling.start(piece.first_tile), rows = tiling.start(piece.last_tile) - first_row;
  auto weights = scratch<float>(std::min(chunk_, k) * kPanelRows);
  auto sums = scratch<float>(std::min(kPanelGroup, piece.last_panel - piece.first_panel) * rows * kPanelRows);
  for (int64_t group = piece.first_panel; group < piece.last_panel; group += kPanelGroup) {
    const int64_t panels = std::min(kPanelGroup, piece.last_panel - group);
    std::fill_n(sums.get(), panels * rows * kPanelRows, 0.0f);
    for (int64_t c = 0; c < k; c += chunk_) {
      const int64_t length = std::min(chunk_, k - c);
      const float* x = tiles(segment.first_row) + c * segment.rows;
      for (int64_t p = 0; p < panels; ++p) {
        decode(segment, group + p, c, length, weights.get());
        for (int64_t t = piece.first_tile; t < piece.last_tile; ++t) {
          const int64_t start = tiling.start(t);
          kernels_.multiply_float(x + start * length, static_cast<int>(tiling.start(t + 1) - start), weights.get(),
                                  length, sums.get() + (p * rows + start - first_row) * kPanelRows);
        }
      }
    }
    for (int64_t p = 0; p < panels; ++p) {
      finish(segment, first_row, rows, group + p, sums.get() + p * rows * kPanelRows);
    }
  }
}

}  // namespace fp4::cpu
