// Chat with a model in a terminal; Ctrl-C ends an answer, an empty line the chat.
//
//   npm install
//   node chat.js BUNDLE                    a conversation
//   node chat.js BUNDLE PROMPT [TOKENS]    continue one text, then exit
//
// EDGELM_LIBRARY and EDGELM_ONNXRUNTIME are the paths of libedgelm and ONNX Runtime where the system does not find them.
import readline from 'node:readline';
import { Model } from './edgelm.js';

let answer; // the AbortController of the answer that is being generated

// Write the text as it comes; return it.
async function show(model, prompt, options) {
  answer = new AbortController();
  let text = '';
  for await (const part of model.stream(prompt, { ...options, signal: answer.signal })) {
    process.stdout.write(part);
    text += part;
  }
  answer = undefined;
  process.stdout.write('\n');
  return text;
}

async function chat(model) {
  if (!model.info.hasChatTemplate) throw new Error(`${model.info.name} has no chat template: give it a text to continue`);
  const terminal = readline.createInterface({ input: process.stdin, output: process.stderr, prompt: '> ' });
  terminal.on('SIGINT', () => (answer ? answer.abort() : terminal.close()));
  terminal.prompt();
  const messages = [];
  for await (const question of terminal) {
    if (question === '') break;
    messages.push({ role: 'user', content: question });
    messages.push({ role: 'assistant', content: await show(model, messages, { temperature: 0.7, topP: 0.9 }) });
    terminal.prompt();
  }
  terminal.close();
}

async function complete(model, prompt, maxTokens) {
  process.once('SIGINT', () => answer?.abort());
  await show(model, prompt, { maxTokens });
}

const [bundle, prompt, tokens = '64'] = process.argv.slice(2);
if (bundle === undefined) {
  console.error('usage: node chat.js BUNDLE [PROMPT [TOKENS]]');
  process.exit(2);
}
try {
  const model = await Model.open(bundle);
  await (prompt === undefined ? chat(model) : complete(model, prompt, Number(tokens)));
  await model.close();
} catch (error) {
  console.error(`error: ${error.message}`);
  process.exitCode = 1;
}
