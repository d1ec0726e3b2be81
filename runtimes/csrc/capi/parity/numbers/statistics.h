// Statistics over positions in double precision, with numpy's definitions. NaN among the values gives NaN, so that a
// broken device cannot pass.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace edgelm::capi {

using Values = std::vector<double>;
using Mask = std::vector<bool>;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// The larger value; NaN if one is NaN.
inline double larger(double a, double b) { return std::isnan(a) || a > b ? a : b; }

// NaN for no values.
double mean(const Values& values);
double largest(const Values& values);
// With linear interpolation between neighbours.
double quantile(Values values, double q);
double median(const Values& values);
double deviation(const Values& values);  // of the whole population

// Share of true entries, NaN for none; and their number.
double share(const Mask& mask);
std::int64_t count(const Mask& mask);
// The values where `mask` is true.
Values where(const Values& values, const Mask& mask);
// The mean and standard deviation of `size` numbers.
double mean(const double* values, std::size_t size);
double deviation(const double* values, std::size_t size);

}  // namespace edgelm::capi
