// What jinja2 checks when it compiles a template, and whether the template reads the parts of messages.
#include <algorithm>
#include <map>
#include <set>

#include "capi/chat/syntax/names.h"
#include "capi/chat/syntax/parser.h"
#include "capi/chat/values/failure.h"

namespace edgelm::capi::chat {

namespace {

[[noreturn]] void invalid(const Node& node, const std::string& message) {
  throw Failure(Failure::kInvalid, at_line(node.line) + message);
}

// Where a node stands.
struct Place {
  bool soft = false;    // in an if: unknown filters are errors only when they are reached
  bool loop = false;    // break and continue are allowed
  bool in_for = false;  // the name loop cannot be assigned to
};

class Checker {
 public:
  void statements(const std::vector<NodePtr>& nodes, Place place) {
    for (const NodePtr& node : nodes) visit(*node, place);
  }

 private:
  void visit(const Node& node, Place place) {
    switch (node.kind) {
      case Kind::kFor: return loop(node, place);
      case Kind::kBranches:
      case Kind::kIf: place.soft = true; break;
      case Kind::kBranch: place.soft = true; break;
      case Kind::kMacro:
      case Kind::kCallBlock: return macro(node, place);
      case Kind::kGeneration:
      case Kind::kBlock:
        if (node.kind == Kind::kBlock && !blocks_.insert(node.name).second) {
          invalid(node, concat("block '", node.name, "' defined twice"));
        }
        return statements(node.body, {false, false, place.in_for});
      case Kind::kBreak:
      case Kind::kContinue:
        if (!place.loop) invalid(node, concat("'", node.kind == Kind::kBreak ? "break" : "continue", "' outside loop"));
        break;
      case Kind::kSet:
      case Kind::kSetBlock: targets(*node.children[0], place); break;
      case Kind::kFilter:
      case Kind::kTest: named(node, place); break;
      case Kind::kName:
        if (node.name == "lipsum") unsupported(at_line(node.line), "the function lipsum");
        break;
      default: break;
    }
    if (node.kind == Kind::kSetBlock || node.kind == Kind::kFilterBlock || node.kind == Kind::kWith) {
      Place inner = place;
      inner.soft = false;
      for (const NodePtr& child : node.children) {
        if (child != nullptr) visit(*child, node.kind == Kind::kWith ? place : inner);
      }
      return statements(node.body, inner);
    }
    each_child(node, [&](const Node& child) { visit(child, place); });
  }

  void loop(const Node& node, Place place) {
    targets(*node.children[0], {false, false, true});
    visit(*node.children[1], place);
    if (node.children[2] != nullptr) visit(*node.children[2], {false, false, true});
    statements(node.body, {false, true, true});
    statements(node.otherwise, {false, place.loop && !node.flag, true});
  }

  static void targets(const Node& node, const Place& place) {
    if (node.kind == Kind::kName && node.name == "loop" && place.in_for) {
      invalid(node, "Can't assign to special loop variable in for-loop target");
    }
    each_child(node, [&](const Node& child) { targets(child, place); });
  }

  void macro(const Node& node, Place place) {
    std::set<std::string> names;
    for (const auto& [id, name] : node.parameters) {
      if (!names.insert(name).second) invalid(node, concat("duplicate argument '", name, "' in function definition"));
    }
    for (std::size_t i = 0; i < node.children.size(); ++i) {
      const bool is_call = node.kind == Kind::kCallBlock && i == 0;
      visit(*node.children[i], is_call ? place : Place{false, false, place.in_for});
    }
    statements(node.body, {false, false, place.in_for});
  }

  static void named(const Node& node, const Place& place) {
    const bool filter = node.kind == Kind::kFilter;
    const Known known = filter ? filter_named(node.name) : test_named(node.name);
    const char* what = filter ? "filter" : "test";
    if (known == Known::kUnsupported) unsupported(at_line(node.line), "the ", what, " ", node.name);
    if (known == Known::kMissing && !place.soft) invalid(node, concat("No ", what, " named '", node.name, "'."));
  }

  std::set<std::string> blocks_;
};

// Which of the names caller, kwargs and varargs a macro's body reads before it sets them.
class Undeclared {
 public:
  explicit Undeclared(Node& macro) {
    for (const NodePtr& child : macro.body) visit(*child);
    const auto has = [&](const char* name) {
      return std::any_of(macro.parameters.begin(), macro.parameters.end(),
                         [&](const auto& parameter) { return parameter.second == name; });
    };
    const auto is_optional = [&] {
      std::size_t place = 0;
      while (macro.parameters[place].second != "caller") ++place;
      const std::size_t defaults = macro.children.size() - (macro.kind == Kind::kCallBlock);
      return place + defaults >= macro.parameters.size();
    };
    if (reads_.count("caller") != 0 && has("caller") && !is_optional()) {
      invalid(macro,
              "When defining macros or call blocks the special \"caller\" argument must be omitted or be given "
              "a default.");
    }
    macro.takes_caller = reads_.count("caller") != 0;
    macro.takes_named = reads_.count("kwargs") != 0 && !has("kwargs");
    macro.takes_positional = reads_.count("varargs") != 0 && !has("varargs");
  }

 private:
  void visit(const Node& node) {
    if (node.kind == Kind::kBlock) return;
    if (node.kind == Kind::kName && names_.count(node.name) != 0) reads_.insert(node.name);
    if (node.kind == Kind::kSet || node.kind == Kind::kSetBlock || node.kind == Kind::kFor) {
      targets(*node.children[0]);
      for (std::size_t i = 1; i < node.children.size(); ++i) {
        if (node.children[i] != nullptr) visit(*node.children[i]);
      }
      for (const NodePtr& child : node.body) visit(*child);
      for (const NodePtr& child : node.otherwise) visit(*child);
      return;
    }
    for (const auto& [id, name] : node.parameters) names_.erase(name);
    each_child(node, [&](const Node& child) { visit(child); });
  }

  void targets(const Node& node) {
    names_.erase(node.name);
    each_child(node, [&](const Node& child) { targets(child); });
  }

  std::set<std::string> names_ = {"caller", "kwargs", "varargs"}, reads_;
};

void mark_macros(Node& node) {
  if (node.kind == Kind::kMacro || node.kind == Kind::kCallBlock) Undeclared{node};
  for (std::vector<NodePtr>* nodes : {&node.children, &node.body, &node.otherwise}) {
    for (const NodePtr& child : *nodes) {
      if (child != nullptr) mark_macros(*child);
    }
  }
}

// Whether the template loops over the parts of a message's content: over x.content, or over a variable or macro argument
// to which it was assigned.
class PartsReader {
 public:
  explicit PartsReader(const Tree& tree) {
    for (const NodePtr& node : tree.body) collect(*node);
    std::size_t before = 0;
    do {
      before = names_.size();
      for (const Node* set : sets_) {
        if (set->children[0]->kind == Kind::kName && is_content(set->children[1].get())) {
          names_.insert(set->children[0]->name);
        }
      }
      for (const Node* call : calls_) arguments(*call);
    } while (before != names_.size());
  }

  bool reads() const {
    return std::any_of(loops_.begin(), loops_.end(),
                       [&](const Node* loop) { return is_content(loop->children[1].get()); });
  }

 private:
  void collect(const Node& node) {
    if (node.kind == Kind::kSet) sets_.push_back(&node);
    if (node.kind == Kind::kFor) loops_.push_back(&node);
    if (node.kind == Kind::kMacro) macros_[node.name] = &node;
    if (node.kind == Kind::kCall && node.children[0]->kind == Kind::kName) calls_.push_back(&node);
    each_child(node, [&](const Node& child) { collect(child); });
  }

  void arguments(const Node& call) {
    const auto macro = macros_.find(call.children[0]->name);
    if (macro == macros_.end()) return;
    const auto& parameters = macro->second->parameters;
    for (std::size_t i = 0; i < std::min(parameters.size(), call.arguments->positional.size()); ++i) {
      if (is_content(call.arguments->positional[i].get())) names_.insert(parameters[i].second);
    }
    for (const auto& [name, value] : call.arguments->named) {
      if (is_content(value.get())) names_.insert(name);
    }
  }

  bool is_content(const Node* node) const {
    if (node == nullptr) return false;
    switch (node->kind) {
      case Kind::kFilter:
      case Kind::kTest: return is_content(node->children[0].get());
      case Kind::kIf: return is_content(node->children[1].get()) || is_content(node->children[2].get());
      case Kind::kAttribute: return node->name == "content";
      case Kind::kItem: {
        const Node& index = *node->children[1];
        if (index.kind == Kind::kSlice) return is_content(node->children[0].get());
        const auto* text = std::get_if<std::string>(&index.constant);
        return index.kind == Kind::kConstant && text != nullptr && *text == "content";
      }
      case Kind::kName: return names_.count(node->name) != 0;
      default: return false;
    }
  }

  std::vector<const Node*> sets_, loops_, calls_;
  std::map<std::string, const Node*> macros_;
  std::set<std::string> names_;
};

}  // namespace

std::unique_ptr<Tree> parse(std::string_view source) {
  auto tree = std::make_unique<Tree>();
  Parser(tokens_of(source), *tree).run();
  Checker().statements(tree->body, {});
  for (const NodePtr& node : tree->body) mark_macros(*node);
  tree->reads_parts = PartsReader(*tree).reads();
  return tree;
}

}  // namespace edgelm::capi::chat
