// SparseMoE: [RMSNorm,] router, the chosen experts' SwiGLU networks, and their weighted sum [added to a residual].
//
// Tokens are sorted by expert, so that each expert's rows are one product. Gate and up of all experts are one set of
// pieces, and so are all down products: there a piece owns some columns of some tokens and adds the experts' results to
// them in rising order, so every element of y is written by one thread, in one order.
#include <cstring>

#include "ort/activations.h"
#include "ort/pieces.h"
#include "ort/routing.h"
#include "ort/scratch.h"
#include "ort/weights.h"

namespace edgelm::ort {
namespace {

// Long prompts go through in stretches of tokens whose intermediate results take about this many bytes.
constexpr int64_t kScratchBytes = 64 << 20;
constexpr int64_t kFewestTokens = 64;
// Rows that share the router's weights while these are in the cache.
constexpr int64_t kRouterRows = 16;
// Units of down, and tokens, of a piece: each expert's rows are read once for every piece of columns.
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
  // What one call has to do, checked.
  struct Layer {
    Matrix router;
    const std::vector<Expert>* experts = nullptr;
    const float* norm = nullptr;
    int64_t d = 0, f = 0;                    // hidden width, expert width
    bool int8_x = false, float_x = false;    // as what gate+up, of some expert, take their activations
    bool int8_h = false, float_h = false;    // and down

    int64_t count() const { return static_cast<int64_t>(experts->size()); }
  };
  // A stretch of tokens: its inputs and outputs, and where intermediate results are.
  struct Stretch {
    int64_t tokens;
    const float* x;
    const float* residual;
    float* y;
    float* logits;    // or nullptr
    int64_t* chosen;  // or nullptr
  };
  struct Slots {
    Slot<float> normed, probabilities, weights, pair_weights, gathered_float, hidden_float;
    Slot<int32_t> chosen, tokens;
    Slot<int64_t> start;
    QuantSlot quantised, gathered, hidden;
  };
  struct Rows {  // activations in one or both forms
    QuantRows int8;
    const float* floats;
  };
  struct Piece {
    const Expert* expert;
    int64_t begin, end, first, rows;  // units, pairs
  };

  Layer Check(const Run& run, std::vector<Expert>* own) const;
  Slots PlanFor(const Layer& layer, int64_t tokens, Plan* plan) const;
  void ComputeStretch(const Run& run, const Layer& layer, const Stretch& stretch) const;
  Rows Route(const Run& run, const Layer& layer, const Stretch& stretch, const Slots& slots,
             const Scratch& scratch) const;
  Rows Gather(const Run& run, const Layer& layer, const Rows& x, const Pairs& pairs, int64_t count, const Slots& slots,
              const Scratch& scratch) const;
  void GateUp(const Run& run, const Layer& layer, const Rows& x, const Pairs& pairs, bool shared,
              const QuantRows& hidden, float* hidden_float) const;
  void Down(const Run& run, const Layer& layer, const Stretch& stretch, const Pairs& pairs, const QuantRows& hidden,
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
    Fail("router has ", layer.router.rows, " rows, there are ", layer.count(), " experts");
  }
  if (layer.router.columns != layer.d) {
    Fail("router is for ", layer.router.columns, " columns, experts' gate_up for ", layer.d);
  }
  if (k_ > layer.count()) Fail("attribute k is ", k_, ", there are ", layer.count(), " experts");
  layer.norm = norm_.Get(run, layer.d, "one value a column of the experts' gate_up");
  for (const Expert& expert : *layer.experts) {
    (activations_.Int8(expert.gate_up) ? layer.int8_x : layer.float_x) = true;
    (activations_.Int8(expert.down) ? layer.int8_h : layer.float_h) = true;
  }
  return layer;
}

SparseMoe::Slots SparseMoe::PlanFor(const Layer& layer, int64_t tokens, Plan* plan) const {
  const int64_t pairs = tokens * k_, gathered = tokens == 1 ? 0 : pairs;
  Slots slots;
  slots.normed = plan->Add<float>(layer.norm != nullptr ? tokens * layer.d : 0);
  slots.probabilities = plan->Add<float>(tokens * layer.count());
  slots.weights = plan->Add<float>(pairs);
  slots.chosen = plan->Add<int32_t>(pairs);
  slots.start = plan->Add<int64_t>(layer.count() + 1);
  slots.tokens = plan->Add<int32_t>(pairs);
  slots.pair_weights = plan->Add<float>(pairs);
  slots.quantised = plan->AddRows(layer.int8_x ? tokens : 0, layer.d);
  slots.gathered = plan->AddRows(layer.int8_x ? gathered : 0, layer.d);
  slots.gathered_float = plan->Add<float>(layer.float_x ? gathered * layer.d : 0);
  slots.hidden = plan->AddRows(layer.int8_h ? pairs : 0, layer.f);
  slots.hidden_float = plan->Add<float>(layer.float_h ? pairs * layer.f : 0);
  return slots;
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

  Plan of_one, of_two;
  PlanFor(layer, 2, &of_one);
  PlanFor(layer, 4, &of_two);
  const int64_t token_bytes = static_cast<int64_t>(of_two.bytes() - of_one.bytes()) / 2;
  const int64_t step = std::max(kFewestTokens, kScratchBytes / token_bytes);
  for (int64_t first = 0; first < tokens; first += step) {
    ComputeStretch(run, layer,
                   {std::min(step, tokens - first), x.As<float>() + first * layer.d,
                    residual == nullptr ? nullptr : residual + first * layer.d, y + first * layer.d,
                    logits == nullptr ? nullptr : logits + first * experts,
                    chosen == nullptr ? nullptr : chosen + first * k_});
  }
}

void SparseMoe::ComputeStretch(const Run& run, const Layer& layer, const Stretch& stretch) const {
  Plan plan;
  const Slots slots = PlanFor(layer, stretch.tokens, &plan);
  const Scratch scratch(plan);
  const Rows x = Route(run, layer, stretch, slots, scratch);
  const Pairs pairs{scratch[slots.start], scratch[slots.tokens], scratch[slots.pair_weights]};
  SortByExpert(scratch[slots.chosen], scratch[slots.weights], stretch.tokens, k_, layer.count(), pairs);
  const QuantRows hidden = scratch[slots.hidden];
  float* hidden_float = scratch[slots.hidden_float];
  if (stretch.tokens == 1) {
    GateUp(run, layer, x, pairs, true, hidden, hidden_float);
  } else {
    const Rows gathered = Gather(run, layer, x, pairs, stretch.tokens * k_, slots, scratch);
    GateUp(run, layer, gathered, pairs, false, hidden, hidden_float);
  }
  Down(run, layer, stretch, pairs, hidden, hidden_float);
}

// Norm, router, softmax, choice, and activations in the forms that the experts take.
SparseMoe::Rows SparseMoe::Route(const Run& run, const Layer& layer, const Stretch& stretch, const Slots& slots,
                                 const Scratch& scratch) const {
  const LinearKernels& kernels = ChosenKernels().linear;
  const int64_t d = layer.d, experts = layer.count();
  float* const normed = scratch[slots.normed];
  const float* const x = layer.norm != nullptr ? normed : stretch.x;
  float* const probabilities = scratch[slots.probabilities];
  const QuantRows quantised = scratch[slots.quantised];

  const auto prepare = [&](int64_t first, int64_t count) {
    if (layer.norm != nullptr) {
      kernels.rms_norm(stretch.x + first * d, d, count, d, layer.norm, epsilon_, normed + first * d, d);
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
    if (stretch.logits != nullptr) std::memcpy(stretch.logits + first * experts, p, count * experts * sizeof(float));
    kernels.softmax(p, count, experts);
    for (int64_t t = first; t < first + count; ++t, p += experts) {
      int32_t* chosen = scratch[slots.chosen] + t * k_;
      ChooseExperts(p, experts, k_, normalize_ != 0, chosen, scratch[slots.weights] + t * k_);
      if (stretch.chosen == nullptr) continue;
      for (int64_t i = 0; i < k_; ++i) stretch.chosen[t * k_ + i] = chosen[i];
    }
  };

  if (stretch.tokens <= kSerialRows) {
    // The router's weights come from memory, not from a cache: its tiles are shared among the threads.
    prepare(0, stretch.tokens);
    run.ParallelFor(layer.router.units(), [&](int64_t unit) { route(unit, unit + 1, 0, stretch.tokens); });
    choose(0, stretch.tokens);
  } else {
    run.ParallelFor(Pieces(stretch.tokens, kRouterRows), [&](int64_t i) {
      const int64_t first = i * kRouterRows, count = std::min(kRouterRows, stretch.tokens - first);
      prepare(first, count);
      route(0, layer.router.units(), first, count);
      choose(first, count);
    });
  }
  return {quantised, x};
}

// The rows of each pair's token, in the order of the pairs.
SparseMoe::Rows SparseMoe::Gather(const Run& run, const Layer& layer, const Rows& x, const Pairs& pairs, int64_t count,
                                  const Slots& slots, const Scratch& scratch) const {
  const QuantRows to = scratch[slots.gathered];
  float* const floats = scratch[slots.gathered_float];
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

// `shared`: there is one token, and x holds its row alone for all pairs.
void SparseMoe::GateUp(const Run& run, const Layer& layer, const Rows& x, const Pairs& pairs, bool shared,
                       const QuantRows& hidden, float* hidden_float) const {
  const LinearKernels& kernels = ChosenKernels().linear;
  std::vector<Piece> pieces;
  for (int64_t e = 0; e < layer.count(); ++e) {
    const int64_t rows = pairs.start[e + 1] - pairs.start[e];
    if (rows == 0) continue;
    const Expert& expert = (*layer.experts)[e];
    const Grid grid(expert.gate_up, rows, activations_.Int8(expert.gate_up));
    for (int64_t i = 0; i < grid.pieces; ++i) {
      grid.Piece(i, [&](int64_t begin, int64_t end, int64_t row, int64_t count) {
        pieces.push_back({&expert, begin, end, pairs.start[e] + row, count});
      });
    }
  }
  run.ParallelFor(static_cast<int64_t>(pieces.size()), [&](int64_t i) {
    const Piece& piece = pieces[i];
    Output out;
    if (activations_.Int8(piece.expert->down)) {
      out.finish = Finish::kSwigluQuant;
      out.quant = hidden.From(piece.first);
    } else {
      out.finish = Finish::kSwiglu;
      out.y = hidden_float + piece.first * layer.f;
      out.ldy = layer.f;
    }
    const int64_t from = shared ? 0 : piece.first;
    const Matrix& m = piece.expert->gate_up;
    if (activations_.Int8(m)) {
      kernels.linear_int8(m, piece.begin, piece.end, x.int8.From(from), piece.rows, out);
    } else {
      kernels.linear_float(m, piece.begin, piece.end, x.floats + from * layer.d, layer.d, piece.rows, out);
    }
  });
}

void SparseMoe::Down(const Run& run, const Layer& layer, const Stretch& stretch, const Pairs& pairs,
                     const QuantRows& hidden, const float* hidden_float) const {
  const LinearKernels& kernels = ChosenKernels().linear;
  const int64_t units = layer.experts->front().down.units(), d = layer.d;
  const int64_t column_pieces = Pieces(units, kDownUnits);
  run.ParallelFor(column_pieces * Pieces(stretch.tokens, kDownTokens), [&](int64_t i) {
    const int64_t begin = i % column_pieces * kDownUnits, end = std::min(begin + kDownUnits, units);
    const int64_t first = i / column_pieces * kDownTokens, last = std::min(first + kDownTokens, stretch.tokens);
    const int64_t column = begin * kTile, width = std::min(end * kTile, d) - column;
    for (int64_t t = first; t < last; ++t) {
      float* y = stretch.y + t * d + column;
      if (stretch.residual != nullptr) {
        std::memcpy(y, stretch.residual + t * d + column, width * sizeof(float));
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
      out.y = stretch.y;
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
