// What the inner loops are given: runs of blocks of packed or decoded weights, and where a row of x goes.
#pragma once

#include <cstdint>

namespace fp4::cpu {

// `count` neighbouring blocks of a panel of packed weights, in the layout of layout.h.
struct PackedBlocks {
  const uint8_t* codes;
  const uint8_t* scales;
  int64_t count;
};

// The same blocks once their codes were decoded to integers; `scales` holds 16 for each block.
template <typename T>
struct DecodedBlocks {
  const T* values;
  const float* scales;
  int64_t count;
};

// Row `row` of a tile that holds `rows` rows of x.
struct TileRow {
  uint8_t* tile;
  int rows;
  int row;
};

}  // namespace fp4::cpu
