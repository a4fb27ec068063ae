// Where the tensor cores want block scales: tiles of 128 rows x 4 scales of a row, 512 bytes each, K fastest.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FP4_LAYOUT __host__ __device__ __forceinline__
#else
#define FP4_LAYOUT inline
#endif

namespace fp4::cuda {

constexpr int kScaleTileRows = 128;
constexpr int kScaleTileColumns = 4;

FP4_LAYOUT int64_t padded_columns(int64_t columns) {
  return (columns + kScaleTileColumns - 1) / kScaleTileColumns * kScaleTileColumns;
}

FP4_LAYOUT int64_t padded_rows(int64_t rows) {
  return (rows + kScaleTileRows - 1) / kScaleTileRows * kScaleTileRows;
}

FP4_LAYOUT int64_t swizzled_bytes(int64_t rows, int64_t columns) { return padded_rows(rows) * padded_columns(columns); }

// Offset of the scale of a row (m) and block (j) for rows of `columns` blocks.
FP4_LAYOUT int64_t swizzled_offset(int64_t m, int64_t j, int64_t columns) {
  const int64_t tile = m / kScaleTileRows * (padded_columns(columns) / kScaleTileColumns) + j / kScaleTileColumns;
  return tile * 512 + m % 32 * 16 + m % kScaleTileRows / 32 * 4 + j % kScaleTileColumns;
}

// Rows sorted by expert: each expert begins at a row of its own tile. This closed form needs no sum over experts, and
// leaves room: rows below it number at most `offset` rounded up to a tile, plus a tile for each expert before.
FP4_LAYOUT int64_t expert_scale_row(int64_t expert, int64_t offset) {
  return (offset / kScaleTileRows + expert) * kScaleTileRows;
}

// Rows that hold the scales of all experts.
FP4_LAYOUT int64_t grouped_scale_rows(int64_t experts, int64_t rows) {
  return (rows / kScaleTileRows + experts) * kScaleTileRows;
}

}  // namespace fp4::cuda
