// Runs a template's tree.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "capi/chat/render/call.h"
#include "capi/chat/syntax/tree.h"
#include "capi/chat/values/value.h"

namespace edgelm::capi::chat {

// Variables of one part of a template. Names that it does not have are looked up in the part around it.
struct Scope {
  explicit Scope(std::shared_ptr<Scope> around) : around(std::move(around)) {}
  ~Scope() { limits().release(counted_ * kVariable); }
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;
  const Value* find(int name) const;
  void set(int name, Value value);

  const std::shared_ptr<Scope> around;
  std::vector<std::pair<int, Value>> variables;

 private:
  static constexpr std::size_t kVariable = 2 * sizeof(std::pair<int, Value>);
  std::size_t counted_ = 0;  // variables that count against the limits
};
using ScopePtr = std::shared_ptr<Scope>;

struct Macro;
struct Loop;

class Interpreter {
 public:
  // `variables`: a dict.
  Interpreter(const Tree& tree, const Value& variables);
  ~Interpreter();
  Interpreter(const Interpreter&) = delete;
  Interpreter& operator=(const Interpreter&) = delete;

  std::string run();
  // The line of the statement or call that is running.
  int line() const { return line_; }

  Value evaluate(const Node& node, const ScopePtr& scope);
  void assign(const Node& target, const Value& value, const ScopePtr& scope);
  Value value_of_target(const Node& target, const ScopePtr& scope);
  std::string call_macro(Macro& macro, Arguments& arguments);
  std::string call_block(const Node& block);
  const Node* block_named(const std::string& name) const;
  // The text of a recursive loop over `iterable`.
  std::string recurse(const Node& node, const ScopePtr& scope, const Value& iterable, std::int64_t depth);
  // Keeps a value that may refer to itself until the end, when it is emptied.
  void keep(Value value);

 private:
  enum class Flow { kNext, kBreak, kContinue };

  Flow execute(const std::vector<NodePtr>& nodes, const ScopePtr& scope);
  Flow statement(const Node& node, const ScopePtr& scope);
  void output(const Node& node, const ScopePtr& scope);
  Flow run_for(const Node& node, const ScopePtr& scope, const Value& iterable, std::int64_t depth);
  Flow branches(const Node& node, const ScopePtr& scope);
  void with(const Node& node, const ScopePtr& scope, Flow& flow);
  void set(const Node& node, const ScopePtr& scope);
  Flow set_block(const Node& node, const ScopePtr& scope);
  Flow filter_block(const Node& node, const ScopePtr& scope);
  void call_with_body(const Node& node, const ScopePtr& scope);
  void check_namespaces(const Node& target, const ScopePtr& scope);
  Value make_macro(const Node& node, const ScopePtr& scope);
  void bind(Macro& macro, Arguments& arguments, const ScopePtr& scope);

  Value constant(const Node& node) const;
  Value name(const Node& node, const ScopePtr& scope) const;
  Value items(const Node& node, const ScopePtr& scope);
  Value dict(const Node& node, const ScopePtr& scope);
  Value item(const Node& node, const ScopePtr& scope);
  Value compare(const Node& node, const ScopePtr& scope);
  Value concat_of(const Node& node, const ScopePtr& scope);
  Value call_node(const Node& node, const ScopePtr& scope, const Value* caller);
  Value filter(const Node& node, const ScopePtr& scope, const Value* input);
  void collect(const ArgumentNodes& nodes, const ScopePtr& scope, Arguments& arguments);

  void write(std::string_view text);
  void write_string(const Value& value);  // what a block returned; jinja2 fails if that is no string
  // Runs `body` with its output in a text of its own.
  template <class Body>
  std::string captured(const Body& body);
  void collect_blocks(const std::vector<NodePtr>& nodes);

  const Tree& tree_;
  ScopePtr context_, root_;
  std::vector<Value> constants_, kept_;
  std::vector<const Node*> blocks_;
  Writer* out_ = nullptr;
  Writer* result_ = nullptr;
  std::size_t characters_ = 0;
  int line_ = 0;
  int loop_id_ = -1, caller_id_ = -1, kwargs_id_ = -1, varargs_id_ = -1;
};

struct Macro : Other {
  Macro(Interpreter& interpreter, const Node& node, ScopePtr scope)
      : interpreter(interpreter), node(node), scope(std::move(scope)) {
    hold(sizeof(Macro) + 64);
  }
  const char* type_name() const override { return "Macro"; }
  Value call(Arguments& arguments) override { return Value(interpreter.call_macro(*this, arguments)); }
  bool attribute(const std::string& name, Value& value) override;
  std::string text() override;

  Interpreter& interpreter;
  const Node& node;
  ScopePtr scope;  // where it was defined; null when the rendering has ended
};

// The variable `loop`.
struct Loop : Other {
  Loop(Interpreter& interpreter, const Node& node, ScopePtr scope, const Value& iterable, Value iterator,
       std::int64_t depth);
  const char* type_name() const override { return "LoopContext"; }
  bool next(Value& value);  // the next item
  bool peek();
  Value call(Arguments& arguments) override;
  bool attribute(const std::string& name, Value& value) override;
  bool truth() override;
  bool length(std::int64_t& length) override;
  std::string text() override;

  Interpreter& interpreter;
  const Node& node;
  ScopePtr scope;
  Value iterable, iterator;
  Value after, current, before, changed;
  bool has_after = false, has_changed = false;
  std::int64_t place = -1, count = -1;
  const std::int64_t depth;
};

// The functions that every template has, by name.
Value global_named(Interpreter& interpreter, const std::string& name, bool& found);
Value make_self(Interpreter& interpreter);

}  // namespace edgelm::capi::chat
