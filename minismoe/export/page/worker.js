// The page's worker: it loads the model with transformers.js and answers the page's messages.

// Bytes of memory that a tab takes for a byte of weights: WASM turns each into a float as it loads,
// and computes with copies of them.
const TAKEN = { wasm: 13, webgpu: 3 };
// Says that the next character is text, whatever it looks like; Unicode keeps it for such uses.
const MARK = "\ufdd0", MARKED = /((?:\ufdd0.)+)/su;

let files, reader, tokenizer, streamerOf, context, system, stops, go, answers = {}, stopped = false;

const post = (is, data) => self.postMessage({ is, ...data });
const does = {
  load, ask, choose,
  go: () => go(),
  stop: () => { stopped = true; },
};

self.onmessage = ({ data }) => does[data.does](data)
  ?.catch(error => post("failed", { text: inOneLine(error), fatal: data.does === "load" }));
self.onunhandledrejection = ({ reason }) => post("failed", { text: inOneLine(reason), fatal: true });

async function load({ home, lacks: reason }) {
  files = new Files(home);
  const info = await files.open(), config = json(await files.bytes("config.json"));
  const tasks = files.listed["tasks.json"] ? json(await files.bytes("tasks.json")) : {};
  const { dtype, gpu, lacks } = await device(config["transformers.js_config"], reason);
  const graph = `onnx/model${{ fp32: "", q8: "_quantized" }[dtype] ?? `_${dtype}`}.onnx`;
  const library = [SCRIPT, ...["mjs", "wasm"].map(end => `${RUNTIME}${gpu ? ".asyncify" : ""}.${end}`)];
  const names = [...library, graph, `${graph}_data`, ...Object.keys(files.listed)
    .filter(name => /^[^/]+\.(json|jinja)$/.test(name))];
  const lacking = await files.lacking(names);
  post("plan", { model: info.model, tasks, lacking, keeps: files.keeps,
                 memory: files.listed[`${graph}_data`].bytes * TAKEN[gpu ? "webgpu" : "wasm"] });
  await new Promise(done => { go = done; });
  const total = names.reduce((sum, name) => sum + files.listed[name].bytes, 0), content = {};
  let loaded = 0;
  files.seen = bytes => post("progress", { loaded: loaded += bytes, total, cdn: files.cdn });
  for (const name of names) content[name] = await files.bytes(name);
  post("starting");
  const threads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  const parts = await start(library.map(name => content[name]), content, threads);
  tokenizer = await parts.AutoTokenizer.from_pretrained(".");
  const model = await parts.AutoModelForCausalLM.from_pretrained(".", {
    device: gpu ? "webgpu" : "wasm", dtype, use_external_data_format: false,
    session_options: { externalData: [
      { path: `${graph}_data`.slice(5), data: content[`${graph}_data`] }] } })
    .catch(error => { if (!gpu) throw error; });
  if (!model) return post("gpuFailed");      // the page begins anew, without it
  Object.keys(content).forEach(name => delete content[name]);    // the model has its own copy
  await files.remember();
  // On Vulkan, as on Android and Linux, WebGPU attends wrongly to 32 and more tokens at once: Dawn's
  // compiler does not set the variables of a shader's loop to zero again.
  const most = gpu && /Linux|CrOS/.test(navigator.userAgent) ? 31 : Infinity;
  reader = new Reader(model, parts, most);
  context = info.context;
  system = info.system ? [{ role: "system", content: info.system }] : [];    // as in training
  stops = [model.generation_config.eos_token_id].flat();
  streamerOf = say => new parts.TextStreamer(
    tokenizer, { skip_prompt: true, skip_special_tokens: true, callback_function: say });
  post("ready", { on: gpu ? "WebGPU" : "WASM", threads, lacks, keeps: files.keeps });
}

// The graph that this browser computes with: its dtype, whether on a GPU, and if not, what the GPU
// lacks.
async function device({ dtype, device_config }, reason) {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  const wanted = adapter && device_config?.webgpu?.dtype;
  const lacks = reason ?? (/fp?16$/.test(wanted) && !adapter.features.has("shader-f16") ?
    "this GPU has no float16" : "");
  return wanted && !lacks ? { dtype: wanted, gpu: true } : { dtype, gpu: false, lacks };
}

// transformers.js, which takes all its files from `content`: names in the folder, and their bytes.
async function start([script, factory, wasm], content, threads) {
  const url = (bytes, type = "text/javascript") => URL.createObjectURL(new Blob([bytes], { type }));
  const library = await import(url(script)), { env } = library;
  Object.assign(env, {
    allowRemoteModels: false, allowLocalModels: true, localModelPath: files.home,
    useBrowserCache: false, useWasmCache: false,
    fetch: async address => {
      const name = new URL(address, files.home).href.slice(files.home.length);
      return name in content ? new Response(content[name]) : new Response(null, { status: 404 });
    } });
  Object.assign(env.backends.onnx.wasm, {
    numThreads: threads, wasmPaths: { mjs: url(factory), wasm: url(wasm, "application/wasm") } });
  return library;
}

async function ask({ messages, temperature }) {
  const ids = prompt(messages, 1), start = performance.now(), times = [];
  const streamer = streamerOf(text => post("text", { text }));
  streamer.put([[]]);                        // the prompt, which is skipped
  let read;
  stopped = false;
  reader.anew = 0;
  for await (const tokens of answer(reader, ids, context - ids.length, stops, temperature, () => stopped)) {
    read ??= reader.anew;
    times.push(...tokens.map(() => performance.now()));
    streamer.put([tokens.map(BigInt)]);
  }
  streamer.end();
  post("done", { read, length: ids.length, context, first: (times[0] - start) / 1000, tokens: times.length,
                 seconds: (times.at(-1) - times[0]) / 1000 });
}

async function choose({ messages, task, choices }) {
  answers[task] ??= answerTokens(tokenizer, choices, stops);
  const longest = Math.max(...answers[task].map(answer => answer.tokens.length));
  const ids = prompt(messages, longest), start = performance.now();
  stopped = false;
  const best = await likeliest(reader, ids, answers[task], 3, () => stopped);
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

function json(bytes) { return JSON.parse(new TextDecoder().decode(bytes)); }

function inOneLine(error) {
  const text = String(error?.message ?? error).split("\n")[0];
  if (/out of memory|bad_alloc|alloc\w* (failed|size)|failed to alloc/i.test(text)
      || error instanceof RangeError || typeof error === "number") {
    return "too little memory for this model: close other tabs";
  }
  return text;
}
