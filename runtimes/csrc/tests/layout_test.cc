// Tests that the layout is read as layout.h defines it, and that a damaged matrix is refused or at least harmless.
#include "kernels/layout.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "packed_matrix.h"
#include "tables.h"

namespace {

using namespace edgelm_test;
using edgelm::Matrix;

const std::vector<Shape>& Shapes() {
  static const std::vector<Shape> shapes = {
      {Kind::kInt3, 33, 96, 32, ScaleKind::kFloat16},
      {Kind::kInt3, 64, 64, 64, ScaleKind::kFloat32, true, true},
      {Kind::kInt4, 70, 128, 64, ScaleKind::kFloat16},
      {Kind::kInt4, 66, 96, 32, ScaleKind::kFloat32, true, true},
      {Kind::kInt5, 37, 128, 64, ScaleKind::kFloat16},
      {Kind::kInt5, 66, 96, 32, ScaleKind::kFloat32, true, true},
      {Kind::kInt6, 33, 96, 96, ScaleKind::kFloat16, true},
      {Kind::kInt6, 70, 128, 32, ScaleKind::kFloat32, false, true},
      {Kind::kInt8, 31, 128, 128, ScaleKind::kFloat16},
      {Kind::kInt8, 1, 64, 32, ScaleKind::kFloat32, true},
      {Kind::kInt8Split, 40, 128, 64, ScaleKind::kFloat16},
      {Kind::kInt8Split, 64, 96, 32, ScaleKind::kFloat32, false, true},
      {Kind::kInt3, 33, 100, 32, ScaleKind::kFloat16, true},
      {Kind::kInt4, 34, 100, 128, ScaleKind::kFloat16},
      {Kind::kInt4, 33, 48, 16, ScaleKind::kFloat32, true},
      {Kind::kInt4, 66, 90, 64, ScaleKind::kFloat16, false, true},
      {Kind::kInt5, 35, 7, 32, ScaleKind::kFloat16},
      {Kind::kInt6, 33, 75, 16, ScaleKind::kFloat16},
      {Kind::kInt8, 40, 20, 16, ScaleKind::kFloat16, true},
      {Kind::kInt8Split, 40, 99, 16, ScaleKind::kFloat32},
      {Kind::kInt8Split, 33, 70, 64, ScaleKind::kFloat16},
      {Kind::kFp8E4M3, 33, 100, 16, ScaleKind::kFloat32},
      {Kind::kFp8E4M3, 33, 77, 77, ScaleKind::kFloat32},
      {Kind::kFp8E4M3, 32, 96, 32, ScaleKind::kFloat16},
      {Kind::kFloat16, 34, 13, 13, ScaleKind::kNone, false, true},
      {Kind::kBFloat16, 5, 40, 40, ScaleKind::kNone},
      {Kind::kFloat32, 64, 33, 33, ScaleKind::kNone},
  };
  return shapes;
}

void TestDequantizedRowsAreTheWeights() {
  uint32_t seed = 1;
  for (const Shape& shape : Shapes()) {
    const Packed packed(shape, seed++);
    std::vector<float> row(static_cast<size_t>(shape.columns));
    for (int64_t n = 0; n < shape.rows; ++n) {
      edgelm::DequantizeRow(packed.matrix, n, row.data());
      for (int64_t k = 0; k < shape.columns; ++k) {
        // Code times scale is exact in double, so there is one rounding, to float32.
        const float wanted = static_cast<float>(packed.Weight(n, k)), got = row[static_cast<size_t>(k)];
        EXPECT(got == wanted, "%s: [%d, %d] is %g, not %g", shape.Name().c_str(), int(n), int(k), double(got),
               double(wanted));
      }
    }
  }
}

// The identity times the matrix is the matrix, with every table.
void TestMatmulWithTheIdentityGivesTheDequantizedRows() {
  uint32_t seed = 100;
  for (const Shape& shape : Shapes()) {
    if (shape.swiglu) continue;
    const Packed packed(shape, seed++);
    const int64_t columns = shape.columns, rows = shape.rows;
    std::vector<float> identity(static_cast<size_t>(columns * columns)), y(identity.size() / columns * rows),
        row(columns);
    for (int64_t k = 0; k < columns; ++k) identity[static_cast<size_t>(k * columns + k)] = 1.0f;
    edgelm::Output out;
    out.y = y.data();
    out.ldy = rows;
    for (const edgelm::InstructionSet& set : edgelm::InstructionSets()) {
      if (!set.available()) continue;
      std::fill(y.begin(), y.end(), NAN);
      set.kernels->linear.linear_float(packed.matrix, 0, packed.matrix.units(), identity.data(), columns, columns, out);
      for (int64_t n = 0; n < rows; ++n) {
        edgelm::DequantizeRow(packed.matrix, n, row.data());
        for (int64_t k = 0; k < columns; ++k) {
          EXPECT(y[static_cast<size_t>(k * rows + n)] == row[static_cast<size_t>(k)], "%s, %s: [%d, %d]",
                 set.kernels->name, shape.Name().c_str(), int(n), int(k));
        }
      }
    }
  }
}

void TestScalarConversionsAreExact() {
  for (uint32_t bits = 0; bits < 256; ++bits) {
    const float value = edgelm::Fp8ToFloat32(static_cast<uint8_t>(bits));
    if ((bits & 127) == 127) {
      EXPECT(std::isnan(value), "fp8 %02x is %g", bits, double(value));
    } else {
      EXPECT(value == Decode(bits, 4, 3) && std::signbit(value) == (bits > 127), "fp8 %02x is %g", bits, double(value));
    }
  }
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float value = edgelm::HalfToFloat32(static_cast<uint16_t>(bits));
    if ((bits & 0x7C00) == 0x7C00) {
      EXPECT((bits & 1023) != 0 ? std::isnan(value) : std::isinf(value), "float16 %04x is %g", bits, double(value));
    } else {
      EXPECT(value == Decode(bits, 5, 10), "float16 %04x is %g", bits, double(value));
      EXPECT(edgelm::Float32ToHalf(value) == bits, "float16 %04x and back", bits);
      const float next = edgelm::HalfToFloat32(static_cast<uint16_t>(bits + 1));
      const float middle = (value + next) / 2;
      if (std::isfinite(middle)) EXPECT(edgelm::Float32ToHalf(middle) == bits + bits % 2, "the tie past %04x", bits);
    }
  }
  EXPECT(edgelm::Float32ToHalf(65520.0f) == 0x7C00 && edgelm::Float32ToHalf(65519.9f) == 0x7BFF, "float16's end");
  EXPECT((edgelm::Float32ToHalf(NAN) & 0x7FFF) > 0x7C00, "NaN");
}

// Scales are read in place: a matrix may begin at any multiple of 4. UndefinedBehaviorSanitizer checks this per table.
void TestMatricesMayBeginAtAnyMultipleOfFour() {
  for (const Shape& shape : Shapes()) {
    const Packed packed(shape, 21);
    const int64_t size = static_cast<int64_t>(packed.blob.size()), columns = shape.columns,
                  width = packed.matrix.outputs();
    std::vector<float> wanted(static_cast<size_t>(width)), y(wanted.size());
    const std::vector<float> x = RandomRows(columns, 22);
    QuantBuffer q(1, columns);
    edgelm::kScalarKernels.linear.quantize_rows(x.data(), columns, 1, columns, q.Rows());
    edgelm::Output out;
    out.finish = shape.swiglu ? edgelm::Finish::kSwiglu : edgelm::Finish::kStore;
    out.ldy = width;
    for (const bool int8 : {false, true}) {
      if (int8 && !shape.integer()) continue;
      const auto run = [&](const edgelm::Kernels& table, const Matrix& m, std::vector<float>* to) {
        out.y = to->data();
        if (int8) return table.linear.linear_int8(m, 0, m.units(), q.Rows(), 1, out);
        table.linear.linear_float(m, 0, m.units(), x.data(), columns, 1, out);
      };
      run(edgelm::kScalarKernels, packed.matrix, &wanted);
      for (const size_t shift : {4, 12, 20}) {
        std::vector<uint8_t> moved(packed.blob.size() + shift);
        std::memcpy(moved.data() + shift, packed.blob.data(), packed.blob.size());
        Matrix m;
        const char* wrong = edgelm::ParseMatrix(moved.data() + shift, size, &m);
        EXPECT(wrong == nullptr, "%s: %s", shape.Name().c_str(), wrong);
        for (const edgelm::InstructionSet& set : edgelm::InstructionSets()) {
          if (!set.available()) continue;
          run(*set.kernels, m, &y);
          ExpectSame(y, wanted, std::string(set.kernels->name) + ", " + shape.Name() + " at " + std::to_string(shift));
        }
      }
    }
  }
}

// A matrix that parses can be used: nothing outside the blob is read, which AddressSanitizer checks.
void Use(const std::vector<uint8_t>& blob, const Matrix& m) {
  EXPECT(m.rows > 0 && m.columns > 0, "an empty matrix was let through");
  // A header that claims a large matrix needs as many bytes, so these are small.
  std::vector<float> x(static_cast<size_t>(m.columns)), y(static_cast<size_t>(m.rows));
  edgelm::DequantizeRow(m, 0, x.data());
  edgelm::DequantizeRow(m, m.rows - 1, x.data());
  QuantBuffer q(1, m.columns);
  edgelm::Output out;
  out.finish = m.swiglu ? edgelm::Finish::kSwiglu : edgelm::Finish::kStore;
  out.y = y.data();
  out.ldy = m.outputs();
  for (const edgelm::InstructionSet& set : edgelm::InstructionSets()) {
    if (!set.available()) continue;
    const edgelm::LinearKernels& linear = set.kernels->linear;
    linear.linear_float(m, 0, m.units(), x.data(), m.columns, 1, out);
    if (!m.integer()) continue;
    linear.quantize_rows(x.data(), m.columns, 1, m.columns, q.Rows());
    linear.linear_int8(m, 0, m.units(), q.Rows(), 1, out);
    if (m.kind == Kind::kInt8Split) linear.linear_high(m, 0, m.units(), q.Rows(), 1, out);
  }
  EXPECT(!blob.empty(), "no blob");
}

void TestDamagedHeadersAreRefusedOrHarmless() {
  std::mt19937 engine(7);
  int refused = 0, used = 0;
  for (const Shape& shape : Shapes()) {
    const Packed packed(shape, 11);
    const std::vector<uint8_t>& good = packed.blob;
    for (int trial = 0; trial < 400; ++trial) {
      std::vector<uint8_t> blob = good;
      const int flips = 1 + static_cast<int>(engine() % 3);
      for (int i = 0; i < flips; ++i) {
        uint8_t& byte = blob[engine() % sizeof(edgelm::MatrixHeader)];
        // A flipped bit, a small number, or any byte. Sizes that nearly fit are the interesting cases.
        const uint32_t kind = engine() % 3;
        byte = static_cast<uint8_t>(kind == 0 ? byte ^ 1u << engine() % 8 : kind == 1 ? engine() % 20 : engine());
      }
      Matrix m;
      if (edgelm::ParseMatrix(blob.data(), static_cast<int64_t>(blob.size()), &m) != nullptr) {
        ++refused;
      } else {
        ++used;
        Use(blob, m);
      }
    }
  }
  EXPECT(refused > 1000 && used > 100, "only %d refused and %d used", refused, used);
}

void TestTruncatedMatricesAreRefused() {
  for (const Shape& shape : Shapes()) {
    const Packed packed(shape, 12);
    const int64_t size = static_cast<int64_t>(packed.blob.size());
    for (int64_t length = 0; length < size; length += length < 70 ? 1 : 61) {
      const std::vector<uint8_t> part(packed.blob.begin(), packed.blob.begin() + length);
      Matrix m;
      EXPECT(edgelm::ParseMatrix(part.data(), length, &m) != nullptr, "%s: %d of %d bytes", shape.Name().c_str(),
             int(length), int(size));
    }
    // Extra bytes are allowed: matrices follow one another in a file.
    std::vector<uint8_t> longer = packed.blob;
    longer.resize(longer.size() + 100);
    Matrix m;
    EXPECT(edgelm::ParseMatrix(longer.data(), static_cast<int64_t>(longer.size()), &m) == nullptr, "longer");
  }
}

void TestEachFieldIsChecked() {
  const Packed packed({Kind::kInt4, 64, 64, 32, ScaleKind::kFloat16}, 3);
  const auto refuses = [&](const char* reason, void (*change)(edgelm::MatrixHeader*)) {
    std::vector<uint8_t> blob = packed.blob;
    edgelm::MatrixHeader header;
    std::memcpy(&header, blob.data(), sizeof header);
    change(&header);
    std::memcpy(blob.data(), &header, sizeof header);
    Matrix m;
    const char* found = edgelm::ParseMatrix(blob.data(), static_cast<int64_t>(blob.size()), &m);
    EXPECT(found != nullptr && std::strstr(found, reason) != nullptr, "wanted '%s', got '%s'", reason,
           found == nullptr ? "nothing" : found);
  };
  refuses("EDLM", [](edgelm::MatrixHeader* h) { h->magic[3] = 'X'; });
  refuses("version", [](edgelm::MatrixHeader* h) { h->version = 2; });
  refuses("kind of weights", [](edgelm::MatrixHeader* h) { h->kind = static_cast<Kind>(7); });
  refuses("flags", [](edgelm::MatrixHeader* h) { h->flags = 4; });
  refuses("shape", [](edgelm::MatrixHeader* h) { h->rows = 0; });
  refuses("shape", [](edgelm::MatrixHeader* h) { h->columns = -64; });
  refuses("shape", [](edgelm::MatrixHeader* h) { h->columns = INT64_MAX / 64 * 64; });
  refuses("does not fit", [](edgelm::MatrixHeader* h) { h->group = 96; });
  refuses("does not fit", [](edgelm::MatrixHeader* h) { h->group = INT64_MAX - 31; });
  refuses("does not fit", [](edgelm::MatrixHeader* h) { h->group = 0; });
  refuses("does not fit", [](edgelm::MatrixHeader* h) { h->group = -32; });
  refuses("multiple of 32", [](edgelm::MatrixHeader* h) { h->group = 48; });
  refuses("multiple of 32", [](edgelm::MatrixHeader* h) { h->group = 8; });
  refuses("multiple of 32", [](edgelm::MatrixHeader* h) { h->kind = Kind::kFp8E4M3, h->group = 24; });
  refuses("size", [](edgelm::MatrixHeader* h) {
    h->columns = 60;
    h->bytes -= 64;
  });
  refuses("no scales", [](edgelm::MatrixHeader* h) { h->scale = ScaleKind::kNone; });
  refuses("kind of scales", [](edgelm::MatrixHeader* h) { h->scale = static_cast<ScaleKind>(3); });
  refuses("zero points", [](edgelm::MatrixHeader* h) { h->kind = Kind::kFloat16, h->flags = edgelm::kHasZeros; });
  refuses("even number", [](edgelm::MatrixHeader* h) { h->rows = 63, h->flags = edgelm::kSwiglu; });
  refuses("shorter", [](edgelm::MatrixHeader* h) { h->rows = int64_t{1} << 39; });
  refuses("no low nibbles", [](edgelm::MatrixHeader* h) { h->low_offset = 64; });
  refuses("lie outside", [](edgelm::MatrixHeader* h) { h->kind = Kind::kInt8Split, h->low_offset = INT64_MAX; });
  refuses("size", [](edgelm::MatrixHeader* h) { h->bytes += 1; });
}

}  // namespace

int main() {
  TestScalarConversionsAreExact();
  TestDequantizedRowsAreTheWeights();
  TestMatmulWithTheIdentityGivesTheDequantizedRows();
  TestEachFieldIsChecked();
  TestTruncatedMatricesAreRefused();
  TestMatricesMayBeginAtAnyMultipleOfFour();
  TestDamagedHeadersAreRefusedOrHarmless();
  return Finish();
}
