// The page's worker: it loads the model with transformers.js and answers the page's messages.

import { Reader, answer, answerTokens, likeliest } from "./answer.js";

const HOME = new URL("./", self.location).href;
const LIBRARY = "@huggingface/transformers", VERSION = "4.3.1";
const FOR_WASM = ["q8", "fp32"];         // precisions; the others are for WebGPU
// Says that the next character is text, whatever it looks like; Unicode keeps it for such uses.
const MARK = "\ufdd0", MARKED = /((?:\ufdd0.)+)/su;

let reader, tokenizer, context, system, stops, stopped = false;

const post = (is, data) => self.postMessage({ is, ...data });
const does = { ask, choose, stop: async () => { stopped = true; } };

self.onmessage = ({ data }) => does[data.does](data).catch(error => failed(error, false));
self.onunhandledrejection = ({ reason }) => failed(reason, true);

function failed(error, fatal) {
  const text = String(error?.message ?? error).split("\n")[0];
  const full = error instanceof RangeError || typeof error === "number"        // a C++ exception
    || /out of memory|bad_alloc|failed to alloc/i.test(text);
  post("failed", { text: full ? "too little memory for this model" : text, fatal });
}

async function load() {
  const json = async name => JSON.parse(new TextDecoder().decode(await file(name)));
  const info = await json("export.json");
  post("known", { model: info.model, tasks: info.files["tasks.json"] ? await json("tasks.json") : {} });
  const gpu = !FOR_WASM.includes(info.precision), half = /f(p)?16$/.test(info.precision);
  const adapter = gpu && await navigator.gpu?.requestAdapter();
  if (gpu && !(half ? adapter?.features.has("shader-f16") : adapter)) {
    throw new Error(`this browser has no WebGPU${half ? " with float16" : ""}, which a model in ${
      info.precision} needs: export q8`);
  }
  const threads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  const parts = await library(gpu, threads);
  const weights = `${info.contract.graph}_data`;
  const data = await file(weights, info.files[weights].bytes);
  tokenizer = await parts.AutoTokenizer.from_pretrained(".");
  const model = await parts.AutoModelForCausalLM.from_pretrained(".", {
    device: gpu ? "webgpu" : "wasm", use_external_data_format: false,
    session_options: { externalData: [
      { path: weights.split("/").at(-1), data }] } });
  // On Vulkan, as on Android and Linux, WebGPU attends wrongly to 32 and more tokens at once: Dawn's
  // compiler does not set the variables of a shader's loop to zero again.
  const most = gpu && /Linux|CrOS/.test(navigator.userAgent) ? 31 : Infinity;
  reader = new Reader(model, parts, most);
  context = info.context;
  system = info.system ? [{ role: "system", content: info.system }] : [];    // as in training
  stops = [model.generation_config.eos_token_id].flat();
  const slow = self.crossOriginIsolated ? "" : ", as the server sends no COOP and COEP headers";
  post("ready", { on: gpu ? "WebGPU" : `WASM, ${threads} thread${threads > 1 ? "s" : ""}${slow}` });
}

// The bytes of a file of the folder. Of one whose size is given, the page shows how much has come.
async function file(name, size) {
  const response = await fetch(new URL(name, HOME)).catch(() => ({ ok: false }));
  if (!response.ok) throw new Error(`${name} cannot be loaded: copy the folder whole`);
  if (!size) return response.arrayBuffer();
  const whole = new Uint8Array(size);
  let loaded = 0;
  for (const stream = response.body.getReader(); ;) {
    const { value, done } = await stream.read();
    if (done ? loaded < size : loaded + value.length > size) {
      throw new Error(`${name} does not have the ${size} bytes that export.json names`);
    }
    if (done) return whole;
    whole.set(value, loaded);
    loaded += value.length;
    post("progress", { loaded, total: size });
  }
}

// transformers.js, from vendor/ in the folder or else from a CDN.
async function library(gpu, numThreads) {
  const vendor = new URL("vendor/node_modules/", HOME).href, script = "dist/transformers.min.js";
  const { ok } = await fetch(`${vendor}${LIBRARY}/${script}`, { method: "HEAD" });
  const place = (name, version) => ok ? `${vendor}${name}`
                                      : `https://cdn.jsdelivr.net/npm/${name}@${version}`;
  const parts = await import(`${place(LIBRARY, VERSION)}/${script}`), { onnx } = parts.env.backends;
  // Without WebGPU, onnxruntime is several times as fast on the CPU.
  const build = `ort-wasm-simd-threaded${gpu ? ".asyncify" : ""}`;
  const runtime = `${place("onnxruntime-web", onnx.versions.web)}/dist/${build}`;
  Object.assign(onnx.wasm, {
    numThreads, wasmPaths: { mjs: `${runtime}.mjs`, wasm: `${runtime}.wasm` } });
  Object.assign(parts.env, {
    allowRemoteModels: false, allowLocalModels: true, localModelPath: HOME,
    useBrowserCache: false });           // it would not see that a file is another one now
  return parts;
}

async function ask({ messages }) {
  const ids = prompt(messages, 1), start = performance.now(), times = [], said = [];
  stopped = false;
  for await (const token of answer(reader, ids, context - ids.length, stops, () => stopped)) {
    times.push(performance.now());
    said.push(token);
    post("text", { text: tokenizer.decode(said, { skip_special_tokens: true }) });
  }
  if (!said.length) return post("stopped");
  post("done", { first: (times[0] - start) / 1000, tokens: said.length,
                 seconds: (times.at(-1) - times[0]) / 1000 });
}

async function choose({ messages, choices }) {
  const start = performance.now(), answers = answerTokens(tokenizer, choices, stops);
  const longest = Math.max(...answers.map(({ tokens }) => tokens.length));
  stopped = false;
  const best = await likeliest(reader, prompt(messages, longest), answers, 3, () => stopped);
  if (!best) return post("stopped");
  post("chosen", { best, seconds: (performance.now() - start) / 1000 });
}

// The tokens of a chat; throws if they leave no room for `more`. The template alone writes special
// tokens: what looks like one in a message is marked, and read as single characters.
function prompt(messages, more) {
  const special = tokenizer.all_special_tokens;
  const mark = text => special.reduce((text, token) => text.replaceAll(
    token, [...token].map(character => MARK + character).join("")), text.replaceAll(MARK, MARK + MARK));
  const chat = [...system, ...messages].map(({ role, content }) => ({ role, content: mark(content) }));
  const text = tokenizer.apply_chat_template(chat, { add_generation_prompt: true, tokenize: false });
  const parts = text.split(MARKED).flatMap((part, i) =>          // every second one is marked
    i % 2 ? [...part.replace(/\ufdd0(.)/gsu, "$1")] : part || []);
  const ids = parts.flatMap(part => tokenizer.encode(part, { add_special_tokens: false }));
  const over = ids.length + more - context;
  if (over > 0) throw new Error(`the text is ${over} tokens too long: begin a new chat`);
  return ids;
}

load();
