#include "cuda/host/node.h"

#include <algorithm>
#include <utility>

#include "cuda/host/operators/attention.h"
#include "cuda/host/operators/linear.h"
#include "cuda/host/matrix.h"
#include "cuda/host/planners.h"
#include "cuda/host/operators/rows.h"
#include "cuda/host/operators/sparse_moe.h"

namespace edgelm::gpu {

namespace {

constexpr std::pair<const char*, const char*> kCacheTypes[] = {
    {"float16", "f16"}, {"bfloat16", "bf16"}, {"float32", "f32"}, {"int8", "int8"}, {"fp8", "fp8"}};

// A step: sequences and the new tokens of each.
struct Step {
  i64 batch, tokens;
  i64 rows() const { return batch * tokens; }
};

struct Scratch { u64 workspace, counters; };

[[noreturn]] void damaged(const Node& node, const std::string& what) {
  throw Error(node.name + " " + what, Error::Kind::kBundle);
}

std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
}

const Tensor kAbsent;

i64 dim(const Node& node, std::size_t input, std::size_t axis) {
  const std::vector<i64>& dims = node.input(input).dims;
  if (axis >= dims.size()) {
    damaged(node, "has " + std::to_string(dims.size()) + " dimensions in input " + std::to_string(input) +
                      ", expected more than " + std::to_string(axis));
  }
  return dims[axis];
}

i64 width(const Node& node) {
  if (node.input(0).dims.empty()) dim(node, 0, 0);
  return node.input(0).dims.back();
}

Step step_of(const Node& node) {
  const Step step{dim(node, 0, 0), dim(node, 0, 1)};
  if (step.rows() > kMostSize) throw Error(node.name + ": " + std::to_string(step.rows()) + " tokens are too many");
  return step;
}

void check_sizes(const Node& node, i64 batch, i64 tokens) {
  if (batch < 1 || tokens < 1 || batch > kMostSize || tokens > kMostSize) {
    throw Error(node.name + ": steps of " + std::to_string(tokens) + " tokens of " + std::to_string(batch) +
                " sequences, expected at least 1 of each");
  }
}

Matrix matrix_of(const Node& node, const std::string& prefix = "") {
  try {
    return Matrix::of(node.attributes, prefix);
  } catch (const Error& error) {
    damaged(node, std::string("has a damaged matrix (") + error.what() + "): export the bundle again");
  }
}

float rounding_of(const Node& node) {
  const std::string& kind = node.text("activations");
  if (kind == "float") return 0;
  if (kind == "fp8-token") return -1;
  damaged(node, "has activations '" + kind + "', expected one of float, fp8-token: upgrade edgelm");
}

// -- operators --------------------------------------------------------------------------------------------------------

Launches embedding(const Node& node, const Step& step, const DeviceInfo&, const Scratch&) {
  return {embedding_launch(node.input(0).address, matrix_of(node), node.input(1).address, node.output(0).address,
                           step.rows())};
}

Matmul matmul_of(const Node& node, i64 rows) {
  Matmul matmul;
  matmul.matrix = matrix_of(node);
  matmul.blob = node.input(1).address;
  matmul.x = node.input(0).address;
  matmul.y = node.output(0).address;
  matmul.rows = rows;
  matmul.activation = node.text("activation");
  matmul.x_float = node.input(0).type == "f32";
  matmul.y_float = node.text("output") == "f32";
  matmul.norm = node.input(2).address;
  matmul.residual = node.input(3).address;
  matmul.bias = node.input(4).address;
  matmul.rounding = rounding_of(node);
  matmul.epsilon = float(node.number("epsilon"));
  return matmul;
}

Launches linear(const Node& node, const Step& step, const DeviceInfo& device, const Scratch& scratch) {
  return matmul_launches(matmul_of(node, step.rows()), device, scratch.workspace);
}

const char* cache_type(const Fields& attributes) {
  const std::string kind = attributes.text("kv", "float16");
  std::vector<std::string> known;
  for (const auto& [name, type] : kCacheTypes) {
    if (kind == name) return type;
    known.push_back(name);
  }
  throw Error("kv is '" + kind + "': the KV cache can be " + joined(known), Error::Kind::kOther);
}

AttentionShape attention_shape(const Node& node, const Step& step) {
  return {step.batch,
          step.tokens,
          node.integer("num_heads"),
          node.integer("kv_num_heads"),
          node.integer("head_size"),
          dim(node, 1, 2),
          dim(node, 4, 0),
          node.text("activation"),
          cache_type(node.attributes)};
}

// Whether a QK-norm weight has the size of one head.
bool is_per_head(const Node& node, std::size_t input, const char* heads) {
  return node.input(input).present() && node.input(input).elements() == node.integer("head_size") &&
         node.integer(heads) > 1;
}

// Call `visit` with the shape of every step of up to `tokens` tokens, over all sequences, of one and of `batch` sequences.
template <class Visit> void each_attention_step(const Node& node, i64 batch, i64 tokens, const Visit& visit) {
  AttentionShape shape = attention_shape(node, {1, 1});
  shape.check();
  for (i64 sequences : {i64(1), batch}) {
    shape.batch = sequences;
    const i64 most = std::min(std::max<i64>(1, tokens / sequences), shape.capacity);
    for (shape.tokens = 1; shape.tokens <= most; shape.tokens++) visit(shape);
  }
}

Launches attention(const Node& node, const Step& step, const DeviceInfo& device, const Scratch& scratch) {
  AttentionBuffers buffers{};
  buffers.qkv = node.input(0).address;
  buffers.key_cache = node.input(1).address;
  buffers.value_cache = node.input(2).address;
  buffers.past_lengths = node.input(3).address;
  buffers.cos = node.input(4).address;
  buffers.sin = node.input(5).address;
  buffers.q_norm = node.input(6).address;
  buffers.k_norm = node.input(7).address;
  buffers.out = node.output(0).address;
  buffers.workspace = scratch.workspace;
  buffers.counters = scratch.counters;
  buffers.prefetch = node.attributes.address("prefetch");
  buffers.prefetch_bytes = std::min(node.attributes.address("prefetch_bytes"), u64(device.prefetch_bytes()));
  buffers.q_norm_per_head = is_per_head(node, 6, "num_heads");
  buffers.k_norm_per_head = is_per_head(node, 7, "kv_num_heads");
  AttentionOptions options;
  options.epsilon = node.number("epsilon");
  options.clip = node.number("clip");
  return attention_launches(attention_shape(node, step), buffers, device.multiprocessors, options);
}

SparseMoe sparse_moe_of(const Node& node, i64 rows) {
  SparseMoe call{{}, matrix_of(node, "gate_up_"), matrix_of(node, "down_"), rounding_of(node)};
  call.shape.tokens = rows;
  call.shape.columns = call.gate_up.columns;
  call.shape.hidden = call.down.columns;
  call.shape.experts = call.gate_up.count;
  call.shape.k = node.integer("k");
  call.shape.normalize = node.integer("normalize") != 0;
  call.shape.activation = node.text("activation");
  call.shape.epsilon = float(node.number("epsilon"));
  return call;
}

Launches sparse_moe(const Node& node, const Step& step, const DeviceInfo& device, const Scratch& scratch) {
  SparseMoeBuffers buffers{};
  buffers.x = node.input(0).address;
  buffers.router = node.input(1).address;
  buffers.gate_up = node.input(2).address;
  buffers.down = node.input(3).address;
  buffers.norm = node.input(4).address;
  buffers.y = node.output(0).address;
  buffers.logits = node.output(1).address;
  buffers.workspace = scratch.workspace;
  buffers.counters = scratch.counters;
  return sparse_moe_launches(sparse_moe_of(node, step.rows()), buffers, device);
}

Launches rms_norm(const Node& node, const Step& step, const DeviceInfo&, const Scratch&) {
  RmsNorm norm;
  norm.x = node.input(0).address;
  norm.weight = node.input(1).address;
  norm.residual = node.input(2).address;
  norm.y = node.output(0).address;
  norm.rows = step.rows();
  norm.columns = width(node);
  norm.source = node.input(0).type;
  norm.epsilon = float(node.number("epsilon"));
  return {rms_norm_launch(norm)};
}

Launches last_token(const Node& node, const Step& step, const DeviceInfo&, const Scratch&) {
  return {last_token_launch(node.input(0).address, node.output(0).address, step.batch, step.tokens, width(node))};
}

KernelNames embedding_needs(const Node& node) { return {embedding_kernel(matrix_of(node))}; }
KernelNames linear_needs(const Node& node) {
  return matmul_kernels(matrix_of(node), node.text("activation"), rounding_of(node));
}
KernelNames attention_needs(const Node& node) {
  return attention_kernels_of(node.text("activation"), cache_type(node.attributes), node.integer("head_size"));
}
KernelNames moe_needs(const Node& node) { return sparse_moe_kernels(sparse_moe_of(node, 1)); }
KernelNames rms_norm_needs(const Node& node) { return {rms_norm_kernel(node.input(0).type)}; }
KernelNames last_token_needs(const Node&) { return {"last_token_f32"}; }

struct Operator {
  const char* name;
  Launches (*launches)(const Node&, const Step&, const DeviceInfo&, const Scratch&);
  KernelNames (*kernels)(const Node&);
};
constexpr Operator kOperators[] = {{"QuantEmbedding", embedding, embedding_needs},
                                   {"QuantLinear", linear, linear_needs},
                                   {"GroupQueryAttention", attention, attention_needs},
                                   {"SparseMoE", sparse_moe, moe_needs},
                                   {"RMSNorm", rms_norm, rms_norm_needs},
                                   {"LastToken", last_token, last_token_needs}};

const Operator& operator_of(const Node& node) {
  std::vector<std::string> known;
  for (const Operator& one : kOperators) {
    if (node.op == one.name) return one;
    known.push_back(one.name);
  }
  damaged(node, "has the operator '" + node.op + "', supported are " + joined(known) + ": upgrade edgelm");
}

// -- text ---------------------------------------------------------------------------------------------------------------

Tensor tensor_of(const std::string& field, const std::string& text) {
  const std::size_t first = text.find(':'), second = text.find(':', first == std::string::npos ? first : first + 1);
  if (second == std::string::npos) {
    throw Error(field + " is " + text.substr(0, 60) + ", expected ADDRESS:TYPE:D,D", Error::Kind::kBundle);
  }
  Tensor tensor{0, text.substr(first + 1, second - first - 1), {}};
  Fields numbers("address=" + text.substr(0, first) + "\n");
  tensor.address = numbers.address("address");
  for (std::size_t at = second + 1; at < text.size();) {
    const std::size_t comma = std::min(text.find(',', at), text.size());
    const std::string what = "a dimension of " + field;
    tensor.dims.push_back(Fields(what + "=" + text.substr(at, comma - at) + "\n").size(what));
    at = comma + 1;
  }
  return tensor;
}

std::vector<Tensor> tensors_of(const Fields& fields, const std::string& prefix) {
  std::vector<Tensor> found;
  for (const auto& [name, text] : fields.all()) {
    if (name.compare(0, prefix.size(), prefix) != 0) continue;
    const i64 index = Fields("index=" + name.substr(prefix.size()) + "\n").integer("index");
    if (index < 0 || index > 15) throw Error(name + " is no input or output", Error::Kind::kBundle);
    found.resize(std::max(found.size(), std::size_t(index) + 1));
    found[std::size_t(index)] = tensor_of(name, text);
  }
  return found;
}

std::string planned(const Fields& fields) {
  return serialised(
      launches(Node::of(fields), device_of(fields), fields.address("workspace"), fields.address("counters")));
}

std::string cache_row(const Fields& fields) {
  return std::to_string(attention_row_bytes(cache_type(fields), fields.size("head_size")));
}

std::string scratch(const Fields& fields) {
  const Node node = Node::of(fields);
  const i64 batch = fields.integer("batch"), tokens = fields.integer("tokens");
  return std::to_string(scratch_bytes(node, device_of(fields), batch, tokens)) + " " +
         std::to_string(counter_bytes(node, batch, tokens));
}

}  // namespace

i64 Tensor::elements() const {
  i64 count = 1;
  for (i64 size : dims) {
    count *= size;
    if (count > kMostSize) return count;  // more than any input that is counted has; it could overflow
  }
  return count;
}

Node Node::of(const Fields& fields) {
  Node node{fields.text("op"), fields.text("name"), fields, tensors_of(fields, "input."),
            tensors_of(fields, "output.")};
  operator_of(node);
  return node;
}

const Tensor& Node::input(std::size_t index) const { return index < inputs.size() ? inputs[index] : kAbsent; }
const Tensor& Node::output(std::size_t index) const { return index < outputs.size() ? outputs[index] : kAbsent; }

const std::string& Node::text(const std::string& key) const {
  if (!attributes.has(key))
    throw Error(op + " " + name + " has no " + key + ": export the bundle again", Error::Kind::kBundle);
  return attributes.text(key);
}

i64 Node::integer(const std::string& key) const {
  text(key);
  try {
    return attributes.integer(key);
  } catch (const Error& error) {
    damaged(*this, std::string("is damaged (") + error.what() + "): export the bundle again");
  }
}

double Node::number(const std::string& key) const {
  text(key);
  try {
    return attributes.number(key);
  } catch (const Error& error) {
    damaged(*this, std::string("is damaged (") + error.what() + "): export the bundle again");
  }
}

Launches launches(const Node& node, const DeviceInfo& device, u64 workspace, u64 counters) {
  return operator_of(node).launches(node, step_of(node), device, {workspace, counters});
}

u64 scratch_bytes(const Node& node, const DeviceInfo& device, i64 batch, i64 tokens) {
  check_sizes(node, batch, tokens);
  const i64 rows = std::max(batch, tokens);
  if (node.op == "SparseMoE") return sparse_moe_workspace_bytes(sparse_moe_of(node, rows));
  if (node.op == "QuantLinear") return matmul_workspace_bytes(matmul_of(node, rows));
  u64 most = 0;
  if (node.op == "GroupQueryAttention") {
    each_attention_step(node, batch, tokens, [&](const AttentionShape& shape) {
      most = std::max(most, attention_workspace_bytes(shape, device.multiprocessors));
    });
  }
  return most;
}

u64 counter_bytes(const Node& node, i64 batch, i64 tokens) {
  check_sizes(node, batch, tokens);
  u64 most = node.op == "SparseMoE" ? kMoeCounterBytes : 0;
  if (node.op == "GroupQueryAttention") {
    each_attention_step(node, batch, tokens, [&](const AttentionShape& shape) {
      if (shape.few()) most = std::max(most, shape.counter_bytes());
    });
  }
  return most;
}

KernelNames kernels(const Node& node) { return operator_of(node).kernels(node); }

Functions node_functions() {
  return {{"node_launches", planned},
          {"node_scratch", scratch},
          {"node_cache_row", cache_row},
          {"node_kernels", [](const Fields& fields) { return lines_of(kernels(Node::of(fields))); }}};
}

}  // namespace edgelm::gpu
