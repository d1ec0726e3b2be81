#include "cuda/tensorrt/plugin_spec.h"

#include <algorithm>
#include <cstdlib>

#include "cuda/host/planners.h"

namespace edgelm::gpu {

namespace {

const char* const kMark = "edgelm_plugin=2\n";
const InputDim kBatch{0, 0}, kTokens{0, 1};
const std::vector<DimFactors> kRows{{kBatch}, {kTokens}};

const std::vector<Operator>& operators() {
  static const std::vector<Operator> all{
      {"QuantEmbedding", {"ids", "table"}, 2, {kRows}, {}},
      {"QuantLinear", {"x", "weights", "norm", "residual", "bias"}, 2, {kRows}, {}},
      {"SparseMoE", {"x", "router", "gate_up", "down", "norm"}, 5, {kRows, {{kBatch, kTokens}}}, {}},
      {"GroupQueryAttention",
       {"qkv", "key_cache", "value_cache", "past_lengths", "cos", "sin", "q_norm", "k_norm"},
       6,
       {kRows},
       {1, 2}},
      {"RMSNorm", {"x", "weight", "residual"}, 2, {kRows}, {}},
      {"LastToken", {"x", "new_lengths"}, 1, {{{kBatch}, {}}}, {}},
  };
  return all;
}

template <class Each> std::string joined(const std::vector<Each>& parts) {
  std::string text;
  for (const auto& part : parts) text += (text.empty() ? "" : ", ") + std::string(part);
  return text;
}

Error damaged(const std::string& what) {
  return Error("a plugin " + what + ": build the engine again with `edgelm build BUNDLE`", Error::Kind::kBundle);
}

std::vector<PluginResult> results_of(const std::string& name, std::string_view text) {
  std::vector<PluginResult> found;
  while (!text.empty()) {
    const std::string one(text.substr(0, text.find(',')));
    text.remove_prefix(std::min(text.size(), one.size() + 1));
    const std::size_t colon = one.find(':');
    const std::string type = one.substr(0, colon);
    const i64 width = colon == std::string::npos ? 0 : std::strtoll(one.c_str() + colon + 1, nullptr, 10);
    if ((type != "f32" && type != "f16" && type != "bf16") || width < 1 || width >= i64(1) << 31) {
      throw damaged(name + " has the result " + one.substr(0, 60));
    }
    found.push_back({type, width});
  }
  return found;
}

}  // namespace

const Operator& operator_of(const std::string& name) {
  std::vector<const char*> names;
  for (const Operator& op : operators()) {
    if (name == op.name) return op;
    names.push_back(op.name);
  }
  throw Error("there is no TensorRT plugin for " + name.substr(0, 60) + ", only for " + joined(names),
              Error::Kind::kBundle);
}

PluginSpec::PluginSpec(std::string text) : text_(std::move(text)) {
  if (text_.compare(0, std::string(kMark).size(), kMark) != 0) {
    throw damaged("has the field " + text_.substr(0, std::min<std::size_t>(20, text_.find('\n'))) +
                  ", not that of this version of EdgeLM");
  }
  text_.resize(text_.find_last_not_of('\n') + 1);
  fields_ = Fields(text_);
  name_ = fields_.text("name");
  op_ = &operator_of(fields_.text("op"));
  const std::string& present = fields_.text("present");
  for (std::size_t i = 0; i < present.size(); ++i) {
    if (present[i] == '1') inputs_.push_back(int(i));
  }
  const bool whole = present.find_first_not_of("01") == std::string::npos && present.size() <= op_->inputs.size();
  if (!whole || inputs_.size() < op_->required || std::size_t(inputs_[op_->required - 1]) != op_->required - 1) {
    throw Error(name_ + ": " + op_->name + " takes " + joined(op_->inputs) + ", and needs the first " +
                    std::to_string(op_->required) + "; the node has " + present.substr(0, 60),
                Error::Kind::kBundle);
  }
  results_ = results_of(name_, fields_.text("results"));
  if (results_.empty() || results_.size() > op_->outputs.size()) {
    throw damaged(name_ + " has " + std::to_string(results_.size()) + " results");
  }
}

std::string PluginSpec::serialised(const std::string& library) const {
  return text_ + (fields_.has("library") ? "" : "\nlibrary=" + library) + "\n\n";
}

int PluginSpec::place(int input) const {
  const auto found = std::find(inputs_.begin(), inputs_.end(), input);
  return found == inputs_.end() ? -1 : int(found - inputs_.begin());
}

int PluginSpec::aliased_input(int output) const {
  const std::size_t alias = std::size_t(output) - results_.size();
  return output < int(results_.size()) || alias >= op_->aliases.size() ? -1 : place(op_->aliases[alias]);
}

std::vector<std::string> PluginSpec::output_types(const std::vector<std::string>& inputs) const {
  if (inputs.size() != inputs_.size()) {
    throw damaged(name_ + " has " + std::to_string(inputs.size()) + " inputs, expected " +
                  std::to_string(inputs_.size()));
  }
  std::vector<std::string> types;
  for (const PluginResult& result : results_) types.push_back(result.type);
  for (int input : op_->aliases) types.push_back(inputs[std::size_t(place(input))]);
  return types;
}

// For the exporter: a plugin's text from the lines after the first, which are checked.
Functions plugin_functions() {
  return {{"plugin_text", [](const Fields& fields) {
             std::string text = kMark;
             for (const auto& [name, value] : fields.all()) text += name + "=" + value + "\n";
             PluginSpec checked(text);
             return text + "\n";
           }}};
}

}  // namespace edgelm::gpu
