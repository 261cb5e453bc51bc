// The page: what is shown and typed. The worker loads the model and answers.

const $ = Object.fromEntries([...document.querySelectorAll("[id]")].map(e => [e.id, e]));
const HOME = new URL("./", location.href).href;
const LARGE = 1e9;                       // bytes of memory: the page asks before it takes more

let worker, state, tasks = {}, messages = [], question, setting = "";

const MB = bytes => bytes < 1e9 ? `${Math.ceil(bytes / 1e6)} MB` : `${(bytes / 1e9).toFixed(1)} GB`;

function say(text, wrong = false) {
  $.status.textContent = text;
  $.status.title = "";
  $.below.className = wrong ? "wrong" : "";
  $.progress.hidden = $.go.hidden = true;
}

// loading, ready, answering, or broken: then only a reload helps.
function enter(next) {
  state = next;
  $.send.hidden = next === "answering";
  $.stop.hidden = next !== "answering";
  $.send.disabled = $.anew.disabled = $.task.disabled = next !== "ready";
}

function show(role, text) {
  const p = Object.assign(document.createElement("p"), { className: role, textContent: text });
  $.log.append(p);
  p.scrollIntoView();
  return p;
}

function broken(text) {
  worker?.terminate();                   // or else its progress would overwrite the message
  if (state === "answering") takeBack();
  enter("broken");
  say(text, true);
}

// Takes back a question that got no answer, from the log and from the chat.
function takeBack() {
  messages.pop();
  question.bubbles.forEach(bubble => bubble.remove());
  $.text.value ||= question.text;
}

const hear = {
  plan({ model, tasks: known, lacking, memory, keeps }) {
    document.title = $.name.textContent = model.split("/").filter(Boolean).at(-1);
    $.forget.disabled = !keeps;
    tasks = known;
    const options = Object.keys(tasks).map(name => new Option(name));
    $.task.replaceChildren(...options, new Option("Chat", ""));
    $.task.hidden = !Object.keys(tasks).length;
    const go = () => {
      say("Loading");
      $.progress.hidden = false;
      if (keeps && lacking) navigator.storage.persist?.().catch(() => {});   // before it is filled
      worker.postMessage({ does: "go" });
    };
    if (!lacking || memory < LARGE) return go();
    say(`${MB(lacking)} to load, and about ${MB(memory)} of this device's memory`);
    $.go.hidden = false;
    $.go.onclick = go;
  },
  progress({ loaded, total, cdn }) {
    $.progress.value = loaded / total;
    say(`Loading ${MB(loaded)} of ${MB(total)}${cdn && `, transformers.js from ${cdn}`}`);
    $.progress.hidden = false;
  },
  starting() {
    $.progress.removeAttribute("value");
    say("Loading: the model starts");
    $.progress.hidden = false;
  },
  // A GPU that the model does not start on.
  gpuFailed() { begin("this GPU does not start the model"); },
  ready({ on, threads, lacks, keeps }) {
    setting = on === "WASM" ? `${on}, ${threads} thread${threads > 1 ? "s" : ""}` : on;
    if (lacks) setting += `, as ${lacks}`;
    if (on === "WASM" && !crossOriginIsolated) {
      setting += "; one only, as the server sends no COOP and COEP headers: use --serve";
    }
    enter("ready");
    say(`Ready on ${setting}${keeps ? "" : "; not kept for the next time"}`);
  },
  text({ text }) {
    const { bubbles: [, bubble] } = question;
    const below = $.log.scrollHeight - $.log.scrollTop - $.log.clientHeight < 40;
    bubble.textContent += bubble.textContent ? text : text.trimStart();  // no space before it
    if (below) bubble.scrollIntoView({ block: "end" });
  },
  done({ read, length, context, first, tokens, seconds }) {
    if (tokens) messages.push({ role: "assistant", content: question.bubbles[1].textContent });
    else takeBack();
    enter("ready");
    const speed = tokens > 1 ? `, ${((tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
    say(tokens ? `First token after ${first.toFixed(2)} s${speed} on ${setting}` : "Stopped");
    $.status.title = `The chat has ${length} of ${context} tokens; ${read} of them were new`;
  },
  // The likeliest answers of a task's set, each with its probability.
  chosen({ best, seconds }) {
    if (best.length) {
      question.bubbles[1].textContent = best[0].text;
      messages.push({ role: "assistant", content: best[0].text });
      const odds = Object.assign(document.createElement("div"), { className: "odds" });
      odds.append(...best.flatMap(({ text, probability }) => [
        Object.assign(document.createElement("span"), { textContent: text }),
        Object.assign(document.createElement("meter"), { value: probability }),
        Object.assign(document.createElement("span"),
                      { textContent: `${(100 * probability).toFixed(1)} %` })]));
      $.log.append(odds);
      odds.scrollIntoView();
    } else {
      takeBack();
    }
    enter("ready");
    say(best.length ? `Answered after ${seconds.toFixed(2)} s on ${setting}` : "Stopped");
  },
  failed({ text, fatal }) {
    if (fatal) return broken(state === "loading" ? text : `${text}: reload the page`);
    takeBack();
    enter("ready");
    say(text, true);
  },
};

function ask() {
  const text = $.text.value.trim(), name = $.task.value, task = tasks[name];
  if (!text || state !== "ready") return;
  if (task) messages = [];               // a task reads each message by itself
  messages.push({ role: "user", content: text.startsWith(task?.instruction ?? "") ? text
                                                             : task.instruction + text });
  question = { text, bubbles: [show("user", text), show("assistant", "")] };
  $.text.value = "";
  enter("answering");
  say("Answering");
  if (task?.choices.length) {
    worker.postMessage({ does: "choose", messages, task: name, choices: task.choices });
  } else {
    const { valueAsNumber: value, max } = $.temperature;
    worker.postMessage({ does: "ask", messages, temperature: Math.min(max, Math.max(0, value || 0)) });
  }
}

// lacks: why the GPU is to be left alone.
function begin(lacks) {
  worker?.terminate();
  const source = [...document.querySelectorAll("script.worker")].map(part => part.textContent);
  const url = URL.createObjectURL(new Blob(source, { type: "text/javascript" }));
  worker = new Worker(url, { type: "module" });
  worker.onerror = ({ message }) => broken(`${message}: reload the page`);
  worker.onmessage = ({ data }) => hear[data.is](data);
  worker.postMessage({ does: "load", home: HOME, lacks });
  enter("loading");
  navigator.serviceWorker?.register("offline.js").catch(() => {});   // or else: not offline
}

// Frees what this browser keeps of the model, and lets nothing open the page offline.
async function forget() {
  worker.terminate();
  await caches.delete(`minismoe ${HOME}`);
  await (await navigator.serviceWorker?.getRegistration())?.unregister();
  enter("broken");
  say("This browser keeps nothing of the model any more: reload the page to load it again");
}

$.form.onsubmit = event => {
  event.preventDefault();
  ask();
};
$.text.onkeydown = event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    ask();
  }
};
$.stop.onclick = () => worker.postMessage({ does: "stop" });
$.forget.onclick = forget;
$.task.onchange = $.anew.onclick = () => {
  messages = [];
  $.log.replaceChildren();
  $.text.focus();
};
document.onkeydown = event => { if (event.key === "Escape" && !$.stop.hidden) $.stop.click(); };

begin();
