// Tests prefix reuse, sessions, continuations and the queue of calls on a runtime whose logits depend on its cache.
#include <atomic>
#include <cstdio>
#include <fstream>
#include <set>
#include <thread>

#include "capi/common/files.h"
#include "capi/generation/continuation.h"
#include "capi/generation/prefix_cache.h"
#include "capi/generation/session.h"
#include "capi/generation/turns.h"
#include "check.h"
#include "system.h"

namespace {

using namespace edgelm::capi;
using Ids = std::vector<std::int32_t>;

// Its cache has 8 bytes per token; the logits are a hash of the cached bytes.
class HashRuntime : public Runtime {
 public:
  explicit HashRuntime(std::int64_t context = 64) : cache(std::size_t(context)), row_(50) {
    name = "hash";
    kv = "bytes";
    vocab_size = 50;
    context_length = model_context_length = context;
    chunk = 4;
  }

  const float* decode(std::int32_t token) override {
    check_fits(&token, 1);
    const float* logits = prefill_step(&token, 1, true);
    ++position_;
    return logits;
  }
  void write_cache(std::int64_t length, const std::function<void(const void*, std::size_t)>& write) override {
    write(cache.data(), cache_bytes(length));
  }
  void read_cache(std::int64_t length, const std::function<void(void*, std::size_t)>& read) override {
    read(cache.data(), cache_bytes(length));
    position_ = length;
  }
  std::uint64_t cache_bytes(std::int64_t length) const override { return std::uint64_t(length) * sizeof(cache[0]); }

  std::vector<std::uint64_t> cache;
  std::int64_t computed = 0;

 protected:
  const float* prefill_step(const std::int32_t* ids, std::int64_t count, bool) override {
    check_cancelled();
    for (std::int64_t i = 0; i < count; ++i)
      cache[std::size_t(position_ + i)] = std::uint64_t(ids[i]) * 0x9E3779B97F4A7C15u;
    computed += count;
    std::uint64_t hash = 14695981039346656037u;
    for (std::int64_t i = 0; i < position_ + count; ++i) hash = (hash ^ cache[std::size_t(i)]) * 1099511628211u;
    for (std::size_t i = 0; i < row_.size(); ++i) row_[i] = float((hash >> (i % 48)) % 1009) / 64;
    return row_.data();
  }
  const float* prefill_all(const std::int32_t* ids, std::int64_t count) override {
    all_.clear();
    for (std::int64_t i = 0; i < count; ++i) {
      const float* row = prefill_step(ids + i, 1, true);
      all_.insert(all_.end(), row, row + row_.size());
      ++position_;
    }
    position_ -= count;
    return all_.data();
  }

 private:
  std::vector<float> row_, all_;
};

const std::function<void()> kNoCheck = [] {};

std::vector<float> row(const float* logits) { return std::vector<float>(logits, logits + 50); }

std::vector<float> fresh_logits(const Ids& ids) {
  HashRuntime runtime;
  return row(runtime.prefill(ids));
}

template <class Call>
std::string refusal(const Call& call, edgelm_code code = EDGELM_FILE) {
  try {
    call();
  } catch (const Error& error) {
    return error.code == code ? error.what() : concat("code ", int(error.code), ": ", error.what());
  }
  return "no error";
}

bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

void test_prefix_reuse() {
  HashRuntime runtime;
  PrefixCache cache(runtime);
  const auto reused = [&](const Ids& ids, bool exact) {
    const auto [logits, count] = cache.prefill(ids, exact, kNoCheck);
    EXPECT(row(logits) == fresh_logits(ids), "%d ids", int(ids.size()));
    EXPECT(runtime.position() == std::int64_t(ids.size()), "%d", int(runtime.position()));
    return count;
  };
  EXPECT(reused({1, 2, 3, 4, 5}, false) == 0, "new");
  EXPECT(reused({1, 2, 3, 4, 5}, true) == 5, "an identical fresh prompt is exact");
  EXPECT(reused({1, 2, 3, 9, 5}, false) == 3, "common prefix");
  EXPECT(reused({1, 2, 3, 9, 5}, true) == 0, "not fresh");
  EXPECT(reused({1, 2, 3, 9, 5, 6}, false) == 5, "growing");
  EXPECT(reused({1, 2, 3, 9, 5, 6, 7}, true) == 4, "growing, exact: whole chunks that were fresh");
  EXPECT(reused({1, 2, 3, 9, 5, 6, 7}, true) == 7, "which is as good as fresh");
  EXPECT(reused({1, 2, 3}, false) == 2, "a prefix: its last token gives the logits");
  EXPECT(reused({7}, false) == 0, "other");
  cache.appending(8);
  runtime.decode(8);
  EXPECT(cache.cached() == Ids({7, 8}), "decoded tokens are cached");
  EXPECT(reused({7, 8, 9}, false) == 2, "the answer is reused");

  std::vector<float> blocks;
  cache.logits_of_last({7, 8, 9, 10}, 3, [&](const float* logits, std::int64_t rows) {
    blocks.insert(blocks.end(), logits, logits + rows * 50);
  });
  EXPECT(blocks.size() == 150, "%d", int(blocks.size()));
  for (const std::size_t last : {2, 3, 4}) {
    const Ids ids = Ids{7, 8, 9, 10};
    const std::vector<float> wanted = fresh_logits(Ids(ids.begin(), ids.begin() + std::ptrdiff_t(last)));
    EXPECT(std::equal(wanted.begin(), wanted.end(), blocks.begin() + std::ptrdiff_t(50 * (last - 2))), "%d", int(last));
  }

  // A prefill that ends between chunks leaves what is computed.
  int chunks = 0;
  const std::string why = refusal(
      [&] {
        cache.prefill({20, 21, 22, 23, 24, 25, 26, 27, 28}, false, [&] {
          if (++chunks == 2) fail(EDGELM_CANCELLED, "stop");
        });
      },
      EDGELM_CANCELLED);
  EXPECT(why == "stop", "%s", why.c_str());
  EXPECT(cache.cached() == Ids({20, 21, 22, 23}), "%d cached", int(cache.cached().size()));
  EXPECT(reused({20, 21, 22, 23, 24}, false) == 4, "after a cancelled prefill");
}

std::string bytes_of(const std::string& path) { return read_file(path, 1 << 20, EDGELM_FILE); }

// Without a wait for the disk, unlike write_atomically.
void put(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary).write(bytes.data(), std::streamsize(bytes.size()));
}

void test_sessions() {
  const std::string folder = edgelm_test::MakeFolder(), path = join(folder, "session");
  HashRuntime runtime;
  PrefixCache cache(runtime);
  const SessionOf session{runtime, cache, std::string(64, 'a'), kNoCheck};
  cache.prefill({1, 2, 3}, false, kNoCheck);
  cache.appending(4);
  runtime.decode(4);
  save_session(session, path);

  HashRuntime other;
  PrefixCache restored(other);
  const SessionOf target{other, restored, std::string(64, 'a'), kNoCheck};
  load_session(target, path);
  EXPECT(restored.cached() == Ids({1, 2, 3, 4}), "%d cached", int(restored.cached().size()));
  EXPECT(row(other.decode(5)) == fresh_logits({1, 2, 3, 4, 5}), "the cache continues");
  const auto [logits, count] = restored.prefill({1, 2, 3}, true, kNoCheck);
  EXPECT(count == 3 && row(logits) == fresh_logits({1, 2, 3}), "the logits of the last prompt are restored");
  EXPECT(other.computed == 1, "%d tokens computed", int(other.computed));

  // Whatever is wrong with a file, it is refused, and nothing has changed.
  restored.prefill({30, 31}, false, kNoCheck);
  const std::vector<std::uint64_t> before = other.cache;
  const auto refused = [&](const std::string& bytes, const char* what, std::size_t where) {
    put(path, bytes);
    const std::string why = refusal([&] { load_session(target, path); });
    EXPECT(why.rfind(path, 0) == 0, "%s %d: %s", what, int(where), why.c_str());
    EXPECT(restored.cached() == Ids({30, 31}) && other.cache == before, "%s %d changed the model", what, int(where));
    return why;
  };
  const std::string good = bytes_of(path);
  for (std::size_t size = 0; size < good.size(); ++size) refused(good.substr(0, size), "cut at", size);
  for (std::size_t at = 0; at < good.size(); ++at)
    for (const int bit : {0, 7}) {
      std::string damaged = good;
      damaged[at] = char(damaged[at] ^ (1 << bit));
      refused(damaged, "byte", at);
    }
  refused(good + "x", "longer than", good.size());
  refused(good + good, "twice", good.size());
  put(path, good);

  // A whole file of something else says what it is of.
  const auto why_of = [&](const char* part, const SessionOf& into, edgelm_code code = EDGELM_FILE) {
    const std::string why = refusal([&] { load_session(into, path); }, code);
    EXPECT(has(why, part), "%s: %s", part, why.c_str());
  };
  why_of("another bundle", {other, restored, std::string(64, 'b'), kNoCheck});
  other.kv = "int8";
  why_of("type \"bytes\"", target);
  other.kv = "bytes";
  other.name = "cuda";
  why_of("runtime \"hash\"", target);
  other.name = "hash";
  HashRuntime small(3);
  PrefixCache none(small);
  why_of("4 tokens do not fit", {small, none, std::string(64, 'a'), kNoCheck}, EDGELM_CONTEXT_FULL);
  load_session(target, path);

  // An empty session is one, too.
  restored.replace({}, {}, 0);
  other.truncate(0);
  save_session(target, path);
  load_session(session, path);
  EXPECT(runtime.position() == 0 && cache.cached().empty(), "%d", int(runtime.position()));
  edgelm_test::RemoveFolder(folder);
  EXPECT(has(refusal([&] { load_session(target, path); }), "cannot be read"), "a missing file");
  EXPECT(has(refusal([&] { load_session(target, "/"); }), "cannot be read"), "a folder");
  EXPECT(refusal([&] { save_session(target, "/nowhere/at/all"); }) != "no error", "a folder that does not exist");
}

Generation generated(HashRuntime& runtime, PrefixCache& cache, Turns& turns, const Ids& prompt,
                     const GenerateOptions& options, const std::set<std::int64_t>& ends = {}) {
  Continuation answer(prompt, options, nullptr, ends, runtime, Clock::now());
  const Turn turn(turns);
  return answer.run(runtime, cache, turn);
}

void test_ends() {
  HashRuntime runtime(16);
  PrefixCache cache(runtime);
  Turns turns([&] { runtime.resume(); }, [&] { runtime.cancel(); });
  GenerateOptions options;
  options.max_tokens = 5;
  const Generation five = generated(runtime, cache, turns, {1, 2}, options);
  EXPECT(five.reason == EDGELM_STOP_LENGTH && five.tokens.size() == 5, "%d tokens", int(five.tokens.size()));
  EXPECT(five.timings.decoded_tokens == 4 && five.timings.prompt_tokens == 2, "timings");
  options.max_tokens.reset();
  const Generation full = generated(runtime, cache, turns, {1, 2}, options);
  // The last token needs no place.
  EXPECT(full.reason == EDGELM_STOP_LENGTH && full.tokens.size() == 15, "%d tokens", int(full.tokens.size()));
  EXPECT(full.timings.reused_tokens == 2, "%d", int(full.timings.reused_tokens));
  const Generation ended = generated(runtime, cache, turns, {1, 2}, options, {full.tokens[1]});
  EXPECT(ended.reason == EDGELM_STOP_EOS, "reason %d", int(ended.reason));
  EXPECT(ended.tokens.size() == (full.tokens[0] == full.tokens[1] ? 0 : 1), "%d tokens", int(ended.tokens.size()));
}

void test_the_queue() {
  std::atomic<int> begun{0}, cancels{0};
  Turns turns([&] { ++begun; }, [&] { ++cancels; });
  std::vector<int> order;
  std::vector<std::thread> threads;
  {
    const Turn first(turns);
    const std::string why = refusal([&] { const Turn again(turns); }, EDGELM_INVALID_ARGUMENT);
    EXPECT(has(why, "callback"), "%s", why.c_str());
    std::atomic<int> waiting{0};
    for (int i = 0; i < 8; ++i) {
      threads.emplace_back([&, i] {
        ++waiting;
        const Turn turn(turns);
        order.push_back(i);  // guarded by the turn
      });
      while (waiting <= i) std::this_thread::yield();
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    EXPECT(order.empty(), "a call did not wait");
    turns.cancel();
    EXPECT(first.cancelled(), "the first is cancelled");
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT(order == std::vector<int>({0, 1, 2, 3, 4, 5, 6, 7}), "not in the order of arrival");
  EXPECT(begun == 9 && cancels == 1, "%d, %d", int(begun), int(cancels));
  turns.cancel();  // nothing runs
  EXPECT(cancels == 1, "%d", int(cancels));
  EXPECT(!Turn(turns).cancelled(), "a cancellation reached the next call");
}

void test_closing() {
  Turns turns([] {}, [] {});
  std::atomic<bool> running{false};
  std::atomic<int> refused{0};
  std::thread first([&] {
    const Turn turn(turns);
    running = true;
    while (!turn.cancelled()) std::this_thread::yield();
  });
  while (!running) std::this_thread::yield();
  std::vector<std::thread> waiting;
  for (int i = 0; i < 4; ++i)
    waiting.emplace_back([&] { refused += has(refusal([&] { const Turn turn(turns); }, EDGELM_CANCELLED), "closed"); });
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  turns.close();
  first.join();
  for (std::thread& thread : waiting) thread.join();
  EXPECT(refused == 4, "%d", int(refused));
  EXPECT(has(refusal([&] { const Turn turn(turns); }, EDGELM_CANCELLED), "closed"), "after close");

  Turns own([] {}, [] {});
  const Turn turn(own);
  own.close();  // in a callback: returns
  EXPECT(turn.cancelled(), "closing ends the call");
}

// While 4 threads generate and one cancels, every result is whole or a beginning of it.
void test_threads() {
  HashRuntime runtime;
  PrefixCache cache(runtime);
  Turns turns([&] { runtime.resume(); }, [&] { runtime.cancel(); });
  GenerateOptions options;
  options.max_tokens = 30;
  std::vector<Ids> wanted;
  for (std::int32_t i = 0; i < 4; ++i) wanted.push_back(generated(runtime, cache, turns, {i, i + 1}, options).tokens);
  std::atomic<int> left{4}, interrupted{0};
  std::vector<std::thread> threads;
  for (std::int32_t i = 0; i < 4; ++i)
    threads.emplace_back([&, i] {
      for (int time = 0; time < 30; ++time) {
        const Generation one = generated(runtime, cache, turns, {i, i + 1}, options);
        const Ids& all = wanted[std::size_t(i)];
        const bool whole = one.reason == EDGELM_STOP_LENGTH;
        EXPECT(one.tokens.size() <= all.size() && std::equal(one.tokens.begin(), one.tokens.end(), all.begin()),
               "thread %d: other tokens", i);
        EXPECT(whole == (one.tokens.size() == all.size()) || !whole, "thread %d", i);
        interrupted += !whole;
      }
      --left;
    });
  while (left > 0) {
    turns.cancel();
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT(left == 0, "%d", int(left));
}

}  // namespace

// A call that asks for the bits of a fresh model reuses what the session has of them.
void test_sessions_are_fresh_in_the_same_chunks() {
  const std::string folder = edgelm_test::MakeFolder(), path = join(folder, "session");
  HashRuntime runtime;
  PrefixCache cache(runtime);
  const std::string manifest(64, 'a');
  const auto reused = [&](std::int64_t chunk, const Ids& ids) {
    HashRuntime other;
    other.chunk = chunk;
    PrefixCache restored(other);
    load_session({other, restored, manifest, kNoCheck}, path);
    const auto [logits, count] = restored.prefill(ids, true, kNoCheck);
    EXPECT(row(logits) == fresh_logits(ids), "%d ids", int(ids.size()));
    return count;
  };
  cache.prefill({1, 2, 3, 4, 5, 6, 7, 8, 9}, true, kNoCheck);
  save_session({runtime, cache, manifest, kNoCheck}, path);
  EXPECT(reused(4, {1, 2, 3, 4, 5, 6, 7, 8, 9}) == 9, "the identical prompt");
  EXPECT(reused(4, {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}) == 8, "whole chunks");
  EXPECT(reused(4, {1, 2, 3, 4, 5, 6, 9}) == 4, "a whole chunk");
  EXPECT(reused(2, {1, 2, 3, 4, 5, 6, 7, 8, 9}) == 0, "computed in other chunks");
  cache.prefill({1, 2, 3}, true, kNoCheck);
  save_session({runtime, cache, manifest, kNoCheck}, path);
  EXPECT(reused(3, {1, 2, 3}) == 3, "one chunk for both");
  EXPECT(reused(2, {1, 2, 3}) == 0, "two chunks");
  // Tokens of a prefill that went on behind an earlier cache are not fresh.
  cache.prefill({1, 2, 3, 4, 5, 6, 7, 8, 9}, false, kNoCheck);
  save_session({runtime, cache, manifest, kNoCheck}, path);
  EXPECT(reused(4, {1, 2, 3, 4, 5, 6, 7, 8, 9}) == 0, "not fresh");
  edgelm_test::RemoveFolder(folder);
}

int main() {
  test_prefix_reuse();
  test_sessions();
  test_sessions_are_fresh_in_the_same_chunks();
  test_ends();
  test_the_queue();
  test_closing();
  test_threads();
  return edgelm_test::Finish();
}
