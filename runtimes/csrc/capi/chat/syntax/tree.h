// A template as a tree. It never changes, so threads share it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace edgelm::capi::chat {

enum class Kind : std::uint8_t {
  // Expressions. The comments say what `children` are; those in brackets may be null.
  kConstant,   // none: see `constant`
  kName,       // none
  kList,       // items
  kTuple,      // items
  kDict,       // key, value, key, value, ...
  kAttribute,  // object
  kItem,       // object, index
  kSlice,      // [start], [stop], [step]; only as an index
  kCall,       // what is called; `arguments`
  kFilter,     // [value]; `arguments`
  kTest,       // value; `arguments`
  kNot,
  kNegative,
  kPositive,
  kAnd,
  kOr,
  kIf,          // condition, value, [other value]
  kCompare,     // first, second, ...; `comparisons`
  kConcat,      // values
  kArithmetic,  // left, right; `number` is the Operator
  // Statements.
  kOutput,       // expressions
  kFor,          // target, iterable, [condition]; body, otherwise; `flag`: recursive
  kBranches,     // branches of kBranch
  kBranch,       // [condition]; body
  kSet,          // target, value
  kSetBlock,     // target, [filter]; body
  kMacro,        // defaults of the last parameters; `parameters`; body
  kCallBlock,    // call, then as kMacro
  kFilterBlock,  // filter; body
  kWith,         // target, value, target, value, ...; body
  kGeneration,   // body
  kBlock,        // body
  kBreak,
  kContinue,
  // A target of an assignment: namespace.attribute.
  kNamespaceTarget,
};

enum class Comparison : std::uint8_t { kEqual, kNotEqual, kLess, kLessEqual, kGreater, kGreaterEqual, kIn, kNotIn };

struct Node;
using NodePtr = std::unique_ptr<Node>;

// The arguments of a call, filter or test.
struct ArgumentNodes {
  std::vector<NodePtr> positional;
  std::vector<std::pair<std::string, NodePtr>> named;
  NodePtr all_positional, all_named;  // *args and **kwargs
};

struct Node {
  Node(Kind kind, int line) : kind(kind), line(line) {}
  ~Node();

  const Kind kind;
  bool flag = false;
  int line;
  int depth = 0;  // levels of nodes below
  int number = 0;
  int name_id = -1;  // of kName, kMacro, kBlock and kNamespaceTarget; names have numbers
  std::string name;  // of an attribute, filter, test, macro, block, variable
  std::vector<NodePtr> children;
  std::vector<NodePtr> body, otherwise;
  std::unique_ptr<ArgumentNodes> arguments;
  std::vector<Comparison> comparisons;
  std::vector<std::pair<int, std::string>> parameters;  // of kMacro and kCallBlock: numbers and names
  bool takes_caller = false, takes_named = false, takes_positional = false;  // the body reads caller, kwargs, varargs
  std::variant<std::monostate, bool, std::int64_t, double, std::string> constant;
};

// Calls `visit` for each child that there is, in the order of jinja2's iter_child_nodes.
template <class Visit>
void each_child(const Node& node, const Visit& visit) {
  const auto all = [&](const std::vector<NodePtr>& nodes) {
    for (const NodePtr& child : nodes) {
      if (child != nullptr) visit(*child);
    }
  };
  all(node.children);
  if (node.arguments != nullptr) {
    all(node.arguments->positional);
    for (const auto& [name, value] : node.arguments->named) visit(*value);
    if (node.arguments->all_positional != nullptr) visit(*node.arguments->all_positional);
    if (node.arguments->all_named != nullptr) visit(*node.arguments->all_named);
  }
  all(node.body);
  all(node.otherwise);
}

struct Tree {
  std::vector<NodePtr> body;
  std::vector<std::string> names;  // by number
  std::vector<std::string> constants;
  bool reads_parts = false;  // loops over the parts of a message's content instead of using it as a string

  int id_of(const std::string& name);  // gives a new name a number
};

// Read and check a template. Throws Failure.
std::unique_ptr<Tree> parse(std::string_view source);

}  // namespace edgelm::capi::chat
