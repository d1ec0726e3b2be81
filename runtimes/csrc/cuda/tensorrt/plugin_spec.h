// The description of a node as a plugin, and the shapes and types that TensorRT asks for.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "cuda/host/fields.h"

namespace edgelm::gpu {

// Axis `axis` of input `input`, counted in the operator's full list.
struct InputDim { int input, axis; };
// A dimension of an output: these multiplied; 1 if there are none.
using DimFactors = std::vector<InputDim>;

// Properties that all nodes of an operator share.
struct Operator {
  const char* name;
  std::vector<const char*> inputs;  // names; those after the first `required` may be absent
  std::size_t required;
  std::vector<std::vector<DimFactors>> outputs;  // dimensions without the last one, which is the result's width
  std::vector<int> aliases;                      // inputs written in place; their outputs come after the others
};

// The operator of that name. Throws Error (kBundle) for others.
const Operator& operator_of(const std::string& name);

struct PluginResult {
  std::string type;  // f32, f16 or bf16
  i64 width;         // the last dimension
};

// A node as a plugin. Its text, the only field of the plugin in a graph or an engine, is lines of `name=value` and an
// empty line. `edgelm inspect` finds it in an engine's bytes by its first line:
//
//   edgelm_plugin=2
//   op=GroupQueryAttention
//   name=layers.3.attn
//   present=11111100         for each input, whether the node has it: TensorRT allows no empty inputs
//   results=bf16:128         types and widths of the outputs that are used, without the caches
//   library=8a1f...          of the library that built the engine; absent in a graph
//   ...                      the node's attributes
class PluginSpec {
 public:
  // Throws Error (kBundle) if the text is damaged, of another version, or an input is missing.
  explicit PluginSpec(std::string text);

  // The text, with the library's name added if there is none.
  std::string serialised(const std::string& library) const;

  const Operator& op() const { return *op_; }
  const std::string& name() const { return name_; }
  const Fields& fields() const { return fields_; }  // the attributes, and the lines above
  // The number of inputs that the plugin has, and the operator's number of each.
  const std::vector<int>& inputs() const { return inputs_; }
  const std::vector<PluginResult>& results() const { return results_; }

  int output_count() const { return int(results_.size() + op_->aliases.size()); }
  // The plugin's input that an output aliases, or -1.
  int aliased_input(int output) const;
  // Types of the outputs, given those of the plugin's inputs. Throws Error if there are more or fewer inputs.
  std::vector<std::string> output_types(const std::vector<std::string>& inputs) const;
  // Number of the plugin's input for one of the operator's; -1 if it is absent.
  int place(int input) const;

 private:
  std::string text_, name_;
  Fields fields_;
  const Operator* op_;
  std::vector<int> inputs_;
  std::vector<PluginResult> results_;
};

}  // namespace edgelm::gpu
