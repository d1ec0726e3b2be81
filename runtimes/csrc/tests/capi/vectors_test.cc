// Runs tests/vectors: sampling and stop strings have to give what Python gives (tests/vectors/write.py).
#include <cmath>
#include <map>

#include "capi/common/files.h"
#include "capi/common/json.h"
#include "capi/generation/sampling.h"
#include "capi/generation/stop_strings.h"
#include "check.h"

namespace {

using namespace edgelm::capi;
using Ids = std::vector<std::int32_t>;

Json parsed(const char* path) { return Json::parse(read_file(path, 16 << 20, EDGELM_FILE), path, EDGELM_FILE); }

const Json& at(const Json& json, const char* key) {
  const Json* found = json.find(key);
  if (found == nullptr) fail(EDGELM_FILE, "a case without ", key);
  return *found;
}

std::int64_t integer(const Json& json, const char* key) { return at(json, key).integer(); }

std::vector<float> logits_of(const Json& shape, std::int64_t step) {
  std::vector<float> logits(std::size_t(integer(shape, "size")));
  const auto a = integer(shape, "a"), b = integer(shape, "b"), m = integer(shape, "m"), c = integer(shape, "c");
  const auto d = float(integer(shape, "d"));
  for (std::size_t i = 0; i < logits.size(); ++i)
    logits[i] = float((a * std::int64_t(i) + b + 7919 * step) % m - c) / d;
  if (const Json* set = shape.find("set"))
    for (const Json& pair : set->array()) {
      const Json& value = pair.array()[1];
      logits[std::size_t(pair.array()[0].integer())] = value.is_null() ? -INFINITY : float(value.integer()) / d;
    }
  return logits;
}

Sampling sampling_of(const Json& options) {
  Sampling sampling;
  for (const auto& [name, value] : options.object()) {
    if (name == "temperature") sampling.temperature = value.number();
    else if (name == "top_k") sampling.top_k = value.integer();
    else if (name == "top_p") sampling.top_p = value.number();
    else if (name == "min_p") sampling.min_p = value.number();
    else if (name == "repetition_penalty") sampling.repetition_penalty = value.number();
    else fail(EDGELM_FILE, "option ", name);
  }
  return sampling;
}

Ids ids_of(const Json& array) {
  Ids ids;
  for (const Json& id : array.array()) ids.push_back(std::int32_t(id.integer()));
  return ids;
}

std::uint64_t number(const Json& text) { return std::stoull(text.string()); }

void test_choices(const Json& file) {
  std::map<std::string, std::vector<float>> logits;
  for (const auto& [name, shape] : at(file, "logits").object()) logits[name] = logits_of(shape, 0);
  int tokens = 0;
  for (const Json& one : at(file, "choices").array()) {
    const Sampling options = sampling_of(at(one, "options"));
    options.check();
    const std::vector<float>& row = logits.at(at(one, "logits").string());
    const Ids wanted = ids_of(at(one, "tokens")), seen = ids_of(at(one, "seen"));
    for (std::size_t i = 0; i < wanted.size(); ++i, ++tokens) {
      const double uniform = at(one, "uniforms").array()[i].number();
      const std::int32_t token = choose(row.data(), std::int64_t(row.size()), options, seen, uniform);
      EXPECT(token == wanted[i], "%s, number %g: %d in place of %d", one.dump().c_str(), uniform, token, wanted[i]);
    }
  }
  EXPECT(tokens > 1000, "%d tokens", tokens);
}

void test_sequences(const Json& file) {
  for (const Json& one : at(file, "sequences").array()) {
    Sampling options = sampling_of(at(one, "options"));
    options.seed = number(at(one, "seed"));
    const Json& shape = at(at(file, "logits"), at(one, "logits").string().c_str());
    Sampler sampler(options, ids_of(at(one, "prompt")), integer(shape, "size"));
    std::int64_t step = 0;
    for (const std::int32_t wanted : ids_of(at(one, "tokens"))) {
      const std::int32_t token = sampler.sample(logits_of(shape, step).data());
      EXPECT(token == wanted, "%s, step %d: %d", one.dump().c_str(), int(step), token);
      ++step;
    }
  }
}

void test_streams(const Json& file) {
  for (const Json& one : at(file, "streams").array()) {
    Pcg64 random(number(at(one, "seed")));
    for (const Json& wanted : at(one, "raw").array())
      EXPECT(random.next() == number(wanted), "seed %s", at(one, "seed").string().c_str());
  }
}

void test_errors(const Json& file) {
  for (const Json& one : at(file, "errors").array()) {
    std::string message = "no error";
    try {
      sampling_of(at(one, "options")).check();
    } catch (const Error& error) {
      message = error.code == EDGELM_INVALID_ARGUMENT ? error.what() : "another code";
    }
    EXPECT(message == at(one, "message").string(), "%s: %s", one.dump().c_str(), message.c_str());
  }
}

void test_logits_that_are_not_finite() {
  for (const float bad : {std::nanf(""), INFINITY})
    for (const Sampling& options : {Sampling{}, Sampling{0.5, 2, 0.9, 0.1, 1.5, 1}}) {
      const float logits[] = {1, 2, bad, 4};
      bool refused = false;
      try {
        Sampler(options, {0}, 4).sample(logits);
      } catch (const Error& error) {
        refused = error.code == EDGELM_RUNTIME;
      }
      EXPECT(refused, "%g", double(bad));
    }
  // Penalties that overflow give some token.
  const float logits[] = {3e38f, -3e38f, 1, -1};
  for (const double penalty : {1e-300, 1e300})
    for (const double top_p : {1.0, 0.5})
      for (const double min_p : {0.0, 0.5}) {
        const Sampling options{0.7, 0, top_p, min_p, penalty, 1};
        const std::int32_t token = choose(logits, 4, options, {0, 1, 2, 3}, 0.5);
        EXPECT(token >= 0 && token < 4, "%d", token);
      }
}

void test_stop_strings() {
  const Json file = parsed("tests/vectors/stop_strings.json");
  for (const Json& one : file.array()) {
    std::vector<std::string> stops;
    for (const Json& stop : at(one, "stops").array()) stops.push_back(stop.string());
    StopStrings stream(stops);
    const Json::Array& pieces = at(one, "pieces").array();
    const Json::Array& shown = at(one, "shown").array();
    bool found = false;
    for (std::size_t i = 0; i < shown.size(); ++i) {
      std::string text;
      std::tie(text, found) = stream.push(pieces[i].string());
      EXPECT(text == shown[i].string(), "%s, piece %d: %s", one.dump().c_str(), int(i), text.c_str());
    }
    EXPECT(found == at(one, "found").boolean(), "%s", one.dump().c_str());
    EXPECT(stream.flush() == at(one, "rest").string(), "%s", one.dump().c_str());
  }
  for (const char* bad : {"", "a\xff", "\xc3"}) {
    bool refused = false;
    try {
      StopStrings stream({"a", bad});
    } catch (const Error& error) {
      refused = error.code == EDGELM_INVALID_ARGUMENT;
    }
    EXPECT(refused, "%s", bad);
  }
}

}  // namespace

int main() {
  const Json file = parsed("tests/vectors/sampling.json");
  test_choices(file);
  test_sequences(file);
  test_streams(file);
  test_errors(file);
  test_logits_that_are_not_finite();
  test_stop_strings();
  return edgelm_test::Finish();
}
