// What TensorRT's loader of plugin libraries calls: `registry.loadLibrary(path)`.
#include <vector>

#include "cuda/tensorrt/log.h"
#include "cuda/tensorrt/plugin.h"
#include "system/export.h"

extern "C" EDGELM_EXPORT void setLoggerFinder(void* finder) {
  edgelm::trt::set_logger_finder(finder, __builtin_return_address(0));
}

extern "C" EDGELM_EXPORT edgelm::trt::Creator* const* getCreators(std::int32_t& count) {
  using edgelm::trt::NodeCreator;
  static NodeCreator creators[] = {NodeCreator("QuantEmbedding"), NodeCreator("QuantLinear"),
                                   NodeCreator("SparseMoE"),      NodeCreator("GroupQueryAttention"),
                                   NodeCreator("RMSNorm"),        NodeCreator("LastToken")};
  static std::vector<edgelm::trt::Creator*> list = [] {
    std::vector<edgelm::trt::Creator*> all;
    for (NodeCreator& creator : creators) all.push_back(&creator);
    return all;
  }();
  count = std::int32_t(list.size());
  return list.data();
}
