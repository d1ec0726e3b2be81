#include "capi/parity/numbers/statistics.h"

#include <algorithm>

namespace edgelm::capi {

double mean(const double* values, std::size_t size) {
  double sum = 0;
  for (std::size_t i = 0; i < size; ++i) sum += values[i];
  return size ? sum / double(size) : kNan;
}

double deviation(const double* values, std::size_t size) {
  const double center = mean(values, size);
  double sum = 0;
  for (std::size_t i = 0; i < size; ++i) sum += (values[i] - center) * (values[i] - center);
  return size ? std::sqrt(sum / double(size)) : kNan;
}

double mean(const Values& values) { return mean(values.data(), values.size()); }
double deviation(const Values& values) { return deviation(values.data(), values.size()); }

double largest(const Values& values) {
  if (values.empty()) return kNan;
  double result = values[0];
  for (const double value : values) result = larger(result, value);
  return result;
}

double quantile(Values values, double q) {
  if (values.empty()) return kNan;
  if (std::any_of(values.begin(), values.end(), [](double value) { return std::isnan(value); })) return kNan;
  const double place = double(values.size() - 1) * q;
  const std::size_t low = std::min(std::size_t(place), values.size() - 1), high = std::min(low + 1, values.size() - 1);
  std::nth_element(values.begin(), values.begin() + std::ptrdiff_t(low), values.end());
  const double a = values[low];
  const double b = high == low ? a : *std::min_element(values.begin() + std::ptrdiff_t(high), values.end());
  const double part = place - double(low), difference = b - a;
  return part >= 0.5 ? b - difference * (1 - part) : a + difference * part;
}

double median(const Values& values) { return quantile(values, 0.5); }

double share(const Mask& mask) { return mask.empty() ? kNan : double(count(mask)) / double(mask.size()); }

std::int64_t count(const Mask& mask) { return std::count(mask.begin(), mask.end(), true); }

Values where(const Values& values, const Mask& mask) {
  Values result;
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (mask[i]) result.push_back(values[i]);
  }
  return result;
}

}  // namespace edgelm::capi
