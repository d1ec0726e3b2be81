// The functions that Python calls, by name; each file of planners adds a table.
#pragma once

#include <functional>
#include <map>
#include <string>

#include "cuda/host/fields.h"

namespace edgelm::gpu {

using Function = std::function<std::string(const Fields&)>;
using Functions = std::map<std::string, Function>;

Functions kernel_functions();
Functions linear_functions();
Functions rows_functions();
Functions moe_functions();
Functions sparse_moe_functions();
Functions attention_functions();
Functions node_functions();
Functions sampling_functions();
Functions plugin_functions();  // of TensorRT plugins: tensorrt/plugin_spec.cc
Functions log_functions();     // tensorrt/log.cc
Functions image_functions();   // driver/kernel_images.cc

// The device that the fields `sm` and `multiprocessors` describe.
DeviceInfo device_of(const Fields& fields);

// The bytes that planning.py reads: for each launch seven u32 (bytes of the name, grid x y z, threads, shared bytes,
// bytes of the arguments), the name, the arguments.
std::string serialised(const Launches& launches);

}  // namespace edgelm::gpu
