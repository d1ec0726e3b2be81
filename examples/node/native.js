// The functions of edgelm.h that edgelm.js needs, declared for koffi. EDGELM_LIBRARY=PATH names the library; otherwise the
// system finds it.
import { promisify } from 'node:util';
import koffi from 'koffi';

const NAMES = { darwin: 'libedgelm.1.dylib', win32: 'edgelm.dll' };
// Calls run on stacks of koffi's. ONNX Runtime needs more than its 128 KiB.
koffi.config({ sync_stack_size: 8 << 20, async_stack_size: 8 << 20 });
const library = koffi.load(process.env.EDGELM_LIBRARY ?? NAMES[process.platform] ?? 'libedgelm.so.1');

for (const name of ['edgelm_error', 'edgelm_model', 'edgelm_generation']) koffi.opaque(name);
koffi.proto('int edgelm_text_callback(void *user, const void *text, size_t size)');
// In the order of edgelm.h, up to the last member that is used here; `size` tells the library which are there.
const OpenOptions = koffi.struct('edgelm_open_options', {
  size: 'size_t', runtime: 'const char *', onnxruntime: 'const char *', threads: 'int32_t', context_length: 'int32_t',
  chunk: 'int32_t', kv: 'const char *',
});
const GenerateOptions = koffi.struct('edgelm_generate_options', {
  size: 'size_t', max_tokens: 'int32_t', temperature: 'double', top_k: 'int32_t', top_p: 'double', min_p: 'double',
  repetition_penalty: 'double', seed: 'const uint64_t *', stop: 'const char **', stop_count: 'size_t',
  reuse: 'int32_t', on_text: 'edgelm_text_callback *', user: 'void *',
});
const Timings = koffi.struct('edgelm_timings', {
  size: 'size_t', prompt_tokens: 'int64_t', reused_tokens: 'int64_t', decoded_tokens: 'int64_t',
  prefill_seconds: 'double', time_to_first_token: 'double', decode_seconds: 'double',
});
const ModelInfo = koffi.struct('edgelm_model_info', {
  size: 'size_t', name: 'const char *', family: 'const char *', recipe: 'const char *', target: 'const char *',
  operators: 'const char *', runtime: 'const char *', kv: 'const char *', vocab_size: 'int64_t',
  context_length: 'int64_t', model_context_length: 'int64_t', num_layers: 'int64_t', num_experts: 'int64_t',
  experts_per_token: 'int64_t', threads: 'int32_t', has_chat_template: 'int32_t', bos_id: 'int32_t', pad_id: 'int32_t',
});

const PROTOTYPES = [
  'int edgelm_abi_version()',
  'int edgelm_error_code(const edgelm_error *error)',
  'const char *edgelm_error_message(const edgelm_error *error)',
  'void edgelm_error_free(edgelm_error *error)',
  'void edgelm_free(void *memory)',
  'edgelm_error *edgelm_open(const char *path, const edgelm_open_options *options, _Out_ edgelm_model **model)',
  'void edgelm_close(edgelm_model *model)',
  'edgelm_error *edgelm_get_info(const edgelm_model *model, _Inout_ edgelm_model_info *info)',
  'edgelm_error *edgelm_tokenize(const edgelm_model *model, const void *text, size_t size, int add_bos,' +
    ' _Out_ int32_t **ids, _Out_ size_t *count)',
  'edgelm_error *edgelm_detokenize(const edgelm_model *model, const int32_t *ids, size_t count, int skip_special,' +
    ' _Out_ void **text, _Out_ size_t *size)',
  'edgelm_error *edgelm_render_chat(const edgelm_model *model, const void *messages, size_t messages_size,' +
    ' const void *variables, size_t variables_size, int add_generation_prompt, _Out_ void **text, _Out_ size_t *size)',
  'edgelm_error *edgelm_generate(edgelm_model *model, const int32_t *ids, size_t count,' +
    ' const edgelm_generate_options *options, _Out_ edgelm_generation **generation)',
  'edgelm_error *edgelm_logits(edgelm_model *model, const int32_t *ids, size_t count, size_t positions,' +
    ' _Out_ float *logits, size_t capacity)',
  'void edgelm_cancel(edgelm_model *model)',
  'const void *edgelm_generation_text(const edgelm_generation *generation, _Out_ size_t *size)',
  'const void *edgelm_generation_tokens(const edgelm_generation *generation, _Out_ size_t *count)',
  'int edgelm_generation_reason(const edgelm_generation *generation)',
  'edgelm_error *edgelm_generation_timings(const edgelm_generation *generation, _Inout_ edgelm_timings *timings)',
  'void edgelm_generation_free(edgelm_generation *generation)',
];
const functions = {};
for (const prototype of PROTOTYPES) {
  const name = /(\w+)\(/.exec(prototype)[1];
  functions[name.replace('edgelm_', '')] = library.func(prototype);
}
const ABI = 1;
if (functions.abi_version() !== ABI) throw new Error(`libedgelm has ABI ${functions.abi_version()}, this file is for ${ABI}`);

export class EdgeLMError extends Error {
  constructor(code, message) {
    super(message);
    this.name = 'EdgeLMError';
    this.code = code;
  }
}

function check(error) {
  if (error === null) return;
  const found = new EdgeLMError(functions.error_code(error), functions.error_message(error));
  functions.error_free(error);
  throw found;
}

// Call a function in this thread, or in another one while the event loop goes on; throw what it returns.
export const call = (name, ...given) => check(functions[name](...given));
export const callInThread = async (name, ...given) => check(await promisify(functions[name].async)(...given));
export const { cancel, generation_free, generation_reason } = functions;
export const close = promisify(functions.close.async);

export const openOptions = (options) => ({ size: koffi.sizeof(OpenOptions), ...options });
export const generateOptions = (options) => ({ size: koffi.sizeof(GenerateOptions), ...options });
export const timings = (generation) => filled('generation_timings', generation, Timings);
export const modelInfo = (model) => filled('get_info', model, ModelInfo);

function filled(name, handle, type) {
  const found = { size: koffi.sizeof(type) };
  call(name, handle, found);
  delete found.size;
  return found;
}

// Copies of memory of the library.
export const textAt = (memory, size) => (size ? Buffer.from(koffi.view(memory, size)).toString() : '');
export const idsAt = (memory, count) => (count ? Array.from(new Int32Array(koffi.view(memory, 4 * count))) : []);
export function owned(memory, read, count) {
  try {
    return read(memory, count);
  } finally {
    functions.free(memory);
  }
}
export function viewed(name, generation, read) {
  const count = [0];
  return read(functions[name](generation, count), count[0]);
}

// A function that the library may call from any thread: it runs in the event loop. `release` it when it is not needed.
export function textListener(listen) {
  const pointer = koffi.register((_user, text, size) => listen(textAt(text, size)), 'edgelm_text_callback *');
  return { pointer, release: () => koffi.unregister(pointer) };
}
