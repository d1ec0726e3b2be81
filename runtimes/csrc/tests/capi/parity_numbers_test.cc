// Tests the numbers of the parity check: statistics and texts as numpy and Python give them, limits by kind of recipe.
#include <clocale>
#include <cmath>

#include "capi/parity/diagnose.h"
#include "capi/parity/limits/noise.h"
#include "capi/parity/numbers/format.h"
#include "check.h"

namespace {

using namespace edgelm::capi;

bool near(double a, double b) { return std::abs(a - b) <= 1e-12 * std::abs(b); }

void TestStatisticsAreNumpys() {
  EXPECT(near(quantile({8, 1, 4, 2}, 0.9), 6.8), "0.9");
  EXPECT(near(quantile({8, 1, 4, 2}, 0.5), 3) && quantile({8, 1, 4, 2}, 1) == 8 && quantile({8, 1}, 0) == 1, "others");
  EXPECT(std::isnan(quantile({}, 0.5)) && std::isnan(mean(Values())) && std::isnan(largest({})), "no values");
  EXPECT(std::isnan(quantile({1, kNan, 2}, 0.1)) && std::isnan(largest({kNan, 1})) && std::isnan(largest({1, kNan})),
         "NaN is not lost");
  EXPECT(near(deviation({1, 2, 3, 4}), std::sqrt(1.25)) && mean(Values{1, 2}) == 1.5, "mean and deviation");
}

void TestTextsArePythons() {
  EXPECT(general(0.000012345, 3) == "1.23e-05" && general(97.34, 4) == "97.34" && general(100, 4) == "100", "general");
  EXPECT(general(NAN) == "nan" && general(-NAN) == "nan" && general(-INFINITY) == "-inf", "not finite");
  EXPECT(general_signed(2, 3) == "+2" && general_signed(-0.5, 3) == "-0.5", "signed");
  EXPECT(grouped(50304) == "50,304" && grouped(999) == "999" && grouped(-1234567) == "-1,234,567", "grouped");
  EXPECT(format_number(61160.4, 2) == "61,160" && format_number(0.0312, 2) == "0.03" && format_number(NAN, 2) == "nan",
         "number");
  EXPECT(python_quoted("a'b") == "\"a'b\"" && python_quoted("a\né") == "'a\\né'" && python_quoted("'\"") == "'\\'\"'",
         "quoted");
  if (std::setlocale(LC_ALL, "de_DE.UTF-8")) EXPECT(general(0.5, 3) == "0.5", "in another locale");
  std::setlocale(LC_ALL, "C");
}

// What kind_of returns, or its error.
std::string kind(const std::string& toml) {
  try {
    return kind_of(toml);
  } catch (const Error& error) {
    return error.what();
  }
}

void TestTheLimitsAreThoseOfTheCoarsestType() {
  EXPECT(kind("name = \"int4\"\ndefault = \"float\"\n") == "none", "no type");
  EXPECT(kind("default = \"int8-g128-sym\"\n\n[[rule]]\nmatch = \"x\"\n  scheme='fp8-row'\n") == "fp8", "a rule");
  EXPECT(kind("default = \"int4-g32-sym\"\n[[rule]]\nscheme = \"int8\"") == "int4", "the default");
  EXPECT(kind("# default = \"int3\"\nmy_default = \"int3\"\n") == "none", "no such line");
  EXPECT(kind("default = \"int2-g32\"").find("there are no parity limits for int2; there are: none, int8") == 0, "%s",
         kind("default = \"int2-g32\"").c_str());
  EXPECT(fixed_limits("int4").kl_mean == 1e-2 && fixed_limits("none").kl_mean == 1e-6, "limits");
  EXPECT(loss_warning("int8").kl == 0.03 && noise_rules().factor == 2 && likely_tokens() == 16, "constants");
}

void TestLowPrecisionOnlyLoosensLimits() {
  Manifest manifest;
  manifest.target = "cuda", manifest.dtype = "float16";
  const Limits limits = limits_for(manifest, "none");
  EXPECT(limits.kl_mean == 1e-3 && limits.top1_clear == 0.99 && limits.layer_base == 1e-2, "cuda, float16");
  EXPECT(limits_for(manifest, "int4").kl_mean == 1e-2, "the larger one");
  manifest.target = "tensorrt";
  EXPECT(limits_for(manifest, "none").layer_base == 1e-4, "our own debug graph computes in float32");
  manifest.target = "cpu";
  EXPECT(limits_for(manifest, "none").kl_mean == 1e-6, "a CPU computes in float32");
}

void TestGuiltyExpertsAreThoseThatExplainTheBadPositions() {
  const std::vector<std::int32_t> chosen = {0, 7, 1, 7, 2, 3, 4, 5, 6, 7, 0, 1};  // two for each of six positions
  const Mask bad = {true, true, false, false, true, false};
  Mask good = bad;
  good.flip();
  const auto guilty = guilty_experts(chosen.data(), 2, bad, good);
  EXPECT(guilty && *guilty == std::vector<std::int32_t>{7}, "expert 7");
  EXPECT(!guilty_experts(chosen.data(), 2, bad, Mask(6, false)), "no position is good");
  EXPECT(!guilty_experts(chosen.data(), 2, {true, false, false, false, false, false},
                         {false, true, true, true, true, true}),
         "every suspect was used where all is well");
}

}  // namespace

int main() {
  TestStatisticsAreNumpys();
  TestTextsArePythons();
  TestTheLimitsAreThoseOfTheCoarsestType();
  TestLowPrecisionOnlyLoosensLimits();
  TestGuiltyExpertsAreThoseThatExplainTheBadPositions();
  return edgelm_test::Finish();
}
