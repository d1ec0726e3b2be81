// A portable bundle in a browser: greedy generation from token ids. The graph is that of docs/reference/bundle.md,
// "Portable graph": past keys and values go in, the longer ones come out, so each step computes one token.
import * as ort from 'onnxruntime-web';

const int64 = (values, dims) => new ort.Tensor('int64', BigInt64Array.from(values, BigInt), dims);

async function fetched(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: ${response.status} ${response.statusText}`);
  return response;
}

// Throws if this ONNX Runtime is too old for the bundle. The manifest says which version it needs, and why.
function checkVersion(manifest, here) {
  const number = (version) => version.split('.').reduce((sum, part, i) => sum + (parseInt(part) || 0) * 1e4 ** (2 - i), 0);
  for (const { package: name, version, feature } of manifest.requires ?? []) {
    if (name === 'onnxruntime' && number(here) < number(version)) {
      throw new Error(`the bundle has ${feature}, which needs ONNX Runtime ${version}; here is ${here}`);
    }
  }
}

// Load the bundle in the folder `url`.
export async function load(url) {
  const manifest = await (await fetched(`${url}/manifest.json`)).json();
  if (manifest.ops !== 'portable' || manifest.target !== 'cpu') {
    throw new Error(`${url} is for ${manifest.target} with ${manifest.ops} operators: export it with --ops portable`);
  }
  checkVersion(manifest, ort.env.versions.web);
  const { file, weights_file: weights } = manifest.graph;
  const session = await ort.InferenceSession.create(`${url}/${file}`, {
    executionProviders: ['wasm'],
    externalData: [{ path: weights, data: `${url}/${weights}` }],
    logSeverityLevel: 3, // the graph declares one row of logits, which causes a warning
  });
  return { manifest, session };
}

// Yields { token, logits } for each step, at most `count` of them.
export async function* generate({ manifest, session }, prompt, count) {
  const { num_layers: layers, num_kv_heads: heads, head_dim: size, vocab_size: vocabulary, context_length: context } =
    manifest.model;
  if (prompt.length === 0) throw new Error('the prompt has no tokens');
  const wrong = prompt.find((id) => !Number.isInteger(id) || id < 0 || id >= vocabulary);
  if (wrong !== undefined) throw new Error(`${wrong} is no token id: they are whole numbers below ${vocabulary}`);
  if (prompt.length + count > context) {
    throw new Error(`${prompt.length} prompt tokens and ${count} more do not fit into ${context} positions`);
  }
  const names = Array.from({ length: layers }, (_, i) => [`${i}.key`, `${i}.value`]).flat();
  const empty = new ort.Tensor('float32', new Float32Array(0), [1, heads, 0, size]);
  let cache = Object.fromEntries(names.map((name) => [`past_key_values.${name}`, empty]));
  for (let ids = prompt, total = 0, step = 0; step < count; step++) {
    total += ids.length;
    const result = await session.run({
      input_ids: int64(ids, [1, ids.length]),
      attention_mask: int64(new Array(total).fill(1), [1, total]),
      ...cache,
    });
    cache = Object.fromEntries(names.map((name) => [`past_key_values.${name}`, result[`present.${name}`]]));
    const logits = result.logits.data;
    const token = logits.reduce((best, value, i) => (value > logits[best] ? i : best), 0);
    yield { token, logits };
    if (manifest.tokens.eos_ids.includes(token)) return;
    ids = [token];
  }
}
