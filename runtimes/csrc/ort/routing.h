// Choice of a token's experts, and sorting of tokens by expert. Plain loops over arrays that the caller owns.
#ifndef EDGELM_ORT_ROUTING_H_
#define EDGELM_ORT_ROUTING_H_

#include <cstdint>

namespace edgelm::ort {

// Choose the `k` largest of `experts` probabilities, largest first; of equal ones the lower index first. NaN counts as
// less than any number, so any input gives k different experts. With `normalize` the weights are divided by their sum.
void ChooseExperts(const float* probabilities, int64_t experts, int64_t k, bool normalize, int32_t* chosen,
                   float* weights);

// (token, expert) pairs ordered by expert, and by token within an expert.
struct Pairs {
  int64_t* start;  // [experts + 1]: the pairs of expert e are start[e] .. start[e + 1] - 1
  int32_t* token;  // [tokens * k]
  float* weight;   // [tokens * k]
};
void SortByExpert(const int32_t* chosen, const float* weights, int64_t tokens, int64_t k, int64_t experts,
                  const Pairs& pairs);

}  // namespace edgelm::ort

#endif  // EDGELM_ORT_ROUTING_H_
