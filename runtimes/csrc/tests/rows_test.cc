// Tests quantisation of rows, RMSNorm and softmax: results against their definitions, and the same bits with every
// table.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "tables.h"

namespace {

using namespace edgelm_test;
using edgelm::kScalarKernels;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// -- quantize_rows -----------------------------------------------------------------------------------------------------

// Blocks of all sizes, some with extreme scales.
std::vector<float> Activations(int64_t rows, int64_t columns, uint32_t seed) {
  std::vector<float> x = RandomRows(rows * columns, seed);
  const float extremes[] = {1.0f, 0.0f, 3e38f, 1e-38f, 1e-45f, 0x1p-100f, 0x1p-101f, -2.5e-7f};
  for (size_t i = 0; i < x.size(); ++i) {
    const size_t block = i / 32 % 11;
    if (block >= 2 && block < 10) x[i] *= std::fabs(extremes[block - 2]) * (block == 4 ? 0.2f : 1.0f);
    if (block == 10) x[i] = i % 5 == 0 ? 127.0f : 0.5f + static_cast<float>(i % 9);  // ties of rounding
  }
  return x;
}

// Check one block of up to 32 against the definition, in double.
void CheckBlock(const float* x, int64_t count, const int8_t* codes, float scale, int32_t offset,
                const std::string& what) {
  double largest = 0;
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    finite &= std::isfinite(x[i]);
    largest = std::fmax(largest, std::fabs(static_cast<double>(x[i])));
  }
  int sum = 0;
  for (int i = 0; i < 32; ++i) sum += codes[i];
  EXPECT(offset == -8 * sum, "%s: offset %d of codes that sum to %d", what.c_str(), offset, sum);
  for (int64_t i = count; i < 32; ++i) EXPECT(codes[i] == 0, "%s: padding is %d", what.c_str(), codes[i]);
  if (!finite) {
    EXPECT(std::isnan(scale), "%s: scale %g of a block that is not finite", what.c_str(), double(scale));
    return;
  }
  const bool zero = largest < 0x1p-100;
  const float wanted = zero ? 0.0f : static_cast<float>(largest) / 127.0f;
  EXPECT(scale == wanted, "%s: scale %g, not %g", what.c_str(), double(scale), double(wanted));
  for (int64_t i = 0; i < count; ++i) {
    const double exact = zero ? 0 : x[i] * 127.0 / largest;
    // Two roundings precede the one to an integer: the inverse and the multiplication.
    EXPECT(std::fabs(codes[i] - exact) <= 0.5 + 2.1 * kUnit * std::fabs(exact), "%s: code %d of %.9g", what.c_str(),
           codes[i], exact);
  }
}

void TestRowsAreQuantisedAsDefined() {
  for (int64_t columns = 1; columns <= 65; ++columns) {
    for (const int64_t rows : {1, 3}) {
      const int64_t ldx = columns + (columns % 3);
      std::vector<float> x = Activations(rows, ldx, static_cast<uint32_t>(columns));
      x.resize(static_cast<size_t>((rows - 1) * ldx + columns));  // not one float more than may be read
      x.shrink_to_fit();
      QuantBuffer reference(rows, columns);
      kScalarKernels.linear.quantize_rows(x.data(), ldx, rows, columns, reference.Rows());
      const std::string what = std::to_string(rows) + " rows of " + std::to_string(columns);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t b = 0; b < reference.columns / 32; ++b) {
          const size_t block = static_cast<size_t>(r * (reference.columns / 32) + b);
          CheckBlock(&x[static_cast<size_t>(r * ldx + 32 * b)], std::min<int64_t>(32, columns - 32 * b),
                     &reference.codes[32 * block], reference.scales[block], reference.offsets[block], what);
        }
      }
      for (const edgelm::Kernels* table : FastTables()) {
        QuantBuffer q(rows, columns);
        table->linear.quantize_rows(x.data(), ldx, rows, columns, q.Rows());
        q.ExpectSame(reference, std::string(table->name) + ", " + what);
      }
    }
  }
  // Every kind of block at once.
  const std::vector<float> x = Activations(4, 416, 5);
  QuantBuffer reference(4, 416);
  kScalarKernels.linear.quantize_rows(x.data(), 416, 4, 416, reference.Rows());
  for (size_t block = 0; block < reference.scales.size(); ++block) {
    CheckBlock(&x[32 * block], 32, &reference.codes[32 * block], reference.scales[block], reference.offsets[block],
               "block " + std::to_string(block));
  }
  for (const edgelm::Kernels* table : FastTables()) {
    QuantBuffer q(4, 416);
    table->linear.quantize_rows(x.data(), 416, 4, 416, q.Rows());
    q.ExpectSame(reference, table->name);
  }
}

void TestABlockThatIsNotFiniteIsMarkedAndNoOther() {
  std::vector<const edgelm::Kernels*> tables = FastTables();
  tables.push_back(&kScalarKernels);
  for (const edgelm::Kernels* table : tables) {
    for (const float bad : {NAN, -NAN, kInfinity, -kInfinity}) {
      for (const size_t at : {0, 7, 15, 16, 31, 64, 95}) {
        std::vector<float> x = RandomRows(96, 3);
        x[at] = bad;
        QuantBuffer q(1, 96);
        table->linear.quantize_rows(x.data(), 96, 1, 96, q.Rows());
        for (size_t b = 0; b < 3; ++b) {
          const std::string what = std::string(table->name) + ": " + std::to_string(bad) + " at " + std::to_string(at) +
                                   ", block " + std::to_string(b);
          CheckBlock(&x[32 * b], 32, &q.codes[32 * b], q.scales[b], q.offsets[b], what);
        }
      }
    }
  }
}

// -- rms_norm ----------------------------------------------------------------------------------------------------------

void TestRmsNorm() {
  uint32_t seed = 20;
  for (const int64_t columns : {1, 2, 15, 16, 17, 31, 33, 48, 65, 500, 1024}) {
    for (const float deviation : {1.0f, 1e-8f, 1e15f}) {
      const int64_t rows = 3, ldx = columns + 5, ldy = columns + 2;
      const float eps = 1e-5f;
      const std::vector<float> x = RandomRows((rows - 1) * ldx + columns, ++seed, deviation);
      const std::vector<float> weight = RandomRows(columns, ++seed);
      std::vector<float> reference(static_cast<size_t>(rows * ldy), -7.0f);
      kScalarKernels.linear.rms_norm(x.data(), ldx, rows, columns, weight.data(), eps, reference.data(), ldy);
      const std::string what = std::to_string(columns) + " columns of " + std::to_string(deviation);
      Worst worst;
      for (int64_t r = 0; r < rows; ++r) {
        double squares = 0;
        for (int64_t i = 0; i < columns; ++i) squares += std::pow(double(x[static_cast<size_t>(r * ldx + i)]), 2);
        const double factor = 1 / std::sqrt(squares / static_cast<double>(columns) + eps);
        // A lane's sum has columns / 16 terms, all positive; 4 additions, division, eps, root, inverse, two
        // multiplications.
        const double roundings = static_cast<double>(columns) / 16 + 12;
        for (int64_t i = 0; i < ldy; ++i) {
          const bool inside = i < columns;
          const double wanted = inside ? x[static_cast<size_t>(r * ldx + i)] * factor * weight[static_cast<size_t>(i)]
                                       : -7;
          worst.Add(r * ldy + i, reference[static_cast<size_t>(r * ldy + i)], wanted,
                    inside ? roundings * kUnit * std::fabs(wanted) + 1e-44 : 0);
        }
      }
      worst.Expect("rms_norm, " + what);
      for (const edgelm::Kernels* table : FastTables()) {
        std::vector<float> y(reference.size(), -7.0f);
        table->linear.rms_norm(x.data(), ldx, rows, columns, weight.data(), eps, y.data(), ldy);
        ExpectSame(y, reference, std::string(table->name) + ": rms_norm, " + what);
        std::vector<float> in_place = x;
        table->linear.rms_norm(in_place.data(), ldx, rows, columns, weight.data(), eps, in_place.data(), ldx);
        for (int64_t r = 0; r < rows; ++r) {
          const float *got = in_place.data() + r * ldx, *wanted = reference.data() + r * ldy;
          EXPECT(std::equal(got, got + columns, wanted), "%s: in place, %s", table->name, what.c_str());
        }
      }
    }
  }
}

void TestRmsNormKeepsNaNAndInfinityInTheirRows() {
  const std::vector<float> weight(70, 1.0f), x = RandomRows(3 * 70, 9);
  std::vector<const edgelm::Kernels*> tables = FastTables();
  tables.push_back(&kScalarKernels);
  for (const edgelm::Kernels* table : tables) {
    std::vector<float> clean(x.size()), y(x.size());
    table->linear.rms_norm(x.data(), 70, 3, 70, weight.data(), 1e-5f, clean.data(), 70);
    for (const float bad : {NAN, kInfinity}) {
      std::vector<float> damaged = x;
      damaged[70 + 69] = bad;
      table->linear.rms_norm(damaged.data(), 70, 3, 70, weight.data(), 1e-5f, y.data(), 70);
      EXPECT(std::isnan(y[70 + 69]), "%s: %g became %g", table->name, double(bad), double(y[70 + 69]));
      for (size_t i = 0; i < 70; ++i) {
        EXPECT(y[i] == clean[i] && y[140 + i] == clean[140 + i], "%s: a neighbour of %g", table->name, double(bad));
      }
    }
  }
}

// -- softmax -----------------------------------------------------------------------------------------------------------

void TestSoftmax() {
  uint32_t seed = 40;
  for (const int64_t columns : {1, 2, 7, 15, 16, 17, 31, 33, 64, 65, 300}) {
    // 30: some results below float32's smallest normal; shifted: the maximum must be subtracted.
    for (const float deviation : {0.1f, 1.0f, 30.0f, 1000.0f}) {
      for (const float shift : {0.0f, -500.0f, 2000.0f}) {
        const int64_t rows = 2;
        std::vector<float> x = RandomRows(rows * columns, ++seed, deviation);
        for (float& value : x) value += shift;
        if (columns > 2) x[1] = -kInfinity;
        std::vector<float> reference = x;
        kScalarKernels.linear.softmax(reference.data(), rows, columns);
        const std::string what = std::to_string(columns) + " columns of " + std::to_string(deviation);
        Worst worst;
        for (int64_t r = 0; r < rows; ++r) {
          const float* row = &x[static_cast<size_t>(r * columns)];
          const double top = *std::max_element(row, row + columns);
          double sum = 0;
          for (int64_t i = 0; i < columns; ++i) sum += std::exp(row[i] - top);
          for (int64_t i = 0; i < columns; ++i) {
            const double distance = std::fmin(std::fabs(row[i] - top), 90), wanted = std::exp(row[i] - top) / sum;
            // The difference is rounded (an error of e^x relative to x), Exp adds 3 more, then the sum and the
            // quotient. Below e^-87.3 Exp stops decreasing: 1.3e-38 for each of the columns.
            const double relative = kUnit * (distance + 20 + static_cast<double>(columns) / 16 + 6);
            worst.Add(r * columns + i, reference[static_cast<size_t>(r * columns + i)], wanted,
                      relative * wanted + 1.3e-38 * (1 + wanted * static_cast<double>(columns)));
          }
        }
        worst.Expect("softmax, " + what);
        for (const edgelm::Kernels* table : FastTables()) {
          std::vector<float> y = x;
          table->linear.softmax(y.data(), rows, columns);
          ExpectSame(y, reference, std::string(table->name) + ": softmax, " + what);
        }
      }
    }
  }
}

void TestSoftmaxKeepsNaNInItsRow() {
  std::vector<const edgelm::Kernels*> tables = FastTables();
  tables.push_back(&kScalarKernels);
  for (const edgelm::Kernels* table : tables) {
    for (const int64_t columns : {5, 16, 21, 40}) {
      for (const int64_t at : {int64_t{0}, columns / 2, columns - 1}) {
        std::vector<float> clean = RandomRows(3 * columns, 8), damaged = clean;
        damaged[static_cast<size_t>(columns + at)] = NAN;
        table->linear.softmax(clean.data(), 3, columns);
        table->linear.softmax(damaged.data(), 3, columns);
        for (int64_t i = 0; i < columns; ++i) {
          const size_t first = static_cast<size_t>(i), last = static_cast<size_t>(2 * columns + i);
          EXPECT(std::isnan(damaged[static_cast<size_t>(columns + i)]), "%s: %d of %d after NaN at %d", table->name,
                 int(i), int(columns), int(at));
          EXPECT(damaged[first] == clean[first] && damaged[last] == clean[last], "%s: a neighbour", table->name);
        }
      }
    }
  }
}

}  // namespace

int main() {
  TestRowsAreQuantisedAsDefined();
  TestABlockThatIsNotFiniteIsMarkedAndNoOther();
  TestRmsNorm();
  TestRmsNormKeepsNaNAndInfinityInTheirRows();
  TestSoftmax();
  TestSoftmaxKeepsNaNInItsRow();
  return Finish();
}
