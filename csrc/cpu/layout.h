// The layout of packed weights that the matmul kernels read. src/fp4/backends/cpu.py permutes the canonical form into it.
//
// Rows are gathered into panels of 16 (the last one padded with zero bytes), and a panel is stored block after block:
//
//   codes   [panel][K / 4][jj = 2][..]  32 bytes hold four columns k = 4c .. 4c+3 of the 16 rows. Byte l*16 + jj*8 + i*2 + h
//           is the canonical byte of columns (4c + 2jj, 4c + 2jj + 1), row h*8 + l*4 + i of the panel.
//   scales  [panel][K / B][16]          one byte per row, in order.
//
// Why: a byte shuffle turns 32 low (or high) nibbles into the high and low bytes of their bfloat16 values; interleaving
// those bytes gives, in every 32-bit lane, row r in the low half (h = 0) and row r + 8 in the high half (h = 1) of the
// same column. A shift and a mask then widen to float32, so sixteen rows meet one broadcast x[k] without any other
// shuffle, no horizontal sum is needed, and the block scales of eight rows are one vector.
#pragma once

#include <cstdint>

#include "quantize.h"

namespace fp4::cpu {

constexpr int kPanelRows = 16;

constexpr int64_t panels_of(int64_t rows) { return (rows + kPanelRows - 1) / kPanelRows; }

// Bytes of codes that one block (block_size columns) of a panel takes; its scales take kPanelRows.
constexpr int block_bytes(Format format) { return kPanelRows * block_size(format) / 2; }

// Where the byte of (row of the panel, byte column jj of two) stands within its 32.
constexpr int byte_position(int row, int jj) { return (row % 8 / 4) * 16 + jj * 8 + (row % 4) * 2 + row / 8; }

// The order in which decoded integer weights (matmul_kernels.h) keep the rows of a panel: what two rounds of byte interleaving
// make of the layout above.
constexpr int kIntegerRow[kPanelRows] = {0, 8, 1, 9, 4, 12, 5, 13, 2, 10, 3, 11, 6, 14, 7, 15};

}  // namespace fp4::cpu
