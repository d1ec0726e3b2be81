// The `prepare` step of attention: QK-norm, clip and rotary embedding of the new tokens; keys and values to the cache.
#ifndef EDGELM_KERNELS_ATTENTION_PREPARE_IMPL_H_
#define EDGELM_KERNELS_ATTENTION_PREPARE_IMPL_H_

#include "attention_cache_impl.h"

namespace edgelm {
namespace {

// The steps from x to what is stored: factor * weight (norm), clip, rotation. A null pointer leaves its step out.
struct Transform {
  float factor;
  const float* weight;
  float clip;
  const float* cos;
  const float* sin;
};

inline F32 Normed(const Transform& t, const float* x, int64_t i, int64_t count) {
  F32 a = LoadPart(x + i, count);
  if (t.weight != nullptr) a = Mul(Mul(a, Splat(t.factor)), LoadPart(t.weight + i, count));
  if (t.clip > 0.0f) a = Max(Splat(-t.clip), Min(Splat(t.clip), a));  // NaN stays NaN
  return a;
}

// Return 1 / sqrt(mean(x^2) + epsilon), computed as in RmsNorm.
inline float NormFactor(const float* x, int64_t columns, float epsilon) {
  F32 squares = Splat(0.0f);
  for (int64_t i = 0; i < columns; i += 16) {
    const F32 a = LoadPart(x + i, columns - i < 16 ? columns - i : 16);
    squares = Fma(a, a, squares);
  }
  return 1.0f / __builtin_sqrtf(Sum(squares) / static_cast<float>(columns) + epsilon);
}

// Set the norm of head h of x [heads, head_dim]; call for heads in order. Either one norm covers all heads with a
// weight of their whole width, or each head is normed separately with a weight [head_dim].
inline void SetNorm(const float* weight, bool per_head, const float* x, int64_t heads, int64_t head_dim, int64_t h,
                    float epsilon, Transform* how) {
  if (weight == nullptr) return;
  if (per_head) {
    how->factor = NormFactor(x + h * head_dim, head_dim, epsilon);
  } else if (h == 0) {
    how->factor = NormFactor(x, heads * head_dim, epsilon);
  }
  how->weight = per_head ? weight : weight + h * head_dim;
}

// Transform one head: y [width] from x [head_dim], padded with zeros. `t.weight` is this head's.
inline void TransformHead(const Transform& t, const float* x, int64_t head_dim, int64_t width, float* y) {
  Store(y + width - 16, Splat(0.0f));
  if (t.cos == nullptr) {
    for (int64_t i = 0; i < head_dim; i += 16) {
      const int64_t count = head_dim - i < 16 ? head_dim - i : 16;
      StorePart(y + i, Normed(t, x, i, count), count);
    }
    return;
  }
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < half; i += 16) {
    const int64_t count = half - i < 16 ? half - i : 16;
    const F32 a = Normed(t, x, i, count), b = Normed(t, x, half + i, count);
    const F32 c = LoadPart(t.cos + i, count), s = LoadPart(t.sin + i, count);
    StorePart(y + i, Sub(Mul(a, c), Mul(b, s)), count);
    StorePart(y + half + i, Add(Mul(b, c), Mul(a, s)), count);
  }
}

inline void StoreQuery(const Attention& call, const AttentionLayout& at, int64_t row, const float* y, float scale) {
  if (call.cache != CacheKind::kInt8) {
    float* to = reinterpret_cast<float*>(call.scratch + at.queries) + row * at.width;
    for (int64_t i = 0; i < at.width; i += 16) Store(to + i, Mul(Load(y + i), Splat(scale)));
    return;
  }
  int8_t* codes = reinterpret_cast<int8_t*>(call.scratch + at.queries) + row * at.width;
  float step;
  QuantHead(y, at.width, codes, &step);
  int32_t sum = 0;
  for (int64_t i = 0; i < at.width; ++i) sum += codes[i];
  reinterpret_cast<float*>(call.scratch + at.query_scales)[row] = step * scale;
  reinterpret_cast<int32_t*>(call.scratch + at.query_sums)[row] = sum;
}

void AttentionPrepare(const Attention& call, int64_t unit, uint8_t* workspace) {
  const AttentionLayout at(call);
  const int64_t dim = call.head_dim, group = call.group();
  const int64_t end = (unit + 1) * kPrepareRows < call.rows ? (unit + 1) * kPrepareRows : call.rows;
  const float scale = call.scale != 0.0f ? call.scale : 1.0f / __builtin_sqrtf(static_cast<float>(dim));
  float* y = reinterpret_cast<float*>(workspace);
  float* temporary = y + at.width;
  for (int64_t t = unit * kPrepareRows; t < end; ++t) {
    const float* q = call.qkv + t * (call.heads + 2 * call.kv_heads) * dim;
    const float* k = q + call.heads * dim;
    const float* v = k + call.kv_heads * dim;
    const int64_t position = call.past + t;
    const Transform rotated = {0.0f, nullptr, call.clip, call.cos + position * (dim / 2),
                               call.sin + position * (dim / 2)};
    Transform how = rotated;
    for (int64_t h = 0; h < call.heads; ++h) {
      SetNorm(call.q_norm, call.q_norm_per_head, q, call.heads, dim, h, call.epsilon, &how);
      TransformHead(how, q + h * dim, dim, at.width, y);
      StoreQuery(call, at, (h / group * call.rows + t) * group + h % group, y, scale);
    }
    how = rotated;
    const Transform plain = {0.0f, nullptr, call.clip, nullptr, nullptr};
    for (int64_t h = 0; h < call.kv_heads; ++h) {
      SetNorm(call.k_norm, call.k_norm_per_head, k, call.kv_heads, dim, h, call.epsilon, &how);
      TransformHead(how, k + h * dim, dim, at.width, y);
      StoreToken<true>(Cache(call, call.key, h), call.cache, position, y, at.width, temporary);
      TransformHead(plain, v + h * dim, dim, at.width, y);
      StoreToken<false>(Cache(call, call.value, h), call.cache, position, y, at.width, temporary);
    }
  }
}

}  // namespace
}  // namespace edgelm

#endif  // EDGELM_KERNELS_ATTENTION_PREPARE_IMPL_H_
