// How work is cut. Sizes follow from shapes alone, never from the number of threads, so results do not depend on it.
#ifndef EDGELM_ORT_PIECES_H_
#define EDGELM_ORT_PIECES_H_

#include <algorithm>

#include "op.h"

namespace edgelm::ort {

// With few rows a product is bound by reading its weights: a piece is a stretch of the file that takes some
// microseconds, long enough to pay for being claimed (0.1 us), short enough that the last thread's wait is not seen.
constexpr int64_t kFewRows = 8;
constexpr int64_t kFewRowsWeights = 128 << 10;  // bytes
// With many it is bound by arithmetic: a piece's activations stay in the second-level cache while weights stream by,
// and pieces of the same weights follow one another, so that memory sends them once.
constexpr int64_t kManyRowsWeights = 256 << 10;
constexpr int64_t kManyRowsActivations = 256 << 10;
// Rows that are normed and quantised in one piece. Up to kSerialRows are not worth waking the other threads.
constexpr int64_t kRowsPiece = 8;
constexpr int64_t kSerialRows = 4;

inline int64_t Pieces(int64_t total, int64_t size) { return (total + size - 1) / size; }

// Weights of a unit.
inline int64_t UnitBytes(const Matrix& m) {
  const int64_t low = m.low == nullptr ? 0 : m.low_bytes();
  return (m.tile_bytes + low) * (m.swiglu ? 2 : 1);
}

// A product as a grid of pieces, [units] x [rows], rows running fastest.
struct Grid {
  int64_t units, rows;            // of the whole
  int64_t unit_step, row_step;    // of a piece
  int64_t row_pieces, pieces;

  Grid(const Matrix& m, int64_t all_rows, bool int8) : units(m.units()), rows(all_rows) {
    const bool few = rows <= kFewRows;
    unit_step = std::max<int64_t>(1, (few ? kFewRowsWeights : kManyRowsWeights) / UnitBytes(m));
    const int64_t fit = kManyRowsActivations / (m.columns * (int8 ? 1 : 4));
    row_step = std::max<int64_t>(kFewRows, fit / kFewRows * kFewRows);
    row_pieces = Pieces(rows, row_step);
    pieces = Pieces(units, unit_step) * row_pieces;
  }

  // f(first unit, end unit, first row, count of rows)
  template <typename F>
  void Piece(int64_t i, const F& f) const {
    const int64_t unit = i / row_pieces * unit_step, row = i % row_pieces * row_step;
    f(unit, std::min(unit + unit_step, units), row, std::min(row_step, rows - row));
  }
};

// Runs work(first, count) on stretches of `rows` rows, inline where they are few.
template <typename Work>
void ForRows(const Run& run, int64_t rows, int64_t step, const Work& work) {
  if (rows <= kSerialRows) return work(int64_t{0}, rows);
  run.ParallelFor(Pieces(rows, step), [&](int64_t i) { work(i * step, std::min(step, rows - i * step)); });
}

}  // namespace edgelm::ort

#endif  // EDGELM_ORT_PIECES_H_
