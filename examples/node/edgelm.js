// A model in a Node app, through EdgeLM's C library. Types: edgelm.d.ts.
//
//   const model = await Model.open('bundle');
//   for await (const part of model.stream('Once upon a time', { maxTokens: 64 })) process.stdout.write(part);
//   await model.close();
//
// What computes runs in another thread, one call after the other, and the event loop stays free.
import * as native from './native.js';

export { EdgeLMError } from './native.js';

const REASONS = ['eos', 'stop', 'length', 'interrupted'];

export class Model {
  #handle;
  #calls = Promise.resolve(); // the last call: the next one waits for it

  constructor(handle) {
    this.#handle = handle;
    this.info = camelCase(native.modelInfo(handle));
    this.info.hasChatTemplate = this.info.hasChatTemplate !== 0;
  }

  static async open(path, { runtime, onnxruntime, threads = 0, contextLength = 0, chunk = 0, kv } = {}) {
    const options = { runtime, onnxruntime, threads, context_length: contextLength, chunk, kv };
    const model = [null];
    await native.callInThread('open', path, native.openOptions(options), model);
    return new Model(model[0]);
  }

  // Ends after the calls that were made before.
  close() {
    return this.#alone(async (handle) => {
      this.#handle = null;
      await native.close(handle);
    });
  }

  tokenize(text, addBos) {
    const [bytes, ids, count] = [Buffer.from(text), [null], [0]];
    native.call('tokenize', this.#open(), bytes, bytes.length, addBos === undefined ? -1 : Number(addBos), ids, count);
    return native.owned(ids[0], native.idsAt, count[0]);
  }

  detokenize(ids, skipSpecial = true) {
    const [text, size] = [[null], [0]];
    native.call('detokenize', this.#open(), Int32Array.from(ids), ids.length, Number(skipSpecial), text, size);
    return native.owned(text[0], native.textAt, size[0]);
  }

  // The prompt of a conversation; tokenize(prompt, false) gives its ids.
  renderChat(messages, variables = {}, addGenerationPrompt = true) {
    const [given, more, text, size] = [json(messages), json(variables), [null], [0]];
    native.call('render_chat', this.#open(), given, given.length, more, more.length, Number(addGenerationPrompt), text, size);
    return native.owned(text[0], native.textAt, size[0]);
  }

  // A text, token ids, or messages: [{ role: 'user', content: 'Hello' }].
  async generate(prompt, options = {}) {
    const stream = this.stream(prompt, options);
    for (;;) {
      const { value, done } = await stream.next();
      if (done) return value;
    }
  }

  // Yields the text as it is generated, and returns the generation. Leaving the loop ends it.
  async *stream(prompt, { signal, ...options } = {}) {
    const ids = Int32Array.from(this.#idsOf(prompt));
    const given = checkedOptions(options);
    const release = await this.#turn();
    const [parts, handle] = [[], this.#handle];
    if (handle === null) release(); // closed while this call waited; the next ones must not wait for it
    this.#open();
    let [stopped, running, notify] = [false, true, () => {}];
    const stop = () => {
      stopped = true;
      if (running) native.cancel(handle);
    };
    const listener = native.textListener((text) => {
      parts.push(text);
      notify();
      return Number(stopped);
    });
    signal?.addEventListener('abort', stop);
    const result = generated(handle, ids, { ...given, on_text: listener.pointer }).finally(() => {
      running = false;
      notify();
    });
    try {
      if (signal?.aborted) stop();
      while (running || parts.length > 0) {
        if (parts.length > 0) yield parts.shift();
        else await new Promise((resolve) => (notify = resolve));
      }
      return await result;
    } finally {
      stop();
      await result.catch(() => {}); // the library still writes to memory of this call
      signal?.removeEventListener('abort', stop);
      listener.release();
      release();
    }
  }

  // Logits of the last `positions` of token ids: positions x info.vocabSize numbers.
  logits(ids, positions = 1) {
    return this.#alone(async (handle) => {
      const logits = new Float32Array(positions * Number(this.info.vocabSize));
      await native.callInThread('logits', handle, Int32Array.from(ids), ids.length, positions, logits, logits.length);
      return logits;
    });
  }

  #open() {
    if (this.#handle === null) throw new Error('the model is closed');
    return this.#handle;
  }

  #idsOf(prompt) {
    if (typeof prompt === 'string') return this.tokenize(prompt);
    if (prompt.some((item) => typeof item === 'object')) return this.tokenize(this.renderChat(prompt), false);
    const wrong = prompt.find((id) => !Number.isInteger(id));
    if (wrong !== undefined) throw new TypeError(`${wrong} is no token id`);
    return prompt;
  }

  // Wait for the calls before this one; the function that it returns lets the next one begin.
  async #turn() {
    const before = this.#calls;
    let release;
    this.#calls = new Promise((resolve) => (release = resolve));
    await before;
    return release;
  }

  async #alone(task) {
    const release = await this.#turn();
    try {
      return await task(this.#open());
    } finally {
      release();
    }
  }
}

async function generated(model, ids, options) {
  const generation = [null];
  await native.callInThread('generate', model, ids, ids.length, native.generateOptions(options), generation);
  try {
    return {
      text: native.viewed('generation_text', generation[0], native.textAt),
      tokens: native.viewed('generation_tokens', generation[0], native.idsAt),
      reason: REASONS[native.generation_reason(generation[0])],
      timings: camelCase(native.timings(generation[0])),
    };
  } finally {
    native.generation_free(generation[0]);
  }
}

function checkedOptions(options) {
  const { maxTokens = 256, temperature = 0, topK = 0, topP = 1, minP = 0, repetitionPenalty = 1, seed, stop = [] } = options;
  const { reuse = false, ...rest } = options;
  const known = ['maxTokens', 'temperature', 'topK', 'topP', 'minP', 'repetitionPenalty', 'seed', 'stop'];
  const unknown = Object.keys(rest).find((name) => !known.includes(name));
  if (unknown !== undefined) throw new TypeError(`there is no option ${unknown}; there are: ${known.join(', ')}, reuse, signal`);
  const strings = typeof stop === 'string' ? [stop] : stop;
  return {
    max_tokens: maxTokens === null ? -1 : maxTokens, temperature, top_k: topK, top_p: topP, min_p: minP,
    repetition_penalty: repetitionPenalty, seed: seed === undefined ? null : BigUint64Array.of(BigInt(seed)),
    stop: strings.length > 0 ? strings : null, stop_count: strings.length, reuse: Number(reuse), user: null,
  };
}

const json = (value) => Buffer.from(JSON.stringify(value));

function camelCase(record) {
  const renamed = (name) => name.replace(/_(\w)/g, (_, letter) => letter.toUpperCase());
  return Object.fromEntries(Object.entries(record).map(([name, value]) => [renamed(name), value]));
}
