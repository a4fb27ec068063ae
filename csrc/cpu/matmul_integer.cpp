#include <algorithm>

#include "matmul.h"
#include "scratch.h"

namespace fp4::cpu {

namespace {

constexpr int64_t kChunk = 1024;  // columns of a decoded panel: 16 KB, half of a first-level cache
constexpr int64_t kPanelGroup = 8;

}  // namespace

IntegerProduct::IntegerProduct(const Product& product, const void* x, Dtype x_dtype, uint8_t* tiles)
    : Matmul(product, matmul_kernels().integer_tile, kChunk), x_(x), x_dtype_(x_dtype), tiles_(tiles) {}

void IntegerProduct::prepare(int64_t begin, int64_t end) const {
  const int64_t k = product_.k;
  const int block = block_size(product_.format);
  auto codes = scratch<int8_t>(k);
  auto effective = scratch<float>(k / block);
  for (int64_t task = begin; task < end; ++task) {
    const Tile tile = tile_at(task);
    const Segment& segment = *tile.segment;
    const int64_t start = tile.tiling.start(tile.index), rows = tile.tiling.start(tile.index + 1) - start;
    uint8_t* segment_tiles = tiles_ + segment.first_row * tile_bytes(product_.format, k);
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t offset = (segment.first_row + start + m) * k * element_size(x_dtype_);
      segment.quantizer->quantize_doubled(static_cast<const uint8_t*>(x_) + offset, 0, k / block, codes.get(),
                                          effective.get());
      for (int64_t c = 0; c < k; c += chunk_) {
        const int64_t length = std::min(chunk_, k - c);
        const int64_t per_row = length / block * integer_block_bytes(product_.format, 1);
        uint8_t* to = segment_tiles + c / block * integer_block_bytes(product_.format, segment.rows) + start * per_row;
        format_kernels_.lay_out_integer(codes.get() + c, effective.get() + c / block, length / block,
                                        {.tile = to, .rows = static_cast<int>(rows), .row = static_cast<int>(m)});
      }
    }
  }
}

void IntegerProduct::run(int64_t begin, int64_t end) const {
  const int64_t k = product_.k;
  const int block = block_size(product_.format);
  const WholeScales* const whole = format_kernels_.whole_scales;
  auto weights = scratch<uint8_t>(std::min(chunk_, k) * kPanelRows);
  auto weight_scales = scratch<float>(std::min(chunk_, k) / block * kPanelRows);
  while (begin < end) {
    const Piece piece = piece_at(begin, end);
    begin += piece.last_panel - piece.first_panel;
    const Segment& segment = *piece.segment;
    const Tiling tiles = tiling(segment);
    const uint8_t* x = tiles_ + segment.first_row * tile_bytes(product_.format, k);
    const int64_t first_row = tiles.start(piece.first_tile), rows = tiles.start(piece.last_tile) - first_row;
    auto sums = scratch<float>(std::min(kPanelGroup, piece.last_panel - piece.first_panel) * rows * kPanelRows);
    for (int64_t group = piece.first_panel; group < piece.last_panel; group += kPanelGroup) {
      const int64_t panels = std::min(kPanelGroup, piece.last_panel - group);
      std::fill_n(sums.get(), panels * rows * kPanelRows, 0.0f);
      for (int64_t c = 0; c < k; c += chunk_) {
        const int64_t at = c / block, blocks = std::min(chunk_, k - c) / block;
        const uint8_t* chunk = x + at * integer_block_bytes(product_.format, segment.rows);
        const int64_t per_row = blocks * integer_block_bytes(product_.format, 1);
        const DecodedBlocks<uint8_t> decoded = {.values = weights.get(), .scales = weight_scales.get(), .count = blocks};
        for (int64_t p = 0; p < panels; ++p) {
          format_kernels_.decode_integer(blocks_of(segment, group + p, c, blocks * block), weights.get(),
                                         weight_scales.get());
          const bool is_whole = whole != nullptr && whole->convert(weight_scales.get(), blocks);
          const auto multiply = is_whole ? whole->multiply : format_kernels_.multiply_integer;
          for (int64_t t = piece.first_tile; t < piece.last_tile; ++t) {
            const int64_t start = tiles.start(t);
            multiply(chunk + start * per_row, static_cast<int>(tiles.start(t + 1) - start), decoded,
                     sums.get() + (p * rows + start - first_row) * kPanelRows);
          }
        }
      }
      // Both factors were doubled, and only the activations' scales include their global scale.
      const float unit = static_cast<float>(0.25 * (whole == nullptr ? 1.0 : whole->unit) * segment.global_scale);
      for (int64_t p = 0; p < panels; ++p) {
        finish(segment, first_row, rows, group + p, sums.get() + p * rows * kPanelRows, unit);
      }
    }
  }
}

}  // namespace fp4::cpu
