/** An error of the library; `code` is one of `edgelm_code` in edgelm.h. */
export class EdgeLMError extends Error {
  readonly code: number;
}

export interface OpenOptions {
  /** "onnxruntime-cpu" or "cuda-kernels"; by default the one for the bundle's target. */
  runtime?: string;
  /** Path of ONNX Runtime's library. */
  onnxruntime?: string;
  /** By default the physical cores that this process may use. */
  threads?: number;
  /** Positions of the KV cache; by default the model's limit, at most 4096. */
  contextLength?: number;
  /** Tokens of a prefill step. */
  chunk?: number;
  /** Type of the KV cache: "float32", "float16", "bfloat16", "fp8", "int8", "int4". */
  kv?: string;
}

export interface ModelInfo {
  name: string;
  family: string;
  recipe: string;
  target: string;
  operators: string;
  runtime: string;
  kv: string;
  vocabSize: number;
  contextLength: number;
  modelContextLength: number;
  numLayers: number;
  /** 0 for dense models. */
  numExperts: number;
  expertsPerToken: number;
  threads: number;
  hasChatTemplate: boolean;
  /** -1: none. */
  bosId: number;
  padId: number;
}

export interface Message {
  role: string;
  content: string;
}

/** A text, token ids, or a conversation. */
export type Prompt = string | readonly number[] | readonly Message[];

export interface GenerateOptions {
  /** null: until the model ends the text or the context is full. */
  maxTokens?: number | null;
  /** 0: greedy decoding. */
  temperature?: number;
  topK?: number;
  topP?: number;
  minP?: number;
  repetitionPenalty?: number;
  /** Makes sampling reproducible. */
  seed?: number | bigint;
  /** Strings that end the text and are not part of it. */
  stop?: string | readonly string[];
  /** With a seed, reuse the KV cache of earlier calls as well. */
  reuse?: boolean;
  /** Ends the generation, which then has the reason "interrupted". */
  signal?: AbortSignal;
}

export interface Timings {
  promptTokens: number;
  reusedTokens: number;
  decodedTokens: number;
  prefillSeconds: number;
  timeToFirstToken: number;
  decodeSeconds: number;
}

export interface Generation {
  text: string;
  tokens: number[];
  reason: 'eos' | 'stop' | 'length' | 'interrupted';
  timings: Timings;
}

export class Model {
  private constructor();
  /** Load a bundle: the folder that `edgelm export -o` wrote. */
  static open(path: string, options?: OpenOptions): Promise<Model>;
  readonly info: ModelInfo;
  tokenize(text: string, addBos?: boolean): number[];
  detokenize(ids: readonly number[], skipSpecial?: boolean): string;
  renderChat(messages: readonly Message[], variables?: Record<string, unknown>, addGenerationPrompt?: boolean): string;
  generate(prompt: Prompt, options?: GenerateOptions): Promise<Generation>;
  stream(prompt: Prompt, options?: GenerateOptions): AsyncGenerator<string, Generation, void>;
  /** Logits of the last positions of token ids: positions x info.vocabSize numbers. */
  logits(ids: readonly number[], positions?: number): Promise<Float32Array>;
  close(): Promise<void>;
}
