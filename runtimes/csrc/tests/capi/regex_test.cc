// Tests regular expressions: what they match, what is refused by name, and that none takes long.
// tests/capi/test_tokenizer_steps.py compares them with Oniguruma.
#include "capi/tokenizer/regex/regex.h"

#include <ctime>

#include "capi/common/error.h"
#include "check.h"

namespace {

using edgelm::capi::Error;
using edgelm::capi::Regex;

// The matches in a text, in brackets.
std::string found(std::string_view pattern, std::string_view text) {
  std::string result;
  for (const Regex::Match& match : Regex(pattern).find_all(text)) {
    result.append("[").append(text.substr(match.start, match.end - match.start)).append("]");
  }
  return result;
}

std::string refusal(std::string_view pattern) {
  try {
    Regex{pattern};
    return "";
  } catch (const Error& error) {
    return error.code == EDGELM_TOKENIZER ? error.what() : "wrong code";
  }
}

void TestMatches() {
  const struct {
    const char *pattern, *text, *expected;
  } cases[] = {
      {"'s|'t| ?\\p{L}+| ?\\p{N}+|\\s+(?!\\S)|\\s+", "it's  12 Größe", "[it]['s][ ][ 12][ Größe]"},
      {"\\p{N}{1,3}", "1234567", "[123][456][7]"},
      {"(?i:'S|ll)", "'s LL 'ſ", "['s][LL]['ſ]"},
      {"a|(?i)b|c", "aBCAb", "[a][B][C][b]"},
      {"a{,2}", "aaa", "[aa][a]"},
      {"a{2}+", "aaaaa", "[aaaa]"},
      {"a{x}{", "a{x}{", "[a{x}{]"},
      {"[^]a]+", "b]ac", "[b][c]"},
      {"[a-c&&[^b]]+", "abc", "[a][c]"},
      {"[\\]\\-\\x{4e00}\\u4e8c]+", "]-一二三", "[]-一二]"},
      {"a++b|a", "aab aa", "[aab][a][a]"},
      {"(?>a+)a|b", "aab", "[b]"},
      {"(?<=a)b|(?<!a)c", "abacc", "[b][c]"},
      {"(?:ab|a)*c", "abaabc", "[abaabc]"},
      {".{2,3}?", "abcd", "[ab][cd]"},
      {"^a|a$|\\Ab", "ba\na", "[b][a][a]"},
      {"\\bword\\b", "word words wörd word", "[word][word]"},
      {"x*", "axxb", "[][xx][]"},  // after a match, an empty one is left out
      {"", "aé", "[][][]"},
      {"(?m:.)", "\n", "[\n]"},
      {".", "\n", ""},
  };
  for (const auto& one : cases) {
    const std::string result = found(one.pattern, one.text);
    EXPECT(result == one.expected, "%s in %s: %s, not %s", one.pattern, one.text, result.c_str(), one.expected);
  }
}

void TestWhatIsNotSupportedIsNamed() {
  const struct {
    const char *pattern, *reason;
  } cases[] = {
      {"(a)\\1", "the escape \\1"},
      {"\\p{Han}", "the property Han"},
      {"(?<name>a)", "the group (?<"},
      {"[[:alpha:]]", "[:alpha:]"},
      {"\\X", "the escape \\X"},
      {"(?i:é)", "a letter beyond ASCII where case is ignored"},
      {"(?i:ss)", "\"ss\" where case is ignored"},
      {"(?i:\\p{Lu})", "the property Lu where case is ignored"},
      {"(?x: a)", "the option (?x)"},
      {"(?:a*)*", "a repetition of what may be empty"},
      {"(?:a?|b){2}", "a repetition of what may be empty"},
      {"(?<=a+)b", "a repetition in (?<="},
      {"a{1001}", "more than 1000 times"},
      {"a{3,1}", "low above high"},
      {"(", "'(' without ')'"},
      {"a)", "')' without '('"},
      {"[a", "'[' without ']'"},
      {"*", "a repetition of nothing"},
      {"\\", "it ends with '\\'"},
      {"(?:(?:(?:a{1000}b){1000}c){1000}d){1000}", "its repetitions are too large"},
  };
  for (const auto& one : cases) {
    const std::string message = refusal(one.pattern);
    EXPECT(message.find(one.reason) != std::string::npos, "%s: %s", one.pattern, message.c_str());
  }
  const std::string deep = std::string(10000, '(') + std::string(10000, ')');
  EXPECT(refusal(deep).find("groups within groups") != std::string::npos, "%s", refusal(deep).c_str());
  const std::string classes = std::string(10000, '[');
  EXPECT(refusal(classes).find("classes within classes") != std::string::npos, "%s", refusal(classes).c_str());
}

void TestHostilePatternsEnd() {
  const std::string text(30000, 'a');
  for (const char* pattern : {"(?:a+)+b", "(?:a|a)+b", "(?:a|aa)+b", "(?:a{1,30}){1,30}b", "(?:(?=(?:a+)+b)a)+"}) {
    const std::clock_t start = std::clock();
    std::string message;
    try {
      Regex(pattern).find_all(text);
    } catch (const Error& error) {
      message = error.what();
    }
    const double seconds = double(std::clock() - start) / CLOCKS_PER_SEC;
    EXPECT(message.find("takes too long for this text") != std::string::npos, "%s: %s", pattern, message.c_str());
    EXPECT(seconds < 30, "%s took %.1f s", pattern, seconds);
  }
}

void TestALongTextNeedsNoDeepStack() {
  const std::string text(1000000, 'a');
  EXPECT(Regex("(?:a|b)*").find_all(text).size() == 1, "groups");
  EXPECT(Regex("a*?b|a+").find_all("x" + text.substr(0, 2000)).size() == 1, "lazy");
}

}  // namespace

int main() {
  TestMatches();
  TestWhatIsNotSupportedIsNamed();
  TestHostilePatternsEnd();
  TestALongTextNeedsNoDeepStack();
  return edgelm_test::Finish();
}
