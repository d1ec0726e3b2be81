// Renders tests/vectors/chat_templates.json, which Python renders too, and templates that are hostile.
//
// With --serve it renders requests, for tests/capi/fuzz_chat_templates.py: JSON, one a line.
#include "capi/chat/chat_template.h"

#include <iostream>
#include <thread>

#include "capi/common/files.h"
#include "capi/common/json.h"
#include "check.h"

namespace {

using namespace edgelm::capi;

const Json& at(const Json& json, const char* key) {
  const Json* found = json.find(key);
  if (found == nullptr) fail(EDGELM_FILE, "a case without ", key);
  return *found;
}

std::vector<std::pair<std::string, std::string>> special_of(const Json& file) {
  std::vector<std::pair<std::string, std::string>> special;
  for (const auto& [name, text] : at(file, "special").object()) special.emplace_back(name, text.string());
  return special;
}

struct Outcome {
  std::string text, error;
  edgelm_code code = EDGELM_OK;
};

Outcome rendered(const std::string& source, const std::vector<std::pair<std::string, std::string>>& special,
                 const Json& messages, bool prompt, const Json& variables) {
  Outcome outcome;
  try {
    outcome.text = ChatTemplate(source, special).render(messages, prompt, variables);
  } catch (const Error& error) {
    outcome.error = error.what();
    outcome.code = error.code;
  }
  return outcome;
}

// Whether an outcome is what a case says.
void expect(const Json& one, const Outcome& outcome, const std::string& what) {
  if (const Json* text = one.find("text")) {
    EXPECT(outcome.error.empty() && outcome.text == text->string(), "%s: %s%s", what.c_str(), outcome.text.c_str(),
           outcome.error.c_str());
    return;
  }
  const std::string& kind = at(one, "error").string();
  const std::string begin = kind == "invalid"     ? "chat template is not valid: line "
                            : kind == "refused"   ? "chat template refuses these messages: "
                            : kind == "forbidden" ? "chat template tries what a template may not: "
                                                  : "chat template fails on these messages: ";
  const Json* said = one.find("said");
  const std::string wanted = begin + (said == nullptr ? "" : said->string());
  EXPECT(outcome.code == EDGELM_TEMPLATE && outcome.error.compare(0, wanted.size(), wanted) == 0,
         "%s: %s%s in place of %s", what.c_str(), outcome.error.c_str(), outcome.text.c_str(), wanted.c_str());
}

void test_published_templates(const Json& file) {
  const auto special = special_of(file);
  std::size_t texts = 0;
  for (const Json& one : at(file, "cases").array()) {
    const std::string &name = at(one, "template").string(), &talk = at(one, "messages").string();
    const Json& options = at(file, "options").array()[std::size_t(at(one, "options").integer())];
    const Outcome outcome = rendered(at(at(file, "templates"), name.c_str()).string(), special,
                                     at(at(file, "conversations"), talk.c_str()), at(options, "prompt").boolean(),
                                     at(options, "variables"));
    expect(one, outcome, concat(name, ", ", talk, ", options ", at(one, "options").integer()));
    texts += outcome.error.empty();
  }
  EXPECT(texts > 400, "%d texts", int(texts));
}

void test_features(const Json& file) {
  const auto special = special_of(file);
  for (const Json& one : at(file, "features").array()) {
    const std::string& source = at(one, "source").string();
    expect(one, rendered(source, special, at(file, "messages"), true, at(file, "variables")), source);
  }
  for (const Json& one : at(file, "parts").array()) {
    const std::string& source = at(one, "source").string();
    expect(one, rendered(source, special, at(one, "messages"), true, {}), source);
  }
}

void test_what_is_left_out_is_refused_by_name(const Json& file) {
  for (const Json& one : at(file, "left_out").array()) {
    const std::string &source = at(one, "source").string(), &named = at(one, "named").string();
    const Outcome outcome = rendered(source, {}, at(file, "messages"), true, at(file, "variables"));
    EXPECT(outcome.code == EDGELM_TEMPLATE && outcome.error.find("does not support: line ") != std::string::npos &&
               outcome.error.find(named) != std::string::npos,
           "%s: %s%s", source.c_str(), outcome.error.c_str(), outcome.text.c_str());
  }
}

void test_malformed_messages(const Json& file) {
  for (const Json& one : at(file, "malformed").array()) {
    const Outcome outcome = rendered("x", {}, at(one, "messages"), true, {});
    EXPECT(outcome.code == EDGELM_INVALID_ARGUMENT && outcome.error == at(one, "message").string(), "%s: %s",
           one.dump().c_str(), outcome.error.c_str());
  }
  const Json messages = at(file, "messages");
  EXPECT(rendered("x", {}, messages, true, 3).code == EDGELM_INVALID_ARGUMENT, "variables that are no object");
  EXPECT(rendered("x\xff", {}, messages, true, {}).code == EDGELM_TEMPLATE, "invalid UTF-8");
  EXPECT(rendered(std::string(2 << 20, 'x'), {}, messages, true, {}).code == EDGELM_TEMPLATE, "a template of 2 MB");
}

// Each would hang, fill memory, or overflow the stack.
void test_hostile_templates(const Json& file, bool reduced) {
  const std::string nested =
      "{% set n = namespace(a=[], b=[], k=[]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, "
      "n.b] "
      "%}{% endfor %}";
  const std::string kept = "{% set n = namespace(k=[]) %}{% for i in range(10 ** 5) %}";
  const std::string many(3000, '('), minus(9000, '-'), brackets(3000, '[');
  std::string blocks;
  for (int i = 0; i < 500; ++i) blocks += "{% if true %}";
  std::string sum = "{{ x";
  for (int i = 0; i < 5000; ++i) sum += " + x";
  const std::string hostile[] = {
      nested + "{{ n.a == n.b }}",
      nested + "{{ n.a }}",
      nested + "{{ n.a | tojson }}",
      nested + "{{ [n.a, n.b] | sort }}",
      "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
      "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
      "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
      "{% for a in [[[]]] recursive %}{{ loop([[a]]) }}{% endfor %}",
      "{{ 'x' * 10 ** 9 }}",
      "{{ [1] * 10 ** 9 }}",
      "{{ 'x'.ljust(10 ** 12) }}{{ '%1000000000d' % 1 }}",
      "{{ '{:1000000000}'.format('x') }}",
      "{% set x = 'x' * 1000000 %}{{ x.replace('x', x) }}",
      "{% set x = 'x' * 1000000 %}{% for i in range(1000) %}{{ x }}{% endfor %}",
      "{% set x = ['x' * 1000000] * 1000000 %}{{ x | join | length }}",
      "{{ messages | tojson(indent=1000000000) }}",
      "{{ range(10 ** 5) | batch(10 ** 9, 'x') | list }}",
      kept + "{% set n.k = [n.k] %}{% endfor %}{{ n.k }}",
      kept + "{% set n.k = n.k | map('string') %}{% endfor %}{{ n.k | list }}",
      kept + "{% set n.k = [n.k, 'x' * 10 ** 6] %}{% endfor %}",
      "{% set n = namespace() %}{% set n.n = n %}{{ n }}",
      "{{ " + many + " }}",
      "{{ " + minus + "1 }}",
      "{{ " + brackets,
      blocks,
      sum + " }}",
  };
  std::size_t count = 0;
  for (const std::string& source : hostile) {
    if (reduced && ++count > 4 && count < 17) continue;
    const Outcome outcome = rendered(source, {}, at(file, "messages"), true, {});
    EXPECT(outcome.code == EDGELM_TEMPLATE, "%.80s: %.80s", source.c_str(), outcome.text.c_str());
  }
  // Long chains of values are no harm.
  for (const char* chain :
       {"{% set n.k = namespace(k=n.k) %}", "{% for x in [n.k] %}{% set n.k = [loop] %}{% endfor %}",
        "{% macro m() %}{{ n.k }}{% endmacro %}{% set n.k = m %}"}) {
    const Outcome outcome = rendered(kept + chain + "{% endfor %}ok", {}, at(file, "messages"), true, {});
    EXPECT(outcome.text == "ok", "%s: %s", chain, outcome.error.c_str());
  }
  // Values that refer to each other in a circle are freed: the sanitizers would tell.
  const Outcome circle = rendered(
      "{% set n = namespace() %}{% set n.n = [n] %}{% macro m() %}{% endmacro %}{% set n.m = m %}{% for x in [n] %}{% "
      "set "
      "n.l = loop %}{{ loop.changed(loop) }}{% endfor %}ok",
      {}, at(file, "messages"), true, {});
  EXPECT(circle.text == "Trueok", "%s%s", circle.text.c_str(), circle.error.c_str());
}

void test_threads_share_a_template(const Json& file) {
  const ChatTemplate chat(at(at(file, "templates"), "qwen-3").string(), special_of(file));
  const Json& messages = at(at(file, "conversations"), "longer");
  const std::string wanted = chat.render(messages);
  std::vector<std::thread> threads;
  std::vector<int> wrong(4, 0);
  for (int& count : wrong) {
    threads.emplace_back([&] {
      for (int i = 0; i < 50; ++i) count += chat.render(messages) != wanted;
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const int count : wrong) EXPECT(count == 0, "%d texts differ", count);
}

int serve() {
  for (std::string line; std::getline(std::cin, line);) {
    const Json request = Json::parse(line, "the request", EDGELM_INVALID_ARGUMENT);
    const Outcome outcome = rendered(at(request, "source").string(), special_of(request), at(request, "messages"), true,
                                     at(request, "variables"));
    Json answer;
    answer.set(outcome.error.empty() ? "text" : "error", outcome.error.empty() ? outcome.text : outcome.error);
    std::cout << answer.dump() << std::endl;
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "--serve") return serve();
  const char* path = "tests/vectors/chat_templates.json";
  const Json file = Json::parse(read_file(path, 16 << 20, EDGELM_FILE), path, EDGELM_FILE);
  test_published_templates(file);
  test_features(file);
  test_what_is_left_out_is_refused_by_name(file);
  test_malformed_messages(file);
  test_hostile_templates(file, argc > 1);
  test_threads_share_a_template(file);
  return edgelm_test::Finish();
}
