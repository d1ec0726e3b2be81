// RMSNorm: y = x / sqrt(mean(x^2) + epsilon) * weight, row by row [, a residual added].
#include "ort/tasks.h"
#include "ort/weights.h"

namespace edgelm::ort {
namespace {

class RmsNorm {
 public:
  static constexpr const char* kName = "RMSNorm";
  static constexpr Declared kInputs[] = {{kFloat}, {kFloat}, {kFloat, kOptional}};
  static constexpr Declared kOutputs[] = {{kFloat}};

  explicit RmsNorm(const Node& node) : epsilon_(node.Float("epsilon", 1e-5f)) {}

  void Compute(const Run& run) const {
    const Tensor x = run.Required(0, "x"), weight = run.Required(1, "weight");
    if (x.shape.rank < 1 || x.shape.last() < 1) Fail("x has shape ", x.shape, ", expected [..., columns]");
    const int64_t columns = x.shape.last(), rows = x.shape.elements() / columns;
    if (!(weight.shape == Shape{columns})) {
      Fail("weight has shape ", weight.shape, ", expected ", Shape{columns}, ", one value per column of x");
    }
    const float* residual = Residual(run, 2, x.shape);
    const float *from = x.As<float>(), *scale = weight.As<float>();
    float* y = run.Output<float>(0, x.shape);
    ForRows(run, rows, kTaskRows, [&](int64_t first, int64_t count) {
      const int64_t begin = first * columns, end = begin + count * columns;
      ChosenKernels().linear.rms_norm(from + begin, columns, count, columns, scale, epsilon_, y + begin, columns);
      for (int64_t i = begin; residual != nullptr && i < end; ++i) y[i] += residual[i];
    });
  }

 private:
  float epsilon_;
};

const Operator<RmsNorm> op;

}  // namespace

const OrtCustomOp* RmsNormOp() { return &op; }

}  // namespace edgelm::ort
