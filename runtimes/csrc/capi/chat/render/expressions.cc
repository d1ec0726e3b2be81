// The interpreter's expressions.
#include "capi/chat/render/interpreter.h"
#include "capi/chat/values/text.h"

namespace edgelm::capi::chat {

Value Interpreter::evaluate(const Node& node, const ScopePtr& scope) {
  const Level level;
  limits().step();
  switch (node.kind) {
    case Kind::kConstant: return constant(node);
    case Kind::kName: return name(node, scope);
    case Kind::kList:
    case Kind::kTuple: return items(node, scope);
    case Kind::kDict: return dict(node, scope);
    case Kind::kAttribute: {
      const Value value = evaluate(*node.children[0], scope);
      line_ = node.line;
      return attribute_of(value, node.name);
    }
    case Kind::kItem: return item(node, scope);
    case Kind::kCall: return call_node(node, scope, nullptr);
    case Kind::kFilter: return filter(node, scope, nullptr);
    case Kind::kTest: {
      Arguments arguments;
      arguments.positional.push_back(evaluate(*node.children[0], scope));
      collect(*node.arguments, scope, arguments);
      line_ = node.line;
      return apply_test(node.name, arguments);
    }
    case Kind::kNot: return !truth(evaluate(*node.children[0], scope));
    case Kind::kNegative: return negative(evaluate(*node.children[0], scope));
    case Kind::kPositive: return positive(evaluate(*node.children[0], scope));
    case Kind::kAnd:
    case Kind::kOr: {
      Value left = evaluate(*node.children[0], scope);
      return truth(left) == (node.kind == Kind::kOr) ? left : evaluate(*node.children[1], scope);
    }
    case Kind::kIf:
      if (truth(evaluate(*node.children[0], scope))) return evaluate(*node.children[1], scope);
      if (node.children[2] != nullptr) return evaluate(*node.children[2], scope);
      return make_undefined(concat("the inline if-expression on line ", node.line,
                                   " evaluated to false and no else section was defined."));
    case Kind::kCompare: return compare(node, scope);
    case Kind::kConcat: return concat_of(node, scope);
    case Kind::kArithmetic: {
      const Value left = evaluate(*node.children[0], scope);
      const Value right = evaluate(*node.children[1], scope);
      line_ = node.line;
      return calculate(static_cast<Operator>(node.number), left, right);
    }
    default: unsupported("an expression of an unknown kind");
  }
}

Value Interpreter::constant(const Node& node) const {
  if (std::holds_alternative<std::string>(node.constant)) return constants_[static_cast<std::size_t>(node.number)];
  if (const bool* value = std::get_if<bool>(&node.constant)) return *value;
  if (const std::int64_t* value = std::get_if<std::int64_t>(&node.constant)) return *value;
  if (const double* value = std::get_if<double>(&node.constant)) return *value;
  return Value();
}

Value Interpreter::name(const Node& node, const ScopePtr& scope) const {
  const Value* found = scope->find(node.name_id);
  return found != nullptr ? *found : make_undefined(concat("'", node.name, "' is undefined"));
}

Value Interpreter::items(const Node& node, const ScopePtr& scope) {
  std::vector<Value> values;
  values.reserve(node.children.size());
  for (const NodePtr& child : node.children) values.push_back(evaluate(*child, scope));
  return node.kind == Kind::kList ? make_list(std::move(values)) : make_tuple(std::move(values));
}

Value Interpreter::dict(const Node& node, const ScopePtr& scope) {
  Value result = make_dict();
  for (std::size_t i = 0; i < node.children.size(); i += 2) {
    const Value key = evaluate(*node.children[i], scope);
    result.as<Dict>()->set(key, evaluate(*node.children[i + 1], scope));
  }
  return result;
}

Value Interpreter::item(const Node& node, const ScopePtr& scope) {
  const Value value = evaluate(*node.children[0], scope);
  const Node& index = *node.children[1];
  line_ = node.line;
  if (index.kind != Kind::kSlice) return item_of(value, evaluate(index, scope));
  Value bounds[3];
  for (std::size_t i = 0; i < 3; ++i) {
    if (index.children[i] != nullptr) bounds[i] = evaluate(*index.children[i], scope);
  }
  return slice(value, bounds[0], bounds[1], bounds[2]);
}

namespace {

bool holds(Comparison comparison, const Value& left, const Value& right) {
  switch (comparison) {
    case Comparison::kEqual: return equal(left, right);
    case Comparison::kNotEqual: return !equal(left, right);
    case Comparison::kLess: return ordered(left, right, Order::kLess);
    case Comparison::kLessEqual: return ordered(left, right, Order::kLessEqual);
    case Comparison::kGreater: return ordered(left, right, Order::kGreater);
    case Comparison::kGreaterEqual: return ordered(left, right, Order::kGreaterEqual);
    case Comparison::kIn: return contains(right, left);
    default: return !contains(right, left);
  }
}

}  // namespace

Value Interpreter::compare(const Node& node, const ScopePtr& scope) {
  Value left = evaluate(*node.children[0], scope);
  for (std::size_t i = 0; i < node.comparisons.size(); ++i) {
    Value right = evaluate(*node.children[i + 1], scope);
    line_ = node.line;
    if (!holds(node.comparisons[i], left, right)) return false;
    left = std::move(right);
  }
  return true;
}

Value Interpreter::concat_of(const Node& node, const ScopePtr& scope) {
  std::vector<Value> values;
  for (const NodePtr& child : node.children) values.push_back(evaluate(*child, scope));
  Writer text;
  for (const Value& value : values) write_text(text, value);
  return std::move(text.text);
}

void Interpreter::collect(const ArgumentNodes& nodes, const ScopePtr& scope, Arguments& arguments) {
  for (const NodePtr& node : nodes.positional) arguments.positional.push_back(evaluate(*node, scope));
  for (const auto& [name, node] : nodes.named) arguments.named.emplace_back(name, evaluate(*node, scope));
  if (nodes.all_positional != nullptr) {
    const Value all = evaluate(*nodes.all_positional, scope);
    if (!is_iterable(all)) raise_error("TypeError", "argument after * must be an iterable, not ", type_name(all));
    std::vector<Value> values = list_of(all);
    for (Value& value : values) arguments.positional.push_back(std::move(value));
  }
  if (nodes.all_named == nullptr) return;
  const Value all = evaluate(*nodes.all_named, scope);
  if (!all.is(Type::kDict)) raise_error("TypeError", "argument after ** must be a mapping, not ", type_name(all));
  for (const auto& [key, value] : all.as<Dict>()->entries) {
    if (!key.is_string()) raise_error("TypeError", "keywords must be strings");
    for (const auto& [name, other] : nodes.named) {
      if (name == key.string()) raise_error("TypeError", "got multiple values for keyword argument '", name, "'");
    }
    arguments.named.emplace_back(key.string(), value);
  }
}

Value Interpreter::call_node(const Node& node, const ScopePtr& scope, const Value* caller) {
  const Value function = evaluate(*node.children[0], scope);
  Arguments arguments;
  collect(*node.arguments, scope, arguments);
  if (caller != nullptr) arguments.named.emplace_back("caller", *caller);
  line_ = node.line;
  return call(function, arguments);
}

Value Interpreter::filter(const Node& node, const ScopePtr& scope, const Value* input) {
  Arguments arguments;
  const Node* of = node.children[0].get();
  arguments.positional.push_back(of == nullptr               ? *input
                                 : of->kind == Kind::kFilter ? filter(*of, scope, input)
                                                             : evaluate(*of, scope));
  collect(*node.arguments, scope, arguments);
  line_ = node.line;
  return apply_filter(node.name, arguments);
}

}  // namespace edgelm::capi::chat
