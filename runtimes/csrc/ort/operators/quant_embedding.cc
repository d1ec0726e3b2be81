// QuantEmbedding: embedding lookup, rows of a packed matrix as float32.
#include "ort/tasks.h"
#include "ort/weights.h"

namespace edgelm::ort {
namespace {

class QuantEmbedding {
 public:
  static constexpr const char* kName = "QuantEmbedding";
  static constexpr Declared kInputs[] = {{kInt64}, {kUint8}};
  static constexpr Declared kOutputs[] = {{kFloat}};

  explicit QuantEmbedding(const Node& node) : table_(node, 1, "table") {}

  void Compute(const Run& run) const {
    const Matrix table = table_.Get(run);
    if (table.swiglu) Fail("table is a SwiGLU matrix");
    const Tensor ids = run.Required(0, "ids");
    if (ids.shape.rank >= Shape::kMost) Fail("ids have shape ", ids.shape, ", expected [batch, tokens]");
    Shape shape = ids.shape;
    shape[shape.rank++] = table.columns;
    const int64_t count = ids.shape.elements();
    const int64_t* id = ids.As<int64_t>();
    for (int64_t i = 0; i < count; ++i) {
      if (id[i] < 0 || id[i] >= table.rows) {
        Fail("id ", id[i], " at position ", i, " is outside 0..", table.rows - 1, ", the table has ", table.rows,
             " rows");
      }
    }
    float* out = run.Output<float>(0, shape);
    ForRows(run, count, kTaskRows, [&](int64_t first, int64_t rows) {
      for (int64_t i = first; i < first + rows; ++i) DequantizeRow(table, id[i], out + i * table.columns);
    });
  }

 private:
  MatrixInput table_;
};

const Operator<QuantEmbedding> op;

}  // namespace

const OrtCustomOp* QuantEmbeddingOp() { return &op; }

}  // namespace edgelm::ort
