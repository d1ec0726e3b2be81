#include "layout.h"

#include <cmath>
#include <cstring>

namespace edgelm {
namespace {

constexpr int64_t kMost = int64_t{1} << 40;  // limit of rows and columns, so that sizes stay below 2^63

int64_t RoundUp(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

bool Known(Kind kind) {
  switch (kind) {
    case Kind::kInt3:
    case Kind::kInt4:
    case Kind::kInt5:
    case Kind::kInt6:
    case Kind::kInt8:
    case Kind::kInt8Split:
    case Kind::kFp8E4M3:
    case Kind::kFloat16:
    case Kind::kBFloat16:
    case Kind::kFloat32: return true;
  }
  return false;
}

float FromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Read one bit (of 32 columns in 128 bytes) or two bits (in 256 bytes); `c` is the column, `n` the row.
uint32_t OneBit(const uint8_t* codes, int64_t n, int64_t c) { return codes[4 * n + c % 4] >> (c / 4) & 1; }
uint32_t TwoBits(const uint8_t* codes, int64_t n, int64_t c) {
  return codes[128 * (c / 16) + 4 * n + c % 4] >> (2 * (c % 16 / 4)) & 3;
}
uint32_t Nibble(const uint8_t* codes, int64_t n, int64_t c) {
  return codes[128 * (c / 8) + 4 * n + c % 4] >> (c % 8 < 4 ? 0 : 4) & 15;
}

uint32_t Code(const Matrix& m, const uint8_t* codes, const uint8_t* low, int64_t n, int64_t k) {
  const int64_t block = k / kBlock, c = k % kBlock;
  codes += CodeBytes(m.kind, block * kBlock);
  switch (m.kind) {
    case Kind::kInt8: return codes[128 * (c / 4) + 4 * n + c % 4];
    case Kind::kInt3: return TwoBits(codes, n, c) | OneBit(codes + 256, n, c) << 2;
    case Kind::kInt5: return Nibble(codes, n, c) | OneBit(codes + 512, n, c) << 4;
    case Kind::kInt6: return Nibble(codes, n, c) | TwoBits(codes + 512, n, c) << 4;
    case Kind::kInt8Split: return Nibble(codes, n, c) << 4 | Nibble(low + block * 512, n, c);
    default: return Nibble(codes, n, c);
  }
}

// The zero point of an integer kind where none is stored.
int32_t SymmetricZero(Kind kind) {
  switch (kind) {
    case Kind::kInt3: return 4;
    case Kind::kInt4: return 8;
    case Kind::kInt5: return 16;
    case Kind::kInt6: return 32;
    default: return 128;
  }
}

}  // namespace

int64_t CodeBytes(Kind kind, int64_t columns) {
  switch (kind) {
    case Kind::kInt3: return columns / kBlock * 384;
    case Kind::kInt4:
    case Kind::kInt8Split: return columns / kBlock * 512;
    case Kind::kInt5: return columns / kBlock * 640;
    case Kind::kInt6: return columns / kBlock * 768;
    case Kind::kInt8:
    case Kind::kFp8E4M3: return columns * kTile;
    case Kind::kFloat16:
    case Kind::kBFloat16: return columns * kTile * 2;
    case Kind::kFloat32: return columns * kTile * 4;
  }
  return 0;
}

const char* ParseMatrix(const uint8_t* blob, int64_t size, Matrix* matrix) {
  MatrixHeader h;
  if (size < static_cast<int64_t>(sizeof h)) return "it is shorter than its header";
  std::memcpy(&h, blob, sizeof h);
  if (std::memcmp(h.magic, "EDLM", 4) != 0) return "it does not begin with EDLM";
  if (h.version != kLayoutVersion) return "its layout version is not 1";
  if (!Known(h.kind)) return "its kind of weights is unknown";
  Matrix m;
  m.kind = h.kind;
  m.scale = h.scale;
  m.zeros = (h.flags & kHasZeros) != 0;
  m.swiglu = (h.flags & kSwiglu) != 0;
  m.rows = h.rows;
  m.columns = h.columns;
  m.group = h.group;
  if ((h.flags & ~(kHasZeros | kSwiglu)) != 0) return "its flags are unknown";
  if (m.rows < 1 || m.columns < 1 || m.rows > kMost || m.columns > kMost) return "its shape is not possible";
  const bool whole = !m.integer() && m.group == m.columns;
  if (m.group < 1 || m.group > RoundUp(m.columns, kBlock)) return "its group does not fit its columns";
  if (!whole && m.group != kHalf && m.group % kBlock != 0) return "its group is neither 16 nor a multiple of 32";
  if (m.integer() && m.scale == ScaleKind::kNone) return "its integer codes have no scales";
  if (m.scale > ScaleKind::kFloat32) return "its kind of scales is unknown";
  if (m.zeros && (!m.integer() || m.kind == Kind::kInt8Split)) return "its kind has no zero points";
  if (m.swiglu && m.rows % 2 != 0) return "a SwiGLU matrix has an even number of rows";
  const int64_t tiles = (m.outputs() + kTile - 1) / kTile;
  m.tiles = m.swiglu ? 2 * tiles : tiles;
  m.span = m.group == kHalf && !whole ? kBlock : m.group;
  m.records = (m.columns + m.span - 1) / m.span;
  m.head_bytes = (m.scale_bytes() + (m.zeros ? 64 : 0)) * (m.halves() ? 2 : 1);
  m.record_bytes = m.head_bytes + CodeBytes(m.kind, m.span);
  // Divide rather than multiply: the numbers of a damaged header could overflow.
  const int64_t room = size - static_cast<int64_t>(sizeof h);
  if (m.record_bytes > room / m.tiles / m.records) return "it is shorter than its shape needs";
  m.tile_bytes = m.records * m.record_bytes;
  m.data = blob + sizeof h;
  int64_t end = static_cast<int64_t>(sizeof h) + m.tiles * m.tile_bytes;
  if (m.kind == Kind::kInt8Split) {
    if (h.low_offset < end || h.low_offset > size) return "its low nibbles lie outside it";
    m.low = blob + h.low_offset;
    end = h.low_offset + m.tiles * m.low_bytes();
  } else if (h.low_offset != 0) {
    return "its kind has no low nibbles";
  }
  if (h.bytes != end || end > size) return "its size is not what its shape needs";
  *matrix = m;
  return nullptr;
}

void DequantizeRow(const Matrix& m, int64_t row, float* out) {
  int64_t tile = row / kTile;
  if (m.swiglu) {
    const int64_t width = m.outputs();
    tile = row < width ? 2 * (row / kTile) : 2 * ((row - width) / kTile) + 1;
    row = row < width ? row : row - width;
  }
  const int64_t n = row % kTile;
  const uint8_t* record = m.data + tile * m.tile_bytes;
  const uint8_t* low = m.low == nullptr ? nullptr : m.low + tile * m.low_bytes();
  for (int64_t g = 0, first = 0; first < m.columns; ++g, first += m.group) {
    const int64_t half = m.halves() ? g % 2 : 0;
    if (g > 0 && half == 0) {
      record += m.record_bytes;
      if (low != nullptr) low += m.span / kBlock * 512;
    }
    const uint8_t* const scales = record + half * m.scale_bytes();
    float scale = 1.0f;
    if (m.scale == ScaleKind::kFloat16) {
      uint16_t bits;
      std::memcpy(&bits, scales + 2 * n, 2);
      scale = HalfToFloat32(bits);
    } else if (m.scale == ScaleKind::kFloat32) {
      std::memcpy(&scale, scales + 4 * n, 4);
    }
    const uint8_t* codes = record + m.head_bytes;
    const int32_t zero = m.zeros ? codes[n - (m.halves() ? 128 - 64 * half : 64)] : SymmetricZero(m.kind);
    const int64_t start = half * kHalf, count = m.columns - first < m.group ? m.columns - first : m.group;
    for (int64_t k = start; k < start + count; ++k) {
      float value;
      if (m.integer()) {
        value = static_cast<float>(static_cast<int32_t>(Code(m, codes, low, n, k)) - zero);
      } else if (m.kind == Kind::kFp8E4M3) {
        value = Fp8ToFloat32(codes[k * kTile + n]);
      } else if (m.kind == Kind::kFloat32) {
        std::memcpy(&value, codes + 4 * (k * kTile + n), 4);
      } else {
        uint16_t bits;
        std::memcpy(&bits, codes + 2 * (k * kTile + n), 2);
        value = m.kind == Kind::kFloat16 ? HalfToFloat32(bits) : FromBits(static_cast<uint32_t>(bits) << 16);
      }
      *out++ = value * scale;
    }
  }
}

float HalfToFloat32(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, exponent = bits >> 10 & 31u,
                 fraction = bits & 1023u;
  if (exponent == 31) return FromBits(sign | 0x7F800000u | fraction << 13);
  if (exponent != 0) return FromBits(sign | (exponent + 112u) << 23 | fraction << 13);
  const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
  return sign != 0 ? -magnitude : magnitude;
}

uint16_t Float32ToHalf(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7FFFFFFFu;
  if (bits > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u | (bits >> 13 & 0x3FFu));
  if (bits >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);
  if (bits < 0x38800000u) {  // subnormal: adding 0.5 aligns the fraction and rounds it
    const float aligned = FromBits(bits) + 0.5f;
    std::memcpy(&bits, &aligned, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3F000000u));
  }
  return static_cast<uint16_t>(sign | (bits + 0xFFFu + (bits >> 13 & 1u) - 0x38000000u) >> 13);
}

float Fp8ToFloat32(uint8_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x80u) << 24, exponent = bits >> 3 & 15u, fraction = bits & 7u;
  if ((bits & 0x7Fu) == 0x7Fu) return FromBits(sign | 0x7FC00000u);
  if (exponent != 0) return FromBits(sign | (exponent + 120u) << 23 | fraction << 20);
  const float magnitude = static_cast<float>(fraction) * 0x1p-9f;
  return sign != 0 ? -magnitude : magnitude;
}

}  // namespace edgelm
