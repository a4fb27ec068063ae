// The layout of packed weights that the matmul kernels read. src/fp4/backends/cpu.py permutes the canonical form into
// it.
//
// Rows are gathered into panels of 16 (the last one padded with zero bytes), and a panel is stored block after block:
//
//   codes   [panel][K / 4][32]   four columns 4c .. 4c+3 of the 16 rows: a 16-bit word for each row, its two canonical
//                                bytes. Words stand in the order of kWordRow.
//   scales  [panel][K / B][16]   one byte for each row, in order.
//
// Why: a byte shuffle turns 32 low (even columns) or high (odd columns) nibbles into anything of a byte. As integers,
// the two columns in a word meet two activations in one multiply-add, and every word sums for a row of its own. As
// floats, two shuffles give the high and low bytes of bfloat16 values; interleaving those leaves, in every 32-bit lane,
// two columns of a row, which a shift and a mask widen to float32. In both cases sixteen rows meet one broadcast of x,
// there is no horizontal sum, and the block scales of eight rows are one vector. The word order is what makes
// interleaving, which works within 128-bit lanes, deliver rows 0-7 and 8-15 as vectors.
#pragma once

#include <cstdint>

#include "quantize.h"

namespace fp4::cpu {

constexpr int kPanelRows = 16;
constexpr int kWordRow[kPanelRows] = {0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15};

constexpr int64_t panels_of(int64_t rows) { return (rows + kPanelRows - 1) / kPanelRows; }

// Bytes of codes that one block (block_size columns) of a panel takes; its scales take kPanelRows.
constexpr int block_bytes(Format format) { return kPanelRows * block_size(format) / 2; }

// Where the canonical byte of (row of the panel, byte column jj of two) stands within its 32: kWordRow, inverted.
constexpr int byte_position(int row, int jj) { return row % 8 / 4 * 16 + row / 8 * 8 + row % 4 * 2 + jj; }

// Column order within each four of decoded integer weights, and of the activations that meet them: even before odd.
constexpr int kIntegerColumn[4] = {0, 2, 1, 3};

}  // namespace fp4::cpu
