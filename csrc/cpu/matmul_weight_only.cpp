#include <algorithm>

#include "matmul.h"
#include "scratch.h"

namespace fp4::cpu {

namespace {

// A decoded panel of this many columns takes 16 KB: half of a first-level cache, where x needs the rest.
constexpr int64_t kChunk = 256;

// Panels that share a pass over x: their sums fill the second-level cache together with a chunk of x.
constexpr int64_t kPanelGroup = 8;

// Columns of x that are made into digits at a time.
constexpr int64_t kDigitColumns = 1024;

int64_t pieces_of(int64_t k) { return (k + kDigitColumns - 1) / kDigitColumns; }

int64_t digit_bytes(Format format, int64_t k) { return k / block_size(format) * digit_block_bytes(format); }

}  // namespace

WeightOnly::WeightOnly(const Product& product, const void* x, Dtype x_dtype, int64_t rows, uint8_t* memory)
    : Matmul(product, matmul_kernels().float_tile, kChunk),
      x_(x),
      x_dtype_(x_dtype),
      rows_(rows),
      memory_(memory),
      digits_(false),
      pieces_(pieces_of(product.k)) {
  if (kernels_.digits == nullptr || x_dtype == Dtype::float32) return;
  for (const Segment& segment : product.segments) digits_ = digits_ || segment.rows <= kernels_.digits->rows;
}

int64_t WeightOnly::memory_bytes(const Product& product, int64_t rows) {
  const int64_t residuals = pieces_of(product.k) * static_cast<int64_t>(sizeof(Residuals));
  return rows * (product.k * 4 + residuals + digit_bytes(product.format, product.k));
}

Residuals* WeightOnly::residuals(int64_t row) const {
  return reinterpret_cast<Residuals*>(memory_ + rows_ * product_.k * 4) + row * pieces_;
}

uint8_t* WeightOnly::digit_row(int64_t row) const {
  return reinterpret_cast<uint8_t*>(residuals(rows_)) + row * digit_bytes(product_.format, product_.k);
}

void WeightOnly::prepare(int64_t begin, int64_t end) const {
  const int64_t tile_tasks = Matmul::prepare_tasks();
  for (int64_t task = begin; task < end; ++task) {
    if (task < tile_tasks) {
      prepare_tile(task);
    } else {
      prepare_digits(task - tile_tasks);
    }
  }
}

void WeightOnly::prepare_tile(int64_t task) const {
  const int64_t k = product_.k;
  const Tile tile = tile_at(task);
  const Segment& segment = *tile.segment;
  const int64_t start = tile.tiling.start(tile.index), rows = tile.tiling.start(tile.index + 1) - start;
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t offset = (segment.first_row + start + m) * k * element_size(x_dtype_);
    for (int64_t c = 0; c < k; c += chunk_) {
      const int64_t length = std::min(chunk_, k - c);
      float row[kChunk];
      kernels_.load(static_cast<const uint8_t*>(x_) + offset + c * element_size(x_dtype_), x_dtype_, length, row);
      float* to = tiles(segment.first_row) + c * segment.rows + start * length + m;
      for (int64_t i = 0; i < length; ++i) to[i * rows] = row[i];
    }
  }
}

// All rows of a call that has a segment for digits are made into digits, also those that go another way: such calls are
// small.
void WeightOnly::prepare_digits(int64_t task) const {
  const int f = static_cast<int>(product_.format), block = block_size(product_.format);
  const int64_t row = task / pieces_, piece = task % pieces_, column = piece * kDigitColumns;
  const int64_t length = std::min(kDigitColumns, product_.k - column);
  float x[kDigitColumns];
  const int64_t offset = (row * product_.k + column) * element_size(x_dtype_);
  kernels_.load(static_cast<const uint8_t*>(x_) + offset, x_dtype_, length, x);
  Residuals& rest = residuals(row)[piece];
  rest.count = 0;
  kernels_.digits->split[f](x, length / block, static_cast<int32_t>(column / 4),
                            digit_row(row) + column / block * digit_block_bytes(product_.format), rest);
}

bool WeightOnly::runs_on_digits(const Segment& segment) const {
  if (!digits_ || segment.rows > kernels_.digits->rows) return false;
  const Residuals* first = residuals(segment.first_row);
  return std::all_of(first, first + segment.rows * pieces_, [](const Residuals& r) { return r.count >= 0; });
}

void WeightOnly::run(int64_t begin, int64_t end) const {
  while (begin < end) {
    const Piece piece = piece_at(begin, end);
    begin += piece.last_panel - piece.first_panel;
    if (runs_on_digits(*piece.segment)) {
      run_digits(piece);
    } else if (piece.segment->rows <= kernels_.gemv_rows) {
      run_rows(piece);
    } else {
      run_tiles(piece);
    }
  }
}

void WeightOnly::run_digits(const Piece& piece) const {
  const Segment& segment = *piece.segment;
  const int f = static_cast<int>(product_.format);
  const int64_t blocks = product_.k / block_size(product_.format), stride = digit_bytes(product_.format, product_.k);
  const float global_scale = static_cast<float>(segment.global_scale);
  for (int64_t p = piece.first_panel; p < piece.last_panel; ++p) {
    const uint8_t* codes = segment.codes + p * blocks * block_bytes(product_.format);
    const uint8_t* scales = segment.scales + p * blocks * kPanelRows;
    float sums[kPanelRows * 2];
    kernels_.digits->gemv[f](codes, scales, blocks, global_scale, digit_row(segment.first_row), stride,
                             static_cast<int>(segment.rows), sums);
    for (int64_t m = 0; m < segment.rows; ++m) {
      const Residuals* rest = residuals(segment.first_row + m);
      for (int64_t i = 0; i < pieces_; ++i) {
        if (rest[i].count == 0) continue;
        kernels_.digits->add_residuals[f](codes, scales, global_scale, rest[i], sums + m * kPanelRows);
      }
    }
    finish(segment, 0, segment.rows, p, sums);
  }
}

void WeightOnly::run_rows(const Piece& piece) const {
  const Segment& segment = *piece.segment;
  const int f = static_cast<int>(product_.format);
  const int64_t blocks = product_.k / block_size(product_.format);
  const float global_scale = static_cast<float>(segment.global_scale);
  for (int64_t p = piece.first_panel; p < piece.last_panel; ++p) {
    float sums[kPanelRows * 4];
    kernels_.gemv[f](segment.codes + p * blocks * block_bytes(product_.format),
                     segment.scales + p * blocks * kPanelRows, blocks, global_scale, tiles(segment.first_row),
                     static_cast<int>(segment.rows), sums);
    finish(segment, 0, segment.rows, p, sums);
  }
}

void WeightOnly::run_tiles(const Piece& piece) const {
  const Segment& segment = *piece.segment;
  const Tiling tiling = this->tiling(segment);
  const int f = static_cast<int>(product_.format), block = block_size(product_.format);
  const int64_t k = product_.k, panel_codes = k / block * block_bytes(product_.format);
  const int64_t panel_scales = k / block * kPanelRows;
  const float global_scale = static_cast<float>(segment.global_scale);
  const int64_t first_row = tiling.start(piece.first_tile), rows = tiling.start(piece.last_tile) - first_row;
  auto weights = scratch<float>(std::min(chunk_, k) * kPanelRows);
  auto sums = scratch<float>(std::min(kPanelGroup, piece.last_panel - piece.first_panel) * rows * kPanelRows);
  for (int64_t group = piece.first_panel; group < piece.last_panel; group += kPanelGroup) {
    const int64_t panels = std::min(kPanelGroup, piece.last_panel - group);
    std::fill_n(sums.get(), panels * rows * kPanelRows, 0.0f);
    for (int64_t c = 0; c < k; c += chunk_) {
      const int64_t length = std::min(chunk_, k - c), at = c / block;
      const float* x = tiles(segment.first_row) + c * segment.rows;
      for (int64_t p = 0; p < panels; ++p) {
        kernels_.decode_float[f](segment.codes + (group + p) * panel_codes + at * block_bytes(product_.format),
                                 segment.scales + (group + p) * panel_scales + at * kPanelRows, length / block,
                                 global_scale, weights.get());
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
