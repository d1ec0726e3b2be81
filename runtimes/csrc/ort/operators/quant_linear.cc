// QuantLinear: [RMSNorm,] matmul with a packed matrix [, SwiGLU, or a bias and a residual added].
#include <cmath>

#include "ort/activations.h"
#include "ort/tasks.h"
#include "ort/scratch.h"
#include "ort/weights.h"

namespace edgelm::ort {
namespace {

class QuantLinear {
 public:
  static constexpr const char* kName = "QuantLinear";
  static constexpr Declared kInputs[] = {
      {kFloat}, {kUint8}, {kFloat, kOptional}, {kFloat, kOptional}, {kFloat, kOptional}};
  static constexpr Declared kOutputs[] = {{kFloat}};

  explicit QuantLinear(const Node& node)
      : activations_(node),
        epsilon_(node.Float("epsilon", 1e-5f)),
        rescore_(node.Int("refine", 0)),
        weights_(node, 1, "weights"),
        norm_(node, 2, "norm"),
        bias_(node, 4, "bias") {
    if (rescore_ < 0) Fail("attribute refine is ", rescore_, ", expected 0 or more");
  }

  void Compute(const Run& run) const {
    const Matrix m = weights_.Get(run);
    const Tensor x = run.Required(0, "x");
    if (x.shape.rank < 1 || x.shape.last() != m.columns) {
      Fail("x has shape ", x.shape, ", weights are for ", m.columns, " columns");
    }
    Shape shape = x.shape;
    shape[shape.rank - 1] = m.outputs();
    Call call{m, x.As<float>(), 0, nullptr, {}};
    call.rows = x.shape.elements() / m.columns;
    call.norm = norm_.Get(run, m.columns, "one value per column of the weights");
    call.out.finish = m.swiglu ? Finish::kSwiglu : Finish::kStore;
    call.out.bias = bias_.Get(run, m.outputs(), "one value per row of the weights");
    call.out.residual = Residual(run, 3, shape);
    call.out.ldy = m.outputs();
    if (m.swiglu && call.out.bias != nullptr) Fail("a bias cannot be added to the result of a SwiGLU matrix");
    if (m.swiglu && call.out.residual != nullptr) Fail("a residual cannot be added to the result of a SwiGLU matrix");
    if (rescore_ > 0 && m.kind != Kind::kInt8Split)
      Fail("attribute refine is for weights of kind int8 in split nibbles");
    if (rescore_ > 0 && !activations_.Int8(m)) Fail("attribute refine is for activations int8");
    call.out.y = run.Output<float>(0, shape);
    if (call.rows == 0) return;
    if (activations_.Int8(m)) {
      ComputeInt8(run, call);
    } else {
      ComputeFloat(run, call);
    }
  }

 private:
  struct Call {
    const Matrix& m;
    const float* x;
    int64_t rows = 0;
    const float* norm = nullptr;
    Output out;
  };

  void ComputeFloat(const Run& run, const Call& call) const {
    const LinearKernels& kernels = ChosenKernels().linear;
    const int64_t columns = call.m.columns;
    ScratchLayout layout;
    const Buffer<float> normed = layout.Add<float>(call.norm != nullptr ? call.rows * columns : 0);
    const Scratch scratch(layout);
    const float* x = call.x;
    if (call.norm != nullptr) {
      float* to = scratch[normed];
      ForRows(run, call.rows, kTaskRows, [&](int64_t first, int64_t count) {
        kernels.rms_norm(x + first * columns, columns, count, columns, call.norm, epsilon_, to + first * columns,
                         columns);
      });
      x = to;
    }
    const Grid grid(call.m, call.rows, false);
    run.ParallelFor(grid.tasks, [&](int64_t i) {
      grid.Task(i, [&](int64_t begin, int64_t end, int64_t row, int64_t count) {
        kernels.linear_float(call.m, begin, end, x + row * columns, columns, count, call.out.From(row));
      });
    });
  }

  void ComputeInt8(const Run& run, const Call& call) const {
    const LinearKernels& kernels = ChosenKernels().linear;
    const int64_t columns = call.m.columns, rows = call.rows;
    const bool rescored = rescore_ > 0 && rows == 1 && !ExactLogits();
    ScratchLayout layout;
    const QuantBuffer buffer = layout.AddRows(rows, columns);
    // A normed row is needed only until it is quantised, so each task of rows has room for one.
    const Buffer<float> normed = layout.Add<float>(call.norm != nullptr ? TaskCount(rows, kTaskRows) * columns : 0);
    const Buffer<float> largest = layout.Add<float>(rescored ? call.m.units() : 0);
    const Buffer<int32_t> chosen = layout.Add<int32_t>(rescored ? call.m.units() : 0);
    const Scratch scratch(layout);
    const QuantRows x = scratch[buffer];
    ForRows(run, rows, kTaskRows, [&](int64_t first, int64_t count) {
      if (call.norm == nullptr) {
        return kernels.quantize_rows(call.x + first * columns, columns, count, columns, x.From(first));
      }
      float* row = scratch[normed] + first / kTaskRows * columns;
      for (int64_t r = first; r < first + count; ++r) {
        kernels.rms_norm(call.x + r * columns, columns, 1, columns, call.norm, epsilon_, row, columns);
        kernels.quantize_rows(row, columns, 1, columns, x.From(r));
      }
    });
    if (rescored) return Rescore(run, call, x, scratch[largest], scratch[chosen]);
    const Grid grid(call.m, rows, true);
    run.ParallelFor(grid.tasks, [&](int64_t i) {
      grid.Task(i, [&](int64_t begin, int64_t end, int64_t row, int64_t count) {
        kernels.linear_int8(call.m, begin, end, x.From(row), count, call.out.From(row));
      });
    });
  }

  // One row: compute all results from the high nibbles of the weights, then compute exactly the `refine` tiles of 32
  // results with the largest maxima. The `refine` largest results are in at most that many tiles, so they are exact.
  void Rescore(const Run& run, const Call& call, const QuantRows& x, float* largest, int32_t* chosen) const {
    const LinearKernels& kernels = ChosenKernels().linear;
    const int64_t units = call.m.units(), width = call.m.outputs();
    const Grid grid(call.m, 1, true);
    run.ParallelFor(grid.tasks, [&](int64_t i) {
      grid.Task(i, [&](int64_t begin, int64_t end, int64_t, int64_t) {
        kernels.linear_high(call.m, begin, end, x, 1, call.out);
        for (int64_t unit = begin; unit < end; ++unit) {
          float most = -INFINITY;  // also for a tile of NaN
          for (int64_t n = unit * kTile; n < std::min((unit + 1) * kTile, width); ++n) {
            most = call.out.y[n] > most ? call.out.y[n] : most;
          }
          largest[unit] = most;
        }
      });
    });
    for (int64_t i = 0; i < units; ++i) chosen[i] = static_cast<int32_t>(i);
    const int64_t count = std::min(rescore_, units);
    std::nth_element(chosen, chosen + count, chosen + units, [&](int32_t a, int32_t b) {
      return largest[a] > largest[b] || (largest[a] == largest[b] && a < b);
    });
    run.ParallelFor(count, [&](int64_t i) { kernels.linear_int8(call.m, chosen[i], chosen[i] + 1, x, 1, call.out); });
  }

  Activations activations_;
  float epsilon_;
  int64_t rescore_;
  MatrixInput weights_;
  VectorInput norm_, bias_;
};

const Operator<QuantLinear> op;

}  // namespace

const OrtCustomOp* QuantLinearOp() { return &op; }

bool& ExactLogits() {
  // Of the thread that runs the model: ONNX Runtime computes every node there, and divides only its work among others.
  static thread_local bool on = false;
  return on;
}

}  // namespace edgelm::ort
