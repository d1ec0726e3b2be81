#include "routing.h"

namespace edgelm::ort {

void ChooseExperts(const float* probabilities, int64_t experts, int64_t k, bool normalize, int32_t* chosen,
                   float* weights) {
  int64_t count = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const float p = probabilities[e];
    // The place of e among the chosen ones: after all that are not less.
    int64_t at = count;
    while (at > 0 && (p > weights[at - 1] || (p == p && weights[at - 1] != weights[at - 1]))) --at;
    if (at == k) continue;
    count = count < k ? count + 1 : k;
    for (int64_t i = count - 1; i > at; --i) {
      chosen[i] = chosen[i - 1];
      weights[i] = weights[i - 1];
    }
    chosen[at] = static_cast<int32_t>(e);
    weights[at] = p;
  }
  if (!normalize) return;
  float sum = 0;
  for (int64_t i = 0; i < k; ++i) sum += weights[i];
  for (int64_t i = 0; i < k; ++i) weights[i] /= sum;
}

void SortByExpert(const int32_t* chosen, const float* weights, int64_t tokens, int64_t k, int64_t experts,
                  const Pairs& pairs) {
  int64_t* const start = pairs.start;
  for (int64_t e = 0; e <= experts; ++e) start[e] = 0;
  for (int64_t i = 0; i < tokens * k; ++i) ++start[chosen[i] + 1];
  for (int64_t e = 0; e < experts; ++e) start[e + 1] += start[e];
  // start[e] is used as expert e's next free place, so it ends at the start of e + 1's places.
  for (int64_t i = 0; i < tokens * k; ++i) {
    const int64_t at = start[chosen[i]]++;
    pairs.token[at] = static_cast<int32_t>(i / k);
    pairs.weight[at] = weights[i];
  }
  for (int64_t e = experts; e > 0; --e) start[e] = start[e - 1];
  start[0] = 0;
}

}  // namespace edgelm::ort
