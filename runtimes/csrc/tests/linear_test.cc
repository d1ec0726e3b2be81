// Tests the matmul kernels: results against double arithmetic, and the same bits with every table and division of work.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "packed_matrix.h"
#include "tables.h"

namespace {

using namespace edgelm_test;
using edgelm::Finish;
using edgelm::Kernels;
using edgelm::kScalarKernels;

constexpr float kCanary = -12345.0f;

enum class Matmul { kInt8, kHigh, kFloat };

// Activations, in float32 and quantised by the scalar table.
struct Rows {
  int64_t rows, columns;
  std::vector<float> x;
  QuantBuffer q;

  Rows(int64_t count, int64_t width, uint32_t seed) : Rows(count, width, RandomRows(count * width, seed)) {}
  Rows(int64_t count, int64_t width, std::vector<float> values)
      : rows(count), columns(width), x(std::move(values)), q(count, width) {
    kScalarKernels.linear.quantize_rows(x.data(), width, count, width, q.Rows());
  }
  // The exact value that the matmul uses for [row, column].
  double Value(Matmul matmul, int64_t row, int64_t column) const {
    if (matmul == Matmul::kFloat) return x[static_cast<size_t>(row * columns + column)];
    const double scale = q.scales[static_cast<size_t>((row * q.columns + column) / 32)];
    return q.codes[static_cast<size_t>(row * q.columns + column)] * scale;
  }
};

// The result of a matmul: everything that an Output can point to, with canaries around it.
struct Result {
  int64_t ldy;
  std::vector<float> y, bias, residual, weight;
  std::vector<int32_t> index;
  QuantBuffer q;
  edgelm::Output out;

  Result(const Packed& packed, Finish finish, int64_t rows, bool with_residual, bool gap = true, bool with_bias = false)
      : ldy(packed.matrix.outputs() + (gap ? 3 : 0)), q(rows, packed.matrix.outputs()) {
    out.finish = finish;
    out.ldy = ldy;
    y.assign(static_cast<size_t>(rows * ldy), kCanary);
    if (finish == Finish::kSwigluQuant) out.quant = q.Rows();
    if (finish != Finish::kSwigluQuant) out.y = y.data();
    if (with_residual) {
      residual = RandomRows(rows * ldy, 77);
      out.residual = residual.data();
    }
    if (with_bias) {
      bias = RandomRows(packed.matrix.outputs(), 79);
      out.bias = bias.data();
    }
    if (finish != Finish::kScatterAdd) return;
    weight = RandomRows(rows, 78);
    // Indices repeat, and some rows of y receive nothing.
    for (int64_t r = 0; r < rows; ++r) index.push_back(static_cast<int32_t>(r % 5 == 4 ? 0 : r * 3 % rows / 2));
    for (float& value : y) value = 0.5f;
    out.weight = weight.data();
    out.index = index.data();
  }
};

void Run(const Kernels& table, Matmul matmul, const Packed& packed, int64_t begin, int64_t end, Rows& x, int64_t rows,
         const edgelm::Output& out) {
  if (matmul == Matmul::kInt8) table.linear.linear_int8(packed.matrix, begin, end, x.q.Rows(), rows, out);
  if (matmul == Matmul::kHigh) table.linear.linear_high(packed.matrix, begin, end, x.q.Rows(), rows, out);
  if (matmul == Matmul::kFloat) {
    table.linear.linear_float(packed.matrix, begin, end, x.x.data(), x.columns, rows, out);
  }
}

void RunAll(const Kernels& table, Matmul matmul, const Packed& packed, Rows& x, Result* result) {
  Run(table, matmul, packed, 0, packed.matrix.units(), x, x.rows, result->out);
}

// sum_k w[n, k] x[r, k] and sum_k |w x| in double.
struct Exact {
  double sum = 0, norm = 0;

  Exact(Matmul matmul, const Packed& packed, const Rows& x, int64_t row, int64_t n) {
    for (int64_t k = 0; k < packed.shape.columns; ++k) {
      double weight = packed.Weight(n, k);
      // The low nibble of a code is unread and counts as 8.
      if (matmul == Matmul::kHigh) weight = HighOnly(packed, n, k);
      const double term = weight * x.Value(matmul, row, k);
      sum += term;
      norm += std::fabs(term);
    }
  }

  // From the bytes of the high nibbles alone: column 8 p + j low, 8 p + 4 + j high.
  static double HighOnly(const Packed& packed, int64_t n, int64_t k) {
    const Shape& s = packed.shape;
    const bool half = s.scale == ScaleKind::kFloat16;
    const int64_t scales = half ? 64 : 128, head = scales * (s.halves() ? 2 : 1), record_bytes = head + s.span() * 16;
    const uint8_t* record = packed.blob.data() + 64 + (n / 32 * s.records() + k / s.span()) * record_bytes;
    const int64_t within = k % s.span(), c = within % 32;
    const uint8_t byte = record[head + within / 32 * 512 + 128 * (c / 8) + 4 * (n % 32) + c % 4];
    if (s.halves()) record += within / 16 * scales;
    double scale;
    if (half) {
      uint16_t bits;
      std::memcpy(&bits, record + 2 * (n % 32), 2);
      scale = Decode(bits, 5, 10);
    } else {
      float value;
      std::memcpy(&value, record + 4 * (n % 32), 4);
      scale = value;
    }
    return (16 * (c % 8 < 4 ? byte & 15 : byte >> 4) + 8 - 128) * scale;
  }

  // Integer matmuls round once per block (or group of 16) for scale * scale, and once per addition of a block's sum;
  // float matmuls once per weight and once per addition. Underflow: 2^-149 per term, times a block's sum below 2^21.
  double Tolerance(Matmul matmul, const Shape& shape) const {
    const int64_t step = shape.halves() ? 16 : 32;
    const double terms = static_cast<double>(matmul == Matmul::kFloat ? shape.columns
                                                                      : (shape.columns + step - 1) / step);
    return (terms + 2) * kUnit * norm + terms * 0x1p-128;
  }
};

std::string Name(const Packed& packed, Matmul matmul, int64_t rows) {
  const char* const kNames[] = {"int8", "high", "float"};
  return packed.shape.Name() + " x " + std::to_string(rows) + " rows " + kNames[static_cast<int>(matmul)];
}

// The scalar table against double arithmetic: plain matmul, or SwiGLU.
void CheckAgainstDouble(Matmul matmul, const Packed& packed, const Rows& x, const Result& result) {
  const int64_t outputs = packed.matrix.outputs();
  Worst worst;
  for (int64_t r = 0; r < x.rows; ++r) {
    for (int64_t n = 0; n < result.ldy; ++n) {
      const double got = result.y[static_cast<size_t>(r * result.ldy + n)];
      if (n >= outputs) {
        worst.Add(r * result.ldy + n, got, static_cast<double>(kCanary), 0);
        continue;
      }
      const Exact first(matmul, packed, x, r, n);
      const double tolerance = first.Tolerance(matmul, packed.shape);
      if (!packed.shape.swiglu) {
        worst.Add(r * result.ldy + n, got, first.sum, tolerance);
        continue;
      }
      const Exact second(matmul, packed, x, r, outputs + n);
      const double gate = first.sum, up = second.sum, up_error = second.Tolerance(matmul, packed.shape);
      const double silu = gate / (1 + std::exp(-gate)), wanted = silu * up;
      // |silu'| < 1.1; Exp, the sum, the quotient and the multiplication round; below -88.3 the exponential stops
      // growing.
      worst.Add(r * result.ldy + n, got, wanted,
                1.1 * tolerance * (std::fabs(up) + up_error) + std::fabs(silu) * up_error +
                    16 * kUnit * std::fabs(wanted) + 1e-36 * (std::fabs(up) + 1));
    }
  }
  worst.Expect("scalar, " + Name(packed, matmul, x.rows));
}

// Every finish follows from the plain result (or kSwiglu) by operations that round once, so its bits are known.
void CheckFinish(Matmul matmul, const Packed& packed, Rows& x, Finish finish, bool with_residual,
                 bool with_bias = false) {
  const bool swiglu = packed.shape.swiglu;
  const int64_t outputs = packed.matrix.outputs();
  const std::string what = "scalar, " + Name(packed, matmul, x.rows);
  Result plain(packed, swiglu ? Finish::kSwiglu : Finish::kStore, x.rows, false, false);
  RunAll(kScalarKernels, matmul, packed, x, &plain);
  Result result(packed, finish, x.rows, with_residual, true, with_bias);
  std::vector<float> wanted = result.y;
  RunAll(kScalarKernels, matmul, packed, x, &result);
  if (finish == Finish::kSwigluQuant) {
    QuantBuffer q(x.rows, outputs);
    kScalarKernels.linear.quantize_rows(plain.y.data(), outputs, x.rows, outputs, q.Rows());
    result.q.ExpectSame(q, what + ", quantised");
    return;
  }
  for (int64_t r = 0; r < x.rows; ++r) {
    for (int64_t n = 0; n < outputs; ++n) {
      float value = plain.y[static_cast<size_t>(r * outputs + n)];
      if (with_bias) value += result.bias[static_cast<size_t>(n)];
      const size_t at = static_cast<size_t>(r * result.ldy + n);
      if (finish == Finish::kScatterAdd) {
        float& sum = wanted[static_cast<size_t>(result.index[static_cast<size_t>(r)] * result.ldy + n)];
        sum = std::fma(result.weight[static_cast<size_t>(r)], value, sum);
      } else {
        wanted[at] = with_residual ? value + result.residual[at] : value;
      }
    }
  }
  const std::string added = with_bias ? ", bias" : "";
  ExpectSame(result.y, wanted, what + added + (with_residual ? ", residual" : ", scattered or stored"));
}

// Compare every table, unit by unit from the last to the first, with one call of the scalar table.
void CheckTables(Matmul matmul, const Packed& packed, Rows& x, Finish finish, bool with_residual,
                 bool with_bias = false) {
  Result reference(packed, finish, x.rows, with_residual, true, with_bias);
  RunAll(kScalarKernels, matmul, packed, x, &reference);
  for (const Kernels* table : FastTables()) {
    Result result(packed, finish, x.rows, with_residual, true, with_bias);
    for (int64_t unit = packed.matrix.units() - 1; unit >= 0; --unit) {
      Run(*table, matmul, packed, unit, unit + 1, x, x.rows, result.out);
    }
    const std::string what = std::string(table->name) + ", " + Name(packed, matmul, x.rows);
    ExpectSame(result.y, reference.y, what);
    result.q.ExpectSame(reference.q, what);
  }
}

// A row's result does not depend on how many rows there are.
void CheckRowAlone(Matmul matmul, const Packed& packed, Rows& x, int64_t row) {
  const Finish finish = packed.shape.swiglu ? Finish::kSwiglu : Finish::kStore;
  Result all(packed, finish, x.rows, false, false);
  RunAll(kScalarKernels, matmul, packed, x, &all);
  const float* from = x.x.data() + row * x.columns;
  Rows one(1, x.columns, std::vector<float>(from, from + x.columns));
  Result alone(packed, finish, 1, false, false);
  RunAll(kScalarKernels, matmul, packed, one, &alone);
  const float* wanted = all.y.data() + row * all.ldy;
  ExpectSame(alone.y, std::vector<float>(wanted, wanted + all.ldy),
             "row " + std::to_string(row) + " alone, " + Name(packed, matmul, x.rows));
}

constexpr Kind kIntegerKinds[] = {Kind::kInt3, Kind::kInt4, Kind::kInt5, Kind::kInt6, Kind::kInt8, Kind::kInt8Split};

const std::vector<Shape>& IntegerShapes() {
  static const std::vector<Shape> shapes = [] {
    std::vector<Shape> all;
    const int64_t remainders[] = {1, 31, 33, 70, 32};
    size_t count = 0;
    for (const Kind kind : kIntegerKinds) {
      for (const int64_t group : {32, 64, 128, 160}) {  // 160: the whole row
        for (const ScaleKind scale : {ScaleKind::kFloat16, ScaleKind::kFloat32}) {
          for (const bool zeros : {false, true}) {
            if (zeros && kind == Kind::kInt8Split) continue;
            const int64_t columns = group == 160 ? 160 : group == 128 ? 256 : 192, n = remainders[count++ % 5];
            all.push_back({kind, n, columns, group, scale, zeros, false});
            all.push_back({kind, 2 * n, columns, group, scale, zeros, true});
          }
        }
      }
      // Rows of any length, and groups of 16.
      for (const int64_t columns : {1, 5, 16, 31, 33, 48, 70, 100, 129}) {
        for (const int64_t group : {16, 32, 64, 160}) {
          const int64_t rounded = (columns + 31) / 32 * 32, width = group < rounded ? group : rounded;
          if (width < group && group < 160) continue;  // the next smaller group covers this
          const ScaleKind scale = count % 2 == 0 ? ScaleKind::kFloat16 : ScaleKind::kFloat32;
          const bool zeros = count % 3 == 0 && kind != Kind::kInt8Split, swiglu = count % 4 == 0;
          const int64_t n = remainders[count++ % 5];
          all.push_back({kind, swiglu ? 2 * n : n, columns, width, scale, zeros, swiglu});
        }
      }
    }
    return all;
  }();
  return shapes;
}

void TestIntegerMatmul() {
  uint32_t seed = 1;
  for (const Shape& shape : IntegerShapes()) {
    const Packed packed(shape, ++seed);
    const int64_t count = 1 + seed % 17;
    Rows x(count, shape.columns, ++seed);
    std::vector<Finish> finishes = {Finish::kStore, Finish::kScatterAdd};
    if (shape.swiglu) finishes = {Finish::kSwiglu, Finish::kSwigluQuant};
    Result result(packed, finishes[0], count, false);
    RunAll(kScalarKernels, Matmul::kInt8, packed, x, &result);
    CheckAgainstDouble(Matmul::kInt8, packed, x, result);
    for (const Finish finish : finishes) {
      CheckFinish(Matmul::kInt8, packed, x, finish, false);
      CheckTables(Matmul::kInt8, packed, x, finish, false);
    }
    if (!shape.swiglu) {
      for (const bool residual : {false, true}) {
        CheckFinish(Matmul::kInt8, packed, x, Finish::kStore, residual, true);
        CheckTables(Matmul::kInt8, packed, x, Finish::kStore, residual, true);
      }
      CheckFinish(Matmul::kInt8, packed, x, Finish::kStore, true);
      CheckTables(Matmul::kInt8, packed, x, Finish::kStore, true);
    }
    CheckRowAlone(Matmul::kInt8, packed, x, count / 2);
  }
}

// All numbers of rows, so that every remainder of a tile of rows occurs for every kind.
void TestEveryNumberOfRows() {
  uint32_t seed = 1000;
  for (const Kind kind :
       {Kind::kInt3, Kind::kInt4, Kind::kInt5, Kind::kInt6, Kind::kInt8, Kind::kInt8Split, Kind::kFp8E4M3}) {
    for (const bool swiglu : {false, true}) {
      const bool zeros = seed % 2 == 0 && kind < Kind::kInt8Split;
      const Packed packed({kind, swiglu ? 68 : 34, 64, 32, ScaleKind::kFloat16, zeros, swiglu}, ++seed);
      const Packed halves({kind, swiglu ? 68 : 34, 75, 16, ScaleKind::kFloat16, zeros, swiglu}, ++seed);
      const Matmul matmul = kind == Kind::kFp8E4M3 ? Matmul::kFloat : Matmul::kInt8;
      for (int64_t count = 1; count <= 18; ++count) {
        for (const Packed* each : {&packed, &halves}) {
          Rows x(count == 18 ? 64 : count, each->shape.columns, ++seed);
          CheckTables(matmul, *each, x, swiglu ? Finish::kSwiglu : Finish::kStore, false);
          CheckRowAlone(matmul, *each, x, x.rows - 1);
        }
      }
      Rows x(131, 64, ++seed);  // more than linear_float processes at once
      CheckTables(matmul, packed, x, swiglu ? Finish::kSwigluQuant : Finish::kScatterAdd, false);
      CheckRowAlone(matmul, packed, x, 130);
    }
  }
}

void TestUpperHalves() {
  uint32_t seed = 2000;
  for (const int64_t group : {32, 64, 128, 160, 16, 48}) {
    for (const ScaleKind scale : {ScaleKind::kFloat16, ScaleKind::kFloat32}) {
      for (const int64_t n : {1, 33, 70}) {
        const int64_t columns = group == 160 ? 160 : group == 16 ? 75 : group == 48 ? 99 : 256;
        const Packed packed({Kind::kInt8Split, n, columns, group == 48 ? 64 : group, scale}, ++seed);
        Rows x(1 + seed % 9, packed.shape.columns, seed);
        Result result(packed, Finish::kStore, x.rows, false);
        RunAll(kScalarKernels, Matmul::kHigh, packed, x, &result);
        CheckAgainstDouble(Matmul::kHigh, packed, x, result);
        CheckFinish(Matmul::kHigh, packed, x, Finish::kStore, true, true);
        CheckFinish(Matmul::kHigh, packed, x, Finish::kStore, true);
        CheckTables(Matmul::kHigh, packed, x, Finish::kStore, true);
        CheckTables(Matmul::kHigh, packed, x, Finish::kScatterAdd, false);
      }
    }
  }
}

std::vector<Shape> FloatShapes() {
  std::vector<Shape> shapes;
  for (const Shape& shape : IntegerShapes()) {
    if (shape.group == 64 || shape.group == 160 || shape.columns % 32 != 0) shapes.push_back(shape);
  }
  for (const Kind kind : {Kind::kFp8E4M3, Kind::kFloat16, Kind::kBFloat16, Kind::kFloat32}) {
    for (const int64_t columns : {1, 7, 31, 33, 77, 129}) {
      for (const ScaleKind scale : {ScaleKind::kNone, ScaleKind::kFloat16, ScaleKind::kFloat32}) {
        const bool swiglu = columns % 4 == 3;
        shapes.push_back({kind, swiglu ? 2 * columns / 2 * 2 : 33, columns, columns, scale, false, swiglu});
      }
    }
    shapes.push_back({kind, 70, 96, 32, ScaleKind::kFloat32});
    shapes.push_back({kind, 66, 128, 64, ScaleKind::kFloat16, false, true});
    shapes.push_back({kind, 66, 100, 64, ScaleKind::kFloat32, false, true});
    shapes.push_back({kind, 33, 48, 16, ScaleKind::kFloat16});
    shapes.push_back({kind, 35, 77, 16, ScaleKind::kFloat32});
    shapes.push_back({kind, 35, 16, 16, ScaleKind::kFloat32});
  }
  return shapes;
}

void TestFloatMatmul() {
  uint32_t seed = 3000;
  for (const Shape& shape : FloatShapes()) {
    const Packed packed(shape, ++seed);
    Rows x(1 + seed % 13, shape.columns, seed);
    std::vector<Finish> finishes = {Finish::kStore, Finish::kScatterAdd};
    if (shape.swiglu) finishes = {Finish::kSwiglu, Finish::kSwigluQuant};
    Result result(packed, finishes[0], x.rows, false);
    RunAll(kScalarKernels, Matmul::kFloat, packed, x, &result);
    CheckAgainstDouble(Matmul::kFloat, packed, x, result);
    for (const Finish finish : finishes) {
      CheckFinish(Matmul::kFloat, packed, x, finish, finish == Finish::kStore);
      CheckTables(Matmul::kFloat, packed, x, finish, finish == Finish::kStore);
      if (finish != Finish::kStore) continue;
      CheckFinish(Matmul::kFloat, packed, x, finish, false, true);
      CheckTables(Matmul::kFloat, packed, x, finish, true, true);
    }
    CheckRowAlone(Matmul::kFloat, packed, x, x.rows / 2);
  }
}

// Scales at the ends of their range overflow and underflow the same way everywhere; finite results are correct.
void TestExtremeScales() {
  uint32_t seed = 4000;
  for (Shape shape : FloatShapes()) {
    if (shape.scale == ScaleKind::kNone || shape.columns < 31) continue;
    shape.scales = Scales::kExtreme;
    const Packed packed(shape, ++seed);
    Rows x(3, shape.columns, ++seed);
    for (const Matmul matmul : {Matmul::kInt8, Matmul::kFloat}) {
      if (matmul == Matmul::kInt8 && !shape.integer()) continue;
      CheckTables(matmul, packed, x, shape.swiglu ? Finish::kSwiglu : Finish::kStore, false);
      if (shape.swiglu) {
        CheckTables(matmul, packed, x, Finish::kSwigluQuant, false);
      } else if (shape.scale == ScaleKind::kFloat16) {
        Result result(packed, Finish::kStore, 3, false);
        RunAll(kScalarKernels, matmul, packed, x, &result);
        CheckAgainstDouble(matmul, packed, x, result);
      }
    }
  }
}

// The largest codes on both sides, where sums of int8 products exceed 16 bits.
void TestLargestCodes() {
  for (const Kind kind : kIntegerKinds) {
    for (const uint8_t fill : {0x00, 0xFF}) {
      for (const float sign : {1.0f, -1.0f}) {
        Packed packed({kind, 32, 64, 64, ScaleKind::kFloat32}, 5);
        const size_t code_bytes = static_cast<size_t>(packed.matrix.record_bytes - packed.matrix.head_bytes);
        std::fill_n(packed.blob.begin() + 64 + packed.matrix.head_bytes, code_bytes, fill);
        if (packed.matrix.low != nullptr) {
          std::fill(packed.blob.end() - 1024, packed.blob.end(), fill);
        }
        const int bits = packed.shape.bits();
        const double code = (fill != 0 ? (1 << bits) - 1 : 0) - (1 << (bits - 1));
        for (int64_t n = 0; n < 32; ++n) {
          float scale;
          std::memcpy(&scale, packed.blob.data() + 64 + 4 * n, 4);
          for (int64_t k = 0; k < 64; ++k) packed.weights[static_cast<size_t>(n * 64 + k)] = code * double(scale);
        }
        Rows x(5, 64, std::vector<float>(5 * 64, sign * 3.25f));
        Result result(packed, Finish::kStore, 5, false);
        RunAll(kScalarKernels, Matmul::kInt8, packed, x, &result);
        CheckAgainstDouble(Matmul::kInt8, packed, x, result);
        CheckTables(Matmul::kInt8, packed, x, Finish::kStore, false);
      }
    }
  }
}

void TestNaNAndInfinityStayInTheirRow() {
  std::vector<const Kernels*> tables = FastTables();
  tables.push_back(&kScalarKernels);
  uint32_t seed = 5000;
  for (const Shape& shape :
       {Shape{Kind::kInt4, 66, 96, 32, ScaleKind::kFloat16, false, true},
        Shape{Kind::kInt3, 33, 64, 64, ScaleKind::kFloat16}, Shape{Kind::kInt5, 34, 96, 32, ScaleKind::kFloat16, true},
        Shape{Kind::kInt6, 66, 64, 32, ScaleKind::kFloat32, false, true},
        Shape{Kind::kInt8, 33, 96, 96, ScaleKind::kFloat32, true},
        Shape{Kind::kInt8Split, 34, 64, 32, ScaleKind::kFloat16},
        Shape{Kind::kFp8E4M3, 40, 70, 70, ScaleKind::kFloat32},
        Shape{Kind::kBFloat16, 66, 33, 33, ScaleKind::kNone, false, true}}) {
    const Packed packed(shape, ++seed);
    const Finish finish = shape.swiglu ? Finish::kSwiglu : Finish::kStore;
    for (const Matmul matmul : {Matmul::kInt8, Matmul::kFloat}) {
      if (matmul == Matmul::kInt8 && !shape.integer()) continue;
      Rows clean(9, shape.columns, ++seed);
      Result wanted(packed, finish, 9, false, false);
      RunAll(kScalarKernels, matmul, packed, clean, &wanted);
      for (const float bad : {NAN, std::numeric_limits<float>::infinity()}) {
        for (const int64_t row : {0, 4, 8}) {
          std::vector<float> values = clean.x;
          values[static_cast<size_t>(row * shape.columns + 20)] = bad;
          Rows x(9, shape.columns, values);
          for (const Kernels* table : tables) {
            Result result(packed, finish, 9, false, false);
            RunAll(*table, matmul, packed, x, &result);
            const std::string what = std::string(table->name) + ", " + Name(packed, matmul, 9);
            for (int64_t i = 0; i < static_cast<int64_t>(result.y.size()); ++i) {
              const float got = result.y[static_cast<size_t>(i)], expected = wanted.y[static_cast<size_t>(i)];
              if (i / result.ldy != row) {
                EXPECT(SameFloat(got, expected), "%s: a neighbour of %g in row %d", what.c_str(), double(bad),
                       int(row));
              } else if (std::isnan(bad) || matmul == Matmul::kInt8) {
                EXPECT(std::isnan(got), "%s: %g of a row with %g", what.c_str(), double(got), double(bad));
              }
            }
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
  TestIntegerMatmul();
  TestEveryNumberOfRows();
  TestUpperHalves();
  TestFloatMatmul();
  TestExtremeScales();
  TestLargestCodes();
  TestNaNAndInfinityStayInTheirRow();
  return edgelm_test::Finish();
}
