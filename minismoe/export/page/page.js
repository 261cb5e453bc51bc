// The page: what is shown and typed. The worker loads the model and answers.

const $ = Object.fromEntries([...document.querySelectorAll("[id]")].map(e => [e.id, e]));
const worker = new Worker("worker.js", { type: "module" });

let state, tasks = {}, messages = [], typed, bubbles, setting;

function say(text, wrong = false) {
  $.status.textContent = text;
  $.status.className = wrong ? "wrong" : "";
}

// loading, ready, answering, or broken: then only a reload helps.
function enter(next) {
  state = next;
  $.send.hidden = next === "answering";
  $.stop.hidden = next !== "answering";
  $.send.disabled = $.anew.disabled = $.task.disabled = next !== "ready";
}

function show(tag, className, ...content) {
  const element = Object.assign(document.createElement(tag), { className });
  element.append(...content);
  $.log.append(element);
  element.scrollIntoView();
  return element;
}

// A task reads each message by itself, behind its instruction.
function ask() {
  typed = $.text.value.trim();
  if (!typed || state !== "ready") return;
  const task = tasks[$.task.value], instruction = task?.instruction ?? "";
  if (task) messages = [];
  messages.push({
    role: "user", content: typed.startsWith(instruction) ? typed : instruction + typed });
  bubbles = [show("p", "user", typed), show("p", "assistant")];
  $.text.value = "";
  enter("answering");
  say("Answering");
  worker.postMessage({ does: task?.choices.length ? "choose" : "ask", messages,
                       choices: task?.choices });
}

function answered(text, figures) {
  messages.push({ role: "assistant", content: text });
  enter("ready");
  say(`${figures} on ${setting}`);
}

// Takes back a question that got no answer, from the log and from the chat.
function takeBack() {
  messages.pop();
  bubbles.forEach(bubble => bubble.remove());
  $.text.value ||= typed;
  enter("ready");
}

const hear = {
  known({ model, tasks: theirs }) {
    document.title = $.name.textContent = model.split("/").filter(Boolean).at(-1);
    tasks = theirs;
    const options = Object.keys(tasks).map(name => new Option(name));
    $.task.replaceChildren(...options, new Option("Chat", ""));
    $.task.hidden = !options.length;
  },
  progress({ loaded, total }) {
    say(loaded < total ? `Loading ${(loaded / 1e6).toFixed(0)} of ${(total / 1e6).toFixed(0)} MB`
                       : "Loading: the model starts");
  },
  ready({ on }) {
    setting = on;
    enter("ready");
    say(`Ready on ${setting}`);
  },
  text({ text }) {
    bubbles[1].textContent = text.trimStart();
    bubbles[1].scrollIntoView({ block: "end" });
  },
  done({ first, tokens, seconds }) {
    const speed = tokens > 1 ? `, ${((tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
    answered(bubbles[1].textContent, `First token after ${first.toFixed(2)} s${speed}`);
  },
  // The likeliest answers of a task's set, each with its probability.
  chosen({ best, seconds }) {
    bubbles[1].textContent = best[0].text;
    show("div", "odds", ...best.flatMap(({ text, probability }) => [
      Object.assign(document.createElement("span"), { textContent: text }),
      Object.assign(document.createElement("meter"), { value: probability }),
      Object.assign(document.createElement("span"),
                    { textContent: `${(100 * probability).toFixed(1)} %` })]));
    answered(best[0].text, `Answered after ${seconds.toFixed(2)} s`);
  },
  stopped() {
    takeBack();
    say("Stopped");
  },
  failed({ text, fatal }) {
    if (state === "answering") takeBack();
    say(fatal && state !== "loading" ? `${text}: reload the page` : text, true);
    if (fatal) enter("broken");
  },
};

worker.onmessage = ({ data }) => hear[data.is](data);
worker.onerror = ({ message }) => hear.failed({ text: message, fatal: true });
$.form.onsubmit = event => {
  event.preventDefault();
  ask();
};
$.text.onkeydown = event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) $.form.onsubmit(event);
};
$.stop.onclick = () => worker.postMessage({ does: "stop" });
$.task.onchange = $.anew.onclick = () => {
  messages = [];
  $.log.replaceChildren();
  $.text.focus();
};
document.onkeydown = event => { if (event.key === "Escape" && !$.stop.hidden) $.stop.click(); };

enter("loading");
