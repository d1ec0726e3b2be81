/* EdgeLM in an app: open a bundle, tokenise, generate, check parity. C11; no exception leaves the library.
 *
 * Errors. Every function that can fail returns NULL for success, or an error with a code and a message, which the
 * caller frees with edgelm_error_free. Results are written only on success.
 *
 * Strings are UTF-8. Input strings are given with their size in bytes and need no terminator; output strings have a
 * terminator that their size does not count. What a function returns in a `char**` or `int32_t**` is freed with
 * edgelm_free.
 *
 * Threads. Any number of threads may use one model: calls that compute run one after the other, in the order of
 * arrival. edgelm_cancel and edgelm_error_* may be called at any time. A detokenizer, a generation and an error belong
 * to one thread at a time. edgelm_close may be called while other threads use the model; no call may begin after it.
 *
 * Structs. The first member is the struct's size as the caller compiled it; EDGELM_INIT sets it. All other members of
 * options may be zero, which is their default. Later versions append members, never into padding, so programs compiled
 * with an older header go on working. A newer header works as long as the members that the library does not know are
 * zero. EDGELM_ABI_VERSION changes only if that is not so.
 */
#ifndef EDGELM_H_
#define EDGELM_H_

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#if defined(EDGELM_BUILDS_LIBRARY)
#define EDGELM_API __declspec(dllexport)
#else
#define EDGELM_API __declspec(dllimport)
#endif
#else
#define EDGELM_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define EDGELM_ABI_VERSION 1

/* A struct with its size, and 0 for all else: `edgelm_open_options options = EDGELM_INIT(edgelm_open_options);` */
#ifdef __cplusplus
#define EDGELM_INIT(type) edgelm_initial<type>()
#else
#define EDGELM_INIT(type) {.size = sizeof(type)}
#endif

typedef struct edgelm_error edgelm_error;
typedef struct edgelm_model edgelm_model;
typedef struct edgelm_generation edgelm_generation;
typedef struct edgelm_detokenizer edgelm_detokenizer;

typedef enum edgelm_code {
  EDGELM_OK = 0,
  EDGELM_INVALID_ARGUMENT = 1, /* an option or argument that the caller can correct */
  EDGELM_BUNDLE = 2,           /* the bundle is missing, damaged or of another version */
  EDGELM_TOKENIZER = 3,        /* the text cannot be encoded, or the tokenizer is not supported */
  EDGELM_TEMPLATE = 4,         /* no chat template, it refuses the messages, or it uses what is not supported */
  EDGELM_CONTEXT_FULL = 5,     /* the tokens do not fit into the context */
  EDGELM_UNAVAILABLE = 6,      /* ONNX Runtime, a driver or a device is missing or too old */
  EDGELM_RUNTIME = 7,          /* the device or ONNX Runtime failed, for example for lack of memory */
  EDGELM_CANCELLED = 8,        /* edgelm_cancel ended the call */
  EDGELM_FILE = 9,             /* a file cannot be read or written */
  EDGELM_INTERNAL = 10         /* a mistake in EdgeLM: please report it */
} edgelm_code;

/* ---- library ---------------------------------------------------------------------------------------------------- */

EDGELM_API int edgelm_abi_version(void);     /* EDGELM_ABI_VERSION of the library */
EDGELM_API const char* edgelm_version(void); /* such as "0.2.0" */

EDGELM_API edgelm_code edgelm_error_code(const edgelm_error* error);    /* EDGELM_OK for NULL */
EDGELM_API const char* edgelm_error_message(const edgelm_error* error); /* "" for NULL; valid until it is freed */
EDGELM_API void edgelm_error_free(edgelm_error* error);                 /* NULL is allowed */
EDGELM_API void edgelm_free(void* memory);                              /* NULL is allowed */

/* ---- models ----------------------------------------------------------------------------------------------------- */

typedef struct edgelm_open_options {
  size_t size;
  const char* runtime;     /* "onnxruntime-cpu" or "cuda-kernels"; NULL: the one for the bundle's target */
  const char* onnxruntime; /* path of the ONNX Runtime library; NULL: EDGELM_ONNXRUNTIME, else beside this library, else
                               as the system finds libonnxruntime.so.1 (.dylib, .dll) */
  int32_t threads;         /* 0: the physical cores that this process may use */
  int32_t context_length;  /* positions of the KV cache; 0: the model's limit, at most 4096 */
  int32_t chunk;           /* tokens of a prefill step; 0: 512, on a GPU 2048 */
  const char* kv;          /* type of the KV cache: float32, float16, bfloat16, fp8, int8; NULL: the bundle's */
} edgelm_open_options;

/* Load a bundle. `path` is the folder that `edgelm export -o` wrote, terminated by 0. `options` may be NULL. */
EDGELM_API edgelm_error* edgelm_open(const char* path, const edgelm_open_options* options, edgelm_model** model);
/* End the call that runs as edgelm_cancel does, and wait for it; calls that wait for it fail with EDGELM_CANCELLED. Then
 * free the model. Called in a callback of the model, it frees when the call of that callback returns. NULL is allowed. */
EDGELM_API void edgelm_close(edgelm_model* model);

typedef struct edgelm_model_info {
  size_t size;
  const char* name;                                   /* all strings are valid as long as the model */
  const char* family;                                 /* "olmoe", "llama", ... */
  const char* recipe;                                 /* "int4", ... */
  const char* target;                                 /* "cpu", "cuda", "tensorrt" */
  const char* operators;                              /* operator set: "native" or "portable" */
  const char* runtime;                                /* what runs it */
  const char* kv;                                     /* type of the KV cache */
  int64_t vocab_size;                                 /* logits per position */
  int64_t context_length;                             /* positions of the KV cache */
  int64_t model_context_length;                       /* the model's limit */
  int64_t num_layers, num_experts, experts_per_token; /* experts: 0 for dense models */
  int32_t threads;
  int32_t has_chat_template; /* 0 or 1 */
  int32_t bos_id;            /* -1: none */
  int32_t pad_id;            /* -1: none */
  const int32_t* eos_ids;    /* tokens that end a text */
  size_t eos_count;
  const char* tokenizer_problem; /* NULL, or why functions with text fail with EDGELM_TOKENIZER. Token ids work all the
                                    same: the text of a generation is then empty, and stop strings are refused. */
} edgelm_model_info;

/* Fill in `info`, whose size the caller has set; members that the library does not know become 0. */
EDGELM_API edgelm_error* edgelm_get_info(const edgelm_model* model, edgelm_model_info* info);

/* ---- text and tokens -------------------------------------------------------------------------------------------- */

/* Token ids of a text. Strings of special tokens in it become those tokens. `add_bos`: 1, 0, or -1 for the tokenizer's
 * default. */
EDGELM_API edgelm_error* edgelm_tokenize(const edgelm_model* model, const char* text, size_t size, int add_bos,
                                         int32_t** ids, size_t* count);
/* Text of token ids. `skip_special`: leave out tokens that are not text. Invalid UTF-8 becomes U+FFFD. */
EDGELM_API edgelm_error* edgelm_detokenize(const edgelm_model* model, const int32_t* ids, size_t count,
                                           int skip_special, char** text, size_t* size);

/* Text of token ids one by one, never a part of a character. The texts, with that of edgelm_detokenizer_flush, join to
 * that of edgelm_detokenize. A text is valid until the next call for this detokenizer, which must not outlive its
 * model. */
EDGELM_API edgelm_error* edgelm_detokenizer_new(const edgelm_model* model, int skip_special,
                                                edgelm_detokenizer** detokenizer);
EDGELM_API edgelm_error* edgelm_detokenizer_push(edgelm_detokenizer* detokenizer, int32_t id, const char** text,
                                                 size_t* size);
EDGELM_API edgelm_error* edgelm_detokenizer_flush(edgelm_detokenizer* detokenizer, const char** text, size_t* size);
EDGELM_API void edgelm_detokenizer_free(edgelm_detokenizer* detokenizer);

/* The prompt of a conversation by the model's chat template; tokenise it with add_bos 0. `messages` is a JSON array such
 * as [{"role": "user", "content": "Hello"}], `variables` a JSON object of further variables such as {"tools": [...]},
 * or NULL. */
EDGELM_API edgelm_error* edgelm_render_chat(const edgelm_model* model, const char* messages, size_t messages_size,
                                            const char* variables, size_t variables_size, int add_generation_prompt,
                                            char** text, size_t* size);

/* ---- generation ------------------------------------------------------------------------------------------------- */

/* A part of the text as it is generated: never a part of a character or of a stop string, not terminated. Return 0 to go
 * on, another value to stop. Called in the thread that generates; it must not compute with the same model. */
typedef int (*edgelm_text_callback)(void* user, const char* text, size_t size);

typedef struct edgelm_generate_options {
  size_t size;
  int32_t max_tokens;        /* 0: 256; -1: until the model ends the text or the context is full */
  double temperature;        /* 0: greedy decoding; 1 samples from the model's own distribution */
  int32_t top_k;             /* sample among the k most likely tokens; 0: all */
  double top_p;              /* sample among the most likely tokens that together reach this probability; 0 or 1: all */
  double min_p;              /* sample among tokens with at least this fraction of the highest probability; 0: all */
  double repetition_penalty; /* divide positive and multiply negative logits of tokens that occurred; 0 or 1: none */
  const uint64_t* seed;      /* makes sampling reproducible; NULL: a random one */
  const char* const* stop;   /* strings that end the text and are not part of it, terminated by 0 */
  size_t stop_count;
  int32_t reuse;                /* 1: with a seed, reuse the KV cache of earlier calls as well; see docs/guides/c.md */
  edgelm_text_callback on_text; /* NULL: none */
  void* user;                   /* first argument of on_text */
} edgelm_generate_options;

/* Generate a continuation of token ids. `options` may be NULL. The KV cache of the last call is reused for the common
 * prefix of the prompts. */
EDGELM_API edgelm_error* edgelm_generate(edgelm_model* model, const int32_t* ids, size_t count,
                                         const edgelm_generate_options* options, edgelm_generation** generation);
/* The same for a text. */
EDGELM_API edgelm_error* edgelm_generate_text(edgelm_model* model, const char* prompt, size_t size,
                                              const edgelm_generate_options* options, edgelm_generation** generation);
/* Answer a conversation: edgelm_render_chat, then edgelm_generate. */
EDGELM_API edgelm_error* edgelm_chat(edgelm_model* model, const char* messages, size_t size,
                                     const edgelm_generate_options* options, edgelm_generation** generation);

/* End the call that computes with the model, from any thread, but not from a signal handler. A generation ends with reason
 * EDGELM_STOP_INTERRUPTED and what it has so far; other calls fail with EDGELM_CANCELLED. Calls that wait go on waiting.
 * Without a running call it does nothing: to end a call that may not have begun, let its on_text return 1 as well. */
EDGELM_API void edgelm_cancel(edgelm_model* model);

typedef enum edgelm_stop_reason {
  EDGELM_STOP_EOS = 0,        /* the model ended the text */
  EDGELM_STOP_STRING = 1,     /* a stop string was found */
  EDGELM_STOP_LENGTH = 2,     /* max_tokens, or the context is full */
  EDGELM_STOP_INTERRUPTED = 3 /* the callback or edgelm_cancel ended it */
} edgelm_stop_reason;

typedef struct edgelm_timings {
  size_t size;
  int64_t prompt_tokens;
  int64_t reused_tokens;  /* of the prompt, which were in the KV cache already */
  int64_t decoded_tokens; /* generated tokens after the first */
  double prefill_seconds;
  double time_to_first_token; /* seconds from the call, with tokenisation and the wait for other calls */
  double decode_seconds;      /* from the first token to the last, without the time of on_text */
} edgelm_timings;

/* Valid until the generation is freed. Tokens: without the end token, with those of a stop string. */
EDGELM_API const char* edgelm_generation_text(const edgelm_generation* generation, size_t* size);
EDGELM_API const int32_t* edgelm_generation_tokens(const edgelm_generation* generation, size_t* count);
EDGELM_API edgelm_stop_reason edgelm_generation_reason(const edgelm_generation* generation);
EDGELM_API edgelm_error* edgelm_generation_timings(const edgelm_generation* generation, edgelm_timings* timings);
EDGELM_API void edgelm_generation_free(edgelm_generation* generation);

/* ---- logits and the KV cache ------------------------------------------------------------------------------------ */

/* Logits of the last `positions` of `ids`, float32 [positions, vocab_size] into `logits`, which holds `capacity` floats.
 * The KV cache is reused for a common prefix, as far as no logits of it are asked for. */
EDGELM_API edgelm_error* edgelm_logits(edgelm_model* model, const int32_t* ids, size_t count, size_t positions,
                                       float* logits, size_t capacity);

/* Write the cached tokens and their KV cache to a file, atomically; read them back, in this or a later process. Reading
 * refuses a file of another bundle, another type of KV cache or another version, and a damaged file. */
EDGELM_API edgelm_error* edgelm_save_session(edgelm_model* model, const char* path);
EDGELM_API edgelm_error* edgelm_load_session(edgelm_model* model, const char* path);
/* Forget all cached tokens. */
EDGELM_API edgelm_error* edgelm_reset(edgelm_model* model);
/* Number of cached tokens. */
EDGELM_API edgelm_error* edgelm_cached_tokens(edgelm_model* model, int64_t* count);

/* ---- parity ----------------------------------------------------------------------------------------------------- */

typedef struct edgelm_parity_options {
  size_t size;
  const char* runtime; /* as in edgelm_open_options */
  const char* onnxruntime;
  int32_t threads;
  const char* kv;
  int32_t skip_layers; /* 1: without the debug graph, which takes as much memory again */
  int (*on_progress)(void* user, const char* what, int64_t done, int64_t total); /* return other than 0 to cancel */
  void* user;
} edgelm_parity_options;

/* Check that this device computes what the PyTorch reference computed, by the bundle's parity pack. `passed` is 1 if every
 * check passed. `report` is the JSON document of `edgelm parity --json`. A failed check is no error. */
EDGELM_API edgelm_error* edgelm_parity(const char* path, const edgelm_parity_options* options, int* passed,
                                       char** report, size_t* size);

#ifdef __cplusplus
}

/* EDGELM_INIT in C++, where an aggregate with one initializer would bring a warning for each other member. */
template <class Struct>
inline Struct edgelm_initial() {
  Struct initial = Struct();
  initial.size = sizeof(Struct);
  return initial;
}
#endif

#endif /* EDGELM_H_ */
