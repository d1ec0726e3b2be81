#include "capi/bundle/manifest_schema.h"

namespace edgelm::capi {

namespace {

constexpr std::int64_t kInt31 = (std::int64_t(1) << 31) - 1;

Schema count() { return whole(0); }

Schema model() {
  return object_of({{"family", text()},
                    {"name", text()},
                    {"hidden_size", whole(1, 1 << 20)},
                    {"num_layers", whole(1, 4096)},
                    {"num_heads", whole(1, 1 << 16)},
                    {"num_kv_heads", whole(1, 1 << 16)},
                    {"head_dim", whole(1, 1 << 16)},
                    {"vocab_size", whole(1, 1 << 24)},
                    {"context_length", whole(1, kInt31)},
                    {"tied", true_or_false()},
                    {"num_experts", whole(0, 1 << 16), false},
                    {"experts_per_token", whole(0, 1 << 16), false},
                    {"norm_topk_prob", true_or_false(), false}});
}

Schema files() { return map_of(object_of({{"size", count()}, {"sha256", text()}})); }

Schema contents() {
  return object_of(
      {{"layout", one_of({"array", "codes", "scales", "zeros", "packed", "packed-experts", "low-nibbles", "gpu"})},
       {"dtype", text()},
       {"shape", list_of(whole(1))},
       {"group", nullable(whole(1)), false},
       {"zero_points", true_or_false(), false},
       {"interleave", nullable(whole(1)), false},
       {"matrices", list_of(text()), false},
       {"rows", list_of(count()), false}});
}

Schema tensor() {
  return object_of({{"name", text()},
                    {"offset", count()},
                    {"size", count()},
                    {"crc32", whole(0, 0xffffffff)},
                    {"layer", nullable(count()), false},
                    {"contents", nullable(contents()), false}});
}

Schema calibration() {
  const Schema fallback = object_of({{"layer", count()}, {"expert", count()}, {"tokens", count()}});
  return object_of({{"text", text()},
                    {"sha256", text()},
                    {"samples", count()},
                    {"length", count()},
                    {"methods", map_of(count()), false},
                    {"fallbacks", list_of(fallback), false},
                    {"smoothing", nullable(text()), false}});
}

}  // namespace

const Schema& manifest_schema() {
  static const Schema schema = object_of(
      {{"model", model()},
       {"target", text()},
       {"ops", text()},
       {"dtype", text()},
       {"recipe", object_of({{"name", text()}, {"toml", text()}})},
       {"graph",
        object_of({{"file", text()}, {"debug_file", text()}, {"weights_file", text()}, {"kv_dtype", text(), false}})},
       {"tokens", object_of({{"bos_id", nullable(whole(0, kInt31))},
                             {"eos_ids", list_of(whole(0, kInt31))},
                             {"pad_id", nullable(whole(0, kInt31))}})},
       {"source", object_of({{"id", text()}, {"files", files(), false}})},
       {"files", files()},
       {"tensors", list_of(tensor())},
       {"tools", map_of(text())},
       {"created", nullable(text()), false},
       {"calibration", nullable(calibration()), false},
       {"requires", list_of(object_of({{"package", text()}, {"version", text()}, {"feature", text()}})), false},
       {"format", text(), false},
       {"format_version", whole(1, 1), false}});
  return schema;
}

}  // namespace edgelm::capi
