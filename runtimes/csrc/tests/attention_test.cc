// Tests attention on every instruction set against a naive float64 reference, and its independence of other rows and of
// stale cache contents.
//
// The reference uses queries, keys and values rounded as the cache stores them. Tolerances are derived per element: the
// roundoff of float32 in scores and sums, the quantisation steps of int8 caches' weights, and one storage step for
// every element so close to a tie that float32 may round it the other way.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "tables.h"

namespace {

using namespace edgelm;
using namespace edgelm_test;

// QK-norm: none, one over all heads, or one per head.
enum class Norm { kNone, kAll, kEach };

struct Shape {
  CacheKind cache;
  int64_t heads, kv_heads, dim, capacity;
  Norm norm = Norm::kNone;
  float clip = 0.0f;

  int64_t columns() const { return (heads + 2 * kv_heads) * dim; }
  int64_t cache_bytes() const { return kv_heads * capacity * AttentionRowBytes(cache, dim); }
};

const char* Name(CacheKind kind) {
  switch (kind) {
    case CacheKind::kFloat32: return "float32";
    case CacheKind::kFloat16: return "float16";
    case CacheKind::kInt8: return "int8";
    case CacheKind::kFp8: return "fp8";
  }
  return "";
}

// A sequence: its tokens, rotary tables and norm weights.
struct Sequence {
  Shape shape;
  int64_t tokens;
  std::vector<float> qkv, cos, sin, q_norm, k_norm;

  Sequence(const Shape& s, int64_t count, uint32_t seed, float deviation = 1.0f) : shape(s), tokens(count) {
    qkv = RandomRows(count * s.columns(), seed, deviation);
    q_norm = RandomRows(s.heads * s.dim, seed + 1);
    k_norm = RandomRows(s.kv_heads * s.dim, seed + 2);
    for (int64_t position = 0; position < count; ++position) {
      for (int64_t i = 0; i < s.dim / 2; ++i) {
        const double share = static_cast<double>(2 * i) / static_cast<double>(s.dim);
        const double angle = static_cast<double>(position) * std::pow(10000.0, -share);
        cos.push_back(static_cast<float>(std::cos(angle)));
        sin.push_back(static_cast<float>(std::sin(angle)));
      }
    }
  }
};

// A cache filled with bytes that are NaN as float32, as float16 and as scales.
struct CacheBuffer {
  std::vector<uint8_t> key, value;
  explicit CacheBuffer(const Shape& shape)
      : key(static_cast<size_t>(shape.cache_bytes()), 0xFF), value(static_cast<size_t>(shape.cache_bytes()), 0xFF) {}
  bool operator==(const CacheBuffer& other) const { return key == other.key && value == other.value; }
};

struct AlignedBytes {
  explicit AlignedBytes(int64_t size) : bytes(static_cast<size_t>(size) + 64, 0xFF) {}
  uint8_t* data() { return bytes.data() + (64 - reinterpret_cast<uintptr_t>(bytes.data()) % 64) % 64; }
  std::vector<uint8_t> bytes;
};

// Run tokens past .. past + rows - 1 of the sequence through one table; return their rows of the output. `between` is
// called after the cache is written and before it is read.
template <typename Between>
std::vector<float> Run(const Kernels& table, const Sequence& sequence, CacheBuffer& cache, int64_t past, int64_t rows,
                       bool backwards, const Between& between) {
  const Shape& s = sequence.shape;
  std::vector<float> out(static_cast<size_t>(rows * s.heads * s.dim), -77.0f);
  Attention call;
  call.cache = s.cache;
  call.heads = s.heads;
  call.kv_heads = s.kv_heads;
  call.head_dim = s.dim;
  call.capacity = s.capacity;
  call.past = past;
  call.rows = rows;
  call.clip = s.clip;
  call.epsilon = 1e-5f;
  call.q_norm = s.norm != Norm::kNone ? sequence.q_norm.data() : nullptr;
  call.k_norm = s.norm != Norm::kNone ? sequence.k_norm.data() : nullptr;
  call.q_norm_per_head = call.k_norm_per_head = s.norm == Norm::kEach;
  call.cos = sequence.cos.data();
  call.sin = sequence.sin.data();
  call.qkv = sequence.qkv.data() + past * s.columns();
  call.key = cache.key.data();
  call.value = cache.value.data();
  call.out = out.data();
  AlignedBytes scratch(AttentionScratchBytes(call));
  call.scratch = scratch.data();
  const auto each = [&](int64_t units, auto run) {
    for (int64_t i = 0; i < units; ++i) {
      AlignedBytes workspace(AttentionWorkspaceBytes(call));
      run(backwards ? units - 1 - i : i, workspace.data());
    }
  };
  each(call.prepare_units(), [&](int64_t unit, uint8_t* space) { table.attention.prepare(call, unit, space); });
  between();
  each(call.attend_units(), [&](int64_t unit, uint8_t* space) { table.attention.attend(call, unit, space); });
  each(call.combine_units(), [&](int64_t unit, uint8_t*) { table.attention.combine(call, unit); });
  return out;
}

std::vector<float> Run(const Kernels& table, const Sequence& sequence, CacheBuffer& cache, int64_t past, int64_t rows,
                       bool backwards = false) {
  return Run(table, sequence, cache, past, rows, backwards, [] {});
}

// -- reference --------------------------------------------------------------------------------------------------------

// A head's vector as it is stored, and the error that float32 rounding may add to each element.
struct Stored {
  std::vector<double> value, slack;
  double scale = 1;  // int8
};

// E4M3, three bits of mantissa and subnormals below 2^-6, with a scale of eight bits that is rounded up.
Stored StoreFp8(const std::vector<double>& x) {
  Stored out = {x, std::vector<double>(x.size(), 0.0), 1};
  double largest = 0;
  for (const double value : x) largest = std::max(largest, std::fabs(value));
  if (largest == 0) return out;
  const double unit = std::ldexp(1.0, std::ilogb(largest / 448) - 7), units = largest / 448 / unit;
  const double scale = std::ceil(units) * unit;
  // If float32 may have rounded the scale to its neighbour, any element may have another code.
  const bool unsure = std::fabs(units - std::nearbyint(units)) < 256 * 64 * kUnit;
  for (size_t i = 0; i < x.size(); ++i) {
    const double step = scale * std::ldexp(1.0, std::max(std::ilogb(std::fabs(x[i]) / scale + 1e-30), -6) - 3);
    const double codes = x[i] / step;
    out.value[i] = std::nearbyint(codes) * step;
    if (unsure || std::fabs(std::fabs(codes - std::floor(codes)) - 0.5) < 16 * 2048 * kUnit) out.slack[i] = step;
  }
  return out;
}

Stored Store(CacheKind kind, const std::vector<double>& x, bool query) {
  Stored out = {x, std::vector<double>(x.size(), 0.0), 1};
  if (kind == CacheKind::kFloat32 || (kind != CacheKind::kInt8 && query)) return out;
  if (kind == CacheKind::kFp8) return StoreFp8(x);
  double largest = 0;
  for (const double value : x) largest = std::max(largest, std::fabs(value));
  for (size_t i = 0; i < x.size(); ++i) {
    // The distance to the next stored number.
    double step = largest / 127;
    if (kind == CacheKind::kFloat16) step = std::ldexp(1.0, std::max(std::ilogb(std::fabs(x[i]) + 1e-30), -14) - 10);
    if (step == 0) continue;
    const double codes = x[i] / step;
    out.value[i] = std::nearbyint(codes) * step;
    if (std::fabs(std::fabs(codes - std::floor(codes)) - 0.5) < 16 * 2048 * kUnit) out.slack[i] = step;
  }
  if (kind == CacheKind::kInt8) out.scale = largest / 127;
  return out;
}

// One head of one token after norm, clip and rotation. `norm` false for values and without norm, `rotate` for values.
std::vector<double> Head(const Sequence& sequence, int64_t token, int64_t first, int64_t columns, int64_t head,
                         const std::vector<float>& weights, bool norm, bool rotate) {
  const Shape& s = sequence.shape;
  const float* x = sequence.qkv.data() + token * s.columns() + first;
  const float* weight = weights.data();
  double factor = 1;
  if (norm) {
    const bool each = s.norm == Norm::kEach;
    const float* normed = each ? x + head * s.dim : x;
    if (each) columns = s.dim;
    if (!each) weight += head * s.dim;
    double squares = 0;
    for (int64_t i = 0; i < columns; ++i) squares += static_cast<double>(normed[i]) * normed[i];
    factor = 1 / std::sqrt(squares / static_cast<double>(columns) + 1e-5f);
  }
  std::vector<double> y(static_cast<size_t>(s.dim)), z;
  for (int64_t d = 0; d < s.dim; ++d) {
    double value = x[head * s.dim + d] * factor * (norm ? weight[d] : 1.0f);
    if (s.clip > 0) value = std::min<double>(s.clip, std::max<double>(-s.clip, value));
    y[static_cast<size_t>(d)] = value;
  }
  if (!rotate) return y;
  z = y;
  const size_t half = y.size() / 2;
  for (size_t i = 0; i < half; ++i) {
    const size_t at = static_cast<size_t>(token) * half + i;
    const double c = sequence.cos[at], n = sequence.sin[at];
    z[i] = y[i] * c - y[half + i] * n;
    z[half + i] = y[half + i] * c + y[i] * n;
  }
  return z;
}

class Reference {
 public:
  explicit Reference(const Sequence& sequence) : sequence_(sequence) {
    const Shape& s = sequence.shape;
    for (int64_t t = 0; t < sequence.tokens; ++t) {
      for (int64_t h = 0; h < s.kv_heads; ++h) {
        const int64_t columns = s.kv_heads * s.dim, k = s.heads * s.dim, v = k + columns;
        const bool norm = s.norm != Norm::kNone;
        keys_.push_back(Store(s.cache, Head(sequence, t, k, columns, h, sequence.k_norm, norm, true), false));
        values_.push_back(Store(s.cache, Head(sequence, t, v, 0, h, sequence.k_norm, false, false), false));
      }
    }
  }

  // Compare rows of the output; the first is token `past`.
  void Check(const std::vector<float>& out, int64_t past, int64_t rows, const std::string& what) const {
    const Shape& s = sequence_.shape;
    Worst worst;
    for (int64_t t = 0; t < rows; ++t) {
      for (int64_t h = 0; h < s.heads; ++h) Row(out, past + t, h, (t * s.heads + h) * s.dim, &worst);
    }
    worst.Expect(what);
  }

 private:
  void Row(const std::vector<float>& out, int64_t token, int64_t head, int64_t at, Worst* worst) const {
    const Shape& s = sequence_.shape;
    const int64_t kv = head / (s.heads / s.kv_heads);
    const bool norm = s.norm != Norm::kNone;
    const Stored q = Store(s.cache, Head(sequence_, token, 0, s.heads * s.dim, head, sequence_.q_norm, norm, true),
                           true);
    const size_t count = static_cast<size_t>(token) + 1, dim = static_cast<size_t>(s.dim);
    const double scale = 1 / std::sqrt(static_cast<double>(s.dim));
    std::vector<double> p(count), error(count), fine(count), coarse(count);
    double top = -INFINITY, sum = 0;
    for (size_t t = 0; t < count; ++t) {
      const Stored& k = keys_[t * static_cast<size_t>(s.kv_heads) + static_cast<size_t>(kv)];
      double score = 0, magnitude = 0, slack = 0;
      for (size_t d = 0; d < dim; ++d) {
        score += q.value[d] * k.value[d];
        magnitude += std::fabs(q.value[d] * k.value[d]);
        slack += std::fabs(q.value[d]) * k.slack[d] + std::fabs(k.value[d]) * q.slack[d];
      }
      p[t] = score * scale;
      // Roundoff of the sum over dimensions, and of norm and rotation before it.
      error[t] = scale * (slack + (static_cast<double>(dim) + 32) * kUnit * magnitude);
      error[t] += 8 * kUnit * (1 + std::fabs(p[t]));
      top = std::max(top, p[t]);
    }
    for (double& value : p) sum += value = std::exp(value - top);
    for (double& value : p) value /= sum;
    const size_t block = static_cast<size_t>(kKeyBlock);
    double before = 0;  // weights of the earlier blocks
    for (size_t first = 0; s.cache == CacheKind::kInt8 && first < count; first += block) {
      const size_t end = std::min(count, first + block);
      double largest = 0, all = 0;
      for (size_t t = first; t < end; ++t) {
        largest = std::max(largest, p[t] * Value(t, kv).scale);
        all += p[t] * Value(t, kv).scale;
      }
      const bool may_be_coarse = end - first == block && 16 * largest < 1.02 * before;
      for (size_t t = first; t < end; ++t) (may_be_coarse ? coarse : fine)[t] = largest / 126.49;
      before += all;
    }
    for (size_t d = 0; d < dim; ++d) {
      double y = 0, tolerance = 1e-30, noise = 0;
      for (size_t t = 0; t < count; ++t) y += p[t] * Value(t, kv).value[d];
      for (size_t t = 0; t < count; ++t) {
        const Stored& v = Value(t, kv);
        const double codes = std::fabs(v.value[d]) / (v.scale + 1e-300);
        tolerance += p[t] * (2 * error[t] * std::fabs(v.value[d] - y) + v.slack[d]) + 0.51 * fine[t] / 254 * codes;
        noise += coarse[t] * codes * coarse[t] * codes / 6;  // dithered: two errors, each of variance 1/12
        tolerance += (static_cast<double>(count) + 64) * kUnit * p[t] * std::fabs(v.value[d]);
      }
      tolerance += 6 * std::sqrt(noise);
      worst->Add(at + static_cast<int64_t>(d), out[static_cast<size_t>(at) + d], y, tolerance);
    }
  }
  const Stored& Value(size_t token, int64_t kv) const {
    return values_[token * static_cast<size_t>(sequence_.shape.kv_heads) + static_cast<size_t>(kv)];
  }

  const Sequence& sequence_;
  std::vector<Stored> keys_, values_;  // [tokens, kv_heads]
};

// -- tests ------------------------------------------------------------------------------------------------------------

std::string Describe(const Shape& s, int64_t past, int64_t rows) {
  char text[160];
  std::snprintf(text, sizeof(text), "%s cache, %d/%d heads of %d, capacity %d, norm %d, clip %g, %d new after %d",
                Name(s.cache), static_cast<int>(s.heads), static_cast<int>(s.kv_heads), static_cast<int>(s.dim),
                static_cast<int>(s.capacity), static_cast<int>(s.norm), static_cast<double>(s.clip),
                static_cast<int>(rows), static_cast<int>(past));
  return text;
}

// Check scalar against the reference, and every other table against scalar, caches included.
void TestCase(const Shape& shape, int64_t past, int64_t rows, float deviation = 1.0f) {
  const Sequence sequence(shape, past + rows, static_cast<uint32_t>(past * 131 + rows), deviation);
  const std::string what = Describe(shape, past, rows);
  CacheBuffer cache(shape);
  if (past > 0) Run(kScalarKernels, sequence, cache, 0, past);
  const CacheBuffer before = cache;
  const std::vector<float> out = Run(kScalarKernels, sequence, cache, past, rows);
  Reference(sequence).Check(out, past, rows, what);
  for (const Kernels* table : FastTables()) {
    CacheBuffer own = before;
    ExpectSame(Run(*table, sequence, own, past, rows, true), out, what + ", " + table->name);
    EXPECT(own == cache, "%s, %s: cache", what.c_str(), table->name);
  }
}

const CacheKind kKinds[] = {CacheKind::kFloat32, CacheKind::kFloat16, CacheKind::kInt8, CacheKind::kFp8};

void TestLengths(bool reduced) {
  std::vector<int64_t> counts = {1, 2, 5, 8, 9, 17, 64, 100};
  if (!reduced) counts = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 64, 100};
  for (const CacheKind kind : kKinds) {
    for (const int64_t past : {0, 1, 15, 16, 17, 511, 513}) {
      for (const int64_t rows : counts) {
        if (reduced && past > 100 && rows > 9) continue;
        TestCase({kind, rows % 2 ? 4 : 2, rows % 2 ? 1 : 2, 16, past + rows + (past + rows) % 3}, past, rows);
      }
    }
  }
}

void TestShapes(bool reduced) {
  for (const CacheKind kind : kKinds) {
    for (const int64_t dim : {2, 6, 16, 24, 30, 64, 80, 128}) {
      for (const int64_t rows : {1, 3, 20}) {
        if (reduced && rows == 3) continue;
        for (const int64_t past : {0, 37, 130}) {
          const int64_t spare = dim % 5;
          TestCase({kind, 4, 1, dim, past + rows + spare, Norm::kAll, 0.0f}, past, rows);
          TestCase({kind, 2, 2, dim, past + rows + spare, Norm::kNone, 1.5f}, past, rows);
          if (past < 100) TestCase({kind, 4, 2, dim, past + rows + spare, Norm::kEach, 0.0f}, past, rows);
        }
      }
    }
    TestCase({kind, 12, 1, 8, 40, Norm::kAll, 2.0f}, 20, 12);
    TestCase({kind, 12, 3, 8, 40, Norm::kEach, 1.0f}, 20, 12);
    TestCase({kind, 80, 1, 8, 40, Norm::kNone, 0.0f}, 5, 12);
    // Scores far apart: most probabilities are negligible beside the largest.
    TestCase({kind, 2, 1, 64, 300, Norm::kNone, 0.0f}, 270, 1, 6.0f);
    TestCase({kind, 2, 1, 64, 300, Norm::kNone, 0.0f}, 200, 40, 6.0f);
  }
}

// With one head both kinds of QK-norm give the same bits.
void TestTheNormOfOneHead(const Kernels& table) {
  const Shape all = {CacheKind::kFloat32, 1, 1, 24, 30, Norm::kAll};
  Shape each = all;
  each.norm = Norm::kEach;
  CacheBuffer first(all), second(each);
  const std::vector<float> wanted = Run(table, Sequence(all, 30, 11), first, 0, 30);
  ExpectSame(Run(table, Sequence(each, 30, 11), second, 0, 30), wanted, std::string("one head, ") + table.name);
  EXPECT(first == second, "%s: cache of one head", table.name);
}

// int8: many small weights keep their joint effect beside a large weight in each block, although each of them is below
// the smallest code.
void TestSmallWeightsSurvive() {
  const Shape shape = {CacheKind::kInt8, 1, 1, 16, 3000};
  Sequence sequence(shape, 3000, 21, 0.01f);
  std::fill(sequence.cos.begin(), sequence.cos.end(), 1.0f);
  std::fill(sequence.sin.begin(), sequence.sin.end(), 0.0f);
  for (size_t t = 0; t < 3000; ++t) {
    float* row = sequence.qkv.data() + t * 48;
    const bool large = t % 128 == 77;
    for (size_t d = 0; d < 16; ++d) {
      row[d] = 1.0f;
      row[16 + d] = large ? 1.426f : 0.01f * static_cast<float>(d % 3);  // e^(4 * 1.426) = 300
      row[32 + d] += large ? -1.0f : 1.0f;
    }
  }
  CacheBuffer cache(shape);
  Run(kScalarKernels, sequence, cache, 0, 2960);
  Reference reference(sequence);
  reference.Check(Run(kScalarKernels, sequence, cache, 2960, 1), 2960, 1, "small weights, one row");
  reference.Check(Run(kScalarKernels, sequence, cache, 2960, 40), 2960, 40, "small weights, many rows");
}

// The value of an E4M3 code, from the format's definition (OCP 8-bit floating point, revision 1.0).
float Fp8Value(uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const double magnitude = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return static_cast<float>(exponent == 15 && mantissa == 7 ? NAN : code >= 128 ? -magnitude : magnitude);
}

// Convert the keys or values of an fp8 cache to those of a float32 cache, which has the same element order.
std::vector<uint8_t> Upcast(const Shape& shape, const std::vector<uint8_t>& cache, bool keys) {
  std::vector<float> wide;
  for (int64_t h = 0; h < shape.kv_heads; ++h) {
    for (int64_t first = 0; first < shape.capacity; first += kCacheTile) {
      const int64_t n = std::min(kCacheTile, shape.capacity - first);
      const uint8_t* tile = cache.data() + (h * shape.capacity + first) * AttentionRowBytes(shape.cache, shape.dim);
      for (int64_t i = 0; i < n * shape.dim; ++i) {
        const int64_t token = keys ? i % n : i / shape.dim;
        uint32_t bits = 0;
        std::memcpy(reinterpret_cast<uint8_t*>(&bits) + 2, tile + n * shape.dim + 2 * token, 2);
        float scale;
        std::memcpy(&scale, &bits, 4);
        wide.push_back(Fp8Value(tile[i]) * scale);
      }
    }
  }
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(wide.data());
  return std::vector<uint8_t>(bytes, bytes + 4 * wide.size());
}

// fp8: the result equals that of a float32 cache with the same keys and values.
void TestFp8IsFloat32OfTheRounded(const Kernels& table) {
  for (const int64_t rows : {2, 40}) {
    const Shape shape = {CacheKind::kFp8, 4, 2, 24, 309};
    Shape wide_shape = shape;
    wide_shape.cache = CacheKind::kFloat32;
    Sequence sequence(shape, 300, 17), wide_sequence(wide_shape, 300, 17);
    CacheBuffer cache(shape), wide(wide_shape);
    const int64_t past = 300 - rows;
    Run(table, sequence, cache, 0, past);
    const std::vector<float> got = Run(table, sequence, cache, past, rows);
    const std::vector<float> wanted = Run(table, wide_sequence, wide, past, rows, false, [&] {
      const std::vector<uint8_t> keys = Upcast(shape, cache.key, true), values = Upcast(shape, cache.value, false);
      std::copy(keys.begin(), keys.end(), wide.key.begin());
      std::copy(values.begin(), values.end(), wide.value.begin());
    });
    ExpectSame(got, wanted, std::string("fp8 as float32, ") + table.name);
  }
}

// Five tokens at once give the same bits as one by one, and so do prompts cut anywhere.
void TestRowsAreAlone(const Kernels& table) {
  for (const CacheKind kind : kKinds) {
    const Shape shape = {kind, 8, 2, 32, 1203};
    const Sequence sequence(shape, 1200, 5);
    const std::string what = std::string(Name(kind)) + ", " + table.name;
    CacheBuffer whole(shape), parts(shape);
    const std::vector<float> all = Run(table, sequence, whole, 0, 1200);
    std::vector<float> joined = Run(table, sequence, parts, 0, 700);
    const std::vector<float> rest = Run(table, sequence, parts, 700, 500);
    joined.insert(joined.end(), rest.begin(), rest.end());
    ExpectSame(joined, all, what + ": a prompt in two");
    EXPECT(whole == parts, "%s: cache of a prompt in two", what.c_str());
    for (const int64_t past : {3, 510, 1030}) {
      const std::vector<float> five = Run(table, sequence, parts, past, 5);
      std::vector<float> singles;
      for (int64_t i = 0; i < 5; ++i) {
        const std::vector<float> one = Run(table, sequence, parts, past + i, 1);
        singles.insert(singles.end(), one.begin(), one.end());
      }
      ExpectSame(singles, five, what + ": five tokens one by one");
    }
  }
}

// After dropping tokens and writing others, the result does not depend on the dropped ones.
void TestOverwriting(const Kernels& table) {
  for (const CacheKind kind : kKinds) {
    const Shape shape = {kind, 2, 2, 24, 53};
    const Sequence first(shape, 53, 8), second(shape, 53, 9);
    Sequence mixed = first;  // 21 tokens of the first, then the second's
    std::copy(second.qkv.begin() + 21 * shape.columns(), second.qkv.end(), mixed.qkv.begin() + 21 * shape.columns());
    CacheBuffer used(shape), fresh(shape);
    Run(table, first, used, 0, 53);
    Run(table, mixed, used, 21, 32);
    Run(table, mixed, fresh, 0, 53);
    EXPECT(used == fresh, "%s, %s: cache after overwriting", Name(kind), table.name);
    CacheBuffer stale(shape), clean(shape);
    Run(table, first, stale, 0, 53);
    Run(table, first, clean, 0, 21);
    for (const int64_t rows : {2, 12}) {
      const std::vector<float> wanted = Run(table, mixed, clean, 21, rows);
      ExpectSame(Run(table, mixed, stale, 21, rows), wanted, std::string(Name(kind)) + ": stale tokens");
    }
  }
}

// A query that is not finite affects only its row and head; a key or value only later rows of its head.
void TestNotFinite(const Kernels& table) {
  for (const CacheKind kind : kKinds) {
    for (const float bad : {NAN, INFINITY, -INFINITY}) {
      for (const int part : {0, 1, 2}) {
        for (const int64_t rows : {5, 30}) {
          const Shape shape = {kind, 4, 2, 32, 60};
          Sequence sequence(shape, 60, 3);
          CacheBuffer cache(shape), clean_cache(shape);
          const std::vector<float> clean = Run(table, sequence, clean_cache, 0, rows);
          const int64_t token = 2, head = 1;  // query head 1, or KV head 1 with query heads 2 and 3
          const int64_t first = part == 0 ? 0 : part == 1 ? 4 : 6;
          sequence.qkv[static_cast<size_t>(token * shape.columns() + (first + head) * 32 + 7)] = bad;
          const std::vector<float> out = Run(table, sequence, cache, 0, rows);
          for (int64_t t = 0; t < rows; ++t) {
            for (int64_t h = 0; h < 4; ++h) {
              const bool hit = part == 0 ? t == token && h == head : t >= token && h / 2 == head;
              bool finite = true, same = true;
              for (size_t i = static_cast<size_t>((t * 4 + h) * 32), d = 0; d < 32; ++d) {
                finite = finite && std::isfinite(out[i + d]);
                same = same && SameFloat(out[i + d], clean[i + d]);
              }
              // An infinite score may be minus infinity, which is just a probability of zero.
              const bool spoilt = !finite || (std::isinf(bad) && part != 2);
              EXPECT(hit ? spoilt : same, "%s, %s: %g in part %d, %d rows: token %d, head %d", Name(kind), table.name,
                     static_cast<double>(bad), part, static_cast<int>(rows), static_cast<int>(t), static_cast<int>(h));
            }
          }
        }
      }
    }
  }
}

}  // namespace

// `attention_test reduced` leaves out tests that take too long under emulation.
int main(int argc, char** argv) {
  const bool reduced = argc > 1 && std::strcmp(argv[1], "reduced") == 0;
  TestSmallWeightsSurvive();
  TestLengths(reduced);
  TestShapes(reduced);
  std::vector<const Kernels*> tables = FastTables();
  if (!reduced || tables.empty()) tables.push_back(&kScalarKernels);
  for (const Kernels* table : tables) {
    TestTheNormOfOneHead(*table);
    TestRowsAreAlone(*table);
    TestFp8IsFloat32OfTheRounded(*table);
    TestOverwriting(*table);
    TestNotFinite(*table);
  }
  return edgelm_test::Finish();
}
