// Random packed matrices together with their exact weights, written from the description in layout.h. Shares no code
// with the reader.
#ifndef EDGELM_TESTS_PACKED_MATRIX_H_
#define EDGELM_TESTS_PACKED_MATRIX_H_

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels/layout.h"
#include "check.h"

namespace edgelm_test {

using edgelm::Kind;
using edgelm::ScaleKind;

enum class Scales { kUsual, kExtreme };  // extreme: the largest, the smallest, zero, negative

struct Shape {
  Kind kind;
  int64_t rows, columns, group;
  ScaleKind scale;
  bool zeros = false, swiglu = false;
  Scales scales = Scales::kUsual;

  bool integer() const { return kind < Kind::kFp8E4M3; }
  // Two groups of 16 share a record.
  bool halves() const { return group == 16 && (integer() || columns != 16); }
  int64_t span() const { return halves() ? 32 : group; }  // columns of a record
  int64_t records() const { return (columns + span() - 1) / span(); }
  int bits() const { return kind == Kind::kInt8Split ? 8 : static_cast<int>(kind); }  // of an integer's code
  std::string Name() const {
    static const char* const kNames[] = {"fp8", "float16", "bfloat16", "float32"};
    const int number = static_cast<int>(kind);
    std::string name = !integer() ? kNames[number - 16] : number == 9 ? "split" : "int" + std::to_string(number);
    name += " " + std::to_string(rows) + "x" + std::to_string(columns) + " group " + std::to_string(group);
    name += scale == ScaleKind::kNone ? "" : scale == ScaleKind::kFloat16 ? " scales16" : " scales32";
    return name + (zeros ? " zeros" : "") + (swiglu ? " swiglu" : "") + (scales == Scales::kExtreme ? " extreme" : "");
  }
};

// The value of a small float of sign, exponent and fraction bits. Not for infinities and NaN.
inline double Decode(uint32_t bits, int exponent_bits, int fraction_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = static_cast<int>(bits >> fraction_bits) & ((1 << exponent_bits) - 1);
  const int fraction = static_cast<int>(bits & ((1u << fraction_bits) - 1));
  const double magnitude = exponent == 0 ? std::ldexp(fraction, 1 - bias - fraction_bits)
                                         : std::ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
  return (bits >> (exponent_bits + fraction_bits) & 1) != 0 ? -magnitude : magnitude;
}

struct Packed {
  Shape shape;
  std::vector<double> weights;  // [rows, columns], gate's rows before up's; exact
  std::vector<uint8_t> blob;    // exactly as long as the matrix
  edgelm::Matrix matrix;

  double Weight(int64_t row, int64_t column) const {
    return weights[static_cast<size_t>(row * shape.columns + column)];
  }

  Packed(const Shape& s, uint32_t seed) : shape(s), engine_(seed) {
    const int64_t outputs = s.swiglu ? s.rows / 2 : s.rows, tiles = (outputs + 31) / 32 * (s.swiglu ? 2 : 1);
    scales_ = s.scale == ScaleKind::kFloat16 ? 64 : s.scale == ScaleKind::kFloat32 ? 128 : 0;
    head_ = (scales_ + (s.zeros ? 64 : 0)) * (s.halves() ? 2 : 1);
    record_ = head_ + CodeBytes(s.span());
    edgelm::MatrixHeader header = {};
    std::memcpy(header.magic, "EDLM", 4);
    header.version = 1;
    header.kind = s.kind;
    header.scale = s.scale;
    header.flags = static_cast<uint8_t>((s.zeros ? 1 : 0) | (s.swiglu ? 2 : 0));
    header.rows = s.rows;
    header.columns = s.columns;
    header.group = s.group;
    header.bytes = 64 + tiles * s.records() * record_;
    if (s.kind == Kind::kInt8Split) {
      header.low_offset = header.bytes + 32;  // anywhere after the records
      header.bytes = header.low_offset + tiles * s.records() * s.span() / 32 * 512;
    }
    low_ = header.low_offset;
    blob.assign(static_cast<size_t>(header.bytes), 0);
    std::memcpy(blob.data(), &header, sizeof header);
    weights.resize(static_cast<size_t>(s.rows * s.columns));
    for (int64_t row = 0; row < s.rows; ++row) {
      const bool up = s.swiglu && row >= outputs;
      const int64_t within = up ? row - outputs : row;
      WriteRow(row, s.swiglu ? within / 32 * 2 + (up ? 1 : 0) : within / 32, within % 32);
    }
    const char* wrong = edgelm::ParseMatrix(blob.data(), header.bytes, &matrix);
    EXPECT(wrong == nullptr, "%s: %s", s.Name().c_str(), wrong);
  }

 private:
  int64_t CodeBytes(int64_t columns) const {
    switch (shape.kind) {
      case Kind::kInt3: return columns * 12;
      case Kind::kInt4:
      case Kind::kInt8Split: return columns * 16;
      case Kind::kInt5: return columns * 20;
      case Kind::kInt6: return columns * 24;
      case Kind::kInt8:
      case Kind::kFp8E4M3: return columns * 32;
      case Kind::kFloat16:
      case Kind::kBFloat16: return columns * 64;
      case Kind::kFloat32: return columns * 128;
    }
    return 0;
  }

  uint32_t Random(uint32_t below) { return static_cast<uint32_t>(engine_() % below); }

  // Write row n of a tile and remember its weights.
  void WriteRow(int64_t row, int64_t tile, int64_t n) {
    const Shape& s = shape;
    const int64_t in_record = s.span() / s.group;
    for (int64_t g = 0; g < s.records() * in_record; ++g) {
      uint8_t* record = blob.data() + 64 + (tile * s.records() + g / in_record) * record_;
      const int64_t half = g % in_record;
      const double scale = WriteScale(record + half * scales_, n);
      int zero = 1 << (s.bits() - 1);
      if (s.zeros) {
        zero = static_cast<int>(Random(s.bits() > 4 ? 1u << s.bits() : 16));
        record[scales_ * in_record + 64 * half + n] = static_cast<uint8_t>(zero);
      }
      for (int64_t k = 0; k < s.group; ++k) {
        const int64_t column = g * s.group + k, within = half * 16 + k;
        // Codes beyond the last column are random, since nothing may use them.
        const double value = s.integer() ? WriteCode(record + head_, tile, n, within, column) - zero
                                         : WriteFloat(record + head_, n, within);
        if (column < s.columns) weights[static_cast<size_t>(row * s.columns + column)] = value * scale;
      }
    }
  }

  double WriteScale(uint8_t* record, int64_t n) {
    if (shape.scale == ScaleKind::kNone) return 1;
    const bool extreme = shape.scales == Scales::kExtreme;
    if (shape.scale == ScaleKind::kFloat16) {
      static const uint16_t kExtreme[] = {0x7BFF, 0x0001, 0x0000, 0x8000, 0xFBFF, 0x8001, 0x03FF, 0xA000};
      // A scale of either sign, from 2^-9 to 2^-5.
      const uint32_t bits = extreme ? kExtreme[Random(8)] : Random(2) << 15 | (6 + Random(4)) << 10 | Random(1024);
      const uint16_t half = static_cast<uint16_t>(bits);
      std::memcpy(record + 2 * n, &half, 2);
      return Decode(half, 5, 10);
    }
    static const float kExtreme[] = {3.4e38f, 1e-45f, 0.0f, -0.0f, -3.4e38f, 1e-38f, -1e-30f, 1.0f};
    const float scale = extreme ? kExtreme[Random(8)]
                                : std::ldexp(1.0f + static_cast<float>(Random(1 << 20)) * 0x1p-20f, -8) *
                                      (Random(2) != 0 ? 1.0f : -1.0f);
    std::memcpy(record + 4 * n, &scale, 4);
    return scale;
  }

  // A random code for column k of the record, which is `column` of the matrix.
  int WriteCode(uint8_t* codes, int64_t tile, int64_t n, int64_t k, int64_t column) {
    const int64_t block = k / 32, c = k % 32, j = c % 4;
    const int code = static_cast<int>(Random(1u << shape.bits()));
    const auto put = [](uint8_t& byte, int bits, int64_t shift) { byte = static_cast<uint8_t>(byte | bits << shift); };
    switch (shape.kind) {
      case Kind::kInt8: put(codes[1024 * block + 128 * (c / 4) + 4 * n + j], code, 0); break;
      case Kind::kInt4: put(codes[512 * block + 128 * (c / 8) + 4 * n + j], code, c % 8 / 4 * 4); break;
      case Kind::kInt3:
        put(codes[384 * block + 128 * (c / 16) + 4 * n + j], code & 3, c % 16 / 4 * 2);
        put(codes[384 * block + 256 + 4 * n + j], code >> 2, c / 4);
        break;
      case Kind::kInt5:
        put(codes[640 * block + 128 * (c / 8) + 4 * n + j], code & 15, c % 8 / 4 * 4);
        put(codes[640 * block + 512 + 4 * n + j], code >> 4, c / 4);
        break;
      case Kind::kInt6:
        put(codes[768 * block + 128 * (c / 8) + 4 * n + j], code & 15, c % 8 / 4 * 4);
        put(codes[768 * block + 512 + 128 * (c / 16) + 4 * n + j], code >> 4, c % 16 / 4 * 2);
        break;
      default: {
        uint8_t* low = blob.data() + low_ + (tile * (shape.records() * shape.span() / 32) + column / 32) * 512;
        put(codes[512 * block + 128 * (c / 8) + 4 * n + j], code >> 4, c % 8 / 4 * 4);
        put(low[128 * (c / 8) + 4 * n + j], code & 15, c % 8 / 4 * 4);
      }
    }
    return code;
  }

  double WriteFloat(uint8_t* codes, int64_t n, int64_t k) {
    const int64_t element = 32 * k + n;
    const uint32_t sign = Random(2);
    if (shape.kind == Kind::kFp8E4M3) {
      const uint32_t bits = sign << 7 | Random(127);  // 127 is NaN
      codes[element] = static_cast<uint8_t>(bits);
      return Decode(bits, 4, 3);
    }
    if (shape.kind == Kind::kFloat32) {
      const float value = std::ldexp(static_cast<float>(engine_()) - 0x1p31f, -35);
      std::memcpy(codes + 4 * element, &value, 4);
      return value;
    }
    const bool half = shape.kind == Kind::kFloat16;
    // Subnormal float16 too; bfloat16 from 2^-10 to 2^5.
    const uint32_t bits = half ? sign << 15 | Random(20) << 10 | Random(1024)
                               : sign << 15 | (117 + Random(16)) << 7 | Random(128);
    const uint16_t two = static_cast<uint16_t>(bits);
    std::memcpy(codes + 2 * element, &two, 2);
    return half ? Decode(bits, 5, 10) : Decode(bits, 8, 7);
  }

  std::mt19937 engine_;
  int64_t scales_ = 0, head_ = 0, record_ = 0, low_ = 0;
};

}  // namespace edgelm_test

#endif  // EDGELM_TESTS_PACKED_MATRIX_H_
