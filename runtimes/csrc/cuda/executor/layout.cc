#include "cuda/executor/layout.h"

#include <algorithm>

#include "cuda/host/operators/rows.h"

namespace edgelm::gpu {

namespace {

constexpr i64 kCapacityMultiple = 64;  // aligns the part of every head
constexpr u64 kMostBytes = u64(1) << 60;

constexpr const char* kCacheTypes[] = {"float16", "bfloat16", "float32", "int8", "fp8"};

void check_cache_type(const std::string& kv) {
  std::string known;
  for (const char* one : kCacheTypes) {
    if (kv == one) return;
    known += (known.empty() ? "" : ", ") + std::string(one);
  }
  throw Error("kv is '" + kv.substr(0, 60) + "': the KV cache can be " + known, Error::Kind::kOther);
}

// Errors of launch planning, with the file that they are about.
template <class Work> auto planned(const Work& work) -> decltype(work()) {
  try {
    return work();
  } catch (const Error& error) {
    if (error.kind == Error::Kind::kBundle) throw Error("program.json: " + std::string(error.what()), error.kind);
    throw;
  } catch (const std::out_of_range&) {  // the name of a type is none
    throw Error("program.json: is damaged (an attribute is no type): copy or export the bundle again",
                Error::Kind::kBundle);
  }
}

}  // namespace

Layout::Layout(const Program& program, const Sizes& sizes, const DeviceInfo& device, const std::set<std::string>& kept)
    : program_(program), sizes_(sizes), device_(device), capacity_(round_up(sizes.capacity, kCapacityMultiple)) {
  check_cache_type(sizes.kv);
  for (const ProgramNode& node : program.nodes) {
    std::string kv;
    Fields fields = node.fields();
    if (node.op == "GroupQueryAttention") {
      ProgramNode other = node;
      other.attributes["kv"] = {Attribute::kText, sizes.kv};
      fields = other.fields();
      cache_shapes_.push_back({node.input(1), node.input(2), node.integer("kv_num_heads"), node.integer("head_size")});
    }
    fields_.push_back(std::move(fields));
  }
  // The inputs of a step, in one piece, ids last: a decode step has few of them, and one copy takes all.
  lengths = take(u64(4 * sizes.batch));
  ids = take(u64(4 * sizes.tokens));
  next_ids = take(u64(4 * sizes.logits));
  place_caches();
  caches_ = end_;
  std::set<std::string> all = kept;
  all.insert("logits");
  place_values(all);
  place_workspace();
}

u64 Layout::take(u64 bytes) {
  const u64 start = end_;
  if (bytes > kMostBytes - end_)
    throw Error("program.json: its values are too large for any device", Error::Kind::kBundle);
  end_ = u64(round_up(i64(end_ + bytes)));
  return start;
}

u64 Layout::code_bytes(const CacheShape& cache) const {
  const std::string& kv = sizes_.kv;
  return u64(cache.size) * (kv == "float32" ? 4 : kv == "float16" || kv == "bfloat16" ? 2 : 1);
}

u64 Layout::sequence_bytes(const CacheShape& cache) const {
  const u64 row = code_bytes(cache) + scale_bytes();
  if (double(cache.heads) * double(capacity_) * double(row) * double(sizes_.batch) > double(kMostBytes)) {
    throw Error("program.json: its caches are too large for any device", Error::Kind::kBundle);
  }
  return u64(cache.heads) * u64(capacity_) * row;
}

void Layout::place_caches() {
  for (const CacheShape& cache : cache_shapes_) {
    for (const std::string* name : {&cache.key, &cache.value}) {
      offsets_[*name] = take(u64(sizes_.batch) * sequence_bytes(cache));
    }
  }
}

void Layout::place_values(const std::set<std::string>& kept) {
  const std::vector<ProgramNode>& nodes = program_.nodes;
  std::map<std::string, std::size_t> last;
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    for (const std::string& name : nodes[i].inputs) last[name] = i;
  }
  for (const ProgramNode& node : nodes) {
    if (node.op != "LastToken") continue;  // with one token per row its readers read its input instead
    const auto reader = last.find(node.outputs[0]);
    if (reader != last.end()) last[node.inputs[0]] = std::max(last[node.inputs[0]], reader->second);
  }
  using Place = std::pair<u64, u64>;  // size, offset
  std::multiset<Place> free;
  std::vector<std::pair<std::string, Place>> held;
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    for (const std::string& name : nodes[i].outputs) {
      const auto value = program_.values.find(name);
      if (value == program_.values.end()) continue;  // a cache
      const u64 size = u64(after_head(name) ? sizes_.logits : sizes_.tokens) * value->second.row_bytes();
      const auto fitting = free.lower_bound({size, 0});
      Place place;
      if (fitting != free.end()) {
        place = *fitting;
        free.erase(fitting);
      } else {
        place = {size, take(size)};
      }
      held.emplace_back(name, place);
      offsets_[name] = place.second;
    }
    for (auto one = held.begin(); one != held.end();) {
      const auto reader = last.find(one->first);
      const bool done = !kept.count(one->first) && (reader == last.end() || reader->second <= i);
      if (done) free.insert(one->second);
      one = done ? held.erase(one) : one + 1;
    }
  }
}

void Layout::place_workspace() {
  const i64 width = program_.values.at("logits").width;
  u64 bytes = argmax_workspace_bytes(std::max<i64>(sizes_.batch, 1), width);
  planned([&] {
    for (const std::size_t index : kinds()) {
      const Node node = this->node(index, {1, 1});
      bytes = std::max(bytes, scratch_bytes(node, device_, sizes_.batch, sizes_.tokens));
      counter_bytes = std::max(counter_bytes, gpu::counter_bytes(node, sizes_.batch, sizes_.tokens));
    }
  });
  workspace = take(bytes);
  counters = take(counter_bytes);
}

Tensor Layout::tensor(const ProgramNode& node, const std::string& name, const StepSize& step) const {
  if (const auto weight = program_.weights.find(name); weight != program_.weights.end()) {
    return {0, weight->second.type, weight->second.dims};
  }
  if (const auto value = program_.values.find(name); value != program_.values.end()) {
    return {0, value->second.type, {step.batch, step.tokens, value->second.width}};
  }
  if (name == "past_lengths") return {0, "int32", {step.batch}};
  if (name == "input_ids") return {0, "int32", {step.batch, step.tokens}};
  for (const CacheShape& cache : cache_shapes_) {
    if (name == cache.key || name == cache.value) {
      return {0, "uint8", {step.batch, cache.heads, capacity_, i64(code_bytes(cache) + scale_bytes())}};
    }
  }
  throw Error("program.json: " + node.name + " reads " + name + ", which has no memory: export the bundle again",
              Error::Kind::kBundle);
}

Node Layout::node(std::size_t index, const StepSize& step) const {
  const ProgramNode& node = program_.nodes[index];
  Node made{node.op, node.name, fields_[index], {}, {}};
  for (const std::string& name : node.inputs) made.inputs.push_back(name.empty() ? Tensor() : tensor(node, name, step));
  for (const std::string& name : node.outputs) {
    if (program_.values.count(name)) made.outputs.push_back(tensor(node, name, step));  // caches are no results
  }
  return made;
}

Launches Layout::launches(const Node& node, u64 workspace_address, u64 counters_address) const {
  return planned([&] { return gpu::launches(node, device_, workspace_address, counters_address); });
}

std::vector<std::size_t> Layout::kinds() const {
  std::set<std::string> known;
  std::vector<std::size_t> found;
  for (std::size_t i = 0; i < program_.nodes.size(); ++i) {
    const Node node = this->node(i, {1, 1});
    std::string key = node.op;
    for (const auto& [name, value] : node.attributes.all()) key += "\n" + name + "=" + value;
    for (const auto* tensors : {&node.inputs, &node.outputs}) {
      key += "\n";
      for (const Tensor& tensor : *tensors) {
        key += tensor.type + ":";
        for (const i64 size : tensor.dims) key += std::to_string(size) + ",";
      }
    }
    if (known.insert(key).second) found.push_back(i);
  }
  return found;
}

KernelNames Layout::kernels() const {
  KernelNames names;
  const auto add = [&](const std::string& name) {
    if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
  };
  for (const Launch& launch : argmax_launches(0, 0, 1, 1, 0)) add(launch.kernel);
  planned([&] {
    for (const std::size_t index : kinds()) {
      for (const std::string& name : gpu::kernels(node(index, {1, 1}))) add(name);
    }
  });
  return names;
}

}  // namespace edgelm::gpu
