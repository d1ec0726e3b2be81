#include "cuda/executor/program.h"

#include <algorithm>
#include <functional>
#include <set>

namespace edgelm::gpu {

namespace {

constexpr u64 kMostBytes = u64(1) << 62;

// Number of inputs, of required inputs, and of outputs.
struct Arity { std::size_t inputs, required, outputs; };
const std::map<std::string, Arity> kArity = {{"QuantEmbedding", {2, 2, 1}}, {"QuantLinear", {5, 2, 1}},
                                             {"SparseMoE", {5, 4, 2}},      {"GroupQueryAttention", {8, 6, 3}},
                                             {"RMSNorm", {3, 2, 1}},        {"LastToken", {1, 1, 1}}};

const std::string kEmpty;

std::string shown(const std::string& text) { return text.substr(0, 60); }

[[noreturn]] void damaged(const std::string& problem) {
  throw Error("program.json: is damaged (" + problem + "): copy or export the bundle again", Error::Kind::kBundle);
}

[[noreturn]] void wrong(const std::string& problem) {
  throw Error("program.json: " + problem + ": export the bundle again", Error::Kind::kBundle);
}

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// The number of elements; of impossibly many some number that no tensor has.
u64 elements(const std::vector<i64>& dims) {
  u64 count = 1;
  for (const i64 size : dims) {
    if (count > kMostBytes / u64(size)) return kMostBytes;
    count *= u64(size);
  }
  return count;
}

Matrix matrix_of(const ProgramNode& node, const std::string& prefix = "") {
  for (const char* key : {"rows", "columns", "group", "count", "zeros", "swiglu"}) node.integer(prefix + key);
  node.text(prefix + "kind");
  try {
    return Matrix::of(node.fields(), prefix);
  } catch (const Error& error) {
    wrong(node.name + " has " + error.what());
  }
}

u64 bytes_of(const Matrix& matrix) {
  return u64(matrix.zeros_offset() + round_up(matrix.count * matrix.zeros_stride()));
}

// Checks one node's inputs and outputs against its attributes.
class NodeCheck {
 public:
  NodeCheck(const Program& program, const ProgramNode& node) : program_(program), node_(node) {}

  void run() const {
    const auto arity = kArity.find(node_.op);
    if (arity == kArity.end()) {
      std::string known;
      for (const auto& [name, sizes] : kArity) known += (known.empty() ? "" : ", ") + name;
      throw Error("program.json: " + node_.name + " has the operator '" + shown(node_.op) + "', supported are " +
                      known + ": upgrade edgelm",
                  Error::Kind::kBundle);
    }
    const Arity& most = arity->second;
    bool whole = node_.inputs.size() <= most.inputs && !node_.outputs.empty() && node_.outputs.size() <= most.outputs;
    for (std::size_t i = 0; i < most.required; ++i) whole = whole && !node_.input(i).empty();
    if (!whole) {
      damaged(node_.name + " has " + std::to_string(node_.inputs.size()) + " inputs and " +
              std::to_string(node_.outputs.size()) + " outputs, wrong for " + node_.op);
    }
    // Launch planning takes the address of the first result, and of a second where the operator has one.
    if (!program_.values.count(node_.outputs[0])) damaged(node_.name + " computes no value");
    static const std::map<std::string, void (NodeCheck::*)() const> kChecks = {
        {"QuantEmbedding", &NodeCheck::embedding},
        {"QuantLinear", &NodeCheck::linear},
        {"GroupQueryAttention", &NodeCheck::attention},
        {"SparseMoE", &NodeCheck::sparse_moe},
        {"RMSNorm", &NodeCheck::rms_norm},
        {"LastToken", &NodeCheck::last_token}};
    (this->*kChecks.at(node_.op))();
  }

 private:
  const std::string& in(std::size_t index) const { return node_.input(index); }
  const std::string& result() const { return node_.outputs[0]; }

  // A value has so many columns, or a weight so many elements; of packed weights bytes.
  void expect(const std::string& name, u64 wanted, u64 otherwise = 0) const {
    if (name.empty()) return;
    u64 size = 0;
    if (const auto value = program_.values.find(name); value != program_.values.end()) {
      size = u64(value->second.width);
    } else if (const auto weight = program_.weights.find(name); weight != program_.weights.end()) {
      size = weight->second.type == "uint8" ? weight->second.size : elements(weight->second.dims);
    } else {
      damaged(node_.name + " reads \"" + shown(name) + "\", expected a value or a weight");
    }
    if (size == wanted || (otherwise && size == otherwise)) return;
    damaged(node_.name + " needs " + std::to_string(wanted) +
            (otherwise && otherwise != wanted ? " or " + std::to_string(otherwise) : "") + " values in \"" +
            shown(name) + "\", which has " + std::to_string(size));
  }

  // A weight, packed in a blob or of float32.
  void expect_weight(const std::string& name, const char* type) const {
    const auto weight = program_.weights.find(name);
    if (name.empty() || (weight != program_.weights.end() && weight->second.type == type)) return;
    damaged(node_.name + " needs a weight of " + type + " in \"" + shown(name) + "\"");
  }

  void expect_value(const std::string& name) const {
    if (!name.empty() && !program_.values.count(name)) {
      damaged(node_.name + " reads \"" + shown(name) + "\", expected a value");
    }
  }

  void expect_float(const std::string& name) const {
    const auto value = program_.values.find(name);
    if (value != program_.values.end() && value->second.type != "f32") {
      damaged(node_.name + " needs float32 in \"" + shown(name) + "\"");
    }
  }

  void embedding() const {
    if (in(0) != "input_ids") damaged(node_.name + " reads \"" + shown(in(0)) + "\", expected input_ids");
    const Matrix matrix = matrix_of(node_);
    expect_weight(in(1), "uint8");
    expect(in(1), bytes_of(matrix));
    expect(result(), u64(matrix.columns));
    expect_float(result());
  }

  void linear() const {
    const Matrix matrix = matrix_of(node_);
    expect_value(in(0));
    expect_weight(in(1), "uint8");
    expect_weight(in(2), "f32");
    expect_value(in(3));
    expect_weight(in(4), "f32");
    expect(in(0), u64(matrix.columns));
    expect(in(1), bytes_of(matrix));
    expect(in(2), u64(matrix.columns));
    expect(in(3), u64(matrix.outputs()));
    expect(in(4), u64(matrix.outputs()));
    expect(result(), u64(matrix.outputs()));
    expect_float(in(3));
    if (!in(4).empty() && matrix.swiglu) damaged(node_.name + " adds a bias to a SwiGLU matmul");
    expect_type(in(0), node_.text("activation"), !in(2).empty());
    if (program_.values.at(result()).type != node_.text("output")) {
      damaged(node_.name + " computes " + shown(node_.text("output")) + ", and its value is " +
              program_.values.at(result()).type);
    }
  }

  // A value is read in its own type: float32, or where nothing is normed that of the activations.
  void expect_type(const std::string& name, const std::string& activation, bool normed) const {
    const std::string& type = program_.values.at(name).type;
    if (type != "f32" && (normed || type != activation)) {
      damaged(node_.name + " reads " + type + " in \"" + shown(name) + "\"");
    }
  }

  void attention() const {
    const i64 heads = node_.integer("num_heads"), kv_heads = node_.integer("kv_num_heads"),
              width = node_.integer("head_size");
    expect_value(in(0));
    expect(in(0), u64((heads + 2 * kv_heads) * width));
    expect(result(), u64(heads * width));
    for (const std::string* name : {&in(0), &result()}) {
      if (program_.values.at(*name).type != node_.text("activation")) {
        damaged(node_.name + " has activations of " + shown(node_.text("activation")) + ", and \"" + shown(*name) +
                "\" is of " + program_.values.at(*name).type);
      }
    }
    for (const std::size_t i : {1, 2}) {
      if (!starts_with(in(i), kCachePrefix) || program_.weights.count(in(i)) || program_.values.count(in(i))) {
        damaged(node_.name + " reads \"" + shown(in(i)) + "\", expected a cache");
      }
    }
    if (in(3) != "past_lengths") damaged(node_.name + " reads \"" + shown(in(3)) + "\", expected past_lengths");
    for (const std::size_t i : {6, 7}) {
      expect_weight(in(i), "f32");
      expect(in(i), u64((i == 6 ? heads : kv_heads) * width), u64(width));
    }
    u64 positions = 0;
    for (const std::size_t i : {4, 5}) {
      expect_weight(in(i), "f32");
      const std::vector<i64>& dims = program_.weights.at(in(i)).dims;
      if (dims.empty() || (positions && positions != u64(dims[0]))) damaged(node_.name + " has no table of positions");
      positions = u64(dims[0]);
      expect(in(i), positions * u64(width / 2));
    }
  }

  void sparse_moe() const {
    const Matrix up = matrix_of(node_, "gate_up_"), down = matrix_of(node_, "down_");
    expect_value(in(0));
    expect_float(in(0));
    for (const std::size_t i : {1, 4}) expect_weight(in(i), "f32");
    for (const std::size_t i : {2, 3}) expect_weight(in(i), "uint8");
    expect(in(0), u64(up.columns));
    expect(in(1), u64(up.count) * u64(up.columns));
    expect(in(4), u64(up.columns));
    expect(in(2), bytes_of(up));
    expect(in(3), bytes_of(down));
    expect(result(), u64(down.outputs()));
    for (std::size_t i = 1; i < node_.outputs.size(); ++i) expect(node_.outputs[i], u64(up.count));
    for (const std::string& name : node_.outputs) expect_float(name);
    if (up.outputs() != down.columns || up.columns != down.rows || up.count != down.count ||
        node_.integer("k") > up.count) {
      damaged("gate_up and down of " + node_.name + " have shapes that contradict each other");
    }
  }

  void rms_norm() const {
    expect_value(in(0));
    expect_weight(in(1), "f32");
    expect_value(in(2));
    expect_float(in(2));
    expect_float(result());
    const i64 width = program_.values.at(result()).width;
    if (width % 2) damaged(node_.name + " norms " + std::to_string(width) + " columns, expected an even number");
    for (std::size_t i = 0; i < 3; ++i) expect(in(i), u64(width));
  }

  void last_token() const {
    expect_value(in(0));
    expect(in(0), u64(program_.values.at(result()).width));
    expect_float(in(0));
    expect_float(result());
  }

  const Program& program_;
  const ProgramNode& node_;
};

// Every value and cache belongs to one node, and values behind LastToken, which have fewer rows, are read there only.
void check_memory(const Program& program) {
  std::set<std::string> made;
  bool behind = false;
  for (const ProgramNode& node : program.nodes) {
    std::vector<std::string> names = node.outputs;
    if (node.op == "GroupQueryAttention") names.insert(names.end(), {node.input(1), node.input(2)});
    for (const std::string& name : names) {
      if (!made.insert(name).second) damaged(shown(name) + " is computed twice, the second time by " + node.name);
    }
    const bool last = after_head(node.outputs[0]);
    behind = behind || node.op == "LastToken";
    bool fits = last ? behind : node.op != "LastToken";
    for (std::size_t i = 1; i < node.outputs.size(); ++i) fits = fits && !after_head(node.outputs[i]);
    for (const std::string& name : node.inputs) fits = fits && (last || !after_head(name));
    if (node.op == "LastToken") fits = fits && !after_head(node.input(0));
    if (!fits) damaged(node.name + " computes " + shown(node.outputs[0]) + " of the wrong positions");
  }
}

void check_attributes(const Program& program, const ProgramNode& node) {
  for (const auto& [key, value] : node.attributes) {
    const auto exact = program.exact.find(key);
    if (exact != program.exact.end() && (exact->second.type == Attribute::kText) != (value.type == Attribute::kText)) {
      damaged("exact." + shown(key) + " is " + shown(exact->second.text) + ", and " + shown(value.text) + " in " +
              node.name);
    }
  }
}

}  // namespace

bool after_head(const std::string& name) { return name == "head_input" || name == "logits"; }

bool starts_with(const std::string& text, const char* prefix) { return text.rfind(prefix, 0) == 0; }

u64 type_bytes(const std::string& type) {
  if (type == "f32" || type == "int32") return 4;
  if (type == "bf16" || type == "f16") return 2;
  return type == "uint8" ? 1 : 0;
}

u64 ProgramValue::row_bytes() const { return u64(width) * type_bytes(type); }

const std::string& ProgramNode::input(std::size_t index) const {
  return index < inputs.size() ? inputs[index] : kEmpty;
}

const std::string& ProgramNode::text(const std::string& key) const {
  const auto found = attributes.find(key);
  if (found == attributes.end()) wrong(op + " " + name + " has no " + key);
  return found->second.text;
}

i64 ProgramNode::integer(const std::string& key) const {
  const std::string& value = text(key);
  i64 low = 0;
  for (const char* size : {"rows", "columns", "group", "count", "num_heads", "head_size", "k"}) {
    if (ends_with(key, size)) low = 1;
  }
  const bool digits = !value.empty() && value.size() <= 10 &&
                      value.find_first_not_of("0123456789") == std::string::npos;
  const i64 number = digits ? std::stoll(value) : -1;
  if (attributes.at(key).type != Attribute::kInteger || number < low || number > kMostSize) {
    wrong(key + " of " + name + " is " + shown(value) + ", expected a whole number from " + std::to_string(low) +
          " to " + std::to_string(kMostSize));
  }
  return number;
}

Fields ProgramNode::fields() const {
  std::string lines;
  for (const auto& [key, value] : attributes) {
    if (key.find_first_of(std::string("=\n\0", 3)) != std::string::npos ||
        value.text.find_first_of(std::string("\n\0", 2)) != std::string::npos) {
      wrong(name + " has an attribute with a line end");
    }
    lines += key + "=" + value.text + "\n";
  }
  return Fields(lines);
}

void Program::check() const {
  std::set<std::string> known = {"", "input_ids", "past_lengths"};
  for (const auto& [name, weight] : weights) {
    for (const i64 size : weight.dims) {
      if (size < 1 || size > kMostSize)
        damaged("the weight " + shown(name) + " has a dimension " + std::to_string(size));
    }
    const u64 count = elements(weight.dims);
    if (count >= kMostBytes / 8 || weight.size != count * type_bytes(weight.type)) {
      damaged("the weight " + shown(name) + " has " + std::to_string(weight.size) + " bytes for " +
              std::to_string(count) + " elements of " + weight.type);
    }
    if (weight.offset > kMostBytes) damaged("the weight " + shown(name) + " is at " + std::to_string(weight.offset));
    if (values.count(name)) damaged(shown(name) + " is a value and a weight");
    known.insert(name);
  }
  for (const char* name : {"", "input_ids", "past_lengths"}) {
    if (values.count(name) || weights.count(name)) damaged("\"" + std::string(name) + "\" names a value or a weight");
  }
  for (const auto& [name, value] : values) {
    if (value.width < 1 || value.width > kMostSize ||
        (value.type != "f32" && value.type != "bf16" && value.type != "f16")) {
      damaged("the value " + shown(name) + " is " + std::to_string(value.width) + " of " + shown(value.type));
    }
  }
  for (const ProgramNode& node : nodes) {
    for (const std::string& name : node.inputs) {
      if (!known.count(name) && !starts_with(name, kCachePrefix)) {
        damaged(node.name + " reads " + shown(name) + ", which no node computes");
      }
    }
    for (const std::string& name : node.outputs) {
      if (!values.count(name) && !starts_with(name, kPresentPrefix)) {
        damaged("the value " + shown(name) + " of " + node.name + " has no type");
      }
    }
    known.insert(node.outputs.begin(), node.outputs.end());
  }
  const auto logits = values.find("logits");
  if (logits == values.end() || !known.count("logits")) damaged("no node computes logits");
  if (logits->second.type != "f32") damaged("the logits are of " + logits->second.type + ", expected f32");
  for (const ProgramNode& node : nodes) {
    check_attributes(*this, node);
    NodeCheck(*this, node).run();
  }
  check_memory(*this);
}

Program Program::debug() const {
  Program found = *this;
  for (ProgramNode& node : found.nodes) {
    for (auto& [key, value] : node.attributes) {
      const auto other = exact.find(key);
      if (other != exact.end()) value = other->second;
    }
  }
  for (auto& [name, value] : found.values) value.type = "f32";
  return found;
}

u64 Program::weight_bytes() const {
  u64 most = 0;
  for (const auto& [name, weight] : weights) most = std::max(most, weight.offset + weight.size);
  return most;
}

}  // namespace edgelm::gpu
