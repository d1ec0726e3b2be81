// The parser's expressions.
#include <charconv>

#include "capi/chat/syntax/parser.h"
#include "capi/chat/values/failure.h"
#include "capi/chat/values/operations.h"
#include "capi/common/json_parser.h"

namespace edgelm::capi::chat {

NodePtr Parser::joined(Kind kind, int line, NodePtr left, NodePtr right) const {
  NodePtr node = make(kind, line);
  node->children.push_back(std::move(left));
  node->children.push_back(std::move(right));
  return finished(std::move(node));
}

NodePtr Parser::string_constant(std::string text, int line) {
  NodePtr node = make(Kind::kConstant, line);
  node->number = static_cast<int>(tree_.constants.size());
  tree_.constants.push_back(text);
  node->constant = std::move(text);
  return node;
}

NodePtr Parser::expression(bool with_condition) {
  const Nested nested(*this);
  int line = current().line;
  NodePtr value = parse_or();
  while (with_condition && skip_word("if")) {
    NodePtr node = make(Kind::kIf, line);
    node->children.push_back(parse_or());
    node->children.push_back(std::move(value));
    node->children.push_back(skip_word("else") ? expression() : nullptr);
    value = finished(std::move(node));
    line = current().line;
  }
  return value;
}

NodePtr Parser::parse_or() {
  int line = current().line;
  NodePtr left = parse_and();
  while (skip_word("or")) {
    left = joined(Kind::kOr, line, std::move(left), parse_and());
    line = current().line;
  }
  return left;
}

NodePtr Parser::parse_and() {
  int line = current().line;
  NodePtr left = parse_not();
  while (skip_word("and")) {
    left = joined(Kind::kAnd, line, std::move(left), parse_not());
    line = current().line;
  }
  return left;
}

NodePtr Parser::parse_not() {
  if (!is_word("not")) return parse_compare();
  const Nested nested(*this);
  NodePtr node = make(Kind::kNot, next().line);
  node->children.push_back(parse_not());
  return finished(std::move(node));
}

NodePtr Parser::parse_compare() {
  static const std::pair<std::string_view, Comparison> signs[] = {
      {"==", Comparison::kEqual},     {"!=", Comparison::kNotEqual}, {"<", Comparison::kLess},
      {"<=", Comparison::kLessEqual}, {">", Comparison::kGreater},   {">=", Comparison::kGreaterEqual}};
  NodePtr node = make(Kind::kCompare, current().line);
  node->children.push_back(parse_sum());
  for (bool more = true; more;) {
    more = false;
    for (const auto& [sign, comparison] : signs) {
      if (!more && skip_sign(sign)) {
        node->comparisons.push_back(comparison);
        more = true;
      }
    }
    if (!more && skip_word("in")) {
      node->comparisons.push_back(Comparison::kIn);
      more = true;
    } else if (!more && is_word("not") && look().kind == Token::kName && look().text == "in") {
      next();
      next();
      node->comparisons.push_back(Comparison::kNotIn);
      more = true;
    }
    if (more) node->children.push_back(parse_sum());
  }
  return node->comparisons.empty() ? std::move(node->children[0]) : finished(std::move(node));
}

NodePtr Parser::parse_sum() {
  int line = current().line;
  NodePtr left = parse_concat();
  while (is_sign("+") || is_sign("-")) {
    const Operator sign = next().text == "+" ? Operator::kAdd : Operator::kSubtract;
    left = joined(Kind::kArithmetic, line, std::move(left), parse_concat());
    left->number = static_cast<int>(sign);
    line = current().line;
  }
  return left;
}

NodePtr Parser::parse_concat() {
  NodePtr node = make(Kind::kConcat, current().line);
  node->children.push_back(parse_terms());
  while (skip_sign("~")) node->children.push_back(parse_terms());
  return node->children.size() == 1 ? std::move(node->children[0]) : finished(std::move(node));
}

NodePtr Parser::parse_terms() {
  int line = current().line;
  NodePtr left = parse_power();
  while (is_sign("*") || is_sign("/") || is_sign("//") || is_sign("%")) {
    const std::string text = next().text;
    const Operator sign = text == "*"    ? Operator::kMultiply
                          : text == "/"  ? Operator::kDivide
                          : text == "//" ? Operator::kFloorDivide
                                         : Operator::kModulo;
    left = joined(Kind::kArithmetic, line, std::move(left), parse_power());
    left->number = static_cast<int>(sign);
    line = current().line;
  }
  return left;
}

NodePtr Parser::parse_power() {
  int line = current().line;
  NodePtr left = parse_unary();
  while (skip_sign("**")) {
    left = joined(Kind::kArithmetic, line, std::move(left), parse_unary());
    left->number = static_cast<int>(Operator::kPower);
    line = current().line;
  }
  return left;
}

NodePtr Parser::parse_unary(bool with_filters) {
  const Nested nested(*this);
  NodePtr node;
  if (is_sign("-") || is_sign("+")) {
    node = make(is_sign("-") ? Kind::kNegative : Kind::kPositive, current().line);
    next();
    node->children.push_back(parse_unary(false));
    node = finished(std::move(node));
  } else {
    node = parse_primary();
  }
  node = postfix(std::move(node));
  return with_filters ? filters_and_tests(std::move(node)) : std::move(node);
}

NodePtr Parser::name_or_constant(bool with_namespace) {
  const Token token = next();
  const std::string& name = token.text;
  if (name == "true" || name == "True" || name == "false" || name == "False") {
    NodePtr node = make(Kind::kConstant, token.line);
    node->constant = name == "true" || name == "True";
    return node;
  }
  if (name == "none" || name == "None") return make(Kind::kConstant, token.line);
  NodePtr node = make(Kind::kName, token.line);
  if (with_namespace && skip_sign(".")) {
    node = make(Kind::kNamespaceTarget, token.line);
    node->name = expect(Token::kName).text;
  } else {
    node->name = name;
  }
  node->name_id = tree_.id_of(name);
  return node;
}

NodePtr Parser::number() {
  const Token token = next();
  NodePtr node = make(Kind::kConstant, token.line);
  if (token.kind == Token::kFloat) {
    node->constant = read_double(token.text);
    return node;
  }
  Value value;
  try {
    if (!read_integer(token.text, 0, value)) invalid("malformed number", token.line);
  } catch (const Failure& failure) {
    throw Failure(failure.kind,
                  failure.kind == Failure::kUnsupported ? at_line(token.line) + failure.message : failure.message);
  }
  node->constant = value.integer();
  return node;
}

NodePtr Parser::parse_primary(bool with_namespace) {
  const Token& token = current();
  if (token.kind == Token::kName) return name_or_constant(with_namespace);
  if (token.kind == Token::kString) {
    const int line = token.line;
    std::string text;
    while (is(Token::kString)) text += next().text;
    return string_constant(std::move(text), line);
  }
  if (token.kind == Token::kInteger || token.kind == Token::kFloat) return number();
  if (skip_sign("(")) {
    NodePtr node = tuple(false, true, "", true);
    expect_sign(")");
    return node;
  }
  if (is_sign("[")) return parse_list();
  if (is_sign("{")) return parse_dict();
  unexpected("an expression");
}

NodePtr Parser::tuple(bool simple, bool with_condition, std::string_view end, bool parentheses, bool with_namespace) {
  const Nested nested(*this);
  int line = current().line;
  std::vector<NodePtr> items;
  bool several = false;
  for (;;) {
    if (!items.empty()) expect_sign(",");
    if (is(Token::kVariableEnd) || is(Token::kBlockEnd) || is_sign(")") || (!end.empty() && is_word(end))) break;
    items.push_back(simple ? parse_primary(with_namespace) : expression(with_condition));
    if (!is_sign(",")) break;
    several = true;
    line = current().line;
  }
  if (!several) {
    if (!items.empty()) return std::move(items[0]);
    if (!parentheses) unexpected("an expression");
  }
  NodePtr node = make(Kind::kTuple, line);
  node->children = std::move(items);
  return finished(std::move(node));
}

NodePtr Parser::parse_list() {
  NodePtr node = make(Kind::kList, next().line);
  while (!is_sign("]")) {
    if (!node->children.empty()) expect_sign(",");
    if (is_sign("]")) break;
    node->children.push_back(expression());
  }
  next();
  return finished(std::move(node));
}

NodePtr Parser::parse_dict() {
  NodePtr node = make(Kind::kDict, next().line);
  while (!is_sign("}")) {
    if (!node->children.empty()) expect_sign(",");
    if (is_sign("}")) break;
    node->children.push_back(expression());
    expect_sign(":");
    node->children.push_back(expression());
  }
  next();
  return finished(std::move(node));
}

NodePtr Parser::postfix(NodePtr node) {
  for (;;) {
    if (is_sign(".") || is_sign("[")) node = subscript(std::move(node));
    else if (is_sign("(")) node = call(std::move(node));
    else return node;
  }
}

NodePtr Parser::filters_and_tests(NodePtr node) {
  for (;;) {
    if (is_sign("|")) node = parse_filter(std::move(node), false);
    else if (is_word("is")) node = parse_test(std::move(node));
    else if (is_sign("(")) node = call(std::move(node));
    else return node;
  }
}

NodePtr Parser::subscript(NodePtr node) {
  const Token token = next();
  if (token.text == ".") {
    if (is(Token::kName)) {
      NodePtr attribute = make(Kind::kAttribute, token.line);
      attribute->name = next().text;
      attribute->children.push_back(std::move(node));
      return finished(std::move(attribute));
    }
    if (!is(Token::kInteger)) invalid("expected name or number");
    return joined(Kind::kItem, token.line, std::move(node), number());
  }
  NodePtr index;
  std::vector<NodePtr> indices;
  while (!is_sign("]")) {
    if (!indices.empty()) expect_sign(",");
    indices.push_back(subscribed());
  }
  next();
  if (indices.size() == 1) {
    index = std::move(indices[0]);
  } else {
    index = make(Kind::kTuple, token.line);
    for (NodePtr& one : indices) {
      if (one->kind == Kind::kSlice) unsupported(at_line(one->line), "several slices in one index");
      index->children.push_back(std::move(one));
    }
    index = finished(std::move(index));
  }
  return joined(Kind::kItem, token.line, std::move(node), std::move(index));
}

NodePtr Parser::subscribed() {
  NodePtr node = make(Kind::kSlice, current().line);
  node->children.resize(3);
  if (!is_sign(":")) {
    node->children[0] = expression();
    if (!is_sign(":")) return std::move(node->children[0]);
  }
  next();
  const auto ends = [&] { return is_sign("]") || is_sign(","); };
  if (!is_sign(":") && !ends()) node->children[1] = expression();
  if (skip_sign(":") && !ends()) node->children[2] = expression();
  return finished(std::move(node));
}

NodePtr Parser::call(NodePtr node) {
  NodePtr result = make(Kind::kCall, current().line);
  result->children.push_back(std::move(node));
  result->arguments = arguments();
  return finished(std::move(result));
}

std::unique_ptr<ArgumentNodes> Parser::arguments() {
  auto result = std::make_unique<ArgumentNodes>();
  const int line = current().line;
  expect_sign("(");
  const auto ensure = [&](bool valid) {
    if (!valid) invalid("invalid syntax for function call expression", line);
  };
  for (bool first = true; !is_sign(")"); first = false) {
    if (!first) {
      expect_sign(",");
      if (is_sign(")")) break;
    }
    if (skip_sign("*")) {
      ensure(result->all_positional == nullptr && result->all_named == nullptr);
      result->all_positional = expression();
    } else if (skip_sign("**")) {
      ensure(result->all_named == nullptr);
      result->all_named = expression();
    } else if (is(Token::kName) && look().kind == Token::kOperator && look().text == "=") {
      ensure(result->all_named == nullptr);
      const std::string name = next().text;
      next();
      for (const auto& [other, value] : result->named) {
        if (other == name) invalid("keyword argument repeated: " + name);
      }
      result->named.emplace_back(name, expression());
    } else {
      ensure(result->all_positional == nullptr && result->all_named == nullptr && result->named.empty());
      result->positional.push_back(expression());
    }
  }
  next();
  return result;
}

NodePtr Parser::parse_filter(NodePtr node, bool inline_start) {
  while (is_sign("|") || inline_start) {
    if (!inline_start) next();
    inline_start = false;
    const Token token = expect(Token::kName);
    NodePtr filter = make(Kind::kFilter, token.line);
    filter->name = token.text;
    while (skip_sign(".")) filter->name += "." + expect(Token::kName).text;
    filter->children.push_back(std::move(node));
    filter->arguments = is_sign("(") ? arguments() : std::make_unique<ArgumentNodes>();
    node = finished(std::move(filter));
  }
  return node;
}

NodePtr Parser::parse_test(NodePtr node) {
  const int line = next().line;
  const bool negated = skip_word("not");
  NodePtr test = make(Kind::kTest, line);
  test->name = expect(Token::kName).text;
  while (skip_sign(".")) test->name += "." + expect(Token::kName).text;
  test->children.push_back(std::move(node));
  test->arguments = std::make_unique<ArgumentNodes>();
  const bool value = is(Token::kName) || is(Token::kString) || is(Token::kInteger) || is(Token::kFloat) ||
                     is_sign("[") || is_sign("{");
  if (is_sign("(")) {
    test->arguments = arguments();
  } else if (value && !is_any_word({"else", "or", "and"})) {
    if (is_word("is")) invalid("You cannot chain multiple tests with is");
    test->arguments->positional.push_back(postfix(parse_primary()));
  }
  test = finished(std::move(test));
  if (!negated) return test;
  NodePtr result = make(Kind::kNot, line);
  result->children.push_back(std::move(test));
  return finished(std::move(result));
}

}  // namespace edgelm::capi::chat
