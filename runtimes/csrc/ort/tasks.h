// Division of work into tasks. Sizes depend on shapes alone, not on the number of threads, so results do not either.
#ifndef EDGELM_ORT_TASKS_H_
#define EDGELM_ORT_TASKS_H_

#include <algorithm>

#include "op.h"

namespace edgelm::ort {

// With few rows a matmul is bound by reading its weights: a task is a chunk of the file that takes some microseconds,
// long compared with the cost of taking a task (0.1 us), and short enough that waiting for the last thread does not
// matter.
constexpr int64_t kFewRows = 8;
constexpr int64_t kFewRowsWeights = 128 << 10;  // bytes
// With many rows it is bound by arithmetic: a task's activations stay in the L2 cache while weights stream, and tasks
// with the same weights follow one another, so that these are read from memory once.
constexpr int64_t kManyRowsWeights = 256 << 10;
constexpr int64_t kManyRowsActivations = 256 << 10;
// Rows that are normed and quantised in one task. Up to kSerialRows rows are done by the calling thread alone.
constexpr int64_t kTaskRows = 8;
constexpr int64_t kSerialRows = 4;

inline int64_t TaskCount(int64_t total, int64_t size) { return (total + size - 1) / size; }

// Bytes of weights of a unit.
inline int64_t UnitBytes(const Matrix& m) {
  const int64_t low = m.low == nullptr ? 0 : m.low_bytes();
  return (m.tile_bytes + low) * (m.swiglu ? 2 : 1);
}

// A matmul as a grid of tasks, [units] x [rows], row tasks varying fastest.
struct Grid {
  int64_t units, rows;          // of the whole matmul
  int64_t unit_step, row_step;  // of a task
  int64_t row_tasks, tasks;

  Grid(const Matrix& m, int64_t all_rows, bool int8) : units(m.units()), rows(all_rows) {
    const bool few = rows <= kFewRows;
    unit_step = std::max<int64_t>(1, (few ? kFewRowsWeights : kManyRowsWeights) / UnitBytes(m));
    const int64_t fit = kManyRowsActivations / (m.columns * (int8 ? 1 : 4));
    row_step = std::max<int64_t>(kFewRows, fit / kFewRows * kFewRows);
    row_tasks = TaskCount(rows, row_step);
    tasks = TaskCount(units, unit_step) * row_tasks;
  }

  // Call f(first unit, end unit, first row, count of rows) for task i.
  template <typename F>
  void Task(int64_t i, const F& f) const {
    const int64_t unit = i / row_tasks * unit_step, row = i % row_tasks * row_step;
    f(unit, std::min(unit + unit_step, units), row, std::min(row_step, rows - row));
  }
};

// Run work(first, count) on chunks of `step` rows; inline if there are few rows.
template <typename Work>
void ForRows(const Run& run, int64_t rows, int64_t step, const Work& work) {
  if (rows <= kSerialRows) return work(int64_t{0}, rows);
  run.ParallelFor(TaskCount(rows, step), [&](int64_t i) { work(i * step, std::min(step, rows - i * step)); });
}

}  // namespace edgelm::ort

#endif  // EDGELM_ORT_TASKS_H_
