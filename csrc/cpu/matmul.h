// Products of activations with packed weights: how the work is cut, common to all instruction sets. No torch here: the
// caller owns the threads. Each class is used in the same way:
//
//   prepare(begin, end)  for ranges that cover [0, prepare_tasks()), in any order, on any threads; then
//   run(begin, end)      for ranges that cover [0, tasks()).
//
// A task computes sixteen output columns for some rows over all of K, in an order that depends on the shape alone, so
// results do not depend on the number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "matmul_kernels.h"

namespace fp4::cpu {

// Rows [first_row, first_row + rows) of x times one packed weight (layout.h). A plain linear layer is one segment, a
// layer of experts one for each expert with rows.
struct Segment {
  int64_t first_row;
  int64_t rows;
  const uint8_t* codes;
  const uint8_t* scales;
  double global_scale;                   // 1 where there is none
  const void* bias = nullptr;            // [n], or null
  const Quantizer* quantizer = nullptr;  // W4A4: of these rows
};

// out [.., n] = x [.., k] weight^T + bias, rounded once to out_dtype.
struct Product {
  Format format;
  int64_t n;
  int64_t k;
  Dtype bias_dtype;
  Dtype out_dtype;
  void* out;
  std::vector<Segment> segments = {};
};

// Cuts `rows` rows into tiles of at most `most`, as even as possible: a lone last row would waste a whole tile's time.
struct Tiling {
  Tiling(int64_t rows, int64_t most) : count((rows + most - 1) / most), rows(rows) {}
  int64_t start(int64_t tile) const {
    const int64_t small = rows / count, larger = rows % count;
    return tile * small + (tile < larger ? tile : larger);
  }
  int64_t count;
  int64_t rows;
};

// Most rows of a tile: `few` of a segment with at most few_rows rows, `many` of others.
struct TileSize {
  int of(int64_t rows) const { return rows <= few_rows ? few : many; }
  int few;
  int64_t few_rows;
  int many;
};

// x, contiguous. With a rotation [h, h], groups of h columns are multiplied by it in float32 and rounded to dtype again.
struct Input {
  const void* x;
  Dtype dtype;
  const float* rotation = nullptr;
  int64_t h = 0;
};

// The base of the products below: it cuts a call into tasks, loads rows of x and stores sums.
class Matmul {
 public:
  // `k` rows of a tile are stored chunk after chunk of K (`chunk` columns), so that what the inner loop reads is
  // contiguous: chunk c of a segment starts at element c * chunk * rows, and a tile within it at start * chunk length.
  Matmul(const Product& product, TileSize tile, int64_t chunk);
  Matmul(const Product& product, int tile, int64_t chunk) : Matmul(product, TileSize{tile, 0, tile}, chunk) {}

  int64_t prepare_tasks() const { return prepare_starts_.back(); }
  int64_t tasks() const { return starts_.back(); }

 protected:
  // A run of panels [first_panel, last_panel) for the tiles [first_tile, last_tile) of one segment.
  struct Piece {
    const Segment* segment;
    int64_t first_tile, last_tile;
    int64_t first_panel, last_panel;
  };
  struct Tile {
    const Segment* segment;
    Tiling tiling;
    int64_t index;
  };

  Piece piece_at(int64_t task, int64_t end) const;
  Tile tile_at(int64_t task) const;
  Tiling tiling(const Segment& segment) const { return Tiling(segment.rows, tile_.of(segment.rows)); }

  // Loads the k values of row `row` of x.
  void load_row(const Input& input, int64_t row, float* to) const;

  // Writes the 16 sums, times unit, of each of `rows` rows (from `row` on) as columns of `panel`.
  void finish(const Segment& segment, int64_t row, int64_t rows, int64_t panel, const float* sums,
              float unit = 1) const;

  // The `columns` columns from `column` on of a panel; both are multiples of the block size.
  PackedBlocks blocks_of(const Segment& segment, int64_t panel, int64_t column, int64_t columns) const {
    const int64_t first = blocks_in(product_.format, panel * product_.k + column);
    return {
        .codes = segment.codes + first * block_bytes(product_.format),
        .scales = segment.scales + first * kPanelRows,
        .count = blocks_in(product_.format, columns),
    };
  }

  const Product& product_;
  const MatmulKernels& kernels_;
  const FormatKernels& format_kernels_;
  const TileSize tile_;
  const int64_t chunk_;
  const int64_t panels_;

 private:
  // Runs of tiles that are multiplied with a panel while it is decoded.
  Tiling batches(const Segment& segment) const;

  std::vector<int64_t> starts_;          // first task of each segment, then their number
  std::vector<int64_t> prepare_starts_;  // the same of tiles
};

// Weight-only: x in its own precision, sums in float32.
class WeightOnly : public Matmul {
 public:
  // `memory` holds memory_bytes(product, rows of x), aligned to 8 bytes. It is written by prepare.
  WeightOnly(const Product& product, const Input& input, uint8_t* memory);
  static int64_t memory_bytes(const Product& product, int64_t rows) { return rows * product.k * 4; }
  void prepare(int64_t begin, int64_t end) const;
  void run(int64_t begin, int64_t end) const;

 protected:
  // How one panel of FP4 weights is multiplied and decoded; Fp8WeightOnly (fp8.h) overrides these.
  virtual int gemv_rows() const { return kernels_.gemv_rows; }
  virtual void gemv(const Segment& segment, int64_t panel, const float* x, float* sums) const;
  virtual void decode(const Segment& segment, int64_t panel, int64_t column, int64_t columns, float* out) const;

 private:
  void run_rows(const Piece& piece) const;
  void run_tiles(const Piece& piece) const;
  float* tiles(int64_t row) const { return tiles_ + row * product_.k; }

  const Input& input_;
  float* tiles_;
};

// Weight-only for bfloat16 x: x in fixed point (fixed_point.h), products of blocks exact.
class FixedPoint : public Matmul {
 public:
  static bool runs(Dtype dtype) { return dtype == Dtype::bfloat16 && matmul_kernels().fixed_point != nullptr; }
  // `memory` as above.
  FixedPoint(const Product& product, const Input& input, int64_t rows, uint8_t* memory);
  static int64_t memory_bytes(const Product& product, int64_t rows);
  void prepare(int64_t begin, int64_t end) const;
  void run(int64_t begin, int64_t end) const;

 private:
  void run_few_rows(const Piece& piece) const;
  void run_tiles(const Piece& piece) const;
  void add_residuals(const Segment& segment, int64_t panel, int64_t first_row, int64_t rows, float* sums) const;
  static int64_t residual_chunks(int64_t k);
  Residual* residuals(int64_t row) const { return residuals_ + row * product_.k; }
  // Where the residuals of each chunk (of its own size) of a row begin, then their number.
  int32_t* residual_starts(int64_t row) const { return residual_starts_ + row * (residual_chunks(product_.k) + 1); }
  float unit(const Segment& segment) const;

  const Input& input_;
  const FixedPointKernels& fixed_point_;
  const FixedPointFormatKernels& fixed_point_format_;
  uint8_t* tiles_;
  Residual* residuals_;  // room for k of each row
  int32_t* residual_starts_;
};

// W4A4: x is quantized by its segment's quantizer, products are exact integers, block scales are applied in float32.
class IntegerProduct : public Matmul {
 public:
  // `tiles` holds tile_bytes(format, k) bytes for each row of x. It is written by prepare.
  IntegerProduct(const Product& product, const void* x, Dtype x_dtype, uint8_t* tiles);
  static int64_t tile_bytes(Format format, int64_t k) {
    return k / block_size(format) * integer_block_bytes(format, 1);
  }
  void prepare(int64_t begin, int64_t end) const;
  void run(int64_t begin, int64_t end) const;

 private:
  const void* x_;
  Dtype x_dtype_;
  uint8_t* tiles_;
};

}  // namespace fp4::cpu
