// Tests of what all runtimes share, and of the CPU runtime without ONNX Runtime: tests/capi/test_onnxruntime.py runs it
// with bundles.
#include "capi/runtime/runtime.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>

#include "capi/runtime/cpu_cores.h"
#include "capi/runtime/onnxruntime/cache_rows.h"
#include "capi/runtime/onnxruntime/cpu_runtime.h"
#include "capi/runtime/onnxruntime/library.h"
#include "capi/runtime/onnxruntime/session.h"
#include "capi/runtime/options.h"
#include "check.h"
#include "system.h"

namespace {

using namespace edgelm::capi;

// "code message" of the error that a call throws; empty if it throws none.
std::string refusal(const std::function<void()>& call) {
  try {
    call();
    return "";
  } catch (const Error& error) {
    return concat(int(error.code), " ", error.what());
  }
}

void ExpectRefusal(const std::function<void()>& call, edgelm_code code, const std::string& part) {
  const std::string found = refusal(call);
  EXPECT(found.rfind(concat(int(code), " "), 0) == 0 && found.find(part) != std::string::npos, "'%s', expected %d %s",
         found.c_str(), code, part.c_str());
}

// Its logits are the token's position and id; it keeps what was run.
class CountingRuntime : public Runtime {
 public:
  CountingRuntime() {
    vocab_size = 3;
    context_length = 10;
    model_context_length = 20;
    chunk = 4;
  }
  const float* decode(std::int32_t token) override {
    check_fits(&token, 1);
    ++position_;
    return fill(token);
  }
  void write_cache(std::int64_t, const std::function<void(const void*, std::size_t)>&) override {}
  void read_cache(std::int64_t, const std::function<void(void*, std::size_t)>&) override {}
  std::uint64_t cache_bytes(std::int64_t) const override { return 0; }

  std::vector<std::int64_t> steps;
  std::vector<float> logits = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
  bool cancels = false;

 protected:
  const float* prefill_step(const std::int32_t* ids, std::int64_t count, bool last) override {
    steps.push_back(last ? count : -count);
    if (cancels) cancel();
    return fill(ids[count - 1]);
  }
  const float* prefill_all(const std::int32_t* ids, std::int64_t count) override {
    steps.push_back(100 + count);
    for (std::int64_t i = 0; i < count; ++i) logits[std::size_t(3 * i)] = float(ids[i]);
    return logits.data();
  }

 private:
  const float* fill(std::int32_t token) {
    logits[0] = float(token);
    return logits.data();
  }
};

void TestPrefillTakesChunks() {
  CountingRuntime runtime;
  EXPECT(runtime.prefill({0, 1, 2, 0, 1, 2, 0, 1, 2})[0] == 2 && runtime.position() == 9, "prefill");
  EXPECT((runtime.steps == std::vector<std::int64_t>{-4, -4, 1}), "%zu steps", runtime.steps.size());
  ExpectRefusal([&] { runtime.prefill({1, 2}); }, EDGELM_CONTEXT_FULL,
                "2 tokens do not fit: the context holds 10, 9 are");
  ExpectRefusal([&] { runtime.prefill({}); }, EDGELM_INVALID_ARGUMENT, "no tokens");
  ExpectRefusal([&] { runtime.prefill({3}); }, EDGELM_INVALID_ARGUMENT, "token id 3 (number 0 of 1)");
  ExpectRefusal([&] { runtime.prefill({-1}); }, EDGELM_INVALID_ARGUMENT, "token id -1");
  EXPECT(runtime.position() == 9, "nothing is appended");
  ExpectRefusal([&] { runtime.truncate(10); }, EDGELM_INVALID_ARGUMENT, "cannot keep 10");
  ExpectRefusal([&] { runtime.truncate(-1); }, EDGELM_INVALID_ARGUMENT, "cannot keep -1");
  runtime.truncate(3);
  EXPECT(runtime.position() == 3, "truncated");
}

void TestLogitsOfAllPositionsComeInBlocks() {
  CountingRuntime runtime;
  std::vector<std::int64_t> rows;
  std::vector<float> first;
  runtime.logits_all({0, 1, 2, 1, 2}, [&](const float* logits, std::int64_t count) {
    rows.push_back(count);
    for (std::int64_t i = 0; i < count; ++i) first.push_back(logits[3 * i]);
  });
  EXPECT((rows == std::vector<std::int64_t>{4, 1}), "%zu blocks", rows.size());
  EXPECT((first == std::vector<float>{0, 1, 2, 1, 2}) && runtime.position() == 5, "logits");
}

void TestCancelEndsPrefillBetweenChunks() {
  CountingRuntime runtime;
  runtime.cancels = true;
  ExpectRefusal([&] { runtime.prefill({0, 1, 2, 0, 1}); }, EDGELM_CANCELLED, "cancelled");
  EXPECT(runtime.position() == 4, "whole chunks stay: %d", int(runtime.position()));
  runtime.cancels = false;
  runtime.resume();
  EXPECT(runtime.prefill({1}) != nullptr && runtime.position() == 5, "resumed");
}

void TestGreedyChoosesTheFirstOfEqualLogits() {
  CountingRuntime runtime;
  runtime.logits = {0, 7, 7};
  EXPECT(runtime.decode_greedy(0) == 1, "first");
  for (const float bad : {NAN, INFINITY}) {
    runtime.logits[2] = bad;
    ExpectRefusal([&] { runtime.decode_greedy(0); }, EDGELM_RUNTIME, "the model's highest logit is");
  }
}

// What is written to a cache is read back from one of another capacity; no two parts of it overlap.
void TestRowsOfCachesOfAnyCapacity() {
  for (const char* kv : {"float32", "float16", "int8", "fp8"}) {
    for (const std::int64_t head_dim : {6, 64}) {
      const std::int64_t row = native_row_bytes(kv, head_dim), length = 35;
      std::vector<unsigned char> rows(std::size_t(length * row)), again(rows.size());
      for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<unsigned char>(i * 2654435761u >> 13);
      for (const bool keys : {true, false}) {
        for (const std::int64_t capacity : {35, 36, 47, 48, 64}) {
          std::vector<unsigned char> head(std::size_t(capacity * row));
          const CacheRows cache{kv, head_dim, row, capacity};
          cache.unpack(keys, head.data(), length, rows.data());
          cache.pack(keys, head.data(), length, again.data());
          EXPECT(rows == again, "%s, capacity %d", kv, int(capacity));
        }
      }
    }
  }
}

void TestOptionsAreChecked() {
  RuntimeOptions options;
  check_options(options);
  options.threads = -1;
  ExpectRefusal([&] { check_options(options); }, EDGELM_INVALID_ARGUMENT, "threads is -1");
  options.threads = 1 << 20;
  ExpectRefusal([&] { check_options(options); }, EDGELM_INVALID_ARGUMENT, "1048576 threads are more than");
  options = {};
  options.chunk = -5;
  ExpectRefusal([&] { check_options(options); }, EDGELM_INVALID_ARGUMENT, "chunk is -5");
  options = {};
  options.context_length = -5;
  ExpectRefusal([&] { check_options(options); }, EDGELM_INVALID_ARGUMENT, "context_length is -5");
  ExpectRefusal([] { native_row_bytes("int4", 8); }, EDGELM_INVALID_ARGUMENT, "kv is \"int4\"");
  EXPECT(allowed_cores() >= 1 && thread_problem(1).empty(), "cores");
  ExpectRefusal([] { checked_bytes({1u << 31, 1u << 31}); }, EDGELM_RUNTIME, "bytes");
  ExpectRefusal([] { Untouched(std::uint64_t(1) << 62); }, EDGELM_RUNTIME, "not enough memory");
}

void TestCachesAreZerosThatTakeNoMemory() {
#if defined(_WIN32)  // which promises no more than there is
  const Untouched cache(std::uint64_t(1) << 30);
#else
  const Untouched cache(std::uint64_t(1) << 34);  // most machines have less
#endif
  EXPECT(cache.data()[0] == 0 && cache.data()[cache.bytes() - 1] == 0, "zeros");
  cache.data()[cache.bytes() / 2] = 1;
}

void TestTheLibraryIsLookedForWhereItIsNamed() {
  ExpectRefusal([] { open_onnxruntime("/none/lib.so"); }, EDGELM_UNAVAILABLE, "/none/lib.so: the file does not exist");
  ExpectRefusal([] { open_onnxruntime("pyproject.toml"); }, EDGELM_UNAVAILABLE, "cannot be opened");
  ExpectRefusal([] { open_onnxruntime(EDGELM_FAKE_ONNXRUNTIME); }, EDGELM_UNAVAILABLE,
                "is ONNX Runtime 1.16.0: bundles need 1.31.1");
  edgelm_test::SetVariable("EDGELM_ONNXRUNTIME", "/none/other.so");
  ExpectRefusal([] { open_onnxruntime(""); }, EDGELM_UNAVAILABLE, "EDGELM_ONNXRUNTIME=/none/other.so");
  ExpectRefusal([] { open_onnxruntime("/none/lib.so"); }, EDGELM_UNAVAILABLE, "library /none/lib.so");
  edgelm_test::SetVariable("EDGELM_ONNXRUNTIME", nullptr);
}

}  // namespace

int main() {
  TestPrefillTakesChunks();
  TestLogitsOfAllPositionsComeInBlocks();
  TestCancelEndsPrefillBetweenChunks();
  TestGreedyChoosesTheFirstOfEqualLogits();
  TestRowsOfCachesOfAnyCapacity();
  TestOptionsAreChecked();
  TestCachesAreZerosThatTakeNoMemory();
  TestTheLibraryIsLookedForWhereItIsNamed();
  return edgelm_test::Finish();
}
