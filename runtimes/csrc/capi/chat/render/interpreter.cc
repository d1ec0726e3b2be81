#include "capi/chat/render/interpreter.h"

#include <algorithm>

#include "capi/chat/values/text.h"

namespace edgelm::capi::chat {

const Value* Scope::find(int name) const {
  for (const Scope* scope = this; scope != nullptr; scope = scope->around.get()) {
    for (const auto& [id, value] : scope->variables) {
      if (id == name) return &value;
    }
  }
  return nullptr;
}

void Scope::set(int name, Value value) {
  for (auto& [id, old] : variables) {
    if (id == name) {
      old = std::move(value);
      return;
    }
  }
  if (variables.size() >= counted_) {
    limits().hold(kVariable);
    ++counted_;
  }
  variables.emplace_back(name, std::move(value));
}

Interpreter::Interpreter(const Tree& tree, const Value& variables) : tree_(tree) {
  constants_.reserve(tree.constants.size());
  for (const std::string& text : tree.constants) constants_.emplace_back(text);
  context_ = std::make_shared<Scope>(nullptr);
  root_ = std::make_shared<Scope>(context_);
  collect_blocks(tree.body);
  for (std::size_t i = 0; i < tree.names.size(); ++i) {
    const std::string& name = tree.names[i];
    const int id = static_cast<int>(i);
    if (name == "loop") loop_id_ = id;
    if (name == "caller") caller_id_ = id;
    if (name == "kwargs") kwargs_id_ = id;
    if (name == "varargs") varargs_id_ = id;
    bool found = false;
    const Value* given = variables.as<Dict>()->named(name);
    Value value = given != nullptr ? *given : global_named(*this, name, found);
    if (name == "self") root_->set(id, make_self(*this));
    if (given != nullptr || found) context_->set(id, std::move(value));
  }
}

Interpreter::~Interpreter() {
  // Values that refer to each other in a circle would stay forever.
  root_->variables.clear();
  for (Value& value : kept_) {
    if (value.is(Type::kNamespace)) {
      value.as<Namespace>()->attributes.as<Dict>()->clear();
    } else if (auto* macro = value.maybe<Macro>()) {
      macro->scope.reset();
    } else if (auto* loop = value.maybe<Loop>()) {
      loop->changed = Value();
    }
  }
}

void Interpreter::keep(Value value) {
  limits().step();
  kept_.push_back(std::move(value));
}

void Interpreter::collect_blocks(const std::vector<NodePtr>& nodes) {
  for (const NodePtr& node : nodes) {
    if (node == nullptr) continue;
    if (node->kind == Kind::kBlock) blocks_.push_back(node.get());
    collect_blocks(node->children);
    collect_blocks(node->body);
    collect_blocks(node->otherwise);
  }
}

const Node* Interpreter::block_named(const std::string& name) const {
  for (const Node* block : blocks_) {
    if (block->name == name) return block;
  }
  return nullptr;
}

std::string Interpreter::run() {
  Writer result;
  out_ = result_ = &result;
  execute(tree_.body, root_);
  return std::move(result.text);
}

void Interpreter::write(std::string_view text) {
  if (out_ == result_) {
    characters_ += count_characters(text);
    if (characters_ > Limits::kOutput) {
      throw Failure(Failure::kLimit, concat("more than ", Limits::kOutput, " characters"));
    }
  }
  out_->add(text);
}

void Interpreter::write_string(const Value& value) {
  if (!value.is_string()) raise_error("TypeError", "expected str instance, ", type_name(value), " found");
  write(value.string());
}

template <class Body>
std::string Interpreter::captured(const Body& body) {
  Writer text;
  Writer* const before = out_;
  out_ = &text;
  struct Restore {
    Writer*& out;
    Writer* before;
    ~Restore() { out = before; }
  } restore{out_, before};
  body();
  return std::move(text.text);
}

Interpreter::Flow Interpreter::execute(const std::vector<NodePtr>& nodes, const ScopePtr& scope) {
  for (const NodePtr& node : nodes) {
    const Flow flow = statement(*node, scope);
    if (flow != Flow::kNext) return flow;
  }
  return Flow::kNext;
}

Interpreter::Flow Interpreter::statement(const Node& node, const ScopePtr& scope) {
  const Level level;
  limits().step();
  line_ = node.line;
  Flow flow = Flow::kNext;
  switch (node.kind) {
    case Kind::kOutput: output(node, scope); break;
    case Kind::kFor: {
      const Value iterable = evaluate(*node.children[1], scope);
      if (!node.flag) return run_for(node, scope, iterable, 0);
      write(recurse(node, scope, iterable, 0));
      break;
    }
    case Kind::kBranches: return branches(node, scope);
    case Kind::kSet: set(node, scope); break;
    case Kind::kSetBlock: return set_block(node, scope);
    case Kind::kMacro: scope->set(node.name_id, make_macro(node, scope)); break;
    case Kind::kCallBlock: call_with_body(node, scope); break;
    case Kind::kFilterBlock: return filter_block(node, scope);
    case Kind::kWith: with(node, scope, flow); break;
    case Kind::kGeneration: execute(node.body, std::make_shared<Scope>(scope)); break;
    case Kind::kBlock: execute(node.body, std::make_shared<Scope>(root_)); break;
    case Kind::kBreak: return Flow::kBreak;
    case Kind::kContinue: return Flow::kContinue;
    default: unsupported("a statement of an unknown kind");
  }
  return flow;
}

void Interpreter::output(const Node& node, const ScopePtr& scope) {
  for (const NodePtr& child : node.children) {
    if (child->kind == Kind::kConstant && std::holds_alternative<std::string>(child->constant)) {
      write(tree_.constants[static_cast<std::size_t>(child->number)]);
      continue;
    }
    line_ = child->line;
    const Value value = evaluate(*child, scope);
    if (value.is_string()) write(value.string());
    else write(text_of_value(value));
  }
}

namespace {

// The items of a loop with a condition.
struct Filtered : Iterator {
  Filtered(Interpreter& interpreter, const Node& node, const ScopePtr& scope, const Value& iterable)
      : interpreter(interpreter), node(node), scope(std::make_shared<Scope>(scope)), cursor(iterable) {
    above(iterable);
    hold(sizeof(Filtered) + 64);
  }
  bool next(Value& value) override {
    while (cursor.next(value)) {
      interpreter.assign(*node.children[0], value, scope);
      if (!truth(interpreter.evaluate(*node.children[2], scope))) continue;
      value = interpreter.value_of_target(*node.children[0], scope);
      return true;
    }
    return false;
  }
  Interpreter& interpreter;
  const Node& node;
  const ScopePtr scope;
  Cursor cursor;
};

}  // namespace

Interpreter::Flow Interpreter::run_for(const Node& node, const ScopePtr& scope, const Value& iterable,
                                       std::int64_t depth) {
  Value over = iterable;
  if (node.children[2] != nullptr) over = Value(Type::kIterator, new Filtered(*this, node, scope, iterable));
  const Value loop(Type::kOther, new Loop(*this, node, node.flag ? scope : nullptr, over, iterator_of(over), depth));
  const ScopePtr inner = std::make_shared<Scope>(scope);
  bool empty = true;
  for (Value value; loop.as<Loop>()->next(value);) {
    inner->variables.clear();
    if (loop_id_ >= 0) inner->set(loop_id_, loop);
    assign(*node.children[0], value, inner);
    const Flow flow = execute(node.body, inner);
    empty = empty && flow != Flow::kNext;  // jinja2 notes an iteration at its end
    if (flow == Flow::kBreak) break;
  }
  inner->variables.clear();
  if (!empty || node.otherwise.empty()) return Flow::kNext;
  return execute(node.otherwise, std::make_shared<Scope>(scope));
}

std::string Interpreter::recurse(const Node& node, const ScopePtr& scope, const Value& iterable, std::int64_t depth) {
  const Level level;
  return captured([&] { run_for(node, scope, iterable, depth); });
}

Interpreter::Flow Interpreter::branches(const Node& node, const ScopePtr& scope) {
  for (const NodePtr& branch : node.children) {
    if (branch->children[0] == nullptr || truth(evaluate(*branch->children[0], scope))) {
      return execute(branch->body, scope);
    }
  }
  return Flow::kNext;
}

void Interpreter::with(const Node& node, const ScopePtr& scope, Flow& flow) {
  const ScopePtr inner = std::make_shared<Scope>(scope);
  for (std::size_t i = 0; i < node.children.size(); i += 2) {
    assign(*node.children[i], evaluate(*node.children[i + 1], scope), inner);
  }
  flow = execute(node.body, inner);
}

void Interpreter::check_namespaces(const Node& target, const ScopePtr& scope) {
  if (target.kind == Kind::kNamespaceTarget) {
    const Value* space = scope->find(target.name_id);
    if (space == nullptr || !space->is(Type::kNamespace)) {
      throw Failure(Failure::kFailed, "cannot assign attribute on non-namespace object");
    }
  }
  for (const NodePtr& child : target.children) check_namespaces(*child, scope);
}

void Interpreter::set(const Node& node, const ScopePtr& scope) {
  check_namespaces(*node.children[0], scope);
  assign(*node.children[0], evaluate(*node.children[1], scope), scope);
}

Interpreter::Flow Interpreter::set_block(const Node& node, const ScopePtr& scope) {
  const ScopePtr inner = std::make_shared<Scope>(scope);
  Flow flow = Flow::kNext;
  Value text(captured([&] { flow = execute(node.body, inner); }));
  if (flow != Flow::kNext) return flow;
  if (node.children[1] != nullptr) text = filter(*node.children[1], inner, &text);
  check_namespaces(*node.children[0], scope);
  assign(*node.children[0], text, scope);
  return flow;
}

Interpreter::Flow Interpreter::filter_block(const Node& node, const ScopePtr& scope) {
  const ScopePtr inner = std::make_shared<Scope>(scope);
  Flow flow = Flow::kNext;
  const Value text(captured([&] { flow = execute(node.body, inner); }));
  if (flow == Flow::kNext) write_string(filter(*node.children[0], inner, &text));
  return flow;
}

void Interpreter::call_with_body(const Node& node, const ScopePtr& scope) {
  const Value caller = make_macro(node, scope);
  write_string(call_node(*node.children[0], scope, &caller));
}

Value Interpreter::make_macro(const Node& node, const ScopePtr& scope) {
  Value macro(Type::kOther, new Macro(*this, node, scope));
  keep(macro);
  return macro;
}

void Interpreter::assign(const Node& target, const Value& value, const ScopePtr& scope) {
  if (target.kind == Kind::kName) {
    scope->set(target.name_id, value);
    return;
  }
  if (target.kind == Kind::kNamespaceTarget) {
    if (target.name[0] == '_') {
      throw Failure(Failure::kForbidden, concat("a namespace cannot have the attribute ", repr_of_text(target.name)));
    }
    const Value* space = scope->find(target.name_id);
    space->as<Namespace>()->attributes.as<Dict>()->set(Value(target.name), value);
    return;
  }
  if (value.is_undefined() ? false : !is_iterable(value)) {
    raise_error("TypeError", "cannot unpack non-iterable ", type_name(value), " object");
  }
  Cursor cursor(value);
  std::size_t count = 0;
  std::vector<Value> parts;
  for (Value part; count <= target.children.size() && cursor.next(part); ++count) parts.push_back(part);
  if (count > target.children.size()) {
    raise_error("ValueError", "too many values to unpack (expected ", target.children.size(), ")");
  }
  if (count < target.children.size()) {
    raise_error("ValueError", "not enough values to unpack (expected ", target.children.size(), ", got ", count, ")");
  }
  for (std::size_t i = 0; i < count; ++i) assign(*target.children[i], parts[i], scope);
}

Value Interpreter::value_of_target(const Node& target, const ScopePtr& scope) {
  if (target.kind == Kind::kName) return *scope->find(target.name_id);
  std::vector<Value> parts;
  for (const NodePtr& child : target.children) parts.push_back(value_of_target(*child, scope));
  return make_tuple(std::move(parts));
}

std::string Interpreter::call_block(const Node& block) {
  const Level level;
  return captured([&] { execute(block.body, std::make_shared<Scope>(root_)); });
}

std::string Interpreter::call_macro(Macro& macro, Arguments& arguments) {
  const Level level;
  if (macro.scope == nullptr) raise_error("RuntimeError", "a macro was called after its template");
  const ScopePtr inner = std::make_shared<Scope>(macro.scope);
  bind(macro, arguments, inner);
  return captured([&] { execute(macro.node.body, inner); });
}

void Interpreter::bind(Macro& macro, Arguments& arguments, const ScopePtr& scope) {
  const Node& node = macro.node;
  const std::size_t count = node.parameters.size(), given = std::min(count, arguments.positional.size());
  std::vector<bool> missing(count, false);
  bool found_caller = false;
  const auto take = [&](const std::string& name, Value& value) {
    const auto at = std::find_if(arguments.named.begin(), arguments.named.end(),
                                 [&](const auto& argument) { return argument.first == name; });
    if (at == arguments.named.end()) return false;
    value = at->second;
    arguments.named.erase(at);
    return true;
  };
  for (std::size_t i = 0; i < count; ++i) {
    const auto& [id, name] = node.parameters[i];
    Value value;
    if (i < given) value = arguments.positional[i];
    else missing[i] = !take(name, value);
    found_caller = found_caller || (name == "caller" && (i >= given || given == count));
    scope->set(id, missing[i] ? make_undefined(concat("'", name, "' is undefined")) : value);
  }
  if (node.takes_caller && !found_caller) {
    Value value;
    if (!take("caller", value) || value.is(Type::kNone)) value = make_undefined("No caller defined");
    scope->set(caller_id_, value);
  }
  if (node.takes_named) {
    scope->set(kwargs_id_, dict_of({{}, arguments.named}, "kwargs"));
  } else if (!arguments.named.empty()) {
    raise_error("TypeError", "macro ", macro.text(), " takes no keyword argument '", arguments.named[0].first, "'");
  }
  if (node.takes_positional) {
    scope->set(varargs_id_, make_tuple({arguments.positional.begin() + static_cast<std::ptrdiff_t>(given),
                                        arguments.positional.end()}));
  } else if (arguments.positional.size() > count) {
    raise_error("TypeError", "macro ", macro.text(), " takes not more than ", count, " argument(s)");
  }
  const std::size_t call = node.kind == Kind::kCallBlock;  // its first child is the call
  const std::size_t defaults = node.children.size() - call;
  for (std::size_t i = 0; i < count; ++i) {
    if (!missing[i]) continue;
    const auto& [id, name] = node.parameters[i];
    scope->set(id, i + defaults >= count ? evaluate(*node.children[call + i + defaults - count], scope)
                                         : make_undefined(concat("parameter '", name, "' was not provided")));
  }
}

}  // namespace edgelm::capi::chat
