// The description of a blob of packed weights. edgelm/bundle/gpu_layout.py describes the layout.
#pragma once

#include <string>

#include "cuda/host/fields.h"

namespace edgelm::gpu {

constexpr i64 kRows = 16;        // of a tile
constexpr i64 kTileBytes = 512;  // of a tile

// `count` matrices [rows, columns] of one kind: int4, int8, fp8, f16, bf16 or f32.
struct Matrix {
  std::string kind;
  i64 rows, columns;  // rows: with swiglu those of gate and up together
  i64 group;          // columns per scale
  bool zeros, swiglu;
  i64 count;

  // Read the fields PREFIXkind, PREFIXrows, ... Throws Error (kBundle) if they contradict each other.
  static Matrix of(const Fields& fields, const std::string& prefix = "");

  std::string text() const;  // for messages

  i64 tile_columns() const;
  i64 scale_bytes() const;  // of one scale; 0: the kind has none
  i64 blocks() const { return divide_up(rows, kRows); }
  i64 groups() const { return columns / group; }
  i64 outputs() const { return swiglu ? rows / 2 : rows; }
  i64 codes_stride() const { return blocks() * (columns / tile_columns()) * kTileBytes; }
  i64 scales_stride() const { return blocks() * groups() * kRows * scale_bytes(); }
  i64 zeros_stride() const { return zeros ? blocks() * groups() * kRows : 0; }
  i64 scales_offset() const { return round_up(count * codes_stride()); }
  i64 zeros_offset() const { return scales_offset() + round_up(count * scales_stride()); }
  // Addresses of the parts of a blob; 0: it has none.
  u64 scales_at(u64 blob) const { return scale_bytes() ? blob + u64(scales_offset()) : 0; }
  u64 zeros_at(u64 blob) const { return zeros ? blob + u64(zeros_offset()) : 0; }
};

}  // namespace edgelm::gpu
