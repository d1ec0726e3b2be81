#include "capi/parity/pack/pack.h"

#include <algorithm>
#include <cmath>

#include "capi/common/files.h"
#include "capi/bundle/schema.h"
#include "capi/parity/pack/arrays.h"

namespace edgelm::capi {
namespace {

constexpr std::int64_t kFormatVersion = 1;
constexpr std::uint64_t kMostIndexBytes = 8 << 20;
constexpr std::int64_t kInt31 = (std::int64_t(1) << 31) - 1;
const char* const kAdvice = "export the bundle again";

[[noreturn]] void refuse(const std::string& path, const std::string& problem) {
  fail(EDGELM_BUNDLE, path, ": ", problem, ": ", kAdvice);
}

// What pack.json may hold.
const Schema& index_schema() {
  static const Schema prompt = object_of({{"name", text()},
                                          {"text", text()},
                                          {"decoded", text()},
                                          {"start", whole(0)},
                                          {"length", whole(1, kInt31 + 1)},
                                          {"greedy", list_of(whole(0, kInt31))}});
  static const Schema tokenizer = object_of({{"vocab_size", whole(0)}, {"sha256", text()}});
  static const Schema sketch = object_of({{"seed", whole(0)}, {"width", whole(kSketchWidth, kSketchWidth)}});
  static const Schema array = object_of({{"shape", list_of(whole(0, kInt31 + 1))}, {"dtype", text()}});
  static const Schema rounded = object_of({{"kv", one_of(cache_types())}});
  static const Schema schema = object_of({{"format_version", whole(0)},
                                          {"prompts", list_of(prompt)},
                                          {"tokenizer", nullable(tokenizer)},
                                          {"sketch", sketch},
                                          {"arrays", map_of(array)},
                                          {"rounded", nullable(rounded), false},
                                          {"made_with", map_of(text()), false}});
  return schema;
}

// pack.json, but for the arrays.
void read_index(ParityPack& pack, std::string& rounded_kv, const Json& index) {
  for (const Json& json : index.find("prompts")->array()) {
    GoldenPrompt prompt = {json.find("name")->string(),    json.find("text")->string(),
                           json.find("decoded")->string(), json.find("start")->integer(),
                           json.find("length")->integer(), {}};
    for (const Json& id : json.find("greedy")->array()) prompt.greedy.push_back(std::int32_t(id.integer()));
    pack.prompts.push_back(std::move(prompt));
  }
  if (const Json* tokenizer = index.find("tokenizer"); !tokenizer->is_null()) {
    pack.tokenizer = TokenizerPrint{tokenizer->find("vocab_size")->integer(), tokenizer->find("sha256")->string()};
  }
  pack.sketch_seed = std::uint64_t(index.find("sketch")->find("seed")->integer());
  if (const Json* rounded = index.find("rounded"); rounded && !rounded->is_null()) {
    rounded_kv = rounded->find("kv")->string();
  }
  if (const Json* made_with = index.find("made_with")) {
    for (const auto& [key, value] : made_with->object()) pack.made_with.emplace_back(key, value.string());
  }
}

using Shape = std::vector<std::int64_t>;

std::string shape_text(const Shape& shape) {
  std::string text = "(";
  for (std::size_t i = 0; i < shape.size(); ++i) text += concat(i ? ", " : "", shape[i]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

std::int64_t last(const Shape& shape) { return shape.empty() ? 0 : shape.back(); }

// Moves the arrays into the pack, with the checks of pack.py in their order.
class Filler {
 public:
  Filler(ParityPack& pack, PackArrays& arrays, const std::string& folder, const std::string& index)
      : pack_(pack), arrays_(arrays), folder_(folder), index_(index) {}

  void run(const std::string& rounded_kv) {
    const Shape ids = need("ids").shape, top_ids = need("top_ids").shape, probe_ids = need("probe_ids").shape;
    const bool quantized = std::any_of(arrays_.begin(), arrays_.end(),
                                       [](auto& item) { return item.first.rfind("quantized.", 0) == 0; });
    require_all("reference", kReference);
    if (quantized) require_all("quantized", kReference);
    if (!rounded_kv.empty()) require_all("rounded", kRounded);

    const Shape& norms = need("reference.norms").shape;
    if (ids.size() != 1 || top_ids.size() != 2 || probe_ids.size() != 1 || norms.size() != 2) {
      wrong("ids, top_ids, probe_ids or reference.norms have another number of dimensions than 1, 2, 1 and 2");
    }
    count_ = ids[0], top_ = top_ids[1], probes_ = probe_ids[0];
    pack_.num_layers = norms[0] - 1;
    pack_.num_experts = arrays_.count("reference.router") ? last(need("reference.router").shape) : 0;
    pack_.top = top_;
    check_prompts();
    if (std::min({top_, probes_, pack_.num_layers}) < 1 || top_ids[0] != count_) {
      wrong(concat("top_ids has shape ", shape_text(top_ids), ", with ", probes_, " probe_ids and ", pack_.num_layers,
                   " layers"));
    }
    pack_.ids = take_ids("ids"), pack_.top_ids = take_ids("top_ids"), pack_.probe_ids = take_ids("probe_ids");
    fill("reference", pack_.reference);
    if (quantized) fill("quantized", pack_.quantized.emplace());
    if (!rounded_kv.empty()) fill_rounded(pack_.rounded.emplace(), rounded_kv);
  }

 private:
  static constexpr const char* kReference[] = {"top_logits", "logsumexp", "probe_logits", "next_logit",
                                               "best",       "gap",       "norms",        "sketches"};
  static constexpr const char* kRounded[] = {"rows",       "top_logits", "logsumexp", "probe_logits",
                                             "next_logit", "best",       "flipped"};

  [[noreturn]] void wrong(const std::string& problem) const { refuse(folder_, problem); }

  PackArray& need(const std::string& name) {
    const auto found = arrays_.find(name);
    if (found == arrays_.end()) refuse(index_, "arrays." + name + " is missing");
    return found->second;
  }
  template <std::size_t size>
  void require_all(const std::string& prefix, const char* const (&names)[size]) {
    for (const char* name : names) need(prefix + "." + name);
  }

  void check_prompts() {
    std::int64_t fed = 0;
    for (const GoldenPrompt& prompt : pack_.prompts) fed += std::min(prompt.fed(), INT64_MAX / 2 - fed);
    if (pack_.prompts.empty() || fed != count_) {
      wrong(concat("the prompts do not add up to its ", count_, " positions"));
    }
    std::int64_t start = 0;
    for (const GoldenPrompt& prompt : pack_.prompts) {
      if (prompt.start != start) wrong("prompt " + quoted(prompt.name) + " is misplaced");
      start += prompt.fed();
    }
  }

  std::vector<std::int32_t> take_ids(const std::string& name) {
    std::vector<std::int32_t>& values = need(name).ints;
    check_ids(name, values);
    return std::move(values);
  }
  void check_ids(const std::string& name, const std::vector<std::int32_t>& values) const {
    const auto least = std::min_element(values.begin(), values.end());
    if (least != values.end() && *least < 0) wrong(concat(name, " holds the token id ", *least));
  }

  PackArray& shaped(const std::string& name, const Shape& shape) {
    PackArray& array = need(name);
    if (array.shape != shape) {
      wrong(concat(name, " has shape ", shape_text(array.shape), ", expected ", shape_text(shape)));
    }
    if (!std::all_of(array.floats.begin(), array.floats.end(), [](float value) { return std::isfinite(value); })) {
      wrong(name + " has values that are not finite");
    }
    return array;
  }

  void fill_logits(const std::string& prefix, LogitValues& record, std::int64_t rows) {
    record.top_logits = std::move(shaped(prefix + ".top_logits", {rows, top_}).floats);
    record.probe_logits = std::move(shaped(prefix + ".probe_logits", {rows, probes_}).floats);
    const std::vector<float>& sums = shaped(prefix + ".logsumexp", {rows}).floats;
    record.logsumexp.assign(sums.begin(), sums.end());
    record.next_logit = std::move(shaped(prefix + ".next_logit", {rows}).floats);
    const std::vector<std::int32_t>& best = shaped(prefix + ".best", {rows}).ints;
    record.best.assign(best.begin(), best.end());
  }

  void fill(const std::string& prefix, ReferenceRecord& record) {
    const std::int64_t layers = pack_.num_layers;
    const bool router = arrays_.count(prefix + ".router") != 0, experts = arrays_.count(prefix + ".experts") != 0;
    if (router != experts || router != (pack_.num_experts != 0)) {
      wrong(prefix + " has one of router and experts, or another than the reference");
    }
    fill_logits(prefix, record, count_);
    record.gap = std::move(shaped(prefix + ".gap", {count_}).floats);
    record.norms = std::move(shaped(prefix + ".norms", {layers + 1, count_}).floats);
    record.sketches = std::move(shaped(prefix + ".sketches", {layers + 1, count_, kSketchWidth}).floats);
    if (router) {
      record.router = std::move(shaped(prefix + ".router", {layers, count_, pack_.num_experts}).floats);
      record.chosen = last(need(prefix + ".experts").shape);
      record.experts = std::move(shaped(prefix + ".experts", {layers, count_, record.chosen}).ints);
    }
    const auto least = std::min_element(record.best.begin(), record.best.end());
    if (*least < 0) wrong(concat(prefix, ".best holds the token id ", *least));
    if (!router) return;
    const auto outside = [&](std::int32_t expert) { return expert < 0 || expert >= pack_.num_experts; };
    if (record.experts.empty() || std::any_of(record.experts.begin(), record.experts.end(), outside)) {
      wrong(concat(prefix, ".experts holds an expert outside 0..", pack_.num_experts - 1));
    }
  }

  void fill_rounded(RoundedRecord& record, const std::string& kv) {
    const PackArray& rows = need("rounded.rows");
    const auto outside = [&](std::int32_t row) { return row < 0 || row >= count_; };
    if (rows.shape.size() != 1 || rows.ints.empty() || std::any_of(rows.ints.begin(), rows.ints.end(), outside)) {
      wrong("rounded.rows are not positions of the pack");
    }
    record.rows.assign(rows.ints.begin(), rows.ints.end());
    fill_logits("rounded", record, rows.shape[0]);
    for (const std::int32_t flipped : shaped("rounded.flipped", rows.shape).ints)
      record.flipped.push_back(flipped != 0);
    record.kv = kv;
  }

  ParityPack& pack_;
  PackArrays& arrays_;
  const std::string& folder_;
  const std::string& index_;
  std::int64_t count_ = 0, top_ = 0, probes_ = 0;
};

}  // namespace

const std::vector<std::string>& cache_types() {
  static const std::vector<std::string> types = {"float32", "float16", "int8", "fp8"};
  return types;
}

ParityPack ParityPack::load(const std::string& folder) {
  const std::string path = join(folder, "pack.json");
  if (!is_file(path)) {
    fail(EDGELM_BUNDLE, path, " is missing: the bundle has no parity pack; export it again");
  }
  const Json json = Json::parse(read_file(path, kMostIndexBytes, EDGELM_BUNDLE), path, EDGELM_BUNDLE, true);
  const std::int64_t version = Members(json, path, EDGELM_BUNDLE).integer("format_version");
  if (version != kFormatVersion) {
    fail(EDGELM_BUNDLE, path, ": format_version is ", version, ", this EdgeLM reads ", kFormatVersion, ": ",
         version > kFormatVersion ? "use a newer EdgeLM" : kAdvice);
  }
  index_schema().require(json, path, kAdvice, EDGELM_BUNDLE);
  ParityPack pack;
  std::string rounded_kv;
  read_index(pack, rounded_kv, json);
  PackArrays arrays = read_pack_arrays(join(folder, "pack.npz"), *json.find("arrays"));
  Filler(pack, arrays, folder, path).run(rounded_kv);
  return pack;
}

std::vector<bool> ParityPack::has_next() const {
  std::vector<bool> mask(ids.size());
  for (const GoldenPrompt& prompt : prompts) {
    for (std::int64_t i = 0; i + 1 < prompt.length; ++i) mask[std::size_t(prompt.start + i)] = true;
  }
  return mask;
}

std::vector<std::int32_t> ParityPack::next_ids() const {
  std::vector<std::int32_t> following(ids.size());
  for (const GoldenPrompt& prompt : prompts) {
    for (std::int64_t i = prompt.start; i + 1 < prompt.start + prompt.fed(); ++i) {
      following[std::size_t(i)] = ids[std::size_t(i) + 1];
    }
  }
  return following;
}

}  // namespace edgelm::capi
