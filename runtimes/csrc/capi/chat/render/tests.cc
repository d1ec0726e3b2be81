// The tests of templates: what follows `is`.
#include "capi/chat/render/call.h"
#include "capi/chat/syntax/names.h"
#include "capi/chat/values/text.h"

namespace edgelm::capi::chat {

namespace {

using Test = bool (*)(const Value& value);
using PairTest = bool (*)(const Value& value, const Value& other);

bool remainder_is(const Value& value, int divisor, int rest) {
  return equal(calculate(Operator::kModulo, value, Value(divisor)), Value(rest));
}

bool is_sequence(const Value& value) {
  return value.is_sequence() || value.is_string() || value.is(Type::kDict) || value.is(Type::kRange) ||
         value.is_undefined();
}

const std::pair<const char*, Test> tests[] = {
    {"odd", [](const Value& value) { return remainder_is(value, 2, 1); }},
    {"even", [](const Value& value) { return remainder_is(value, 2, 0); }},
    {"defined", [](const Value& value) { return !value.is_undefined(); }},
    {"undefined", [](const Value& value) { return value.is_undefined(); }},
    {"filter",
     [](const Value& value) {
       hash_of(value);
       return value.is_string() && filter_named(value.string()) != Known::kMissing;
     }},
    {"test",
     [](const Value& value) {
       hash_of(value);
       return value.is_string() && test_named(value.string()) != Known::kMissing;
     }},
    {"none", [](const Value& value) { return value.is(Type::kNone); }},
    {"boolean", [](const Value& value) { return value.is(Type::kBool); }},
    {"false", [](const Value& value) { return value.is(Type::kBool) && !value.boolean(); }},
    {"true", [](const Value& value) { return value.is(Type::kBool) && value.boolean(); }},
    {"integer", [](const Value& value) { return value.is(Type::kInt); }},
    {"float", [](const Value& value) { return value.is(Type::kFloat); }},
    {"lower", [](const Value& value) { return is_lower_text(text_of_value(value)); }},
    {"upper", [](const Value& value) { return is_upper_text(text_of_value(value)); }},
    {"string", [](const Value& value) { return value.is_string(); }},
    {"mapping", [](const Value& value) { return value.is(Type::kDict); }},
    {"number", [](const Value& value) { return value.is_number(); }},
    {"sequence", is_sequence},
    {"iterable", [](const Value& value) { return is_iterable(value); }},
    {"callable",
     [](const Value& value) {
       return value.is_undefined() || (value.is(Type::kOther) && value.as<Other>()->callable());
     }},
    {"escaped", [](const Value& value) { return value.is_string() && value.as<Text>()->markup; }},
};

bool is_equal(const Value& value, const Value& other) { return equal(value, other); }
bool is_other(const Value& value, const Value& other) { return !equal(value, other); }
template <Order order>
bool is_ordered(const Value& value, const Value& other) {
  return ordered(value, other, order);
}

const std::pair<const char*, PairTest> pair_tests[] = {
    {"==", is_equal},
    {"eq", is_equal},
    {"equalto", is_equal},
    {"!=", is_other},
    {"ne", is_other},
    {">", is_ordered<Order::kGreater>},
    {"gt", is_ordered<Order::kGreater>},
    {"greaterthan", is_ordered<Order::kGreater>},
    {"ge", is_ordered<Order::kGreaterEqual>},
    {">=", is_ordered<Order::kGreaterEqual>},
    {"<", is_ordered<Order::kLess>},
    {"lt", is_ordered<Order::kLess>},
    {"lessthan", is_ordered<Order::kLess>},
    {"<=", is_ordered<Order::kLessEqual>},
    {"le", is_ordered<Order::kLessEqual>},
    {"in", [](const Value& value, const Value& other) { return contains(other, value); }},
    {"sameas", same},
};

}  // namespace

bool apply_test(const std::string& name, Arguments& given) {
  for (const auto& [known, test] : tests) {
    if (name == known) return test(Parameters(known, given, {"value"}, 1)[0]);
  }
  for (const auto& [known, test] : pair_tests) {
    if (name != known) continue;
    const bool by_name = name == "in" || name == "sameas";
    const Parameters arguments(known, given, {"value", name == "in" ? "seq" : "other"}, 2, by_name);
    return test(arguments[0], arguments[1]);
  }
  if (name == "divisibleby") {
    const Parameters arguments("divisibleby", given, {"value", "num"}, 2);
    return equal(calculate(Operator::kModulo, arguments[0], arguments[1]), Value(0));
  }
  throw Failure(Failure::kFailed, concat("No test named ", repr_of_text(name), "."));
}

}  // namespace edgelm::capi::chat
