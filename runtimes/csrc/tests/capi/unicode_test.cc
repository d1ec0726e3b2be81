// Tests categories, case and normal forms of characters. tests/capi/unicode_tables.py --check compares all of them with
// the libraries that they come from.
#include "capi/common/unicode.h"

#include "check.h"

namespace {

using namespace edgelm::capi;

void TestCategories() {
  const struct {
    char32_t character;
    const char* name;
  } cases[] = {{'A', "Lu"},
               {'z', "Ll"},
               {0x1c5, "Lt"},
               {0x2b0, "Lm"},
               {0x6f22, "Lo"},
               {0x301, "Mn"},
               {0x903, "Mc"},
               {0x20dd, "Me"},
               {'7',
                "N"
                "d"},
               {0x2167, "Nl"},
               {0xbd, "No"},
               {'_', "Pc"},
               {0x2014, "Pd"},
               {'(', "Ps"},
               {0x300d, "Pe"},
               {0xab, "Pi"},
               {0xbb, "Pf"},
               {'!', "Po"},
               {'+', "Sm"},
               {0x20ac, "Sc"},
               {'^', "Sk"},
               {0x1f389, "So"},
               {0x3000, "Zs"},
               {0x2028, "Zl"},
               {0x2029, "Zp"},
               {0x1f, "Cc"},
               {0x200d, "Cf"},
               {0xd800, "Cs"},
               {0xe000, "Co"},
               {0xfffff, "Cn"},
               {0x897, "Mn"},
               {0x10ffff, "Cn"},
               {0x110000, "Cn"},
               {0xffffffff, "Cn"}};
  for (const auto& one : cases) {
    const std::string name = category_name(category(one.character));
    EXPECT(name == one.name, "U+%04X is %s", static_cast<unsigned>(one.character), name.c_str());
    EXPECT(category_of_name(one.name) == category(one.character), "%s", one.name);
  }
  EXPECT(!category_of_name("Xx") && !category_of_name("L") && !category_of_name("uL"), "names of no category");
}

void TestClassesOfRegularExpressions() {
  EXPECT(is_letter(0x10400) && is_mark(0x903) && is_number(0x2167) && is_punctuation('_') && is_symbol('~'), "classes");
  EXPECT(is_white_space(0x85) && is_white_space(0xa0) && is_white_space(0x3000), "white space");
  EXPECT(!is_white_space(0x200b) && !is_white_space(0x1c) && is_python_space(0x1c), "not white space");
  EXPECT(is_word(0x200d) && !is_oniguruma_word(0x200d), "joiners");
  EXPECT(!is_word(0xb2) && is_oniguruma_word(0xb2), "superscripts");
  EXPECT(is_printable(' ') && !is_printable(0xa0) && !is_printable('\n') && is_printable(0x301), "printable");
  EXPECT(is_rust_punctuation('$') && !is_punctuation('$') && !is_rust_punctuation(0x2e52), "punctuation");
}

void TestCaseIsPythons() {
  const struct {
    const char *text, *lower, *upper, *title, *capital;
  } cases[] = {
      {"Hello wORLD's 2nd", "hello world's 2nd", "HELLO WORLD'S 2ND", "Hello World'S 2Nd", "Hello world's 2nd"},
      {"stra\u00dfe \ufb01n", "stra\u00dfe \ufb01n", "STRASSE FIN", "Stra\u00dfe Fin", "Stra\u00dfe \ufb01n"},
      {"\u03a3\u0391\u03a3 \u03a3. \u0391\u03a3'", "\u03c3\u03b1\u03c2 \u03c3. \u03b1\u03c2'",
       "\u03a3\u0391\u03a3 \u03a3. \u0391\u03a3'", "\u03a3\u03b1\u03c2 \u03a3. \u0391\u03c2'",
       "\u03a3\u03b1\u03c2 \u03c3. \u03b1\u03c2'"},
      {"\u01c6x \u0130 \u0149", "\u01c6x i\u0307 \u0149", "\u01c4X \u0130 \u02bcN", "\u01c5x \u0130 \u02bcN",
       "\u01c5x i\u0307 \u0149"},
      {"\u10d0\u10d1", "\u10d0\u10d1", "\u1c90\u1c91", "\u10d0\u10d1", "\u10d0\u10d1"},
      {"", "", "", "", ""},
  };
  for (const auto& one : cases) {
    EXPECT(to_lower(one.text) == one.lower, "%s: %s", one.text, to_lower(one.text).c_str());
    EXPECT(to_upper(one.text) == one.upper, "%s: %s", one.text, to_upper(one.text).c_str());
    EXPECT(to_title(one.text) == one.title, "%s: %s", one.text, to_title(one.text).c_str());
    EXPECT(capitalized(one.text) == one.capital, "%s: %s", one.text, capitalized(one.text).c_str());
  }
}

void TestNormalForms() {
  const struct {
    const char *text, *nfc, *nfd, *nfkc, *nfkd;
  } cases[] = {
      {"caf\u00e9", "caf\u00e9", "cafe\u0301", "caf\u00e9", "cafe\u0301"},
      {"\u1e9b\u0323", "\u1e9b\u0323", "\u017f\u0323\u0307", "\u1e69", "s\u0323\u0307"},
      {"\uac01\u11a8", "\uac01\u11a8", "\u1100\u1161\u11a8\u11a8", "\uac01\u11a8", "\u1100\u1161\u11a8\u11a8"},
      {"\u1100\u1161\u11a8", "\uac01", "\u1100\u1161\u11a8", "\uac01", "\u1100\u1161\u11a8"},
      {"\u212b\ufb01\uff21", "\u00c5\ufb01\uff21", "A\u030a\ufb01\uff21", "\u00c5fiA", "A\u030afiA"},
      {"a\u0301\u0323", "\u1ea1\u0301", "a\u0323\u0301", "\u1ea1\u0301", "a\u0323\u0301"},
      {"\u0958\U0001d15e", "\u0915\u093c\U0001d157\U0001d165", "\u0915\u093c\U0001d157\U0001d165",
       "\u0915\u093c\U0001d157\U0001d165", "\u0915\u093c\U0001d157\U0001d165"},
      {"\U00011131\U00011127", "\U0001112e", "\U00011131\U00011127", "\U0001112e", "\U00011131\U00011127"},
  };
  for (const auto& one : cases) {
    EXPECT(normalized(one.text, Form::NFC) == one.nfc, "NFC of %s", one.text);
    EXPECT(normalized(one.text, Form::NFD) == one.nfd, "NFD of %s", one.text);
    EXPECT(normalized(one.text, Form::NFKC) == one.nfkc, "NFKC of %s", one.text);
    EXPECT(normalized(one.text, Form::NFKD) == one.nfkd, "NFKD of %s", one.text);
  }
}

void TestNormalFormsAreStable() {
  for (char32_t character = 0; character < 0x110000; ++character) {
    if (category(character) == Category::kSurrogate) continue;
    std::string text;
    append_utf8(text, character);
    const std::string nfc = normalized(text, Form::NFC), nfd = normalized(text, Form::NFD);
    EXPECT(normalized(nfc, Form::NFD) == nfd && normalized(nfd, Form::NFC) == nfc, "U+%04X",
           static_cast<unsigned>(character));
    const std::string nfkd = normalized(text, Form::NFKD);
    EXPECT(normalized(nfd, Form::NFKD) == nfkd && normalized(nfkd, Form::NFD) == nfkd, "U+%04X",
           static_cast<unsigned>(character));
  }
}

}  // namespace

int main() {
  TestCategories();
  TestClassesOfRegularExpressions();
  TestCaseIsPythons();
  TestNormalForms();
  TestNormalFormsAreStable();
  return edgelm_test::Finish();
}
