// Tests that the launch planning (cuda/host) answers damaged requests with an error, never with a crash. Run under
// AddressSanitizer and UndefinedBehaviorSanitizer.
#include <cstddef>
#include <string>
#include <vector>

#include "check.h"

extern "C" int edgelm_gpu_call(const char* function, const char* fields, const char** answer, std::size_t* size);

namespace {

using Lines = std::vector<std::string>;

#define MATRIX(prefix, kind, rows, columns, group, swiglu, count)                                                      \
  prefix "kind=" kind, prefix "rows=" rows, prefix "columns=" columns, prefix "group=" group, prefix "zeros=0",        \
      prefix "swiglu=" swiglu, prefix "count=" count
#define DEVICE "sm=90", "multiprocessors=132"
#define SHAPE                                                                                                          \
  "tokens=40", "columns=64", "hidden=128", "experts=8", "k=2", "normalize=1", "activation=bf16", "epsilon=1e-5"
#define PLACES                                                                                                         \
  "at_logits=256", "at_normed=256", "at_chosen=256", "at_chosen_weights=256", "at_counts=256", "at_offsets=256",       \
      "at_row_map=256", "at_slot_weights=256", "at_slot_of=256", "at_active=256", "at_hidden=256", "at_outputs=256"
#define MATMUL                                                                                                         \
  "blob=256", "x=256", "y=256", "rows=300", "activation=bf16", "x_float=1", "y_float=1", "norm=256", "residual=256",   \
      "bias=0", "row_map=0", "offsets=0", "x_rows=0", "most_rows=0", "rounding=0", "epsilon=1e-5"
#define EXPERTS                                                                                                        \
  MATRIX("gate_up_", "int4", "256", "64", "32", "1", "8"), MATRIX("down_", "int4", "64", "128", "32", "0", "8")
#define BUFFERS                                                                                                        \
  "at_x=256", "at_norm=256", "at_router=256", "at_gate_up=256", "at_down=256", "at_y=256", "at_workspace=256",         \
      "at_logits=256", "at_counters=256"
#define ATTENTION                                                                                                      \
  "batch=2", "tokens=9", "heads=4", "kv_heads=2", "size=64", "capacity=128", "positions=128", "activations=bf16",      \
      "cache=int8", "multiprocessors=132"
#define ATTENTION_NODE                                                                                                 \
  "op=GroupQueryAttention", "name=a", "num_heads=4", "kv_num_heads=2", "head_size=64", "activation=bf16", "kv=int8",   \
      "epsilon=1e-5", "clip=0", "input.0=256:bf16:2,9,512", "input.1=256:uint8:2,2,128,68",                            \
      "input.2=256:uint8:2,2,128,68", "input.3=256:int32:2", "input.4=256:f32:128,32", "input.5=256:f32:128,32",       \
      "input.6=256:f32:64", "input.7=256:f32:128", "output.0=256:bf16:2,9,256"

struct Request {
  const char* function;
  Lines fields;
  Lines needed;  // fields without which there is no answer
};

const Request kRequests[] = {
    {"kernels", {}, {}},
    {"matmul",
     {MATRIX("matrix_", "int8", "192", "128", "32", "0", "1"), MATMUL, DEVICE, "workspace=256"},
     {"matrix_kind", "matrix_rows", "matrix_columns", "rows", "activation", "epsilon", "sm", "multiprocessors"}},
    {"matmul_workspace", {MATRIX("matrix_", "int8", "192", "128", "32", "0", "1"), MATMUL}, {"matrix_group", "rows"}},
    {"matmul_kernels",
     {MATRIX("matrix_", "fp8", "192", "128", "128", "0", "1"), "activation=bf16", "rounding=-1"},
     {"matrix_kind", "activation", "rounding"}},
    {"convert",
     {"x=256", "y=256", "rows=3", "columns=64", "source=bf16", "target=fp8", "x_float=1", "norm=256", "epsilon=1e-5",
      "rounding=-1", "scales=256"},
     {"rows", "columns", "source", "target"}},
    {"rms_norm",
     {"x=256", "weight=256", "y=256", "rows=3", "columns=64", "source=f32", "residual=0", "epsilon=1e-5"},
     {"rows", "columns", "source"}},
    {"embedding",
     {"ids=256", MATRIX("matrix_", "int8", "192", "128", "32", "0", "1"), "blob=256", "y=256", "rows=3"},
     {"matrix_kind", "rows"}},
    {"last_token", {"x=256", "y=256", "batch=2", "tokens=3", "columns=64"}, {"batch", "tokens", "columns"}},
    {"argmax", {"x=256", "ids=256", "rows=2", "columns=50304", "workspace=256"}, {"rows", "columns"}},
    {"argmax_workspace", {"rows=2", "columns=50304"}, {"rows", "columns"}},
    {"moe_workspace", {SHAPE, "workspace=256"}, {"tokens", "columns", "hidden", "experts", "k", "activation"}},
    {"moe_router", {SHAPE, "x=256", "norm=256", "router=256", "logits=256", "normed=256", "tile=0"}, {"tokens"}},
    {"moe_route", {SHAPE, PLACES, "x=256", "norm=256", "router=256", "logits=256", "counter=256"}, {"experts", "k"}},
    {"moe_choose", {SHAPE, PLACES, "logits=256"}, {"experts", "k"}},
    {"moe_combine", {SHAPE, "x=256", "outputs=256", "slot_weights=256", "slot_of=256", "y=256"}, {"columns"}},
    {"moe_down",
     {"tokens=4", "columns=64", "hidden=128", "experts=8", "k=2", "activation=bf16", "epsilon=1e-5",
      MATRIX("down_", "int4", "64", "128", "32", "0", "8"), PLACES, "weights=256", "x=256", "hidden_rows=256", "y=256"},
     {"down_kind", "tokens", "hidden"}},
    {"sparse_moe", {SHAPE, EXPERTS, "rounding=0", BUFFERS, DEVICE}, {"gate_up_kind", "down_rows", "tokens", "sm"}},
    {"sparse_moe_workspace", {SHAPE, EXPERTS, "rounding=0"}, {"gate_up_columns", "tokens"}},
    {"sparse_moe_kernels", {SHAPE, EXPERTS, "rounding=0"}, {"gate_up_kind", "experts"}},
    {"attention_launches",
     {ATTENTION, "qkv=256", "key_cache=256", "value_cache=256", "past_lengths=256", "cos=256", "sin=256", "out=256",
      "workspace=256", "q_norm=256", "k_norm=256", "counters=256", "q_norm_per_head=1", "epsilon=1e-5", "clip=8",
      "scale=0", "splits=0"},
     {"batch", "tokens", "heads", "kv_heads", "size", "capacity", "positions", "activations", "cache", "qkv"}},
    {"attention_workspace", {ATTENTION, "splits=3"}, {"batch", "tokens", "multiprocessors"}},
    {"attention_row", {"cache=int8", "size=64"}, {"cache", "size"}},
    {"attention_kernels", {"activations=bf16", "cache=int8", "size=64"}, {"activations", "cache", "size"}},
    {"node_launches",
     {ATTENTION_NODE, DEVICE, "workspace=256", "counters=256"},
     {"num_heads", "kv_num_heads", "head_size", "activation", "clip", "input.0", "input.1", "input.4"}},
    {"node_scratch", {ATTENTION_NODE, DEVICE, "batch=2", "tokens=100"}, {"batch", "tokens", "sm", "input.1"}},
    {"node_kernels", {ATTENTION_NODE}, {"head_size", "activation"}},
    {"node_cache_row", {"kv=fp8", "head_size=64"}, {"head_size"}},
    {"node_launches",
     {"op=QuantLinear", "name=q", MATRIX("", "int4", "192", "128", "32", "0", "1"), "activation=bf16",
      "activations=float", "output=f32", "epsilon=1e-5", "input.0=256:f32:2,3,128", "input.1=256:uint8:4096",
      "output.0=256:f32:2,3,192", DEVICE, "workspace=256", "counters=256"},
     {"op", "name", "kind", "activation", "activations", "input.0"}},
    {"node_launches",
     {"op=RMSNorm", "name=n", "epsilon=1e-5", "input.0=256:f32:2,3,128", "input.1=256:f32:128",
      "output.0=256:f32:2,3,128", DEVICE},
     {"op", "epsilon", "input.0"}},
    {"node_launches",
     {"op=SparseMoE", "name=m", EXPERTS, "k=2", "normalize=0", "activation=bf16", "activations=float", "epsilon=1e-5",
      "input.0=256:f32:2,3,64", "input.1=256:f32:8,64", "input.2=256:uint8:9", "input.3=256:uint8:9",
      "input.4=256:f32:64", "output.0=256:f32:2,3,64", DEVICE, "workspace=256", "counters=256"},
     {"gate_up_kind", "down_kind", "k", "input.0"}},
};

const char* const kValues[] = {"",
                               "-1",
                               "0",
                               "1",
                               "7",
                               "2147483647",
                               "2147483648",
                               "9223372036854775807",
                               "-9223372036854775808",
                               "18446744073709551615",
                               "99999999999999999999",
                               "1e400",
                               "nan",
                               "x",
                               "f32",
                               "256:f32:",
                               "256:f32:1",
                               "256:f32:-1,-1,-1",
                               "256:f32:2147483647,2147483647,128",
                               "a=b"};

std::string joined(const Lines& lines) {
  std::string text;
  for (const std::string& line : lines) text += line + "\n";
  return text;
}

struct Answer {
  int status;
  std::string text;
};

Answer ask(const std::string& function, const std::string& fields) {
  const char* text = nullptr;
  std::size_t size = 0;
  const int status = edgelm_gpu_call(function.c_str(), fields.c_str(), &text, &size);
  return {status, std::string(text, size)};
}

void check_request(const Request& request) {
  const Answer good = ask(request.function, joined(request.fields));
  EXPECT(good.status == 0 && !good.text.empty(), "%s: %s", request.function, good.text.c_str());
  for (std::size_t i = 0; i < request.fields.size(); ++i) {
    const std::string name = request.fields[i].substr(0, request.fields[i].find('='));
    Lines without = request.fields;
    without.erase(without.begin() + std::ptrdiff_t(i));
    const Answer answer = ask(request.function, joined(without));
    bool needed = false;
    for (const std::string& one : request.needed) needed |= one == name;
    EXPECT(!needed || answer.status != 0, "%s without %s", request.function, name.c_str());
    for (const char* value : kValues) {
      Lines changed = request.fields;
      changed[i] = name + "=" + value;
      const Answer other = ask(request.function, joined(changed));
      EXPECT(other.status >= 0 && other.status <= 3 && (other.status == 0 || !other.text.empty()), "%s with %s",
             request.function, changed[i].c_str());
    }
  }
}

void check_messages() {
  const Answer unknown = ask("no_such", "");
  EXPECT(unknown.status == 3 && unknown.text == "there is no function no_such", "%s", unknown.text.c_str());
  const Answer line = ask("argmax_workspace", "rows=2\ncolumns\n");
  EXPECT(line.status == 1 && line.text == "a field without a value: columns", "%s", line.text.c_str());
  const Answer missing = ask("argmax_workspace", "rows=2\n");
  EXPECT(missing.status == 1 && missing.text == "columns is missing", "%s", missing.text.c_str());
  const Answer negative = ask("argmax_workspace", "rows=-2\ncolumns=5\n");
  EXPECT(negative.status == 1 && negative.text == "rows is -2, expected 0 to 2147483647", "%s", negative.text.c_str());
  const Answer kind = ask(
      "matmul_kernels",
      "rounding=0\nactivation=bf16\nmatrix_kind=int5\nmatrix_rows=1\nmatrix_columns=64\nmatrix_group=64\n");
  EXPECT(kind.status == 2 && kind.text == "weights of the kind int5: upgrade edgelm", "%s", kind.text.c_str());
}

}  // namespace

int main() {
  for (const Request& request : kRequests) check_request(request);
  check_messages();
  return edgelm_test::Finish();
}
