#include "cuda/host/operators/sparse_moe.h"

#include <algorithm>

#include "cuda/host/planners.h"

namespace edgelm::gpu {

namespace {

void append(Launches& to, Launches more) {
  for (Launch& one : more) to.push_back(std::move(one));
}

// The matmul of gate and up for all slots.
Matmul first_of(const SparseMoe& call, u64 normed, u64 blob, u64 hidden, const MoeWorkspace& places) {
  Matmul m;
  m.matrix = call.gate_up;
  m.blob = blob;
  m.x = normed;
  m.y = hidden;
  m.rows = call.shape.slots();
  m.activation = call.shape.activation;
  m.row_map = places.row_map;
  m.offsets = places.offsets;
  m.x_rows = m.most_rows = call.shape.tokens;
  m.rounding = call.rounding;
  return m;
}

// The matmul of down for all slots.
Matmul second_of(const SparseMoe& call, u64 hidden, u64 blob, u64 outputs, const MoeWorkspace& places) {
  Matmul m;
  m.matrix = call.down;
  m.blob = blob;
  m.x = hidden;
  m.y = outputs;
  m.rows = call.shape.slots();
  m.activation = call.shape.activation;
  m.y_float = true;
  m.offsets = places.offsets;
  m.most_rows = call.shape.tokens;
  m.rounding = call.rounding;
  return m;
}

SparseMoe call_of(const Fields& fields) {
  return {MoeShape::of(fields), Matrix::of(fields, "gate_up_"), Matrix::of(fields, "down_"),
          float(fields.number("rounding"))};
}

}  // namespace

bool SparseMoe::fuses_down() const { return shape.activation != "f32" && rounding == 0 && shape.tokens <= kDownTokens; }

u64 sparse_moe_workspace_bytes(const SparseMoe& call) {
  call.shape.check();
  // At an address other than 0, which would mean that there are no offsets.
  const MoeWorkspace places = MoeWorkspace::at(call.shape, kAlignment);
  return MoeWorkspace::bytes(call.shape) + std::max(matmul_workspace_bytes(first_of(call, 0, 0, 0, places)),
                                                    matmul_workspace_bytes(second_of(call, 0, 0, 0, places)));
}

Launches sparse_moe_launches(const SparseMoe& call, const SparseMoeBuffers& buffers, const DeviceInfo& device) {
  const MoeShape& shape = call.shape;
  shape.check();
  const MoeWorkspace places = MoeWorkspace::at(shape, buffers.workspace);
  const u64 scratch = buffers.workspace + MoeWorkspace::bytes(shape);
  const u64 logits = buffers.logits ? buffers.logits : places.logits;
  Launches launches = moe_route_launches(shape, buffers.x, buffers.norm, buffers.router, logits, places,
                                         buffers.counters);
  append(launches,
         matmul_launches(first_of(call, places.normed, buffers.gate_up, places.hidden, places), device, scratch));
  if (call.fuses_down()) {
    launches.push_back(moe_down_launch(shape, call.down, buffers.down, buffers.x, places.hidden, places, buffers.y));
    return launches;
  }
  append(launches,
         matmul_launches(second_of(call, places.hidden, buffers.down, places.outputs, places), device, scratch));
  launches.push_back(
      moe_combine_launch(shape, buffers.x, places.outputs, places.slot_weights, places.slot_of, buffers.y));
  return launches;
}

KernelNames sparse_moe_kernels(const SparseMoe& call) {
  const std::string& activation = call.shape.activation;
  const std::string experts = "_e" + std::to_string(moe_expert_limit(call.shape.experts));
  const auto starts = [](const std::string& name, const std::string& with) { return name.rfind(with, 0) == 0; };
  const auto ends = [](const std::string& name, const std::string& with) {
    return name.size() >= with.size() && name.compare(name.size() - with.size(), with.size(), with) == 0;
  };
  KernelNames names, by_experts;
  for (const KernelSource& kernel : moe_kernels()) {
    const std::string& name = kernel.name;
    if (starts(name, "moe_router_" + activation + "_") || starts(name, "moe_combine_")) {
      names.push_back(name);
    } else if (ends(name, experts) && (starts(name, "moe_choose_") || starts(name, "moe_place_") ||
                                       starts(name, "moe_route_" + activation + "_"))) {
      by_experts.push_back(name);
    }
  }
  for (std::string& name : moe_down_kernels(activation, call.down)) names.push_back(std::move(name));
  names.insert(names.end(), by_experts.begin(), by_experts.end());
  for (const Matrix* matrix : {&call.gate_up, &call.down}) {
    for (std::string& name : matmul_kernels(*matrix, activation, call.rounding)) names.push_back(std::move(name));
  }
  return names;
}

Functions sparse_moe_functions() {
  return {
      {"sparse_moe",
       [](const Fields& f) {
         const SparseMoeBuffers buffers{f.address("at_x"),         f.address("at_norm"),   f.address("at_router"),
                                        f.address("at_gate_up"),   f.address("at_down"),   f.address("at_y"),
                                        f.address("at_workspace"), f.address("at_logits"), f.address("at_counters")};
         return serialised(sparse_moe_launches(call_of(f), buffers, device_of(f)));
       }},
      {"sparse_moe_workspace", [](const Fields& f) { return std::to_string(sparse_moe_workspace_bytes(call_of(f))); }},
      {"sparse_moe_kernels", [](const Fields& f) { return lines_of(sparse_moe_kernels(call_of(f))); }},
  };
}

}  // namespace edgelm::gpu
