// Prints one checksum per kernel and kind of weights over results for fixed inputs. Fails if two tables of this machine
// differ. To compare machines, compare their outputs.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "packed_matrix.h"
#include "tables.h"

namespace {

using namespace edgelm;
using namespace edgelm_test;

// Inputs are generated with integer arithmetic, so that they are the same on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t Next() {  // splitmix64 (Steele et al. 2014)
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }
  // A number of random sign, with magnitude between 2^low and 2^high.
  float Float(int low, int high) {
    const uint64_t bits = Next();
    const float magnitude = std::ldexp(1.0f + static_cast<float>(bits & 0x7FFFFF) * 0x1p-23f,
                                       low + static_cast<int>(bits >> 24 & 0xFFFF) % (high - low));
    return bits >> 63 != 0 ? -magnitude : magnitude;
  }

 private:
  uint64_t state_;
};

class Digest {
 public:
  void Bytes(const void* data, size_t size) {  // CRC-32, as in ISO 3309
    const uint8_t* bytes = static_cast<const uint8_t*>(data);
    for (size_t i = 0; i < size; ++i) {
      crc_ ^= bytes[i];
      for (int bit = 0; bit < 8; ++bit) crc_ = crc_ >> 1 ^ (0xEDB88320u & (0u - (crc_ & 1)));
    }
  }
  // All NaN count as equal: sign and payload differ between CPUs.
  void Floats(const std::vector<float>& values) {
    for (float value : values) {
      uint32_t bits = 0x7FC00000u;
      if (!std::isnan(value)) std::memcpy(&bits, &value, 4);
      Bytes(&bits, 4);
    }
  }
  uint32_t value() const { return ~crc_; }

 private:
  uint32_t crc_ = 0xFFFFFFFFu;
};

std::vector<float> Floats(int64_t count, Random* random) {
  std::vector<float> x(static_cast<size_t>(count));
  for (float& value : x) value = random->Float(-10, 4);
  return x;
}

// Rows of activations with difficult values: zeros, tiny and huge values, one that is not finite.
std::vector<float> Activations(int64_t rows, int64_t columns, Random* random) {
  std::vector<float> x = Floats(rows * columns, random);
  for (int64_t i = 0; i < columns; ++i) {
    if (rows > 3) x[static_cast<size_t>(columns + i)] = 0.0f;
    if (rows > 4) x[static_cast<size_t>(3 * columns + i)] *= 0x1p-110f;
    if (rows > 5) x[static_cast<size_t>(4 * columns + i)] *= 0x1p90f;
  }
  if (rows > 6) x[static_cast<size_t>(5 * columns + 1)] = INFINITY;
  if (rows > 7) x[static_cast<size_t>(6 * columns + 2)] = NAN;
  return x;
}

void Into(Digest* digest, const QuantBuffer& quantised) {
  digest->Bytes(quantised.codes.data(), quantised.codes.size());
  digest->Floats(quantised.scales);
  digest->Bytes(quantised.offsets.data(), 4 * quantised.offsets.size());
}

// Every Finish of a matmul, by `multiply(output)`.
template <typename Multiply>
void Finishes(const Matrix& m, int64_t rows, Random* random, Digest* digest, const Multiply& multiply) {
  const int64_t width = m.outputs();
  const size_t size = static_cast<size_t>(rows * width);
  std::vector<float> y(size), residual(size), weight(static_cast<size_t>(rows));
  std::vector<int32_t> index(static_cast<size_t>(rows));
  for (float& value : residual) value = random->Float(-3, 3);
  for (int64_t r = 0; r < rows; ++r) {
    weight[static_cast<size_t>(r)] = random->Float(-4, 0);
    index[static_cast<size_t>(r)] = static_cast<int32_t>(rows - 1 - r);
  }
  Output out;
  out.y = y.data();
  out.ldy = width;
  if (m.swiglu) {
    out.finish = Finish::kSwiglu;
    multiply(out);
    digest->Floats(y);
    QuantBuffer quantised(rows, width);
    out.finish = Finish::kSwigluQuant;
    out.quant = quantised.Rows();
    multiply(out);
    Into(digest, quantised);
    return;
  }
  multiply(out);
  digest->Floats(y);
  out.residual = residual.data();
  multiply(out);
  digest->Floats(y);
  out.residual = nullptr;
  out.finish = Finish::kScatterAdd;
  out.index = index.data();
  out.weight = weight.data();
  multiply(out);
  digest->Floats(y);
}

enum class Of { kInt8, kHigh, kFloat };

uint32_t LinearDigest(const LinearKernels& kernels, const Packed& weights, Of which) {
  Random random(1);
  Digest digest;
  const Matrix& m = weights.matrix;
  for (int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 17}) {
    const std::vector<float> x = Activations(rows, m.columns, &random);
    QuantBuffer q(rows, m.columns);
    kScalarKernels.linear.quantize_rows(x.data(), m.columns, rows, m.columns, q.Rows());
    Finishes(m, rows, &random, &digest, [&](const Output& out) {
      if (which == Of::kInt8) kernels.linear_int8(m, 0, m.units(), q.Rows(), rows, out);
      if (which == Of::kHigh) kernels.linear_high(m, 0, m.units(), q.Rows(), rows, out);
      if (which == Of::kFloat) kernels.linear_float(m, 0, m.units(), x.data(), m.columns, rows, out);
    });
  }
  return digest.value();
}

uint32_t Rows(const LinearKernels& kernels) {
  Random random(2);
  Digest digest;
  for (int64_t columns : {1, 7, 15, 16, 17, 31, 32, 33, 100, 2048}) {
    const int64_t rows = 9;
    const std::vector<float> x = Activations(rows, columns, &random), weight = Floats(columns, &random);
    QuantBuffer quantised(rows, columns);
    kernels.quantize_rows(x.data(), columns, rows, columns, quantised.Rows());
    Into(&digest, quantised);
    std::vector<float> y(x.size());
    kernels.rms_norm(x.data(), columns, rows, columns, weight.data(), 1e-5f, y.data(), columns);
    digest.Floats(y);
    y = x;
    kernels.softmax(y.data(), rows, columns);
    digest.Floats(y);
  }
  return digest.value();
}

// A prompt in two parts, cut within a tile of the cache; then a few tokens over more than one split; then one token.
uint32_t Attend(const AttentionKernels& kernels, CacheKind kind) {
  Random random(4);
  Digest digest;
  for (int64_t dim : {6, 80}) {
    const int64_t tokens = 528;
    Attention call;
    call.cache = kind;
    call.heads = 6;
    call.kv_heads = 2;
    call.head_dim = dim;
    call.capacity = tokens;
    call.clip = dim == 80 ? 1.5f : 0.0f;
    call.epsilon = 1e-5f;
    const int64_t columns = (call.heads + 2 * call.kv_heads) * dim;
    const std::vector<float> qkv = Floats(tokens * columns, &random), norm = Floats(call.heads * dim, &random);
    const std::vector<float> cos = Floats((tokens + 1) * dim / 2, &random);  // need not be a rotation here
    std::vector<uint8_t> key(static_cast<size_t>(call.kv_heads * tokens * AttentionRowBytes(kind, dim))), value(key);
    call.q_norm = call.k_norm = dim == 6 ? nullptr : norm.data();
    call.cos = cos.data();
    call.sin = cos.data() + dim / 2;
    call.key = key.data();
    call.value = value.data();
    for (const int64_t rows : {21, 500, 6, 1}) {
      std::vector<float> out(static_cast<size_t>(rows * call.heads * dim));
      call.rows = rows;
      call.qkv = qkv.data() + call.past * columns;
      call.out = out.data();
      const int64_t scratch_bytes = (AttentionScratchBytes(call) + 63) / 64 * 64;
      std::vector<uint8_t> space(static_cast<size_t>(scratch_bytes + AttentionWorkspaceBytes(call) + 64));
      call.scratch = space.data() + (64 - reinterpret_cast<uintptr_t>(space.data()) % 64) % 64;
      uint8_t* workspace = call.scratch + scratch_bytes;
      for (int64_t unit = 0; unit < call.prepare_units(); ++unit) kernels.prepare(call, unit, workspace);
      for (int64_t unit = 0; unit < call.attend_units(); ++unit) kernels.attend(call, unit, workspace);
      for (int64_t unit = 0; unit < call.combine_units(); ++unit) kernels.combine(call, unit);
      digest.Floats(out);
      call.past += rows;
    }
    digest.Bytes(key.data(), key.size());
    digest.Bytes(value.data(), value.size());
  }
  return digest.value();
}

// Check that every table gives the scalar table's checksum, and print it.
template <typename Compute>
void Line(const std::string& name, const Compute& compute) {
  const uint32_t expected = compute(kScalarKernels);
  for (const Kernels* table : FastTables()) {
    const uint32_t got = compute(*table);
    EXPECT(got == expected, "%s: %s gives %08x, scalar %08x", name.c_str(), table->name, got, expected);
  }
  std::printf("digest %08x %s\n", expected, name.c_str());
}

}  // namespace

int main() {
  const ScaleKind f16 = ScaleKind::kFloat16, f32 = ScaleKind::kFloat32, none = ScaleKind::kNone;
  const Shape shapes[] = {
      {Kind::kInt3, 65, 192, 64, f16},
      {Kind::kInt3, 78, 96, 32, f32, true, true},
      {Kind::kInt4, 65, 256, 128, f16},
      {Kind::kInt4, 47, 96, 32, f16, true, false, Scales::kExtreme},
      {Kind::kInt4, 94, 128, 128, f32, false, true},
      {Kind::kInt5, 65, 192, 64, f16},
      {Kind::kInt5, 78, 96, 32, f32, true, true},
      {Kind::kInt6, 65, 128, 128, f16, true},
      {Kind::kInt6, 94, 96, 32, f16, false, true},
      {Kind::kInt8, 65, 192, 64, f16},
      {Kind::kInt8, 64, 96, 32, f16, true, true},
      {Kind::kInt8Split, 65, 128, 32, f16},
      {Kind::kFp8E4M3, 33, 96, 32, f32},
      {Kind::kFloat16, 66, 70, 70, none, false, true},
      {Kind::kBFloat16, 40, 50, 50, none},
      {Kind::kFloat32, 48, 33, 33, none},
  };
  for (const Shape& shape : shapes) {
    Packed weights(shape, 3);
    if (shape.kind == Kind::kFp8E4M3) weights.blob[64 + 128 + 5] = 0xFF;  // NaN, row 5
    if (shape.integer()) {
      Line("linear_int8 " + shape.Name(), [&](const Kernels& k) { return LinearDigest(k.linear, weights, Of::kInt8); });
    }
    if (shape.kind == Kind::kInt8Split) {
      Line("linear_high " + shape.Name(), [&](const Kernels& k) { return LinearDigest(k.linear, weights, Of::kHigh); });
    }
    Line("linear_float " + shape.Name(), [&](const Kernels& k) { return LinearDigest(k.linear, weights, Of::kFloat); });
  }
  Line("quantize_rows, rms_norm, softmax", [](const Kernels& k) { return Rows(k.linear); });
  Line("attention float32", [](const Kernels& k) { return Attend(k.attention, CacheKind::kFloat32); });
  Line("attention float16", [](const Kernels& k) { return Attend(k.attention, CacheKind::kFloat16); });
  Line("attention int8", [](const Kernels& k) { return Attend(k.attention, CacheKind::kInt8); });
  Line("attention fp8", [](const Kernels& k) { return Attend(k.attention, CacheKind::kFp8); });
  return edgelm_test::Finish();
}
