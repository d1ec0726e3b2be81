// Greedy generation with a portable bundle in Node, from a prompt of token ids.
//
//   npm install
//   node generate.js BUNDLE 12,345,67 16    # prints {"tokens": [...], "logits": [[...], ...]}, logits of each step
//
// Ids come from the bundle's tokenizer, here or elsewhere. The graph is the one of docs/reference/bundle.md, "Portable graph": past
// keys and values go in, the longer ones come out, so each step computes one token.
'use strict';

const fs = require('node:fs');
const path = require('node:path');
const ort = require('onnxruntime-node');

// Throws if this ONNX Runtime is too old for the bundle. The manifest says which version it needs, and why.
function checkVersion(manifest) {
  const numbers = (version) => version.split('.').slice(0, 3).map((part) => parseInt(part, 10) || 0);
  const older = (a, b) => {
    const at = [0, 1, 2].findIndex((i) => (a[i] || 0) !== (b[i] || 0));
    return at >= 0 && (a[at] || 0) < (b[at] || 0);
  };
  const here = ort.env.versions.node;
  for (const need of manifest.requires || []) {
    if (need.package === 'onnxruntime' && older(numbers(here), numbers(need.version))) {
      throw new Error(`the bundle has ${need.feature}, which needs onnxruntime ${need.version}; here is ${here}`);
    }
  }
}

function int64(values, dims) {
  return new ort.Tensor('int64', BigInt64Array.from(values, BigInt), dims);
}

async function load(bundle) {
  const manifest = JSON.parse(fs.readFileSync(path.join(bundle, 'manifest.json'), 'utf8'));
  if (manifest.ops !== 'portable' || manifest.target !== 'cpu') {
    throw new Error(`${bundle} is for ${manifest.target} with ${manifest.ops} operators: export it with --ops portable`);
  }
  checkVersion(manifest);
  // The graph declares one row of logits, which causes a warning; log level 3 shows errors only.
  const session = await ort.InferenceSession.create(path.join(bundle, manifest.graph.file), { logSeverityLevel: 3 });
  return { manifest, session };
}

async function generate({ manifest, session }, prompt, count) {
  const { num_layers: layers, num_kv_heads: heads, head_dim: size, vocab_size: ids_below, context_length } = manifest.model;
  const wrong = prompt.find((id) => !Number.isInteger(id) || id < 0 || id >= ids_below);
  if (wrong !== undefined) throw new Error(`${wrong} is no token id: they are whole numbers below ${ids_below}`);
  if (prompt.length + count > context_length) {
    throw new Error(`${prompt.length} prompt tokens and ${count} more do not fit into ${context_length} positions`);
  }
  let cache = {};
  for (let i = 0; i < layers; i++) {
    for (const part of ['key', 'value']) {
      cache[`past_key_values.${i}.${part}`] = new ort.Tensor('float32', new Float32Array(0), [1, heads, 0, size]);
    }
  }
  let ids = prompt;
  let total = 0;
  const tokens = [];
  const logits = [];
  while (tokens.length < count) {
    total += ids.length;
    const result = await session.run({
      input_ids: int64(ids, [1, ids.length]),
      attention_mask: int64(new Array(total).fill(1), [1, total]),
      ...cache,
    });
    cache = {};
    for (let i = 0; i < layers; i++) {
      for (const part of ['key', 'value']) {
        cache[`past_key_values.${i}.${part}`] = result[`present.${i}.${part}`];
      }
    }
    const last = result.logits.data;
    const best = last.reduce((at, value, i) => (value > last[at] ? i : at), 0);
    tokens.push(best);
    logits.push(Array.from(last));
    if (manifest.tokens.eos_ids.includes(best)) break;
    ids = [best];
  }
  return { tokens, logits };
}

module.exports = { load, generate };

if (require.main === module) {
  const [bundle, prompt, count] = process.argv.slice(2);
  if (!bundle || !prompt) {
    console.error('usage: node generate.js BUNDLE 12,345,67 [TOKENS]');
    process.exit(2);
  }
  load(bundle)
    .then((model) => generate(model, prompt.split(',').map(Number), Number(count || 16)))
    .then((result) => console.log(JSON.stringify(result)))
    .catch((error) => {
      console.error(`error: ${error.message}`);
      process.exit(1);
    });
}
