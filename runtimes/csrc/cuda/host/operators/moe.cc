#include "cuda/host/operators/moe.h"

#include <algorithm>
#include <array>

#include "cuda/host/planners.h"
#include "cuda/moe/moe_args.cuh"

namespace edgelm::gpu {

namespace {

constexpr i64 kMaxExperts = 256, kMaxChosen = 16;
// The largest number of tokens that one block chooses and sorts for: an expert's tokens are bits of one word.
constexpr i64 kChooseTokens = 32;
// From this number of tokens on the router is computed in tiles. For fewer, a block per few tokens and experts is
// faster.
constexpr i64 kTiledTokens = 257;
constexpr i64 kTiles[] = {32, 16, 8};  // tokens of a block of the router in tiles
constexpr i64 kTileThreads = 256, kPlaceThreads = 256, kCombineThreads = 128;
constexpr i64 kDownWidths[] = {1, 2, 4};      // tiles of 8 tokens
constexpr i64 kDownGroups[] = {32, 64, 128};  // columns per scale that have kernels of their own
constexpr i64 kExpertLimits[] = {32, 64, 128, 256};

// The router for few tokens.
struct Router {
  const char* name;
  i64 tokens, experts, threads;  // of a block
};
constexpr Router kRouters[] = {{"n1", 1, 2, 512}, {"n4", 4, 4, 512}};

i64 bytes_of(const std::string& activation) { return activation == "f32" ? 4 : 2; }

// (activation, kind of the weights) of the kernels moe_down.
std::vector<std::array<std::string, 2>> downs() {
  std::vector<std::array<std::string, 2>> all;
  for (const std::string a : {"bf16", "f16"}) {
    for (const std::string& kind : {std::string("int4"), std::string("int8"), std::string("fp8"), a}) {
      all.push_back({a, kind});
    }
  }
  return all;
}

// Groups that have kernels of their own for weights of this kind, and 0: the kernel for all others.
std::vector<i64> down_groups(const std::string& kind) {
  std::vector<i64> groups{0};
  if (kind == "int4" || kind == "int8") groups.insert(groups.end(), std::begin(kDownGroups), std::end(kDownGroups));
  return groups;
}

std::string down_name(const std::string& activation, const std::string& kind, i64 group, i64 width) {
  return "moe_down_" + activation + "_" + kind + (group ? "_g" + std::to_string(group) : "") + "_f32_n" +
         std::to_string(8 * width);
}

// The group that is a constant of the kernel: it needs each warp's part of the columns to begin with a group.
i64 down_group(const Matrix& matrix, i64 tiles, i64 split_bits) {
  const auto groups = down_groups(matrix.kind);
  if (std::find(groups.begin(), groups.end(), matrix.group) == groups.end()) return 0;
  for (i64 part = 0; part < i64(1) << split_bits; ++part) {
    if ((tiles * part >> split_bits) * matrix.tile_columns() % matrix.group) return 0;
  }
  return matrix.group;
}

std::string experts_suffix(i64 experts) { return "_e" + std::to_string(moe_expert_limit(experts)); }

struct RouterBlocks {
  std::string name;
  i64 x, y, threads, shared;
};
RouterBlocks router_blocks(const MoeShape& shape) {
  const Router& one = kRouters[shape.tokens <= 2 ? 0 : 1];
  return {one.name, divide_up(shape.experts, one.experts), divide_up(shape.tokens, one.tokens), one.threads,
          4 * (one.threads / 32) * one.tokens * (one.experts + 1)};
}

MoeRouterArgs router_args(const MoeShape& shape, u64 x, u64 norm, u64 router, u64 logits, u64 normed) {
  auto args = zeroed<MoeRouterArgs>();
  point(args.x, x);
  point(args.norm, norm);
  point(args.router, router);
  point(args.logits, logits);
  point(args.normed, normed);
  args.tokens = i32(shape.tokens);
  args.columns = i32(shape.columns);
  args.experts = i32(shape.experts);
  args.share = i32(divide_up(shape.columns / 4, router_blocks(shape).x) * 4);
  args.epsilon = shape.epsilon;
  return args;
}

MoeChooseArgs choose_args(const MoeShape& shape, u64 logits, const MoeWorkspace& places) {
  auto args = zeroed<MoeChooseArgs>();
  point(args.logits, logits);
  point(args.chosen, places.chosen);
  point(args.chosen_weights, places.chosen_weights);
  point(args.counts, places.counts);
  point(args.offsets, places.offsets);
  point(args.row_map, places.row_map);
  point(args.slot_weights, places.slot_weights);
  point(args.slot_of, places.slot_of);
  point(args.active, places.active);
  args.tokens = i32(shape.tokens);
  args.experts = i32(shape.experts);
  args.k = i32(shape.k);
  args.normalize = shape.normalize;
  args.k_divisor = divisor(shape.k);
  return args;
}

i64 choose_shared(const MoeShape& shape) { return 12 * shape.experts + 8 * shape.slots(); }

// Bytes of the parts of the workspace, in order.
std::array<i64, 12> sizes(const MoeShape& s) {
  const i64 width = bytes_of(s.activation);
  const i64 many = s.tokens > kChooseTokens ? 1 : 0;
  return {4 * s.tokens * s.experts,
          width * s.tokens * s.columns,
          4 * s.slots() * many,
          4 * s.slots() * many,
          4 * s.blocks() * s.experts * many,
          4 * (s.experts + 1),
          4 * s.slots(),
          4 * s.slots(),
          4 * s.slots(),
          16 * (1 + s.most_active()),
          width * s.slots() * s.hidden,
          4 * s.slots() * s.columns};
}

}  // namespace

// -- shape and workspace ----------------------------------------------------------------------------------------------

void MoeShape::check() const {
  const auto refuse = [](const std::string& what, i64 found, const std::string& expected) {
    throw Error(what + " is " + std::to_string(found) + ", expected " + expected);
  };
  if (tokens < 1) refuse("tokens", tokens, "1 or more");
  if (columns < 16 || columns % 8) refuse("columns", columns, "a multiple of 8, 16 or more");
  if (hidden < 16 || hidden % 8) refuse("hidden", hidden, "a multiple of 8, 16 or more");
  if (experts < 1 || experts > kMaxExperts) refuse("experts", experts, "1 to " + std::to_string(kMaxExperts));
  const i64 most = std::min(kMaxChosen, experts);
  if (k < 1 || k > most) {
    refuse("k", k, "1 to " + std::to_string(most) + " of " + std::to_string(experts) + " experts");
  }
  if (activation != "bf16" && activation != "f16" && activation != "f32") {
    throw Error("activation is '" + activation + "', expected one of bf16, f16, f32");
  }
  const i64 widest = std::max(columns, hidden);
  if (tokens >= i64(1) << 30 || slots() >= i64(1) << 30 || widest > kMostSize || slots() * widest >= i64(1) << 40) {
    throw Error(std::to_string(tokens) + " tokens are too many for one launch: divide the prompt");
  }
}

i64 MoeShape::blocks() const { return divide_up(tokens, kChooseTokens); }

MoeShape MoeShape::of(const Fields& fields) {
  MoeShape shape{
      fields.integer("tokens"), fields.integer("columns"), fields.integer("hidden"),  fields.integer("experts"),
      fields.integer("k"),      fields.flag("normalize"),  fields.text("activation"), float(fields.number("epsilon"))};
  shape.check();
  return shape;
}

MoeWorkspace MoeWorkspace::at(const MoeShape& shape, u64 address) {
  std::array<u64, 12> at{};
  const auto parts = sizes(shape);
  for (std::size_t i = 0; i < parts.size(); ++i) {
    at[i] = address;
    address += u64(round_up(parts[i]));
  }
  return {at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7], at[8], at[9], at[10], at[11]};
}

u64 MoeWorkspace::bytes(const MoeShape& shape) {
  u64 all = 0;
  for (i64 size : sizes(shape)) all += u64(round_up(size));
  return all;
}

i64 moe_expert_limit(i64 experts) {
  return *std::find_if(std::begin(kExpertLimits), std::end(kExpertLimits) - 1, [=](i64 e) { return experts <= e; });
}

// -- launches ---------------------------------------------------------------------------------------------------------

Launch moe_router_launch(const MoeShape& shape, u64 x, u64 norm, u64 router, u64 logits, u64 normed, i64 tile) {
  const MoeRouterArgs args = router_args(shape, x, norm, router, logits, normed);
  if (!tile && shape.tokens >= kTiledTokens) {
    // The largest tile that still uses most multiprocessors of a large GPU.
    tile = *std::find_if(std::begin(kTiles), std::end(kTiles) - 1,
                         [&](i64 tokens) { return shape.tokens > 96 * tokens; });
  }
  if (tile) {
    if (std::find(std::begin(kTiles), std::end(kTiles), tile) == std::end(kTiles)) {
      throw Error("there is no router in tiles of " + std::to_string(tile) + " tokens, expected 8, 16 or 32");
    }
    return make_launch("moe_router_" + shape.activation + "_t" + std::to_string(tile), divide_up(shape.tokens, tile), 1,
                       1, kTileThreads, 64 * (tile + 64) * 4, args);
  }
  const RouterBlocks blocks = router_blocks(shape);
  return make_launch("moe_router_" + shape.activation + "_" + blocks.name, blocks.x, blocks.y, 1, blocks.threads,
                     blocks.shared, args);
}

Launches moe_route_launches(const MoeShape& shape, u64 x, u64 norm, u64 router, u64 logits, const MoeWorkspace& places,
                            u64 counter) {
  if (!counter || shape.tokens > kChooseTokens) {
    Launches launches{moe_router_launch(shape, x, norm, router, logits, places.normed)};
    for (Launch& one : moe_choose_launches(shape, logits, places)) launches.push_back(std::move(one));
    return launches;
  }
  const RouterBlocks blocks = router_blocks(shape);
  auto args = zeroed<MoeRouteArgs>();
  args.router = router_args(shape, x, norm, router, logits, places.normed);
  args.choose = choose_args(shape, logits, places);
  point(args.counter, counter);
  return {make_launch("moe_route_" + shape.activation + "_" + blocks.name + experts_suffix(shape.experts), blocks.x,
                      blocks.y, 1, blocks.threads, 16 + std::max(blocks.shared, choose_shared(shape)), args)};
}

Launches moe_choose_launches(const MoeShape& shape, u64 logits, const MoeWorkspace& places) {
  const MoeChooseArgs args = choose_args(shape, logits, places);
  const std::string suffix = experts_suffix(shape.experts);
  if (shape.tokens <= kChooseTokens) {
    return {make_launch("moe_choose" + suffix, 1, 1, 1, 32 * shape.tokens, choose_shared(shape), args)};
  }
  return {make_launch("moe_choose_many" + suffix, shape.blocks(), 1, 1, 32 * kChooseTokens, 4 * shape.experts, args),
          make_launch("moe_place" + suffix, shape.blocks(), 1, 1, kPlaceThreads, 12 * shape.experts, args)};
}

Launch moe_combine_launch(const MoeShape& shape, u64 x, u64 outputs, u64 slot_weights, u64 slot_of, u64 y) {
  auto args = zeroed<MoeCombineArgs>();
  point(args.x, x);
  point(args.outputs, outputs);
  point(args.slot_weights, slot_weights);
  point(args.slot_of, slot_of);
  point(args.y, y);
  args.tokens = i32(shape.tokens);
  args.columns = i32(shape.columns);
  args.k = i32(shape.k);
  return make_launch("moe_combine_f32", shape.tokens, divide_up(shape.columns, 4 * kCombineThreads), 1, kCombineThreads,
                     0, args);
}

Launch moe_down_launch(const MoeShape& shape, const Matrix& matrix, u64 weights, u64 x, u64 hidden,
                       const MoeWorkspace& places, u64 y) {
  if (matrix.count != shape.experts || matrix.rows != shape.columns || matrix.columns != shape.hidden ||
      matrix.swiglu) {
    throw Error("down is " + matrix.text() + ", expected " + std::to_string(shape.experts) + " matrices [" +
                std::to_string(shape.columns) + ", " + std::to_string(shape.hidden) + "]");
  }
  if (shape.hidden % matrix.tile_columns() || (matrix.scale_bytes() && matrix.group % 16)) {
    throw Error(matrix.text() + ": partial tiles, or a group that is not a multiple of 16");
  }
  const auto pairs = downs();
  const std::array<std::string, 2> pair{shape.activation, matrix.kind};
  if (shape.tokens > kDownTokens || std::find(pairs.begin(), pairs.end(), pair) == pairs.end()) {
    throw Error("moe_down has no kernel for " + std::to_string(shape.tokens) + " tokens of " + shape.activation +
                " with " + matrix.kind + " weights");
  }
  const i64 width = kDownWidths[shape.tokens <= 8 ? 0 : shape.tokens <= 16 ? 1 : 2];
  const i64 tiles = shape.hidden / matrix.tile_columns();
  // With few experts, several warps divide an expert's columns, as long as each has some tiles.
  i64 bits = 0;
  while (2 * std::min<i64>(shape.most_active(), 8) << bits <= kDownWarps && i64(8) << bits <= tiles) ++bits;
  const i64 group = down_group(matrix, tiles, bits);
  auto args = zeroed<MoeDownArgs>();
  point(args.hidden, hidden);
  point(args.codes, weights);
  point(args.scales, weights + u64(matrix.scales_offset()));
  point(args.zeros, matrix.zeros_at(weights));
  point(args.active, places.active);
  point(args.slot_weights, places.slot_weights);
  point(args.slot_of, places.slot_of);
  point(args.x, x);
  point(args.y, y);
  args.codes_stride = matrix.codes_stride();
  args.scales_stride = matrix.scales_stride();
  args.zeros_stride = matrix.zeros_stride();
  args.tokens = i32(shape.tokens);
  args.columns = i32(shape.columns);
  args.hidden_columns = i32(shape.hidden);
  args.k = i32(shape.k);
  args.pairs = i32(shape.slots());
  args.most_active = i32(shape.most_active());
  args.split_bits = i32(bits);
  args.tiles = i32(tiles);
  args.group = i32(matrix.group);
  args.groups = i32(matrix.groups());
  args.group_divisor = divisor(matrix.group);
  const DownSizes sizes = down_sizes(int(matrix.tile_columns()), int(matrix.scale_bytes()), int(width), int(group));
  return make_launch(down_name(shape.activation, matrix.kind, group, width), matrix.blocks(), 1, 1, kDownThreads,
                     sizes.pairs + 8 * shape.slots(), args);
}

KernelNames moe_down_kernels(const std::string& activation, const Matrix& matrix) {
  KernelNames names;
  for (const auto& [a, kind] : downs()) {
    if (a != activation || kind != matrix.kind) continue;
    for (i64 group : down_groups(kind)) {
      if (group && group != matrix.group) continue;
      for (i64 width : kDownWidths) names.push_back(down_name(a, kind, group, width));
    }
  }
  return names;
}

// -- list of all kernels ----------------------------------------------------------------------------------------------

namespace {

KernelSources all_moe_kernels() {
  KernelSources all;
  const auto add = [&](const std::string& name, const char* args, i64 threads, const std::string& body,
                       i64 min_blocks = 1) { all.push_back({name, "moe/moe.cuh", args, threads, min_blocks, body}); };
  const auto activations = {"bf16", "f16", "f32"};
  const auto router_body = [](const std::string& what, const char* activation, const Router& one) {
    return what + "<" + cuda_type(activation) + ", " + std::to_string(one.tokens) + ", " + std::to_string(one.experts);
  };
  for (const char* a : activations) {
    const std::string name = std::string("moe_router_") + a + "_";
    for (const Router& one : kRouters) {
      add(name + one.name, "MoeRouterArgs", one.threads, router_body("moe_router", a, one) + ">");
    }
    for (i64 tile : kTiles) {
      add(name + "t" + std::to_string(tile), "MoeRouterArgs", kTileThreads,
          std::string("moe_router_tiled<") + cuda_type(a) + ", " + std::to_string(tile) + ">");
    }
  }
  for (const std::string what : {"choose", "choose_many", "place"}) {
    const i64 threads = what == "place" ? kPlaceThreads : 32 * kChooseTokens;
    for (i64 limit : kExpertLimits) {
      add("moe_" + what + experts_suffix(limit), "MoeChooseArgs", threads,
          "moe_" + what + "<" + std::to_string(limit / 32) + ">");
    }
  }
  for (const char* a : activations) {
    for (const Router& one : kRouters) {
      for (i64 limit : kExpertLimits) {
        add(std::string("moe_route_") + a + "_" + one.name + experts_suffix(limit), "MoeRouteArgs", one.threads,
            router_body("moe_route", a, one) + ", " + std::to_string(limit / 32) + ">");
      }
    }
  }
  for (const auto& [a, kind] : downs()) {
    for (i64 group : down_groups(kind)) {
      for (i64 width : kDownWidths) {
        add(down_name(a, kind, group, width), "MoeDownArgs", kDownThreads,
            std::string("moe_down<") + cuda_type(a) + ", " + cuda_type(kind) + ", " + std::to_string(width) + ", " +
                std::to_string(group) + ">",
            kind == "int4" && width == 1 ? 2 : 1);  // room for the successor of an early launch, where nothing spills
      }
    }
  }
  add("moe_combine_f32", "MoeCombineArgs", kCombineThreads, "moe_combine");
  return all;
}

// Where the fields name no address of a part of the workspace, it is 0: not used.
MoeWorkspace places_of(const Fields& f) {
  return {f.address("at_logits"),  f.address("at_normed"),  f.address("at_chosen"),  f.address("at_chosen_weights"),
          f.address("at_counts"),  f.address("at_offsets"), f.address("at_row_map"), f.address("at_slot_weights"),
          f.address("at_slot_of"), f.address("at_active"),  f.address("at_hidden"),  f.address("at_outputs")};
}

std::string workspace_text(const Fields& f) {
  const MoeShape shape = MoeShape::of(f);
  const MoeWorkspace w = MoeWorkspace::at(shape, f.address("workspace"));
  std::string text;
  for (u64 part : {w.logits, w.normed, w.chosen, w.chosen_weights, w.counts, w.offsets, w.row_map, w.slot_weights,
                   w.slot_of, w.active, w.hidden, w.outputs, MoeWorkspace::bytes(shape)}) {
    text += std::to_string(part) + "\n";
  }
  return text;
}

}  // namespace

const KernelSources& moe_kernels() {
  static const KernelSources kAll = all_moe_kernels();
  return kAll;
}

Functions moe_functions() {
  return {
      // The addresses of MoeWorkspace in its order, then its size.
      {"moe_workspace", workspace_text},
      {"moe_router",
       [](const Fields& f) {
         return serialised({moe_router_launch(MoeShape::of(f), f.address("x"), f.address("norm"), f.address("router"),
                                              f.address("logits"), f.address("normed"), f.integer("tile"))});
       }},
      {"moe_route",
       [](const Fields& f) {
         return serialised(moe_route_launches(MoeShape::of(f), f.address("x"), f.address("norm"), f.address("router"),
                                              f.address("logits"), places_of(f), f.address("counter")));
       }},
      {"moe_choose",
       [](const Fields& f) {
         return serialised(moe_choose_launches(MoeShape::of(f), f.address("logits"), places_of(f)));
       }},
      {"moe_combine",
       [](const Fields& f) {
         return serialised({moe_combine_launch(MoeShape::of(f), f.address("x"), f.address("outputs"),
                                               f.address("slot_weights"), f.address("slot_of"), f.address("y"))});
       }},
      {"moe_down",
       [](const Fields& f) {
         return serialised({moe_down_launch(MoeShape::of(f), Matrix::of(f, "down_"), f.address("weights"),
                                            f.address("x"), f.address("hidden_rows"), places_of(f), f.address("y"))});
       }},
  };
}

}  // namespace edgelm::gpu
