// SparseMoE: [RMSNorm,] router, the chosen experts' SwiGLU networks, and their weighted sum [added to a residual].
//
// Tokens are sorted by expert, so that each expert does one matmul over its rows. The gate and up matmuls of all
// experts are one set of tasks. In the down matmuls a task has some columns of some tokens and adds the experts'
// results in ascending order, so every element of y is written by one thread, in one order.
#include <cstring>

#include "ort/activations.h"
#include "ort/tasks.h"
#include "ort/routing.h"
#include "ort/scratch.h"
#include "ort/weights.h"

namespace edgelm::ort {
namespace {

// Long prompts are processed in chunks of tokens whose intermediate results take about this many bytes.
constexpr int64_t kScratchBytes = 64 << 20;
constexpr int64_t kFewestTokens = 64;
// Rows per task of the router; they share its weights while these are in the CPU's cache.
constexpr int64_t kRouterRows = 16;
// Units (columns) and tokens of a task of the down matmuls. An expert's rows are read once per task of columns.
constexpr int64_t kDownUnits = 4;
constexpr int64_t kDownTokens = 512;
constexpr int64_t kGatherPairs = 64;

class SparseMoe {
 public:
  static constexpr const char* kName = "SparseMoE";
  static constexpr Declared kInputs[] = {{kFloat}, {kUint8}, {kUint8}, {kFloat, kOptional}, {kFloat, kOptional}};
  static constexpr Declared kOutputs[] = {{kFloat}, {kFloat, kOptional}, {kInt64, kOptional}};

  explicit SparseMoe(const Node& node)
      : activations_(node),
        epsilon_(node.Float("epsilon", 1e-5f)),
        k_(node.Int("k", 0)),
        normalize_(node.Int("normalize", 0)),
        router_(node, 1, "router"),
        experts_(node, 2),
        norm_(node, 3, "norm") {
    if (k_ < 1) Fail("attribute k is ", k_, ", expected 1 or more");
    if (normalize_ != 0 && normalize_ != 1) Fail("attribute normalize is ", normalize_, ", expected 0 or 1");
  }

  void Compute(const Run& run) const;

 private:
  // The checked inputs of a call.
  struct Layer {
    Matrix router;
    const std::vector<Expert>* experts = nullptr;
    const float* norm = nullptr;
    int64_t d = 0, f = 0;                  // hidden width, expert width
    bool int8_x = false, float_x = false;  // types of activations that some expert's gate+up takes
    bool int8_h = false, float_h = false;  // types that some expert's down takes

    int64_t count() const { return static_cast<int64_t>(experts->size()); }
  };
  // A chunk of tokens: its inputs and outputs.
  struct Chunk {
    int64_t tokens;
    const float* x;
    const float* residual;
    float* y;
    float* logits;    // or nullptr
    int64_t* chosen;  // or nullptr
  };
  struct Buffers {
    Buffer<float> normed, probabilities, weights, pair_weights, gathered_float, hidden_float;
    Buffer<int32_t> chosen, tokens;
    Buffer<int64_t> start;
    QuantBuffer quantised, gathered, hidden;
  };
  struct Rows {  // activations in one or both types
    QuantRows int8;
    const float* floats;
  };
  struct Task {
    const Expert* expert;
    int64_t begin, end, first, rows;  // units, pairs
  };

  Layer Check(const Run& run, std::vector<Expert>* own) const;
  Buffers LayOut(const Layer& layer, int64_t tokens, ScratchLayout* layout) const;
  void ComputeChunk(const Run& run, const Layer& layer, const Chunk& chunk) const;
  Rows Route(const Run& run, const Layer& layer, const Chunk& chunk, const Buffers& buffers,
             const Scratch& scratch) const;
  Rows Gather(const Run& run, const Layer& layer, const Rows& x, const Pairs& pairs, int64_t count,
              const Buffers& buffers, const Scratch& scratch) const;
  void GateUp(const Run& run, const Layer& layer, const Rows& x, const Pairs& pairs, bool shared,
              const QuantRows& hidden, float* hidden_float) const;
  void Down(const Run& run, const Layer& layer, const Chunk& chunk, const Pairs& pairs, const QuantRows& hidden,
            const float* hidden_float) const;

  Activations activations_;
  float epsilon_;
  int64_t k_, normalize_;
  MatrixInput router_;
  ExpertsInput experts_;
  VectorInput norm_;
};

SparseMoe::Layer SparseMoe::Check(const Run& run, std::vector<Expert>* own) const {
  Layer layer;
  layer.router = router_.Get(run);
  layer.experts = &experts_.Get(run, own);
  const Matrix& gate_up = layer.experts->front().gate_up;
  layer.d = gate_up.columns;
  layer.f = gate_up.outputs();
  if (layer.router.swiglu) Fail("router is a SwiGLU matrix");
  if (layer.router.rows != layer.count()) {
    Fail("router has ", layer.router.rows, " rows, expected ", layer.count(), ", one per expert");
  }
  if (layer.router.columns != layer.d) {
    Fail("router is for ", layer.router.columns, " columns, expected as for experts' gate_up, ", layer.d);
  }
  if (k_ > layer.count()) Fail("attribute k is ", k_, ", expected at most the number of experts, ", layer.count());
  layer.norm = norm_.Get(run, layer.d, "one value per column of the experts' gate_up");
  for (const Expert& expert : *layer.experts) {
    (activations_.Int8(expert.gate_up) ? layer.int8_x : layer.float_x) = true;
    (activations_.Int8(expert.down) ? layer.int8_h : layer.float_h) = true;
  }
  return layer;
}

SparseMoe::Buffers SparseMoe::LayOut(const Layer& layer, int64_t tokens, ScratchLayout* layout) const {
  const int64_t pairs = tokens * k_, gathered = tokens == 1 ? 0 : pairs;
  Buffers buffers;
  buffers.normed = layout->Add<float>(layer.norm != nullptr ? tokens * layer.d : 0);
  buffers.probabilities = layout->Add<float>(tokens * layer.count());
  buffers.weights = layout->Add<float>(pairs);
  buffers.chosen = layout->Add<int32_t>(pairs);
  buffers.start = layout->Add<int64_t>(layer.count() + 1);
  buffers.tokens = layout->Add<int32_t>(pairs);
  buffers.pair_weights = layout->Add<float>(pairs);
  buffers.quantised = layout->AddRows(layer.int8_x ? tokens : 0, layer.d);
  buffers.gathered = layout->AddRows(layer.int8_x ? gathered : 0, layer.d);
  buffers.gathered_float = layout->Add<float>(layer.float_x ? gathered * layer.d : 0);
  buffers.hidden = layout->AddRows(layer.int8_h ? pairs : 0, layer.f);
  buffers.hidden_float = layout->Add<float>(layer.float_h ? pairs * layer.f : 0);
  return buffers;
}

void SparseMoe::Compute(const Run& run) const {
  std::vector<Expert> own;
  const Layer layer = Check(run, &own);
  const Tensor x = run.Required(0, "x");
  if (x.shape.rank != 3 || x.shape.last() != layer.d) {
    Fail("x has shape ", x.shape, ", expected [batch, tokens, ", layer.d, "] as experts' gate_up is for ", layer.d,
         " columns");
  }
  const int64_t tokens = x.shape[0] * x.shape[1], experts = layer.count();
  const float* residual = Residual(run, 4, x.shape);
  float* y = run.Output<float>(0, x.shape);
  float* logits = run.Output<float>(1, {tokens, experts});
  int64_t* chosen = run.Output<int64_t>(2, {tokens, k_});

  ScratchLayout of_one, of_two;
  LayOut(layer, 2, &of_one);
  LayOut(layer, 4, &of_two);
  const int64_t token_bytes = static_cast<int64_t>(of_two.bytes() - of_one.bytes()) / 2;
  const int64_t step = std::max(kFewestTokens, kScratchBytes / token_bytes);
  for (int64_t first = 0; first < tokens; first += step) {
    ComputeChunk(
        run, layer,
        {std::min(step, tokens - first), x.As<float>() + first * layer.d,
         residual == nullptr ? nullptr : residual + first * layer.d, y + first * layer.d,
         logits == nullptr ? nullptr : logits + first * experts, chosen == nullptr ? nullptr : chosen + first * k_});
  }
}

void SparseMoe::ComputeChunk(const Run& run, const Layer& layer, const Chunk& chunk) const {
  ScratchLayout layout;
  const Buffers buffers = LayOut(layer, chunk.tokens, &layout);
  const Scratch scratch(layout);
  const Rows x = Route(run, layer, chunk, buffers, scratch);
  const Pairs pairs{scratch[buffers.start], scratch[buffers.tokens], scratch[buffers.pair_weights]};
  SortByExpert(scratch[buffers.chosen], scratch[buffers.weights], chunk.tokens, k_, layer.count(), pairs);
  const QuantRows hidden = scratch[buffers.hidden];
  float* hidden_float = scratch[buffers.hidden_float];
  if (chunk.tokens == 1) {
    GateUp(run, layer, x, pairs, true, hidden, hidden_float);
  } else {
    const Rows gathered = Gather(run, layer, x, pairs, chunk.tokens * k_, buffers, scratch);
    GateUp(run, layer, gathered, pairs, false, hidden, hidden_float);
  }
  Down(run, layer, chunk, pairs, hidden, hidden_float);
}

// Norm, router, softmax and top k; returns the activations in the types that the experts take.
SparseMoe::Rows SparseMoe::Route(const Run& run, const Layer& layer, const Chunk& chunk, const Buffers& buffers,
                                 const Scratch& scratch) const {
  const LinearKernels& kernels = ChosenKernels().linear;
  const int64_t d = layer.d, experts = layer.count();
  float* const normed = scratch[buffers.normed];
  const float* const x = layer.norm != nullptr ? normed : chunk.x;
  float* const probabilities = scratch[buffers.probabilities];
  const QuantRows quantised = scratch[buffers.quantised];

  const auto prepare = [&](int64_t first, int64_t count) {
    if (layer.norm != nullptr) {
      kernels.rms_norm(chunk.x + first * d, d, count, d, layer.norm, epsilon_, normed + first * d, d);
    }
    if (layer.int8_x) kernels.quantize_rows(x + first * d, d, count, d, quantised.From(first));
  };
  const auto route = [&](int64_t begin, int64_t end, int64_t first, int64_t count) {
    Output out;
    out.y = probabilities;
    out.ldy = experts;
    kernels.linear_float(layer.router, begin, end, x + first * d, d, count, out.From(first));
  };
  const auto choose = [&](int64_t first, int64_t count) {
    float* p = probabilities + first * experts;
    if (chunk.logits != nullptr) std::memcpy(chunk.logits + first * experts, p, count * experts * sizeof(float));
    kernels.softmax(p, count, experts);
    for (int64_t t = first; t < first + count; ++t, p += experts) {
      int32_t* chosen = scratch[buffers.chosen] + t * k_;
      ChooseExperts(p, experts, k_, normalize_ != 0, chosen, scratch[buffers.weights] + t * k_);
      if (chunk.chosen == nullptr) continue;
      for (int64_t i = 0; i < k_; ++i) chunk.chosen[t * k_ + i] = chosen[i];
    }
  };

  if (chunk.tokens <= kSerialRows) {
    // With few tokens the router is bound by reading its weights from memory, so its tiles are divided among the
    // threads.
    prepare(0, chunk.tokens);
    run.ParallelFor(layer.router.units(), [&](int64_t unit) { route(unit, unit + 1, 0, chunk.tokens); });
    choose(0, chunk.tokens);
  } else {
    run.ParallelFor(TaskCount(chunk.tokens, kRouterRows), [&](int64_t i) {
      const int64_t first = i * kRouterRows, count = std::min(kRouterRows, chunk.tokens - first);
      prepare(first, count);
      route(0, layer.router.units(), first, count);
      choose(first, count);
    });
  }
  return {quantised, x};
}

// Copy the row of each pair's token, in the order of the pairs.
SparseMoe::Rows SparseMoe::Gather(const Run& run, const Layer& layer, const Rows& x, const Pairs& pairs, int64_t count,
                                  const Buffers& buffers, const Scratch& scratch) const {
  const QuantRows to = scratch[buffers.gathered];
  float* const floats = scratch[buffers.gathered_float];
  ForRows(run, count, kGatherPairs, [&](int64_t first, int64_t rows) {
    for (int64_t i = first; i < first + rows; ++i) {
      const int64_t token = pairs.token[i];
      if (layer.int8_x) {
        const QuantRows from = x.int8.From(token), row = to.From(i);
        std::memcpy(row.codes, from.codes, from.columns);
        std::memcpy(row.scales, from.scales, from.blocks() * sizeof *from.scales);
        std::memcpy(row.offsets, from.offsets, from.blocks() * sizeof *from.offsets);
      }
      if (layer.float_x) std::memcpy(floats + i * layer.d, x.floats + token * layer.d, layer.d * sizeof(float));
    }
  });
  return {to, floats};
}

// The gate and up matmuls with SwiGLU. `shared`: there is one token, and x holds its row once for all pairs.
void SparseMoe::GateUp(const Run& run, const Layer& layer, const Rows& x, const Pairs& pairs, bool shared,
                       const QuantRows& hidden, float* hidden_float) const {
  const LinearKernels& kernels = ChosenKernels().linear;
  std::vector<Task> tasks;
  for (int64_t e = 0; e < layer.count(); ++e) {
    const int64_t rows = pairs.start[e + 1] - pairs.start[e];
    if (rows == 0) continue;
    const Expert& expert = (*layer.experts)[e];
    const Grid grid(expert.gate_up, rows, activations_.Int8(expert.gate_up));
    for (int64_t i = 0; i < grid.tasks; ++i) {
      grid.Task(i, [&](int64_t begin, int64_t end, int64_t row, int64_t count) {
        tasks.push_back({&expert, begin, end, pairs.start[e] + row, count});
      });
    }
  }
  run.ParallelFor(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Task& task = tasks[i];
    Output out;
    if (activations_.Int8(task.expert->down)) {
      out.finish = Finish::kSwigluQuant;
      out.quant = hidden.From(task.first);
    } else {
      out.finish = Finish::kSwiglu;
      out.y = hidden_float + task.first * layer.f;
      out.ldy = layer.f;
    }
    const int64_t from = shared ? 0 : task.first;
    const Matrix& m = task.expert->gate_up;
    if (activations_.Int8(m)) {
      kernels.linear_int8(m, task.begin, task.end, x.int8.From(from), task.rows, out);
    } else {
      kernels.linear_float(m, task.begin, task.end, x.floats + from * layer.d, layer.d, task.rows, out);
    }
  });
}

void SparseMoe::Down(const Run& run, const Layer& layer, const Chunk& chunk, const Pairs& pairs,
                     const QuantRows& hidden, const float* hidden_float) const {
  const LinearKernels& kernels = ChosenKernels().linear;
  const int64_t units = layer.experts->front().down.units(), d = layer.d;
  const int64_t column_tasks = TaskCount(units, kDownUnits);
  run.ParallelFor(column_tasks * TaskCount(chunk.tokens, kDownTokens), [&](int64_t i) {
    const int64_t begin = i % column_tasks * kDownUnits, end = std::min(begin + kDownUnits, units);
    const int64_t first = i / column_tasks * kDownTokens, last = std::min(first + kDownTokens, chunk.tokens);
    const int64_t column = begin * kTile, width = std::min(end * kTile, d) - column;
    for (int64_t t = first; t < last; ++t) {
      float* y = chunk.y + t * d + column;
      if (chunk.residual != nullptr) {
        std::memcpy(y, chunk.residual + t * d + column, width * sizeof(float));
      } else {
        std::memset(y, 0, width * sizeof(float));
      }
    }
    for (int64_t e = 0; e < layer.count(); ++e) {
      // An expert's pairs are in the order of their tokens.
      const int32_t* const begin_token = pairs.token + pairs.start[e];
      const int32_t* const end_token = pairs.token + pairs.start[e + 1];
      const int32_t* const from = std::lower_bound(begin_token, end_token, static_cast<int32_t>(first));
      const int32_t* const to = std::lower_bound(from, end_token, static_cast<int32_t>(last));
      if (from == to) continue;
      const int64_t pair = from - pairs.token;
      const Matrix& m = (*layer.experts)[e].down;
      Output out;
      out.finish = Finish::kScatterAdd;
      out.y = chunk.y;
      out.ldy = d;
      out.index = from;
      out.weight = pairs.weight + pair;
      if (activations_.Int8(m)) {
        kernels.linear_int8(m, begin, end, hidden.From(pair), to - from, out);
      } else {
        kernels.linear_float(m, begin, end, hidden_float + pair * layer.f, layer.f, to - from, out);
      }
    }
  });
}

const Operator<SparseMoe> op;

}  // namespace

const OrtCustomOp* SparseMoeOp() { return &op; }

}  // namespace edgelm::ort
