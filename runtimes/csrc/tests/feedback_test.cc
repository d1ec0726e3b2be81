// Tests fitting of scales and rounding with error feedback: every instruction set gives the scalar table's bits, and
// those are what quantize.h defines, computed here one row at a time with FP8 numbers looked up in a list.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "quantize.h"
#include "quantize_kernel.h"

namespace {

using Floats = std::vector<float>;

// -- the numbers ------------------------------------------------------------------------------------------------------

struct Grid {
  const char* name;
  int numbers;
  float range;
  bool varying;  // whether each row has its own lowest value
};

const Grid kGrids[] = {{"int4 sym", EDGELM_INTEGERS, 15.0f, false},
                       {"int3 asym", EDGELM_INTEGERS, 7.0f, true},
                       {"int8 asym", EDGELM_INTEGERS, 255.0f, true},
                       {"e4m3", EDGELM_E4M3, 0.0f, false},
                       {"e5m2", EDGELM_E5M2, 0.0f, false}};

// The values of the codes 0, 1, ... of an FP8 format that are finite.
std::vector<double> Positive(int numbers) {
  const int mantissa = numbers == EDGELM_E4M3 ? 3 : 2, bias = numbers == EDGELM_E4M3 ? 7 : 15;
  const int count = numbers == EDGELM_E4M3 ? 0x7f : 0x7c;  // then NaN, and in E5M2 infinity before it
  std::vector<double> values;
  for (int code = 0; code < count; ++code) {
    const int exponent = code >> mantissa, fraction = code & ((1 << mantissa) - 1);
    const double significand = fraction * std::exp2(-mantissa) + (exponent != 0);
    values.push_back(significand * std::exp2((exponent != 0 ? exponent : 1) - bias));
  }
  return values;
}

float NearestFp8(float x, const std::vector<double>& values) {
  const double magnitude = std::fabs(double(x));
  size_t best = values.size() - 1;  // also for numbers beyond it, whose distances could be equal in double
  for (size_t code = 0; code < values.size() && magnitude < values.back(); ++code) {
    const double distance = std::fabs(magnitude - values[code]), least = std::fabs(magnitude - values[best]);
    if (distance < least || (distance == least && code % 2 == 0)) best = code;
  }
  return std::copysign(static_cast<float>(values[best]), x);
}

float Nearest(const Grid& grid, float x, float lowest) {
  static const std::vector<double> e4m3 = Positive(EDGELM_E4M3), e5m2 = Positive(EDGELM_E5M2);
  if (grid.numbers == EDGELM_E4M3) return NearestFp8(x, e4m3);
  if (grid.numbers == EDGELM_E5M2) return NearestFp8(x, e5m2);
  const double inside = std::fmin(std::fmax(x, lowest), double(lowest) + grid.range);
  return static_cast<float>(std::nearbyint(inside)) + 0.0f;  // -0 becomes +0
}

// -- a block and what is expected of it -------------------------------------------------------------------------------

// Arrays [columns, rows] end with their last element, so that AddressSanitizer detects reads beyond them.
struct Block {
  Grid grid;
  bool recode;
  int64_t rows, columns, stride, coupling_stride;
  Floats weights, target, values, error, coupling, scale, inverse, lowest;

  std::string Name() const {
    return std::string(grid.name) + (recode ? " recode " : " round ") + std::to_string(columns) + "x" +
           std::to_string(rows) + " stride " + std::to_string(stride);
  }
};

float Reciprocal(float value) { return value == 0.0f ? 0.0f : 1.0f / value; }

Block MakeBlock(const Grid& grid, bool recode, int64_t rows, int64_t columns, int64_t stride, uint32_t seed) {
  Block b = {grid, recode, rows, columns, stride, columns + seed % 3, {}, {}, {}, {}, {}, {}, {}, {}};
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  const size_t size = static_cast<size_t>((columns - 1) * stride + rows);
  for (Floats* array : {&b.weights, &b.target, &b.error}) {
    array->resize(size);
    for (float& x : *array) x = 0.05f * normal(engine);
  }
  for (float& x : b.error) x *= 0.1f;
  b.values.assign(size, -77.0f);
  // H of correlated columns. Elements below the diagonal must not be read.
  b.coupling.assign(static_cast<size_t>((columns - 1) * b.coupling_stride + columns), NAN);
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t k = j; k < columns; ++k) {
      const float alike = 0.3f * normal(engine) / float(columns);
      b.coupling[j * b.coupling_stride + k] = j == k ? 2.0f + 0.1f * float(j % 5) : alike;
    }
    if (!recode) b.coupling[j * b.coupling_stride + j] = NAN;  // a rounded column's target is not needed any more
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float levels = grid.numbers == EDGELM_INTEGERS ? grid.range : grid.numbers == EDGELM_E4M3 ? 700.0f : 40.0f;
    b.scale.push_back(r % 11 == 10 ? 0.0f : (0.15f + 0.02f * std::fabs(normal(engine))) / levels);
    b.inverse.push_back(Reciprocal(b.scale.back()));
    const float half = std::floor(grid.range / 2) + 1;
    b.lowest.push_back(grid.varying ? -float(r % int64_t(grid.range + 1)) : -half);
  }
  return b;
}

int32_t Run(Block* b, int isa, int threads) {
  edgelm_feedback_arguments a = {};
  a.rows = b->rows;
  a.columns = b->columns;
  a.stride = b->stride;
  a.weights = b->weights.data();
  a.target = b->target.data();
  a.values = b->values.data();
  a.error = b->error.data();
  a.coupling = b->coupling.data();
  a.coupling_stride = b->coupling_stride;
  a.scale = b->scale.data();
  a.inverse = b->inverse.data();
  a.lowest = b->lowest.data();
  a.range = b->grid.range;
  a.numbers = b->grid.numbers;
  a.recode = b->recode;
  a.threads = threads;
  a.isa = isa;
  return edgelm_feedback(&a);
}

// The expected results, computed a row at a time.
void Expect(Block* b) {
  for (int64_t r = 0; r < b->rows; ++r) {
    Floats target;
    for (int64_t j = 0; j < b->columns; ++j) target.push_back(b->target[j * b->stride + r]);
    for (int64_t j = 0; j < b->columns; ++j) {
      const int64_t at = j * b->stride + r;
      const float* coupling = &b->coupling[j * b->coupling_stride];
      float wanted = target[j];
      if (b->recode) {
        const float kept = b->weights[at] - b->error[at], reciprocal = 1.0f / coupling[j];
        const float pulled = target[j] * reciprocal;
        wanted = kept + pulled;
      }
      const float scaled = wanted * b->inverse[r];
      const float value = Nearest(b->grid, scaled, b->lowest[r]);
      const float stands_for = value * b->scale[r];
      const float error = b->weights[at] - stands_for;
      const float change = b->recode ? error - b->error[at] : error;
      for (int64_t k = j + 1; k < b->columns; ++k) {
        const float moved = coupling[k] * change;
        target[k] += moved;
      }
      b->values[at] = value;
      b->error[at] = error;
    }
  }
}

bool Same(const Floats& a, const Floats& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

const int kWide[] = {EDGELM_ISA_AUTO, EDGELM_ISA_BASELINE, EDGELM_ISA_AVX2, EDGELM_ISA_AVX512};

void CheckBlock(const Block& block, int threads) {
  Block expected = block, scalar = block;
  Expect(&expected);
  EXPECT(Run(&scalar, EDGELM_ISA_SCALAR, 1) == EDGELM_QUANT_OK, "%s", block.Name().c_str());
  // Padding between columns and all inputs stay unchanged.
  EXPECT(Same(scalar.values, expected.values), "%s: values", block.Name().c_str());
  EXPECT(Same(scalar.error, expected.error), "%s: errors", block.Name().c_str());
  EXPECT(Same(scalar.target, block.target), "%s: targets changed", block.Name().c_str());
  for (const int isa : kWide) {
    if (!edgelm_quant_has_isa(isa)) continue;
    Block got = block;
    EXPECT(Run(&got, isa, threads) == EDGELM_QUANT_OK, "%s isa %d", block.Name().c_str(), isa);
    EXPECT(Same(got.values, scalar.values), "%s isa %d threads %d: values", block.Name().c_str(), isa, threads);
    EXPECT(Same(got.error, scalar.error), "%s isa %d threads %d: errors", block.Name().c_str(), isa, threads);
  }
}

void TestFeedbackAgreesOnEveryInstructionSet() {
  uint32_t seed = 1;
  for (const Grid& grid : kGrids) {
    for (const bool recode : {false, true}) {
      for (const int64_t columns : {1, 2, 31, 32, 64, 128}) {
        for (int64_t rows = 1; rows <= 70; rows += columns <= 2 ? 1 : rows % 32 == 31 || rows % 32 == 0 ? 1 : 6) {
          CheckBlock(MakeBlock(grid, recode, rows, columns, rows + seed % 4, seed), 1);
          ++seed;
        }
      }
      // Enough rows for each thread to get some, and a remainder.
      for (const int threads : {1, 2, 3, 8}) CheckBlock(MakeBlock(grid, recode, 600, 32, 601, seed++), threads);
    }
  }
}

// Round one column with a scale of 1: no feedback, just the nearest value.
Floats Rounded(const Grid& grid, const Floats& x, float lowest, int isa) {
  const auto count = static_cast<int64_t>(x.size());
  const Floats unset(x.size(), NAN), one(x.size(), 1.0f);
  Block b = {grid, false, count, 1, count, 1, x, x, unset, unset, {NAN}, one, one, Floats(x.size(), lowest)};
  EXPECT(Run(&b, isa, 1) == EDGELM_QUANT_OK, "%s isa %d", grid.name, isa);
  return b.values;
}

void CheckRounding(const Grid& grid, const Floats& x, float lowest) {
  for (const int isa : {EDGELM_ISA_SCALAR, EDGELM_ISA_BASELINE, EDGELM_ISA_AVX2, EDGELM_ISA_AVX512}) {
    if (!edgelm_quant_has_isa(isa)) continue;
    const Floats got = Rounded(grid, x, lowest, isa);
    for (size_t i = 0; i < x.size(); ++i) {
      const float expected = Nearest(grid, x[i], lowest);
      EXPECT(edgelm::Bits(got[i]) == edgelm::Bits(expected), "%s isa %d: %.9g to %.9g, not %.9g", grid.name, isa, x[i],
             got[i], expected);
    }
  }
}

void TestEveryTieAndBoundIsRoundedRight() {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const Grid& grid : kGrids) {
    Floats x = {0.0f, 1e-45f, 1e-38f, 1e-12f, 1e5f, 3e38f, infinity};
    if (grid.numbers == EDGELM_INTEGERS) {
      for (int i = 0; i <= int(grid.range) + 2; ++i) x.insert(x.end(), {float(i), float(i) + 0.5f});
    } else {
      const std::vector<double> values = Positive(grid.numbers);
      for (size_t i = 0; i < values.size(); ++i) {
        // The last tie is with the number that would come next.
        const double next = i + 1 < values.size() ? values[i + 1] : 2 * values[i] - values[i - 1];
        x.insert(x.end(), {static_cast<float>(values[i]), static_cast<float>((values[i] + next) / 2)});
      }
    }
    for (size_t i = 0, count = x.size(); i < count; ++i) {
      x.insert(x.end(), {std::nextafter(x[i], 0.0f), std::nextafter(x[i], infinity)});
    }
    for (size_t i = 0, count = x.size(); i < count; ++i) x.push_back(-x[i]);
    CheckRounding(grid, x, -std::floor(grid.range / 2) - 1);
    if (grid.varying) {
      for (const float lowest : {0.0f, -grid.range, -3.0f}) CheckRounding(grid, x, lowest);
    }
  }
}

// Each changed value is the best with all others fixed, so e H e never increases.
void TestRecodingNeverLosesAndOftenGains() {
  for (const Grid& grid : kGrids) {
    Block b = MakeBlock(grid, true, 50, 64, 50, 4);
    const auto loss = [&](int64_t r) {
      double sum = 0;
      for (int64_t j = 0; j < b.columns; ++j) {
        for (int64_t k = 0; k < b.columns; ++k) {
          const double h = b.coupling[std::min(j, k) * b.coupling_stride + std::max(j, k)];
          sum += h * b.error[j * b.stride + r] * b.error[k * b.stride + r];
        }
      }
      return sum;
    };
    // Start from wrong codes: those of shifted weights.
    std::vector<double> before;
    for (int64_t r = 0; r < b.rows; ++r) {
      for (int64_t j = 0; j < b.columns; ++j) {
        const int64_t at = j * b.stride + r;
        b.error[at] = b.weights[at] - Nearest(grid, 1.3f * b.weights[at] * b.inverse[r], b.lowest[r]) * b.scale[r];
      }
      for (int64_t j = 0; j < b.columns; ++j) {
        double pull = 0;
        for (int64_t k = 0; k < b.columns; ++k) {
          pull += double(b.coupling[std::min(j, k) * b.coupling_stride + std::max(j, k)]) * b.error[k * b.stride + r];
        }
        b.target[j * b.stride + r] = static_cast<float>(pull);
      }
      before.push_back(loss(r));
    }
    EXPECT(Run(&b, EDGELM_ISA_SCALAR, 1) == EDGELM_QUANT_OK, "%s", grid.name);
    double first = 0, last = 0;
    for (int64_t r = 0; r < b.rows; ++r) {
      const double after = loss(r);
      EXPECT(after <= before[r] * (1 + 1e-5) + 1e-12, "%s row %d: %g to %g", grid.name, int(r), before[r], after);
      first += b.scale[r] == 0.0f ? 0.0 : before[r];
      last += b.scale[r] == 0.0f ? 0.0 : after;
    }
    // If a row's lowest value is about 0, most of the error comes from weights out of range and remains.
    EXPECT(last < (grid.varying ? 0.95 : 0.6) * first, "%s: %g to %g", grid.name, first, last);
  }
}

// -- fitting scales ---------------------------------------------------------------------------------------------------

struct Group {
  Grid grid;
  bool half;
  int64_t rows, columns, stride, trial_count;
  Floats weights, importance, trials, lowest;

  std::string Name() const {
    return std::string(grid.name) + (half ? " half " : " float ") + std::to_string(columns) + "x" +
           std::to_string(rows);
  }
};

Group MakeGroup(const Grid& grid, bool half, int64_t rows, int64_t columns, int64_t stride, uint32_t seed) {
  Group g = {grid, half, rows, columns, stride, 1 + int64_t(seed % 5), {}, {}, {}, {}};
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  g.weights.resize(static_cast<size_t>((columns - 1) * stride + rows));
  for (float& x : g.weights) x = 0.05f * normal(engine);
  for (int64_t r = 6; r < rows; r += 13) {  // rows of zeros, and rows whose scales exceed float16
    for (int64_t j = 0; j < columns; ++j) g.weights[j * stride + r] *= r % 2 ? 0.0f : 1e9f;
  }
  for (int64_t j = 0; j < columns; ++j) g.importance.push_back(j % 9 == 8 ? 0.0f : std::fabs(normal(engine)));
  const float levels = grid.numbers == EDGELM_INTEGERS ? grid.range : grid.numbers == EDGELM_E4M3 ? 800.0f : 90000.0f;
  for (int64_t t = 0; t < g.trial_count; ++t) {
    for (int64_t r = 0; r < rows; ++r) {
      const float size = r % 13 != 6 ? 0.25f : r % 2 ? 0.0f : 2.5e8f;
      g.trials.push_back(size * (1.0f - 0.13f * float(t)) / levels);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    g.lowest.push_back(grid.varying ? -float(r % int64_t(grid.range + 1)) : -std::floor(grid.range / 2) - 1);
  }
  return g;
}

edgelm_fit_arguments FitArguments(const Group& g, Floats* scale, int isa, int threads) {
  edgelm_fit_arguments a = {};
  a.rows = g.rows;
  a.columns = g.columns;
  a.stride = g.stride;
  a.weights = g.weights.data();
  a.importance = g.importance.data();
  a.trials = g.trials.data();
  a.trial_count = g.trial_count;
  a.lowest = g.lowest.data();
  a.scale = scale->data();
  a.range = g.grid.range;
  a.numbers = g.grid.numbers;
  a.half = g.half;
  a.threads = threads;
  a.isa = isa;
  return a;
}

Floats Fit(const Group& g, int isa, int threads) {
  Floats scale(static_cast<size_t>(g.rows), NAN);
  const edgelm_fit_arguments a = FitArguments(g, &scale, isa, threads);
  const int32_t status = edgelm_fit(&a);
  EXPECT(status == EDGELM_QUANT_OK, "%s isa %d: status %d", g.Name().c_str(), isa, status);
  return scale;
}

template <typename Number>
Number FitError(const Group& g, int64_t r, float scale) {
  Number sum = 0;
  for (int64_t j = 0; j < g.columns; ++j) {
    const float w = g.weights[j * g.stride + r];
    const Number value = Nearest(g.grid, w * Reciprocal(scale), g.lowest[r]);
    const Number stands_for = value * scale, left = w - stands_for, square = left * left;
    const Number weighed = g.importance[j] * square;
    sum += weighed;
  }
  return sum;
}

float ExpectScale(const Group& g, int64_t r) {
  float best = std::numeric_limits<float>::infinity(), found = 0.0f;
  for (int64_t t = 0; t < g.trial_count; ++t) {
    float dot = 0.0f, norm = 0.0f;
    for (int64_t j = 0; j < g.columns; ++j) {
      const float w = g.weights[j * g.stride + r];
      const float value = Nearest(g.grid, w * Reciprocal(g.trials[t * g.rows + r]), g.lowest[r]);
      const float weighed_weight = g.importance[j] * w, weighed_value = g.importance[j] * value;
      const float one = weighed_weight * value, other = weighed_value * value;
      dot += one;
      norm += other;
    }
    float fitted = norm > 0.0f ? dot / norm : 0.0f;
    if (g.half) fitted = edgelm::HalfToFloat(edgelm::FloatToHalf(fitted));
    const float error = FitError<float>(g, r, fitted);
    if (error < best) {
      best = error;
      found = fitted;
    }
  }
  return found;
}

void CheckFit(const Group& g, int threads) {
  const Floats scalar = Fit(g, EDGELM_ISA_SCALAR, 1);
  for (int64_t r = 0; r < g.rows; ++r) {
    const float expected = ExpectScale(g, r);
    EXPECT(edgelm::Bits(scalar[r]) == edgelm::Bits(expected), "%s row %d: %.9g, not %.9g", g.Name().c_str(), int(r),
           scalar[r], expected);
    EXPECT(std::isfinite(scalar[r]), "%s row %d", g.Name().c_str(), int(r));
  }
  for (const int isa : kWide) {
    if (!edgelm_quant_has_isa(isa)) continue;
    EXPECT(Same(Fit(g, isa, threads), scalar), "%s isa %d threads %d", g.Name().c_str(), isa, threads);
  }
}

void TestFitAgreesOnEveryInstructionSet() {
  uint32_t seed = 1;
  for (const Grid& grid : kGrids) {
    for (const bool half : {false, true}) {
      for (const int64_t columns : {1, 2, 31, 32, 64, 128}) {
        for (int64_t rows = 1; rows <= 70; rows += columns <= 2 ? 1 : rows % 32 == 31 || rows % 32 == 0 ? 1 : 6) {
          CheckFit(MakeGroup(grid, half, rows, columns, rows + seed % 4, seed), 1);
          ++seed;
        }
      }
      for (const int threads : {1, 2, 3, 8}) CheckFit(MakeGroup(grid, half, 600, 32, 601, seed++), threads);
    }
  }
}

// In double: no trial scale gives a smaller error than the fitted one.
void TestAFittedScaleIsBetterThanItsTrials() {
  for (const Grid& grid : kGrids) {
    for (const bool half : {false, true}) {
      const Group g = MakeGroup(grid, half, 70, 128, 70, 4);  // five trials
      EXPECT(g.trial_count == 5, "%d", int(g.trial_count));
      const Floats scale = Fit(g, EDGELM_ISA_AUTO, 1);
      double found = 0, least = 0;
      for (int64_t r = 0; r < g.rows; ++r) {
        if (r % 13 == 6) continue;
        double best = std::numeric_limits<double>::infinity();
        for (int64_t t = 0; t < 5; ++t) best = std::fmin(best, FitError<double>(g, r, g.trials[t * g.rows + r]));
        found += FitError<double>(g, r, scale[r]);
        least += best;
      }
      EXPECT(found > 0 && found < least, "%s: %g, trials %g", g.Name().c_str(), found, least);
    }
  }
}

// -- errors ----------------------------------------------------------------------------------------------------------

void TestNoRowsAreNoWork() {
  for (const int isa : {EDGELM_ISA_SCALAR, EDGELM_ISA_AUTO}) {
    for (const Grid& grid : kGrids) {
      Block b = MakeBlock(grid, true, 1, 3, 1, 1);
      const Block before = b;
      b.rows = 0;
      EXPECT(Run(&b, isa, 2) == EDGELM_QUANT_OK, "%s isa %d", grid.name, isa);
      EXPECT(Same(b.values, before.values) && Same(b.error, before.error), "%s isa %d: written", grid.name, isa);
      Group g = MakeGroup(grid, true, 1, 3, 1, 1);
      g.rows = 0;
      Floats scale = {-77.0f};
      const edgelm_fit_arguments a = FitArguments(g, &scale, isa, 2);
      EXPECT(edgelm_fit(&a) == EDGELM_QUANT_OK && scale[0] == -77.0f, "%s isa %d", grid.name, isa);
    }
  }
}

template <typename Arguments, typename Change>
void ExpectStatus(int32_t (*run)(const Arguments*), Arguments a, int32_t status, const char* what, Change change) {
  EXPECT(run(&a) == EDGELM_QUANT_OK, "before %s", what);
  change(a);
  const int32_t got = run(&a);
  EXPECT(got == status, "%s: status %d, not %d", what, got, status);
}

// Arguments that both functions refuse.
template <typename Arguments>
void CheckCommonRefusals(int32_t (*run)(const Arguments*), const Arguments& good) {
  const int32_t bad = EDGELM_QUANT_BAD_ARGUMENT;
  ExpectStatus(run, good, bad, "negative rows", [](Arguments& a) { a.rows = -1; });
  ExpectStatus(run, good, bad, "no columns", [](Arguments& a) { a.columns = 0; });
  ExpectStatus(run, good, bad, "a stride below the rows", [](Arguments& a) { a.stride = a.rows - 1; });
  ExpectStatus(run, good, bad, "no threads", [](Arguments& a) { a.threads = 0; });
  ExpectStatus(run, good, bad, "numbers below", [](Arguments& a) { a.numbers = -1; });
  ExpectStatus(run, good, bad, "numbers above", [](Arguments& a) { a.numbers = 3; });
  ExpectStatus(run, good, bad, "weights", [](Arguments& a) { a.weights = nullptr; });
  ExpectStatus(run, good, bad, "scale", [](Arguments& a) { a.scale = nullptr; });
  ExpectStatus(run, good, bad, "lowest", [](Arguments& a) { a.lowest = nullptr; });
  ExpectStatus(run, good, EDGELM_QUANT_NO_SUCH_ISA, "isa", [](Arguments& a) { a.isa = 99; });
}

void TestWrongArgumentsAreRefused() {
  const int32_t bad = EDGELM_QUANT_BAD_ARGUMENT;
  const Group g = MakeGroup(kGrids[0], true, 5, 4, 5, 1);
  Floats scale(5);
  const edgelm_fit_arguments fit = FitArguments(g, &scale, EDGELM_ISA_AUTO, 1);
  CheckCommonRefusals(edgelm_fit, fit);
  ExpectStatus(edgelm_fit, fit, bad, "no trials", [](auto& a) { a.trial_count = 0; });
  ExpectStatus(edgelm_fit, fit, bad, "importance", [](auto& a) { a.importance = nullptr; });
  ExpectStatus(edgelm_fit, fit, bad, "trials", [](auto& a) { a.trials = nullptr; });

  Floats data(5 * 4, 1.0f), values(5 * 4), error(5 * 4);
  edgelm_feedback_arguments feedback = {};
  feedback.rows = feedback.stride = 5;
  feedback.columns = feedback.coupling_stride = 4;
  feedback.weights = feedback.target = feedback.coupling = data.data();
  feedback.scale = feedback.inverse = feedback.lowest = data.data();
  feedback.values = values.data();
  feedback.error = error.data();
  feedback.range = 15.0f;
  feedback.threads = 1;
  CheckCommonRefusals(edgelm_feedback, feedback);
  ExpectStatus(edgelm_feedback, feedback, bad, "too many columns",
               [](auto& a) { a.columns = a.coupling_stride = EDGELM_FEEDBACK_COLUMNS + 1; });
  ExpectStatus(edgelm_feedback, feedback, bad, "coupling's stride", [](auto& a) { a.coupling_stride = 3; });
  ExpectStatus(edgelm_feedback, feedback, bad, "target", [](auto& a) { a.target = nullptr; });
  ExpectStatus(edgelm_feedback, feedback, bad, "values", [](auto& a) { a.values = nullptr; });
  ExpectStatus(edgelm_feedback, feedback, bad, "error", [](auto& a) { a.error = nullptr; });
  ExpectStatus(edgelm_feedback, feedback, bad, "coupling", [](auto& a) { a.coupling = nullptr; });
  ExpectStatus(edgelm_feedback, feedback, bad, "inverse", [](auto& a) { a.inverse = nullptr; });
}

}  // namespace

int main() {
  TestEveryTieAndBoundIsRoundedRight();
  TestFeedbackAgreesOnEveryInstructionSet();
  TestRecodingNeverLosesAndOftenGains();
  TestFitAgreesOnEveryInstructionSet();
  TestAFittedScaleIsBetterThanItsTrials();
  TestNoRowsAreNoWork();
  TestWrongArgumentsAreRefused();
  return edgelm_test::Finish();
}
