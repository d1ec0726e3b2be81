// Tests JSON: what is accepted, what is refused and where, and that documents are written as Python writes them.
#include "capi/common/json.h"

#include <clocale>
#include <cmath>

#include "check.h"

namespace {

using edgelm::capi::Error;
using edgelm::capi::Json;
using edgelm::capi::Members;
using edgelm::capi::python_repr;

Json parse(std::string_view text) { return Json::parse(text, "x.json", EDGELM_BUNDLE); }

// The message with which a document is refused; empty if it is accepted.
std::string refusal(std::string_view text) {
  try {
    parse(text);
    return "";
  } catch (const Error& error) {
    return error.code == EDGELM_BUNDLE ? error.what() : "wrong code";
  }
}

void TestDocumentsAreWrittenAsTheyWereRead() {
  for (const char* text :
       {"null", "[]", "{}", "[1, -2, 9223372036854775807, -9223372036854775808]",
        R"({"b": 1, "a": [true, false, null]})",
        "[0.1, 1e-05, 1e+16, 1e+22, -0.0, 123456.789, 5e-324, 1.7976931348623157e+308, NaN, Infinity, -Infinity]",
        R"(["\"\\\n\r\t\b\f\u0001", "é漢😀"])", "1.8446744073709552e+19", "0.0001", "1000000000000000.0"}) {
    EXPECT(parse(text).dump() == text, "%s became %s", text, parse(text).dump().c_str());
  }
  EXPECT(parse("{\"a\": [1, {\"b\": []}]}").dump(1) == "{\n \"a\": [\n  1,\n  {\n   \"b\": []\n  }\n ]\n}", "indented");
}

void TestOtherSpellingsAreRead() {
  EXPECT(parse(R"("\u00e9\ud83d\ude00\/")").string() == "é😀/", "escapes");
  EXPECT(parse(" [ 1 ,\n2 ] ").dump() == "[1, 2]", "spaces");
  EXPECT(parse(R"({"a": 1, "b": 2, "a": 3})").dump() == R"({"a": 3, "b": 2})", "the last value, at the first place");
  EXPECT(parse("18446744073709551615").is_double(), "integers beyond 64 bits are doubles");
  EXPECT(std::isinf(parse("1e999").number()) && parse("-1e999").number() < 0, "too large for a double");
  EXPECT(parse("1e-999").number() == 0 && std::signbit(parse("-0.001e-999").number()), "too small for a double");
  EXPECT(parse("0.0000e999").number() == 0, "zero");
}

void TestDamagedDocumentsAreRefusedWithTheirPlace() {
  for (const char* text : {"",
                           " ",
                           "[1,]",
                           "[1 2]",
                           "{\"a\" 1}",
                           "{a: 1}",
                           "{\"a\": 1,}",
                           "[1",
                           "{\"a\": 1",
                           "\"a",
                           "\"\\x\"",
                           "\"\\u12\"",
                           "\"\\u 123\"",
                           "\"\\ud800\"",
                           "\"\\ud800\\u0041\"",
                           "\"\\udc00\"",
                           "01",
                           "-",
                           "1.",
                           ".5",
                           "+1",
                           "1e",
                           "nul",
                           "True",
                           "[1] 2",
                           "\"\n\"",
                           "\xff",
                           "\"\xed\xa0\x80\"",
                           "\xef\xbb\xbf[]",
                           "-NaN",
                           "[\x00]"}) {
    EXPECT(refusal(text).find("x.json: not valid JSON (") == 0, "%s: %s", text, refusal(text).c_str());
  }
  EXPECT(refusal("[1,\n \"é\" 2]") == "x.json: not valid JSON (expected ',' or ']': line 2 column 6)", "%s",
         refusal("[1,\n \"é\" 2]").c_str());
  EXPECT(refusal(std::string(200, '[') + std::string(200, ']')).empty(), "200 levels");
  EXPECT(refusal(std::string(1000000, '[')).find("deep") != std::string::npos, "a million levels");
}

void TestNumbersDoNotDependOnTheLocale() {
  for (const char* name : {"de_DE.UTF-8", "de_DE.utf8", "fr_FR.UTF-8"}) std::setlocale(LC_ALL, name);
  EXPECT(parse("[1.5]").dump() == "[1.5]", "%s", parse("[1.5]").dump().c_str());
  std::setlocale(LC_ALL, "C");
  EXPECT(python_repr(1e23) == "1e+23" && python_repr(9007199254740993.0) == "9007199254740992.0", "repr");
  EXPECT(python_repr(-2.5e-7) == "-2.5e-07" && python_repr(INFINITY) == "inf" && python_repr(NAN) == "nan", "repr");
}

void TestErrorsOfMembersNameTheField() {
  const Json json = parse(R"({"model": {"layers": "12", "size": 3}})");
  const Members model = Members(json, "x.json", EDGELM_BUNDLE).object("model");
  try {
    model.integer("layers", 1, 64);
    EXPECT(false, "accepted");
  } catch (const Error& error) {
    EXPECT(
        std::string(error.what()) == "x.json: model.layers is \"12\" (a string), expected a whole number from 1 to 64",
        "%s", error.what());
  }
  EXPECT(model.integer("size", 1, 64) == 3 && !model.has("other") && model.boolean("other", true), "members");
}

void TestTextInMessagesIsShortAndPrintable() {
  EXPECT(edgelm::capi::quoted("a\n\x80\"é") == "\"a\\x0a\\x80\\\"é\"", "%s",
         edgelm::capi::quoted("a\n\x80\"é").c_str());
  EXPECT(edgelm::capi::quoted(std::string(1000, 'a')) == "\"" + std::string(60, 'a') + "\"...", "long");
}

}  // namespace

int main() {
  TestDocumentsAreWrittenAsTheyWereRead();
  TestOtherSpellingsAreRead();
  TestDamagedDocumentsAreRefusedWithTheirPlace();
  TestNumbersDoNotDependOnTheLocale();
  TestErrorsOfMembersNameTheField();
  TestTextInMessagesIsShortAndPrintable();
  return edgelm_test::Finish();
}
