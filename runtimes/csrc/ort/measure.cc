// Timing of the kernels on matrices and caches of a model's shapes, without a model and without ONNX Runtime, so that
// the speed of a bundle can be predicted before it exists. Work is divided into the same tasks as in the operators.
#include "ort/measure.h"

#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "ort/tasks.h"

namespace edgelm::ort {
namespace {

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Bytes that start at a cache line. They are written, since the system maps all untouched pages to one page of zeros.
class Bytes {
 public:
  explicit Bytes(int64_t size)
      : memory_(static_cast<size_t>(size) + 64), start_(memory_.data() + (64 - Address() % 64) % 64) {
    // As float32, float16, bfloat16 and E4M3 this is a small normal number.
    std::memset(memory_.data(), 0x3c, memory_.size());
  }
  template <typename T>
  T* As() const {
    return reinterpret_cast<T*>(start_);
  }

 private:
  uintptr_t Address() const { return reinterpret_cast<uintptr_t>(memory_.data()); }

  std::vector<uint8_t> memory_;
  uint8_t* start_;
};

// Threads that wait for work by spinning, as those of ONNX Runtime do. The calling thread is one of them.
class Team {
 public:
  explicit Team(int32_t threads) {
    for (int32_t i = 1; i < threads; ++i) workers_.emplace_back([this, i] { Serve(i); });
  }
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;
  ~Team() {
    stop_ = true;
    ++round_;
    for (std::thread& worker : workers_) worker.join();
  }

  // Run work(task, thread) for every task below `tasks`.
  template <typename Work>
  void For(int64_t tasks, const Work& work) {
    if (tasks <= 0) return;
    call_ = [](const void* with, int64_t task, int32_t thread) { (*static_cast<const Work*>(with))(task, thread); };
    with_ = &work;
    tasks_ = tasks;
    next_ = 0;
    left_ = static_cast<int32_t>(workers_.size());
    ++round_;
    Take(0);
    Wait([this] { return left_ == 0; });
  }

 private:
  template <typename Done>
  static void Wait(const Done& done) {
    for (int64_t spins = 0; !done(); ++spins) {
      if (spins > 20000) std::this_thread::yield();
    }
  }
  void Take(int32_t thread) {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) call_(with_, i, thread);
  }
  void Serve(int32_t thread) {
    for (int64_t seen = 0;;) {
      Wait([&] { return round_ != seen; });
      seen = round_;
      if (stop_) return;
      Take(thread);
      --left_;
    }
  }

  void (*call_)(const void*, int64_t, int32_t) = nullptr;
  const void* with_ = nullptr;
  int64_t tasks_ = 0;
  std::atomic<int64_t> next_{0}, round_{0};
  std::atomic<int32_t> left_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

class Measured {
 public:
  virtual ~Measured() = default;
  virtual void Run(Team* team) = 0;
};

// `matrices` matmuls of one shape as one parallel region, as those of a layer's experts are.
class Matmul final : public Measured {
 public:
  Matmul(const Kernels& kernels, const edgelm_measured& op)
      : kernels_(kernels.linear), tokens_(op.tokens), high_only_(op.high_only != 0), floats_(op.floats != 0) {
    for (int64_t i = 0; i < op.matrices; ++i) {
      Matrix matrix;
      if (ParseMatrix(op.weights + i * op.stride, op.stride, &matrix) != nullptr) return;
      if (!matrices_.empty() && matrix.columns != columns()) return;
      matrices_.push_back(matrix);
    }
    if (matrices_.empty()) return;
    const int64_t rounded = RoundUp(columns(), kBlock), blocks = rounded / kBlock, outputs = matrices_[0].outputs();
    x_ = std::make_unique<Bytes>(4 * tokens_ * columns());
    y_ = std::make_unique<Bytes>(4 * tokens_ * outputs);
    residual_ = std::make_unique<Bytes>(4 * tokens_ * outputs);
    norm_ = std::make_unique<Bytes>(4 * columns());
    normed_ = std::make_unique<Bytes>(4 * tokens_ * columns());
    codes_ = std::make_unique<Bytes>(tokens_ * rounded);
    scales_ = std::make_unique<Bytes>(4 * tokens_ * blocks);
    offsets_ = std::make_unique<Bytes>(4 * tokens_ * blocks);
    quant_.codes = codes_->As<int8_t>();
    quant_.scales = scales_->As<float>();
    quant_.offsets = offsets_->As<int32_t>();
    quant_.columns = rounded;
  }

  bool ok() const { return !matrices_.empty(); }

  void Run(Team* team) override {
    const bool int8 = matrices_[0].integer() && !floats_;
    const float* const x = x_->As<float>();
    float* const normed = normed_->As<float>();
    const auto prepare = [&](int64_t first, int64_t count) {
      kernels_.rms_norm(x + first * columns(), columns(), count, columns(), norm_->As<float>(), 1e-5f,
                        normed + first * columns(), columns());
      if (int8) {
        kernels_.quantize_rows(normed + first * columns(), columns(), count, columns(), quant_.From(first));
      }
    };
    if (tokens_ <= kSerialRows) {
      prepare(0, tokens_);
    } else {
      team->For(TaskCount(tokens_, kTaskRows),
                [&](int64_t i, int32_t) { prepare(i * kTaskRows, std::min(kTaskRows, tokens_ - i * kTaskRows)); });
    }
    const Grid grid(matrices_[0], tokens_, int8);
    team->For(grid.tasks * static_cast<int64_t>(matrices_.size()), [&](int64_t i, int32_t) {
      const Matrix& m = matrices_[static_cast<size_t>(i / grid.tasks)];
      grid.Task(i % grid.tasks, [&](int64_t begin, int64_t end, int64_t first, int64_t rows) {
        Output out;
        out.finish = m.swiglu ? Finish::kSwiglu : Finish::kStore;
        out.y = y_->As<float>();
        out.ldy = m.outputs();
        if (!m.swiglu) out.residual = residual_->As<float>();
        out = out.From(first);
        if (!int8) {
          kernels_.linear_float(m, begin, end, normed + first * columns(), columns(), rows, out);
        } else {
          (high_only_ ? kernels_.linear_high : kernels_.linear_int8)(m, begin, end, quant_.From(first), rows, out);
        }
      });
    });
  }

 private:
  int64_t columns() const { return matrices_[0].columns; }

  const LinearKernels& kernels_;
  int64_t tokens_;
  bool high_only_, floats_;
  std::vector<Matrix> matrices_;
  std::unique_ptr<Bytes> x_, y_, residual_, norm_, normed_, codes_, scales_, offsets_;
  QuantRows quant_;
};

class CachedAttention final : public Measured {
 public:
  CachedAttention(const Kernels& kernels, const edgelm_measured& op, int32_t threads) : kernels_(kernels.attention) {
    call_.cache = static_cast<CacheKind>(op.cache);
    call_.heads = op.heads;
    call_.kv_heads = op.kv_heads;
    call_.head_dim = op.head_dim;
    call_.past = op.past;
    call_.rows = op.tokens;
    call_.capacity = RoundUp(call_.total(), kCacheTile);
    const int64_t row = AttentionRowBytes(call_.cache, op.head_dim), width = (op.heads + 2 * op.kv_heads) * op.head_dim;
    workspace_bytes_ = RoundUp(AttentionWorkspaceBytes(call_), 64);
    key_ = std::make_unique<Bytes>(op.kv_heads * call_.capacity * row);
    value_ = std::make_unique<Bytes>(op.kv_heads * call_.capacity * row);
    rope_ = std::make_unique<Bytes>(4 * call_.total() * (op.head_dim / 2));
    qkv_ = std::make_unique<Bytes>(4 * op.tokens * width);
    out_ = std::make_unique<Bytes>(4 * op.tokens * op.heads * op.head_dim);
    scratch_ = std::make_unique<Bytes>(AttentionScratchBytes(call_));
    workspace_ = std::make_unique<Bytes>(workspace_bytes_ * threads);
    call_.key = key_->As<uint8_t>();
    call_.value = value_->As<uint8_t>();
    call_.cos = call_.sin = rope_->As<float>();
    call_.qkv = qkv_->As<float>();
    call_.out = out_->As<float>();
    call_.scratch = scratch_->As<uint8_t>();
  }

  void Run(Team* team) override {
    uint8_t* const workspace = workspace_->As<uint8_t>();
    team->For(call_.prepare_units(),
              [&](int64_t i, int32_t thread) { kernels_.prepare(call_, i, workspace + thread * workspace_bytes_); });
    team->For(call_.attend_units(),
              [&](int64_t i, int32_t thread) { kernels_.attend(call_, i, workspace + thread * workspace_bytes_); });
    team->For(call_.combine_units(), [&](int64_t i, int32_t) { kernels_.combine(call_, i); });
  }

 private:
  const AttentionKernels& kernels_;
  Attention call_;
  int64_t workspace_bytes_ = 0;
  std::unique_ptr<Bytes> key_, value_, rope_, qkv_, out_, scratch_, workspace_;
};

bool Valid(const edgelm_measured& op) {
  if (op.tokens < 1) return false;
  if (op.cache < 0) return op.weights != nullptr && op.matrices > 0 && op.stride > 0;
  return op.cache <= static_cast<int64_t>(CacheKind::kFp8) && op.kv_heads > 0 && op.heads > 0 &&
         op.heads % op.kv_heads == 0 && op.head_dim > 0 && op.head_dim % 2 == 0 && op.past >= 0;
}

int32_t Measure(const edgelm_measured* ops, int64_t count, int32_t threads, int32_t passes, double* seconds) {
  std::string why;
  const Kernels* kernels = ChooseKernels(&why);
  if (kernels == nullptr) return kMeasureNoKernels;
  if (count < 1 || threads < 1 || passes < 1) return kMeasureInvalid;
  std::vector<std::unique_ptr<Measured>> all;
  for (int64_t i = 0; i < count; ++i) {
    if (!Valid(ops[i])) return kMeasureInvalid;
    if (ops[i].cache >= 0) {
      all.push_back(std::make_unique<CachedAttention>(*kernels, ops[i], threads));
      continue;
    }
    auto matmul = std::make_unique<Matmul>(*kernels, ops[i]);
    if (!matmul->ok()) return kMeasureInvalid;
    all.push_back(std::move(matmul));
  }
  Team team(threads);
  for (int32_t pass = 0; pass < passes; ++pass) {
    for (size_t i = 0; i < all.size(); ++i) {
      const double start = Now();
      all[i]->Run(&team);
      *seconds++ = Now() - start;
    }
  }
  return kMeasureDone;
}

}  // namespace
}  // namespace edgelm::ort

int32_t edgelm_measure(const edgelm_measured* ops, int64_t count, int32_t threads, int32_t passes, double* seconds) {
  try {
    return edgelm::ort::Measure(ops, count, threads, passes, seconds);
  } catch (const std::bad_alloc&) {
    return edgelm::ort::kMeasureNoMemory;
  } catch (const std::system_error&) {  // a thread could not be started
    return edgelm::ort::kMeasureNoMemory;
  }
}
