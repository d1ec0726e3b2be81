#include "capi/chat/syntax/parser.h"

#include <algorithm>

#include "capi/chat/values/failure.h"
#include "capi/chat/values/text.h"

namespace edgelm::capi::chat {

namespace {

constexpr int kNested = 300;  // brackets and blocks within each other
constexpr int kDepth = 250;   // levels of a tree

std::string described(const Token& token) {
  switch (token.kind) {
    case Token::kData: return "template data / text";
    case Token::kBlockBegin: return "begin of statement block";
    case Token::kBlockEnd: return "end of statement block";
    case Token::kVariableBegin: return "begin of print statement";
    case Token::kVariableEnd: return "end of print statement";
    case Token::kString: return "string";
    case Token::kInteger: return "integer";
    case Token::kFloat: return "float";
    case Token::kEnd: return "end of template";
    default: return token.text;
  }
}

}  // namespace

Node::~Node() = default;

int Tree::id_of(const std::string& name) {
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end()) names.push_back(name);
  return static_cast<int>(std::find(names.begin(), names.end(), name) - names.begin());
}

Parser::Nested::Nested(Parser& parser) : parser_(parser) {
  if (parser.nested_ >= kNested) {
    throw Failure(
        Failure::kUnsupported,
        at_line(parser.current().line) + concat("more than ", kNested / 3, " brackets or blocks within each other"));
  }
  ++parser.nested_;
}

NodePtr Parser::finished(NodePtr node) const {
  int depth = 0;
  each_child(*node, [&](const Node& child) { depth = std::max(depth, child.depth + 1); });
  node->depth = depth;
  if (depth > kDepth) {
    throw Failure(Failure::kUnsupported, at_line(node->line) + concat("an expression of more than ", kDepth, " parts"));
  }
  return node;
}

void Parser::invalid(const std::string& message, int line) const {
  throw Failure(Failure::kInvalid, at_line(line > 0 ? line : current().line) + message);
}

void Parser::unexpected(const std::string& expected) const {
  if (is(Token::kEnd)) invalid(concat("unexpected end of template, expected '", expected, "'."));
  invalid(concat("expected token '", expected, "', got ", repr_of_text(described(current()))));
}

Token Parser::next() { return is(Token::kEnd) ? tokens_[at_] : tokens_[at_++]; }

bool Parser::is_any_word(Words words) const {
  return std::any_of(words.begin(), words.end(), [&](std::string_view word) { return is_word(word); });
}

bool Parser::skip_sign(std::string_view text) {
  const bool found = is_sign(text);
  if (found) next();
  return found;
}

bool Parser::skip_word(std::string_view text) {
  const bool found = is_word(text);
  if (found) next();
  return found;
}

Token Parser::expect(Token::Kind kind) {
  if (!is(kind)) unexpected(kind == Token::kName ? "name" : described({kind, 0, ""}));
  return next();
}

void Parser::expect_sign(std::string_view text) {
  if (!skip_sign(text)) unexpected(std::string(text));
}

void Parser::run() {
  tree_.body = statements({});
  if (!is(Token::kEnd)) invalid("unexpected end of a tag");
}

std::vector<NodePtr> Parser::statements(Words ends) {
  const Nested nested(*this);
  std::vector<NodePtr> body;
  NodePtr output;
  const auto flush = [&] {
    if (output != nullptr) body.push_back(finished(std::move(output)));
    output = nullptr;
  };
  const auto to_output = [&](NodePtr node) {
    if (output == nullptr) output = make(Kind::kOutput, node->line);
    output->children.push_back(std::move(node));
  };
  while (!is(Token::kEnd)) {
    if (is(Token::kData)) {
      const Token token = next();
      to_output(string_constant(token.text, token.line));
    } else if (is(Token::kVariableBegin)) {
      next();
      to_output(tuple(false, true, "", false));
      expect(Token::kVariableEnd);
    } else {
      expect(Token::kBlockBegin);
      flush();
      if (is_any_word(ends)) return body;
      body.push_back(statement());
      expect(Token::kBlockEnd);
    }
  }
  flush();
  return body;
}

std::vector<NodePtr> Parser::body_of(Words ends, bool drop) {
  skip_sign(":");
  expect(Token::kBlockEnd);
  std::vector<NodePtr> body = statements(ends);
  if (is(Token::kEnd)) {
    std::string names;
    for (const std::string_view end : ends) names += concat(names.empty() ? "'" : " or '", end, "'");
    invalid("Unexpected end of template. Jinja was looking for the following tags: " + names + ".");
  }
  if (drop) next();
  return body;
}

NodePtr Parser::statement() {
  if (!is(Token::kName)) invalid("tag name expected");
  const std::string tag = current().text;
  const int line = current().line;
  if (tag == "for") return parse_for();
  if (tag == "if") return parse_if();
  if (tag == "set") return parse_set();
  if (tag == "macro") return parse_macro();
  if (tag == "call") return parse_call_block();
  if (tag == "filter") return parse_filter_block();
  if (tag == "with") return parse_with();
  if (tag == "block") return parse_block();
  if (tag == "print") return parse_print();
  if (tag == "generation") {
    NodePtr node = make(Kind::kGeneration, line);
    next();
    node->body = body_of({"endgeneration"});
    return finished(std::move(node));
  }
  if (tag == "break" || tag == "continue") {
    next();
    return make(tag == "break" ? Kind::kBreak : Kind::kContinue, line);
  }
  for (const char* known : {"extends", "include", "import", "from", "autoescape"}) {
    if (tag == known) unsupported(at_line(line), "the tag ", tag);
  }
  invalid(concat("Encountered unknown tag '", tag, "'."));
}

NodePtr Parser::parse_for() {
  NodePtr node = make(Kind::kFor, next().line);
  node->children.push_back(target(false, true));
  if (!skip_word("in")) unexpected("in");
  node->children.push_back(tuple(false, false, "recursive", false));
  node->children.push_back(skip_word("if") ? expression() : nullptr);
  node->flag = skip_word("recursive");
  node->body = body_of({"endfor", "else"}, false);
  if (next().text == "else") node->otherwise = body_of({"endfor"});
  return finished(std::move(node));
}

NodePtr Parser::parse_if() {
  NodePtr node = make(Kind::kBranches, next().line);
  for (bool more = true; more;) {
    NodePtr branch = make(Kind::kBranch, current().line);
    branch->children.push_back(tuple(false, false, "", false));
    branch->body = body_of({"elif", "else", "endif"}, false);
    node->children.push_back(finished(std::move(branch)));
    const std::string tag = next().text;
    more = tag == "elif";
    if (tag == "else") {
      NodePtr last = make(Kind::kBranch, current().line);
      last->children.push_back(nullptr);
      last->body = body_of({"endif"});
      node->children.push_back(finished(std::move(last)));
    }
  }
  return finished(std::move(node));
}

NodePtr Parser::parse_set() {
  const int line = next().line;
  NodePtr name = target(true, false);
  NodePtr node = make(is_sign("=") ? Kind::kSet : Kind::kSetBlock, line);
  node->children.push_back(std::move(name));
  if (skip_sign("=")) {
    node->children.push_back(tuple(false, true, "", false));
  } else {
    node->children.push_back(parse_filter(nullptr, false));
    node->body = body_of({"endset"});
  }
  return finished(std::move(node));
}

void Parser::parameters(Node& node) {
  expect_sign("(");
  bool defaults = false;
  while (!is_sign(")")) {
    if (!node.parameters.empty()) expect_sign(",");
    const Token name = expect(Token::kName);
    node.parameters.emplace_back(tree_.id_of(name.text), name.text);
    if (skip_sign("=")) {
      node.children.push_back(expression());
      defaults = true;
    } else if (defaults) {
      invalid("non-default argument follows default argument");
    }
  }
  next();
}

NodePtr Parser::parse_macro() {
  NodePtr node = make(Kind::kMacro, next().line);
  node->name = expect(Token::kName).text;
  node->name_id = tree_.id_of(node->name);
  parameters(*node);
  node->body = body_of({"endmacro"});
  return finished(std::move(node));
}

NodePtr Parser::parse_call_block() {
  NodePtr node = make(Kind::kCallBlock, next().line);
  node->children.push_back(nullptr);
  if (is_sign("(")) parameters(*node);
  node->children[0] = expression();
  if (node->children[0]->kind != Kind::kCall) invalid("expected call", node->line);
  node->body = body_of({"endcall"});
  return finished(std::move(node));
}

NodePtr Parser::parse_filter_block() {
  NodePtr node = make(Kind::kFilterBlock, next().line);
  node->children.push_back(parse_filter(nullptr, true));
  node->body = body_of({"endfilter"});
  return finished(std::move(node));
}

NodePtr Parser::parse_with() {
  NodePtr node = make(Kind::kWith, next().line);
  while (!is(Token::kBlockEnd)) {
    if (!node->children.empty()) expect_sign(",");
    node->children.push_back(target(false, false));
    expect_sign("=");
    node->children.push_back(expression());
  }
  node->body = body_of({"endwith"});
  return finished(std::move(node));
}

NodePtr Parser::parse_block() {
  NodePtr node = make(Kind::kBlock, next().line);
  node->name = expect(Token::kName).text;
  if (is_any_word({"scoped", "required"})) unsupported(at_line(node->line), "the tag block with ", current().text);
  node->body = body_of({"endblock"});
  skip_word(node->name);
  return finished(std::move(node));
}

NodePtr Parser::parse_print() {
  NodePtr node = make(Kind::kOutput, next().line);
  while (!is(Token::kBlockEnd)) {
    if (!node->children.empty()) expect_sign(",");
    node->children.push_back(expression());
  }
  return finished(std::move(node));
}

void Parser::assignable(const Node& node) const {
  if (node.kind == Kind::kTuple) {
    for (const NodePtr& child : node.children) assignable(*child);
  } else if (node.kind != Kind::kName && node.kind != Kind::kNamespaceTarget) {
    invalid("can't assign to an expression", node.line);
  }
}

NodePtr Parser::target(bool with_namespace, bool until_in) {
  NodePtr node = tuple(true, true, until_in ? "in" : "", false, with_namespace);
  assignable(*node);
  return node;
}

}  // namespace edgelm::capi::chat
