#include "cuda/host/operators/attention.h"

#include <algorithm>
#include <cmath>

#include "cuda/attention/attention_args.cuh"
#include "cuda/host/planners.h"

namespace edgelm::gpu {

namespace {

constexpr i64 kHeadSizes[] = {32, 64, 128};
constexpr i64 kFewRows = 16;  // the largest number of rows for which the warps of a block divide the cache
constexpr i64 kThreads = 128;
constexpr i64 kTileKeys = 64;
constexpr i64 kMostSplits = 1024;  // that a caller may ask for

struct Step {
  const char* name;
  i64 min_blocks;    // per multiprocessor
  const char* body;  // {a}, {e}, {s}: types of activations and cache, head size
};
constexpr Step kSteps[] = {
    {"prepare", 4, "attention_prepare<{a}, {e}, {s}>"},
    {"decode", 2, "attention_tiles<{a}, {e}, {s}, 16, true>"},
    {"split", 2, "attention_tiles<{a}, {e}, {s}, 16, false>"},
    {"prefill", 2, "attention_tiles<{a}, {e}, {s}, 64, false>"},
    {"wide", 2, "attention_tiles<{a}, {e}, {s}, 128, false>"},
    {"exact", 4, "attention_exact<{s}>"},
};

struct Cache {
  const char* name;
  const char* type;  // in C++
  i64 code_bytes;
};
constexpr Cache kCaches[] = {
    {"f16", "f16", 2}, {"bf16", "bf16", 2}, {"f32", "float", 4}, {"int8", "i8", 1}, {"fp8", "e4m3", 1}};

const Cache& cache_of(const std::string& kind) {
  std::string known;
  for (const Cache& one : kCaches) {
    if (kind == one.name) return one;
    known += (known.empty() ? "" : ", ") + std::string(one.name);
  }
  throw Error("there is no " + kind + " cache on a GPU: choose " + known);
}

std::string name_of(const std::string& step, const std::string& activations, const std::string& cache, i64 size) {
  return "attention_" + step + "_" + activations + "_" + cache + "_s" + std::to_string(size);
}

constexpr std::pair<const char*, const char*> kPairs[] = {
    {"f32", "f32"},  {"bf16", "bf16"}, {"bf16", "f16"}, {"bf16", "int8"}, {"bf16", "fp8"},
    {"f16", "bf16"}, {"f16", "f16"},   {"f16", "int8"}, {"f16", "fp8"}};  // of activations and cache

bool needs(const std::string& activations, const Step& step) {
  const std::string name = step.name;
  return activations == "f32" ? name == "prepare" || name == "exact" : name != "exact";
}

KernelSource source_of(const Step& step, const std::string& activations, const std::string& cache, i64 size) {
  std::string body = step.body;
  const std::pair<std::string, std::string> marks[] = {
      {"{a}", cache_of(activations).type}, {"{e}", cache_of(cache).type}, {"{s}", std::to_string(size)}};
  for (const auto& [mark, text] : marks) {
    const std::size_t at = body.find(mark);
    if (at != std::string::npos) body.replace(at, mark.size(), text);
  }
  return {name_of(step.name, activations, cache, size),
          "attention/attention.cuh",
          "AttentionArgs",
          kThreads,
          step.min_blocks,
          "(" + body + ")"};
}

// Division of a call: rows per block, blocks per sequence and KV head, splits of the keys.
struct Division {
  i64 block_rows, row_blocks, splits;
  // Offsets in the workspace, and its size.
  i64 counters, queries, partials, totals, bytes;
};

Division divide(const AttentionShape& shape, i64 multiprocessors, i64 splits) {
  const i64 heads = shape.batch * shape.kv_heads;
  const bool wide = heads * divide_up(shape.rows(), 128) >= multiprocessors;
  Division d{};
  d.block_rows = shape.few() ? kFewRows : wide ? 128 : 64;
  d.row_blocks = divide_up(shape.rows(), d.block_rows);
  // As many splits as give each multiprocessor two blocks, but at least two tiles per split of a full cache.
  const i64 tiles = divide_up(shape.capacity, kTileKeys);
  const i64 most = d.block_rows == kFewRows ? 32 : 16;
  d.splits = splits ? splits
                    : std::max<i64>(
                          1, std::min({2 * multiprocessors / (heads * d.row_blocks), divide_up(tiles, 2), most}));
  const bool exact = shape.activations == "f32";
  const i64 rows = d.splits > 1 && !exact ? heads * d.row_blocks * d.splits * d.block_rows : 0;
  d.queries = d.counters + round_up(4 * heads * d.row_blocks);
  d.partials = d.queries + round_up(heads * shape.rows() * shape.size * (exact ? 4 : 2));
  d.totals = d.partials + round_up(rows * shape.size * 4);
  d.bytes = d.totals + round_up(rows * 8);
  return d;
}

// Bytes of shared memory per block: stages of keys and values, a tile of upcast codes, 128 rows of queries.
i64 shared_bytes(const std::string& step, const std::string& cache, i64 size) {
  if (step == "prepare") return 64;
  if (step == "exact") return 0;
  const bool few = step == "decode" || step == "split";
  const i64 stages = (few ? 3 : 2) * kTileKeys * 2 * attention_row_bytes(cache, size);
  const i64 upcast = cache_of(cache).code_bytes == 1 && !few ? kTileKeys * 2 * size * 2 : 0;
  return stages + upcast + (step == "wide" ? 128 * size * 2 : 0) + 128;
}

[[noreturn]] void refuse(const std::string& what, const std::string& found, const std::string& expected) {
  throw Error("GroupQueryAttention: " + what + " is " + found + ", expected " + expected);
}

void check_buffers(const AttentionBuffers& b) {
  const std::pair<const char*, u64> needed[] = {{"qkv", b.qkv},
                                                {"key_cache", b.key_cache},
                                                {"value_cache", b.value_cache},
                                                {"past_lengths", b.past_lengths},
                                                {"cos", b.cos},
                                                {"sin", b.sin},
                                                {"out", b.out},
                                                {"workspace", b.workspace}};
  std::string missing;
  for (const auto& [name, address] : needed) {
    if (!address) missing += (missing.empty() ? "" : ", ") + std::string(name);
  }
  if (!missing.empty()) throw Error("GroupQueryAttention: " + missing + " has no address, expected a buffer");
  if (!b.q_norm != !b.k_norm) {
    throw Error("GroupQueryAttention: one of q_norm and k_norm has no address, expected both or none");
  }
}

void check_splits(i64 multiprocessors, i64 splits) {
  if (multiprocessors < 1 || multiprocessors > kMostSize) {
    refuse("the number of multiprocessors", std::to_string(multiprocessors), "at least 1");
  }
  if (splits < 0 || splits > kMostSplits)
    refuse("splits", std::to_string(splits), "0 to " + std::to_string(kMostSplits));
}

AttentionArgs args_of(const AttentionShape& shape, const AttentionBuffers& b, const Division& d, u64 counters,
                      const AttentionOptions& options) {
  const double scale = options.scale ? options.scale : 1 / std::sqrt(double(shape.size));
  AttentionArgs args = zeroed<AttentionArgs>();
  point(args.qkv, b.qkv);
  point(args.key_cache, b.key_cache);
  point(args.value_cache, b.value_cache);
  point(args.past_lengths, b.past_lengths);
  point(args.new_lengths, b.new_lengths);
  point(args.cos, b.cos);
  point(args.sin, b.sin);
  point(args.q_norm, b.q_norm);
  point(args.k_norm, b.k_norm);
  point(args.out, b.out);
  point(args.queries, b.workspace + d.queries);
  point(args.partials, b.workspace + d.partials);
  point(args.totals, b.workspace + d.totals);
  point(args.counters, counters);
  args.tokens = i32(shape.tokens);
  args.heads = i32(shape.heads);
  args.kv_heads = i32(shape.kv_heads);
  args.capacity = i32(shape.capacity);
  args.positions = i32(shape.positions);
  args.splits = i32(d.splits);
  args.row_blocks = i32(d.row_blocks);
  args.epsilon = float(options.epsilon);
  args.clip = float(options.clip);
  args.scale = float(scale);
  args.scale_base2 = float(scale / std::log(2.0));
  args.shared_by = i32(shape.heads / shape.kv_heads);
  args.shared_by_divisor = divisor(args.shared_by);
  args.splits_divisor = divisor(d.splits);
  point(args.prefetch, b.prefetch);
  args.prefetch_bytes = i64(b.prefetch_bytes);
  args.per_head_norms = (b.q_norm_per_head ? kQueries : 0) | (b.k_norm_per_head ? kKeys : 0);
  return args;
}

AttentionShape shape_of(const Fields& f) {
  return {f.integer("batch"),    f.integer("tokens"),    f.integer("heads"),    f.integer("kv_heads"), f.size("size"),
          f.integer("capacity"), f.integer("positions"), f.text("activations"), f.text("cache")};
}

std::string launches(const Fields& f) {
  const AttentionBuffers buffers{f.address("qkv"),          f.address("key_cache"),
                                 f.address("value_cache"),  f.address("past_lengths"),
                                 f.address("cos"),          f.address("sin"),
                                 f.address("out"),          f.address("workspace"),
                                 f.address("q_norm"),       f.address("k_norm"),
                                 f.address("new_lengths"),  f.address("counters"),
                                 f.address("prefetch"),     f.address("prefetch_bytes"),
                                 f.flag("q_norm_per_head"), f.flag("k_norm_per_head")};
  const AttentionOptions options{f.number("epsilon"), f.number("clip"), f.number("scale"), f.integer("splits", 0)};
  return serialised(attention_launches(shape_of(f), buffers, f.integer("multiprocessors"), options));
}

std::string workspace(const Fields& f) {
  const AttentionShape shape = shape_of(f);
  const i64 multiprocessors = f.integer("multiprocessors"), splits = f.integer("splits", 0);
  shape.check();
  check_splits(multiprocessors, splits);
  return std::to_string(attention_workspace_bytes(shape, multiprocessors, splits));
}

std::string needed(const Fields& f) {
  return lines_of(attention_kernels_of(f.text("activations"), f.text("cache"), f.size("size")));
}

std::string row(const Fields& f) { return std::to_string(attention_row_bytes(f.text("cache"), f.size("size"))); }

}  // namespace

void AttentionShape::check() const {
  if (activations != "bf16" && activations != "f16" && activations != "f32") {
    refuse("the type of qkv", activations, "bf16, f16 or f32");
  }
  const bool exact = activations == "f32";
  if (exact ? cache != "f32" : cache != "bf16" && cache != "f16" && cache != "int8" && cache != "fp8") {
    refuse("the cache of " + activations + " activations", cache, exact ? "f32" : "bf16 or f16 or int8 or fp8");
  }
  const std::pair<const char*, i64> counts[] = {
      {"batch", batch}, {"tokens", tokens}, {"heads", heads}, {"kv_heads", kv_heads}, {"capacity", capacity}};
  for (const auto& [name, count] : counts) {
    if (count < 1) refuse(name, std::to_string(count), "at least 1");
    if (count > kMostSize) refuse(name, std::to_string(count), "at most " + std::to_string(kMostSize));
  }
  if (heads % kv_heads) {
    refuse("heads", std::to_string(heads), "a multiple of the " + std::to_string(kv_heads) + " key/value heads");
  }
  if (!std::count(std::begin(kHeadSizes), std::end(kHeadSizes), size)) {
    std::string sizes;
    for (i64 one : kHeadSizes) sizes += (sizes.empty() ? "" : ", ") + std::to_string(one);
    refuse("the size of a head", std::to_string(size), sizes);
  }
  if (cache_of(cache).code_bytes == 1 && capacity % 4) {
    refuse("the capacity of an " + cache + " cache", std::to_string(capacity), "a multiple of 4");
  }
  if (tokens > capacity) refuse("tokens", std::to_string(tokens), "at most the cache's " + std::to_string(capacity));
  if (positions < capacity) {
    refuse("the number of rotary positions", std::to_string(positions),
           "at least the cache's " + std::to_string(capacity));
  }
  if (batch > 65535 || kv_heads > 65535) {
    refuse("batch and key/value heads", "(" + std::to_string(batch) + ", " + std::to_string(kv_heads) + ")",
           "at most 65535 each");
  }
  if (positions > kMostSize || double(batch) * double(tokens) * double(heads) > 1e12) {  // sizes then fit 64 bits
    refuse("the size of the call", std::to_string(batch) + " x " + std::to_string(tokens) + " tokens", "less");
  }
}

bool AttentionShape::few() const { return rows() <= kFewRows; }

Launches attention_launches(const AttentionShape& shape, const AttentionBuffers& buffers, i64 multiprocessors,
                            const AttentionOptions& options) {
  shape.check();
  check_buffers(buffers);
  check_splits(multiprocessors, options.splits);
  const Division d = divide(shape, multiprocessors, options.splits);
  const bool exact = shape.activations == "f32";
  const bool one_launch = shape.few() && buffers.counters != 0 && !exact;
  const u64 counters = one_launch ? buffers.counters : buffers.workspace + d.counters;
  const AttentionArgs args = args_of(shape, buffers, d, counters, options);
  const auto launch = [&](const std::string& step, i64 x, i64 y, i64 z) {
    return make_launch(name_of(step, shape.activations, shape.cache, shape.size), x, y, z, kThreads,
                       shared_bytes(step, shape.cache, shape.size), args);
  };
  const i64 across = d.row_blocks * d.splits;
  if (one_launch) return {launch("decode", across, shape.kv_heads, shape.batch)};
  const Launch prepare = launch("prepare", shape.tokens, shape.batch, 1);
  if (exact) return {prepare, launch("exact", divide_up(shape.rows(), kThreads / 32), shape.kv_heads, shape.batch)};
  const char* step = d.block_rows == kFewRows ? "split" : d.block_rows == 64 ? "prefill" : "wide";
  return {prepare, launch(step, across, shape.kv_heads, shape.batch)};
}

u64 attention_workspace_bytes(const AttentionShape& shape, i64 multiprocessors, i64 splits) {
  return u64(divide(shape, multiprocessors, splits).bytes);
}

i64 attention_row_bytes(const std::string& kind, i64 size) {
  const i64 bytes = cache_of(kind).code_bytes;
  return bytes * size + (bytes == 1 ? 4 : 0);
}

KernelNames attention_kernels_of(const std::string& activations, const std::string& cache, i64 size) {
  KernelNames names;
  for (const Step& step : kSteps) {
    if (needs(activations, step)) names.push_back(name_of(step.name, activations, cache, size));
  }
  return names;
}

const KernelSources& attention_kernels() {
  static const KernelSources all = [] {
    KernelSources found;
    for (const auto& [activations, cache] : kPairs) {
      for (i64 size : kHeadSizes) {
        for (const Step& step : kSteps) {
          if (needs(activations, step)) found.push_back(source_of(step, activations, cache, size));
        }
      }
    }
    return found;
  }();
  return all;
}

Functions attention_functions() {
  return {{"attention_launches", launches},
          {"attention_workspace", workspace},
          {"attention_row", row},
          {"attention_kernels", needed}};
}

}  // namespace edgelm::gpu
