// The parser of jinja2, for the tags that templates may use.
#pragma once

#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "capi/chat/syntax/lexer.h"
#include "capi/chat/syntax/tree.h"

namespace edgelm::capi::chat {

class Parser {
 public:
  Parser(std::vector<Token> tokens, Tree& tree) : tokens_(std::move(tokens)), tree_(tree) {}
  void run();

 private:
  using Words = std::initializer_list<std::string_view>;

  // Tokens.
  const Token& current() const { return tokens_[at_]; }
  const Token& look() const { return tokens_[at_ + 1 < tokens_.size() ? at_ + 1 : at_]; }
  Token next();
  bool is(Token::Kind kind) const { return current().kind == kind; }
  bool is_sign(std::string_view text) const { return is(Token::kOperator) && current().text == text; }
  bool is_word(std::string_view text) const { return is(Token::kName) && current().text == text; }
  bool is_any_word(Words words) const;
  bool skip_sign(std::string_view text);
  bool skip_word(std::string_view text);
  Token expect(Token::Kind kind);
  void expect_sign(std::string_view text);
  [[noreturn]] void invalid(const std::string& message, int line = 0) const;
  [[noreturn]] void unexpected(const std::string& expected) const;

  // Statements.
  std::vector<NodePtr> statements(Words ends);  // up to the tag that ends them, which is current then
  std::vector<NodePtr> body_of(Words ends, bool drop = true);
  NodePtr statement();
  NodePtr parse_for();
  NodePtr parse_if();
  NodePtr parse_set();
  NodePtr parse_macro();
  NodePtr parse_call_block();
  NodePtr parse_filter_block();
  NodePtr parse_with();
  NodePtr parse_block();
  NodePtr parse_print();
  void parameters(Node& node);
  NodePtr target(bool with_namespace, bool until_in);
  void assignable(const Node& node) const;

  // Expressions.
  NodePtr expression(bool with_condition = true);
  NodePtr parse_or();
  NodePtr parse_and();
  NodePtr parse_not();
  NodePtr parse_compare();
  NodePtr parse_sum();
  NodePtr parse_concat();
  NodePtr parse_terms();
  NodePtr parse_power();
  NodePtr parse_unary(bool with_filters = true);
  NodePtr parse_primary(bool with_namespace = false);
  NodePtr name_or_constant(bool with_namespace);
  NodePtr number();
  // One expression, or several as a tuple. `ends`: a word after which there is none.
  NodePtr tuple(bool simple, bool with_condition, std::string_view end, bool parentheses, bool with_namespace = false);
  NodePtr parse_list();
  NodePtr parse_dict();
  NodePtr postfix(NodePtr node);
  NodePtr filters_and_tests(NodePtr node);
  NodePtr subscript(NodePtr node);
  NodePtr subscribed();
  NodePtr call(NodePtr node);
  std::unique_ptr<ArgumentNodes> arguments();
  NodePtr parse_filter(NodePtr node, bool inline_start);
  NodePtr parse_test(NodePtr node);

  NodePtr make(Kind kind, int line) const { return std::make_unique<Node>(kind, line); }
  // Sets the depth of a node whose children are complete.
  NodePtr finished(NodePtr node) const;
  NodePtr joined(Kind kind, int line, NodePtr left, NodePtr right) const;
  NodePtr string_constant(std::string text, int line);

  // One more level of brackets or blocks.
  class Nested {
   public:
    explicit Nested(Parser& parser);
    ~Nested() { --parser_.nested_; }
    Nested(const Nested&) = delete;
    Nested& operator=(const Nested&) = delete;

   private:
    Parser& parser_;
  };

  const std::vector<Token> tokens_;
  Tree& tree_;
  std::size_t at_ = 0;
  int nested_ = 0;
};

}  // namespace edgelm::capi::chat
