// GroupQueryAttention: QK-norm, rotary embedding, append of new tokens to the KV cache, and causal attention over it.
//
// The cache is updated in place if the runtime binds the same buffer as past and present; otherwise past is copied
// first.
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "ort/tasks.h"
#include "ort/scratch.h"
#include "ort/weights.h"

namespace edgelm::ort {
namespace {

constexpr int64_t kCopyBytes = 1 << 20;  // bytes

// The number of threads that may run at once. Each needs a workspace, and the runtime does not say which thread a task
// runs on. So there is one task per workspace, which takes unit after unit until none is left. A unit's result does not
// depend on its task.
int64_t Workers() {
  static const int64_t workers = std::max(1u, std::thread::hardware_concurrency());
  return workers;
}

class GroupQueryAttention {
 public:
  static constexpr const char* kName = "GroupQueryAttention";
  static constexpr Declared kInputs[] = {
      {kFloat},           {kUint8}, {kUint8}, {kInt64}, {kFloat}, {kFloat}, {kFloat, kOptional}, {kFloat, kOptional},
      {kInt64, kOptional}};
  static constexpr Declared kOutputs[] = {{kFloat}, {kUint8}, {kUint8}};

  explicit GroupQueryAttention(const Node& node)
      : heads_(node.Int("num_heads", 0)),
        kv_heads_(node.Int("kv_num_heads", 0)),
        epsilon_(node.Float("epsilon", 1e-5f)),
        clip_(node.Float("clip", 0.0f)),
        scale_(node.Float("scale", 0.0f)),
        q_norm_(node, 6, "q_norm"),
        k_norm_(node, 7, "k_norm") {
    if (heads_ < 1 || kv_heads_ < 1 || heads_ % kv_heads_ != 0) {
      Fail("attributes num_heads and kv_num_heads are ", heads_, " and ", kv_heads_,
           ", expected num_heads to be a multiple of kv_num_heads");
    }
  }

  void Compute(const Run& run) const {
    const Tensor qkv = run.Required(0, "qkv");
    const Tensor past_key = run.Required(1, "past_key"), past_value = run.Required(2, "past_value");
    const Attention call = Check(run, qkv, past_key.shape, past_value.shape);
    const int64_t batch = qkv.shape[0], tokens = qkv.shape[1], width = heads_ * call.head_dim;
    const std::vector<Attention> all = Sequences(run, call, batch, tokens);

    float* out = run.Output<float>(0, {batch, tokens, width});
    uint8_t* key = run.Output<uint8_t>(1, past_key.shape);
    uint8_t* value = run.Output<uint8_t>(2, past_value.shape);
    CopyCache(run, past_key, key);
    CopyCache(run, past_value, value);

    ScratchLayout layout;
    std::vector<Attention> calls;
    std::vector<Buffer<uint8_t>> buffers;
    const int64_t cache_bytes = past_key.shape.elements() / std::max<int64_t>(1, batch);
    for (int64_t b = 0; b < batch; ++b) {
      Attention one = all[b];
      one.qkv = qkv.As<float>() + b * tokens * qkv.shape.last();
      one.key = key + b * cache_bytes;
      one.value = value + b * cache_bytes;
      one.out = out + b * tokens * width;
      const int64_t padding = tokens - one.rows;
      if (padding > 0) std::memset(one.out + one.rows * width, 0, padding * width * sizeof(float));
      if (one.rows == 0) continue;
      buffers.push_back(layout.Add<uint8_t>(AttentionScratchBytes(one)));
      calls.push_back(one);
    }
    if (calls.empty()) return;
    const int64_t workspace_bytes = (AttentionWorkspaceBytes(call) + 63) / 64 * 64;
    const Buffer<uint8_t> workspaces = layout.Add<uint8_t>(Workers() * workspace_bytes);
    const Scratch scratch(layout);
    for (size_t i = 0; i < calls.size(); ++i) calls[i].scratch = scratch[buffers[i]];

    const AttentionKernels& kernels = ChosenKernels().attention;
    uint8_t* const workspace = scratch[workspaces];
    const auto prepare = [](const Attention& one) { return one.prepare_units(); };
    const auto attend = [](const Attention& one) { return one.attend_units(); };
    const auto combine = [](const Attention& one) { return one.combine_units(); };
    Units(run, calls, prepare, [&](const Attention& one, int64_t unit, int64_t worker) {
      kernels.prepare(one, unit, workspace + worker * workspace_bytes);
    });
    Units(run, calls, attend, [&](const Attention& one, int64_t unit, int64_t worker) {
      kernels.attend(one, unit, workspace + worker * workspace_bytes);
    });
    Units(run, calls, combine, [&](const Attention& one, int64_t unit, int64_t) { kernels.combine(one, unit); });
  }

 private:
  // Check what all sequences share, and return it.
  Attention Check(const Run& run, const Tensor& qkv, const Shape& past_key, const Shape& past_value) const;
  // Return a call for each sequence. Fails if its lengths do not fit the cache or the rotary tables.
  std::vector<Attention> Sequences(const Run& run, const Attention& call, int64_t batch, int64_t tokens) const;

  static void CopyCache(const Run& run, const Tensor& past, uint8_t* present) {
    const uint8_t* from = past.As<uint8_t>();
    if (from == present) return;
    const int64_t bytes = past.shape.elements();
    run.ParallelFor(TaskCount(bytes, kCopyBytes), [&](int64_t i) {
      std::memcpy(present + i * kCopyBytes, from + i * kCopyBytes, std::min(kCopyBytes, bytes - i * kCopyBytes));
    });
  }

  // Run all units of a step: work(call, unit, worker).
  template <typename Count, typename Work>
  static void Units(const Run& run, const std::vector<Attention>& calls, const Count& count, const Work& work) {
    std::vector<int64_t> ends;
    int64_t total = 0;
    for (const Attention& call : calls) ends.push_back(total += count(call));
    std::atomic<int64_t> next{0};
    run.ParallelFor(std::min(total, Workers()), [&](int64_t worker) {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < total;) {
        const auto b = static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), i) - ends.begin());
        work(calls[b], b == 0 ? i : i - ends[b - 1], worker);
      }
    });
  }

  int64_t heads_, kv_heads_;
  float epsilon_, clip_, scale_;
  VectorInput q_norm_, k_norm_;
};

Attention GroupQueryAttention::Check(const Run& run, const Tensor& qkv, const Shape& past_key,
                                     const Shape& past_value) const {
  const int64_t all = heads_ + 2 * kv_heads_;
  const Shape& shape = qkv.shape;
  if (shape.rank != 3 || shape.last() < 1 || shape.last() % (2 * all) != 0) {
    Fail("qkv has shape ", shape, ", expected [batch, tokens, ", all,
         " * head size] with an even head size (num_heads + 2 * kv_num_heads = ", all, ")");
  }
  Attention call;
  call.heads = heads_;
  call.kv_heads = kv_heads_;
  call.head_dim = shape.last() / all;
  call.epsilon = epsilon_;
  call.clip = clip_;
  call.scale = scale_;
  const int64_t batch = shape[0], dim = call.head_dim;
  if (past_key.rank != 4 || past_key[0] != batch || past_key[1] != kv_heads_) {
    Fail("past_key has shape ", past_key, ", expected [", batch, ", ", kv_heads_, ", capacity, bytes per token]");
  }
  if (!(past_value == past_key)) Fail("past_value has shape ", past_value, ", past_key ", past_key);
  call.capacity = past_key[2];
  // If two cache types take the same number of bytes (head sizes 2 and 4), assume the larger type.
  bool known = false;
  for (CacheKind kind : {CacheKind::kFp8, CacheKind::kInt8, CacheKind::kFloat16, CacheKind::kFloat32}) {
    if (past_key[3] != AttentionRowBytes(kind, dim)) continue;
    call.cache = kind;
    known = true;
  }
  if (!known) {
    Fail("past_key has ", past_key[3], " bytes per token, expected ", AttentionRowBytes(CacheKind::kFloat32, dim),
         " (float32), ", AttentionRowBytes(CacheKind::kFloat16, dim), " (float16), ",
         AttentionRowBytes(CacheKind::kInt8, dim), " (int8) or ", AttentionRowBytes(CacheKind::kFp8, dim),
         " (fp8) for a head size of ", dim);
  }
  call.q_norm = q_norm_.Get(run, heads_ * dim, "one value per element of the queries", dim, &call.q_norm_per_head);
  call.k_norm = k_norm_.Get(run, kv_heads_ * dim, "one value per element of the keys", dim, &call.k_norm_per_head);
  return call;
}

std::vector<Attention> GroupQueryAttention::Sequences(const Run& run, const Attention& call, int64_t batch,
                                                      int64_t tokens) const {
  const Tensor past = run.Required(3, "past_lengths"), cos = run.Required(4, "cos"), sin = run.Required(5, "sin");
  Tensor lengths;
  const bool padded = run.Input(8, &lengths);
  if (!(past.shape == Shape{batch})) Fail("past_lengths has shape ", past.shape, ", expected ", Shape{batch});
  if (padded && !(lengths.shape == Shape{batch})) {
    Fail("new_lengths has shape ", lengths.shape, ", expected ", Shape{batch});
  }
  if (cos.shape.rank != 2 || cos.shape.last() != call.head_dim / 2) {
    Fail("cos has shape ", cos.shape, ", expected [positions, ", call.head_dim / 2, "], half a head's size");
  }
  if (!(sin.shape == cos.shape)) Fail("sin has shape ", sin.shape, ", cos ", cos.shape);
  std::vector<Attention> calls(static_cast<size_t>(batch), call);
  for (int64_t b = 0; b < batch; ++b) {
    Attention& one = calls[b];
    one.past = past.As<int64_t>()[b];
    one.rows = padded ? lengths.As<int64_t>()[b] : tokens;
    one.cos = cos.As<float>();
    one.sin = sin.As<float>();
    if (one.rows < 0 || one.rows > tokens) {
      Fail("new_lengths of sequence ", b, " is ", one.rows, ", expected 0..", tokens, ", the tokens in qkv");
    }
    if (one.past < 0 || one.past > call.capacity - one.rows) {
      Fail("sequence ", b, " has ", one.past, " past tokens and ", one.rows, " new ones, the cache has room for ",
           call.capacity);
    }
    if (one.total() > cos.shape[0]) {
      Fail("sequence ", b, " has ", one.past, " past tokens and ", one.rows, " new ones, cos has ", cos.shape[0],
           " positions");
    }
  }
  return calls;
}

const Operator<GroupQueryAttention> op;

}  // namespace

const OrtCustomOp* GroupQueryAttentionOp() { return &op; }

}  // namespace edgelm::ort
