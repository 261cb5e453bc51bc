// The model and its files, away from the page's thread. One script with two jobs: as a service
// worker it keeps the files, so that the page opens offline; as the page's worker it loads the model
// with transformers.js and answers.

const VERSION = "4.3.1";                 // of @huggingface/transformers
const HERE = new URL("./", self.location).href;
const CACHE = `minismoe ${HERE}`;

if ("ServiceWorkerGlobalScope" in self) {
  self.addEventListener("install", () => self.skipWaiting());
  self.addEventListener("activate", event => event.waitUntil(self.clients.claim()));
  self.addEventListener("fetch", event => {
    if (event.request.method === "GET") event.respondWith(keep(event));
  });
} else {
  const fail = (error, of) => self.postMessage({ is: "error", text: inOneLine(error), of });
  self.onmessage = ({ data }) =>
    ({ load, ask, stop: () => { stopped = true; } })[data.does](data)
      ?.catch(error => fail(error, data.does));
  // transformers.js loses the error of a missing data file, and waits for ever.
  self.onunhandledrejection = ({ reason }) => fail(reason, "load");
}

// Weights are those of export.json, and stay until it changes. Other files are asked for each time,
// and taken from the cache offline.
async function keep(event) {
  const { request } = event, file = request.url.split("?")[0];
  let cache = await caches.open(CACHE);
  const found = await cache.match(file);
  if (found && file.startsWith(`${HERE}onnx/`)) return found;
  try {
    const response = await fetch(request);
    if (found && file === `${HERE}export.json` &&
        await found.text() !== await response.clone().text()) {
      await caches.delete(CACHE);
      cache = await caches.open(CACHE);
    }
    if (response.status === 200) {       // without space the page works, but not offline
      event.waitUntil(cache.put(file, response.clone()).catch(() => {}));
    }
    return response;
  } catch (error) {
    if (found) return found;
    throw error;
  }
}

// transformers.js from vendor/ or else from a CDN, and with it its build of onnxruntime.
async function library() {
  const vendor = `${HERE}vendor/node_modules/`, file = "dist/transformers.min.js";
  try {
    const found = await import(`${vendor}@huggingface/transformers/${file}`);
    const paths = found.env.backends.onnx.wasm.wasmPaths;
    for (const part in paths) {
      paths[part] = paths[part].replace(/.*\/dist\//, `${vendor}onnxruntime-web/dist/`);
    }
    return found;
  } catch {
    return import(`https://cdn.jsdelivr.net/npm/@huggingface/transformers@${VERSION}/${file}`)
      .catch(() => { throw new Error("vendor/ holds no transformers.js, and the CDN is not reached"); });
  }
}

const BURST = 200;                       // ms: "stop" is heard between calls of the model

// Tokens of a prompt that are read at once. On Vulkan, as on Android and Linux, WebGPU attends wrongly
// to 32 and more: Dawn's compiler does not set the variables of a shader's loop to zero again.
let most, model, tokenizer, context, stopped, parts;

async function load(data) {
  parts = await library();
  const { AutoConfig, AutoModelForCausalLM, AutoTokenizer, env } = parts;
  Object.assign(env, { allowRemoteModels: false, allowLocalModels: true, localModelPath: HERE,
                       useBrowserCache: false, useWasmCache: false });
  const threads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  env.backends.onnx.wasm.numThreads = threads;
  const config = await AutoConfig.from_pretrained(".");
  const adapter = await navigator.gpu?.requestAdapter();
  const dtype = adapter && config["transformers.js_config"].device_config?.webgpu?.dtype;
  const lacks = /fp?16$/.test(dtype) && !adapter.features.has("shader-f16");
  const gpu = dtype && !lacks;
  most = gpu && /Linux|CrOS/.test(navigator.userAgent) ? 31 : Infinity;
  const files = {};
  const progress_callback = event => {
    if (event.status !== "progress") return;
    files[event.file] = event;
    const sum = part => Object.values(files).reduce((all, file) => all + file[part], 0);
    self.postMessage({ is: "progress", loaded: sum("loaded"), total: sum("total") });
  };
  tokenizer = await AutoTokenizer.from_pretrained(".");
  model = await AutoModelForCausalLM.from_pretrained(
    ".", { config, device: gpu ? "webgpu" : "wasm", progress_callback });
  ({ context } = data);
  self.postMessage({ is: "ready", on: gpu ? "WebGPU" : "WASM", threads, lacks });
}

async function ask({ messages }) {
  const inputs = tokenizer.apply_chat_template(
    messages, { add_generation_prompt: true, return_dict: true });
  const room = context - inputs.input_ids.dims[1];
  if (room < 1) throw new Error(`the text is ${1 - room} tokens too long: begin anew`);
  const start = performance.now(), times = [];
  const streamer = new parts.TextStreamer(tokenizer, {
    skip_prompt: true, skip_special_tokens: true,
    callback_function: text => self.postMessage({ is: "text", text }) });
  streamer.put([[]]);                    // the prompt, which is skipped
  for await (const tokens of answer(inputs.input_ids.data, room)) {
    times.push(...tokens.map(() => performance.now()));
    streamer.put([tokens]);
  }
  streamer.end();
  self.postMessage({ is: "done", first: (times[0] - start) / 1000, tokens: times.length,
                     seconds: (times.at(-1) - times[0]) / 1000 });
}

// The likeliest tokens after a prompt, as they come: at most `room`, and a token that ends it.
async function* answer(ids, room) {
  const { DynamicCache, Tensor } = parts, past = new DynamicCache();
  const several = model.sessions.model.outputNames.includes("tokens");   // in one call, as asked
  const stops = [model.generation_config.eos_token_id].flat().map(BigInt);
  const { port1, port2 } = new MessageChannel();
  stopped = false;
  try {
    for (let seen = 0, count = 1, rest = ids, found; room && !stopped; room -= found.length) {
      [ids, rest, found] = [rest.slice(0, most), rest.slice(most), []];
      const start = performance.now(), mask = new BigInt64Array(seen += ids.length).fill(1n);
      if (several) mask[seen - 1] = BigInt(count);
      const { logits, tokens, ...present } = await model.forward({
        input_ids: new Tensor("int64", ids, [1, ids.length]),
        attention_mask: new Tensor("int64", mask, [1, seen]), past_key_values: past });
      past.update(Object.fromEntries(Object.entries(present).map(([name, values]) => [
        name.replace("present_", "past_").replace("present", "past_key_values"), values])));
      if (rest.length) continue;
      found = tokens ? [...tokens.data] : [BigInt(logits.data.reduce(
        (best, value, id, all) => value > all[best] ? id : best, 0))];
      yield found;
      if (stops.includes(found.at(-1))) break;
      rest = found.slice(-1);
      seen += found.length - 1;
      const fit = Math.floor(BURST * found.length / (performance.now() - start));
      count = Math.min(room - found.length, Math.max(1, Math.min(fit, 16)));
      await new Promise(done => { port1.onmessage = done; port2.postMessage(null); });
    }
  } finally {
    await past.dispose();              // what is on a GPU
  }
}

function inOneLine(error) {
  const text = String(error?.message ?? error).split("\n")[0];
  const missing = text.match(/(?:locate file|locally at)[^"]*"([^"]+)"/);
  if (missing) return `${missing[1].replace(HERE, "").replace("./", "")} is missing: copy the folder whole`;
  if (/memory|alloc/i.test(text) || error instanceof RangeError || typeof error === "number") {
    return "too little memory for this model: close other tabs";
  }
  return text;
}
