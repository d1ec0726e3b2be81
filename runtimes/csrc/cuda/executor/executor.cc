#include "cuda/executor/executor.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>

#include "cuda/host/operators/rows.h"
#include "system/files.h"

namespace edgelm::gpu {

namespace {

constexpr std::size_t kMostLongPlans = 16;  // otherwise those of prompts' last chunks would accumulate

using system::Stream;

Stream open_file(const std::string& path) {
  Stream file = system::open_stream(path);
  if (!file) throw Error(path + " cannot be read: copy the bundle again", Error::Kind::kBundle);
  std::setvbuf(file.get(), nullptr, _IONBF, 0);
  return file;
}

}  // namespace

void check_weights_file(const Program& program, const std::string& path) {
  const u64 needed = program.weight_bytes();
  const Stream file = open_file(path);
  u8 last;
  if (needed > 0 && needed < u64(1) << 62) {
    if (system::seek(file.get(), needed - 1) && std::fread(&last, 1, 1, file.get()) == 1) return;
  }
  throw Error(path + " is too short, the program's weights end at " + std::to_string(needed) +
                  ": copy or export the bundle again",
              Error::Kind::kBundle);
}

DeviceWeights::DeviceWeights(Device& device, const Program& program, const std::string& path) : program_(program) {
  const u64 bytes = program.weight_bytes();
  base_ = device.allocate(bytes);
  upload(device, path, bytes);
}

void DeviceWeights::upload(Device& device, const std::string& path, u64 bytes) {
  // Read rather than mapped: mapping a file larger than host memory would evict everything else from the page cache.
  const Stream file = open_file(path);
  u64 done = 0;
  device.upload_from(base_, bytes, [&](void* to, std::size_t count) {
    const std::size_t read = std::fread(to, 1, count, file.get());
    done += read;
    if (read != count) {
      throw Error(path + " is too short, it ends at byte " + std::to_string(done) + ": copy or export the bundle again",
                  Error::Kind::kBundle);
    }
  });
  device.synchronize();
}

Executor::Executor(Device& device, const DeviceWeights& weights, const Layout& layout)
    : device_(device), weights_(weights), layout_(layout) {
  device.load(layout.kernels());
  base_ = device.allocate(layout.bytes());
  try {
    // Caches must not hold NaN, and counters must be 0; kernels reset the counters.
    device.fill(base_, 0, layout.cache_bytes());
    device.fill(base_ + layout.counters, 0, layout.counter_bytes);
    inputs_ = device.pinned(std::size_t(layout.ids - layout.lengths) + 4 * std::size_t(layout.sizes().tokens));
    chosen_ = device.pinned(4 * std::size_t(layout.sizes().logits));
  } catch (...) {
    device.free(base_);
    throw;
  }
}

Executor::~Executor() {
  try {
    const Device::Current current(device_);
    wait();
    for (const auto& [key, graph] : graphs_) device_.drop(graph);
    device_.free(base_);
    device_.unpin(inputs_);
    device_.unpin(chosen_);
  } catch (const std::exception&) {  // after a kernel error: the context is lost, and the memory with it
  }
}

void Executor::wait() {
  if (!pending_) return;
  pending_ = false;
  device_.wait();
}

void Executor::run(const Step& step) {
  const Key key{step.size.batch, step.size.tokens, step.all_positions, step.greedy};
  const std::size_t ids = 4 * std::size_t(step.size.rows()), lengths = 4 * std::size_t(step.size.batch);
  if (!step.graph) {
    plan(key);
    device_.upload(base_ + layout_.ids, step.ids, ids);
    device_.upload(base_ + layout_.lengths, step.lengths, lengths);
    start_launches(key);
    return;
  }
  const bool known = plans_.count(key) != 0;
  plan(key);
  wait();  // the last step may still read the inputs
  std::memcpy(inputs_ + (layout_.ids - layout_.lengths), step.ids, ids);
  std::memcpy(inputs_, step.lengths, lengths);
  pending_ = true;
  // The first time without a capture, so that the driver can finish loading the kernels.
  if (!known) {
    start_graph(key);
    return;
  }
  const auto graph = graphs_.find(key);
  device_.launch_graph(graph != graphs_.end() ? graph->second
                                              : graphs_[key] = device_.capture([&] { start_graph(key); }));
}

// Start a step whose inputs are in pinned memory.
void Executor::start_graph(const Key& key) {
  const auto& [batch, tokens, all_positions, greedy] = key;
  const std::size_t used = std::size_t(layout_.ids - layout_.lengths) + 4 * std::size_t(batch * tokens);
  device_.start_upload(base_ + layout_.lengths, inputs_, used);
  start_launches(key);
}

// Start a step's launches, and the copy of the tokens that it chooses.
void Executor::start_launches(const Key& key) {
  const auto& [batch, tokens, all_positions, greedy] = key;
  for (const LoadedLaunch& launch : plan(key)) device_.launch(launch);
  if (greedy) {
    device_.start_download(chosen_, base_ + layout_.next_ids, 4 * std::size_t(all_positions ? batch * tokens : batch));
    pending_ = true;
  }
}

void Executor::value(const std::string& name, i64 rows, float* out) {
  const ProgramValue& value = layout_.program().values.at(name);
  device_.download(base_ + layout_.offset(name), out, u64(rows) * value.row_bytes());
  pending_ = false;
}

void Executor::chosen(i64 rows, i32* out) {
  wait();
  std::memcpy(out, chosen_, 4 * std::size_t(rows));
}

// -- planning ----------------------------------------------------------------------------------------------------------

const Executor::Plan& Executor::plan(const Key& key) {
  const auto known = plans_.find(key);
  if (known != plans_.end()) return known->second;
  Plan made = make_plan(key);
  if (std::get<1>(key) > 1) {
    if (long_plans_.size() >= kMostLongPlans) {
      plans_.erase(long_plans_.front());
      long_plans_.pop_front();
    }
    long_plans_.push_back(key);
  }
  return plans_.emplace(key, std::move(made)).first->second;
}

Executor::Plan Executor::make_plan(const Key& key) {
  const auto& [batch, tokens, all_positions, greedy] = key;
  const std::vector<ProgramNode>& nodes = layout_.program().nodes;
  const u64 workspace = base_ + layout_.workspace, counters = base_ + layout_.counters;
  StepSize step{batch, tokens}, last = step;
  std::map<std::string, std::string> renamed;
  Plan plan;
  const auto add = [&](Launches launches) {
    for (Launch& launch : launches) plan.push_back(device_.loaded(std::move(launch)));
  };
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    const ProgramNode& one = nodes[i];
    StepSize now = after_head(one.outputs[0]) ? last : step;
    if (one.op == "LastToken") {
      if (all_positions || tokens == 1) {
        renamed[one.outputs[0]] = one.inputs[0];
        continue;
      }
      now = step;
      last = {batch, 1};
    }
    Node node = layout_.node(i, now);
    for (std::size_t input = 0; input < node.inputs.size(); ++input) {
      if (node.inputs[input].present()) node.inputs[input].address = address(one.inputs[input], renamed);
    }
    for (std::size_t from = 0, to = 0; from < one.outputs.size(); ++from) {
      if (layout_.program().values.count(one.outputs[from])) {
        node.outputs[to++].address = address(one.outputs[from], renamed);
      }
    }
    if (one.op == "GroupQueryAttention") add_prefetch(i, node);
    add(layout_.launches(node, workspace, counters));
  }
  if (greedy) {
    add(argmax_launches(base_ + layout_.offset("logits"), base_ + layout_.next_ids, last.rows(),
                        layout_.program().values.at("logits").width, workspace));
  }
  return plan;
}

// The matrix that attention's output is multiplied with by the next node may be requested for the L2 cache.
void Executor::add_prefetch(std::size_t index, Node& node) const {
  const std::vector<ProgramNode>& nodes = layout_.program().nodes;
  if (index + 1 == nodes.size() || nodes[index + 1].op != "QuantLinear") return;
  const std::vector<std::string>& outputs = nodes[index].outputs;
  const std::string& weights = nodes[index + 1].input(1);
  if (std::find(outputs.begin(), outputs.end(), nodes[index + 1].input(0)) == outputs.end()) return;
  std::string lines;
  for (const auto& [name, value] : node.attributes.all()) lines += name + "=" + value + "\n";
  node.attributes = Fields(lines + "prefetch=" + std::to_string(weights_.address(weights)) +
                           "\nprefetch_bytes=" + std::to_string(layout_.program().weights.at(weights).size) + "\n");
}

u64 Executor::address(const std::string& name, const std::map<std::string, std::string>& renamed) const {
  const auto other = renamed.find(name);
  const std::string& actual = other == renamed.end() ? name : other->second;
  if (actual == "input_ids") return base_ + layout_.ids;
  if (actual == "past_lengths") return base_ + layout_.lengths;
  if (layout_.program().weights.count(actual)) return weights_.address(actual);
  return base_ + layout_.offset(actual);
}

// -- caches ------------------------------------------------------------------------------------------------------------

template <class Part> void Executor::each_cache_part(i64 sequence, i64 length, const Part& part) {
  const u64 capacity = u64(layout_.capacity()), scales = layout_.scale_bytes();
  for (const CacheShape& cache : layout_.caches()) {
    const u64 codes = layout_.code_bytes(cache);
    for (const std::string* name : {&cache.key, &cache.value}) {
      u64 at = base_ + layout_.offset(*name) + u64(sequence) * layout_.sequence_bytes(cache);
      for (i64 head = 0; head < cache.heads; ++head, at += capacity * (codes + scales)) {
        part(at, u64(length) * codes);
        if (scales) part(at + capacity * codes, u64(length) * scales);
      }
    }
  }
}

u64 Executor::cache_bytes(i64 length) const {
  u64 bytes = 0;
  for (const CacheShape& cache : layout_.caches()) {
    bytes += 2 * u64(cache.heads) * u64(length) * (layout_.code_bytes(cache) + layout_.scale_bytes());
  }
  return bytes;
}

void Executor::write_cache(i64 sequence, i64 length, const std::function<void(const void*, std::size_t)>& write) {
  std::vector<u8> buffer;
  each_cache_part(sequence, length, [&](u64 address, u64 bytes) {
    buffer.resize(std::size_t(bytes));
    device_.download(address, buffer.data(), bytes);
    write(buffer.data(), buffer.size());
  });
}

void Executor::read_cache(i64 sequence, i64 length, const std::function<void(void*, std::size_t)>& read) {
  each_cache_part(sequence, length, [&](u64 address, u64 bytes) { device_.upload_from(address, bytes, read); });
  device_.wait();
}

}  // namespace edgelm::gpu
