// Answers of the model: tokens one after another, or the likeliest of a set.

// What the model has read, with its keys and values. A text that begins like the last one, as in a
// chat that goes on, is read from the first token that differs.
export class Reader {
  // most: tokens that are read at once.
  constructor(model, { DynamicCache, Tensor }, most) {
    Object.assign(this, { model, DynamicCache, Tensor, most, read: [], past: new DynamicCache() });
  }

  // The logits (V,) after the tokens `ids`; undefined if `stopped()` in between.
  async after(ids, stopped) {
    let same = ids.findIndex((id, i) => id !== this.read[i]);
    if (same < 0) same = ids.length - 1;             // the last token is read again for its logits
    if (same < this.read.length) await this.cut(same);
    for (;;) {
      const start = this.read.length, part = ids.slice(start, start + this.most);
      const mask = new BigInt64Array(start + part.length).fill(1n);
      const { logits, ...present } = await this.model.forward({
        input_ids: new this.Tensor("int64", BigInt64Array.from(part, BigInt), [1, part.length]),
        attention_mask: new this.Tensor("int64", mask, [1, mask.length]),
        past_key_values: this.past });
      this.past.update(Object.fromEntries(Object.entries(present).map(([name, values]) => [
        name.replace("present_", "past_").replace("present", "past_key_values"), values])));
      this.read.push(...part);
      if (this.read.length === ids.length) return logits.data;
      if (stopped()) return undefined;
    }
  }

  // Forgets all tokens but the first `length`. A memory that is not one key a token cannot be cut:
  // then all is read anew.
  async cut(length) {
    const entries = Object.entries(this.past);
    const one = ([name, tensor]) =>
      name.startsWith("past_key_values.") && tensor.dims[2] === this.read.length;
    const past = new this.DynamicCache();
    if (length && entries.every(one)) {
      for (const [name, tensor] of entries) {
        const [rows, heads, tokens, size] = tensor.dims;
        const old = await tensor.ort_tensor.getData(), kept = new old.constructor(heads * length * size);
        for (let head = 0; head < heads; head++) {
          const from = head * tokens * size;
          kept.set(old.subarray(from, from + length * size), head * length * size);
        }
        past[name] = new this.Tensor(tensor.type, kept, [rows, heads, length, size]);
      }
    } else {
      length = 0;
    }
    await this.past.dispose();                       // what is on a GPU
    this.past = past;
    this.read.length = length;
  }
}

// The tokens that follow `ids`, as they come, each the likeliest: at most `room`, and the one of
// `stops` that ends them.
export async function* answer(reader, ids, room, stops, stopped) {
  const { port1, port2 } = new MessageChannel();
  for (ids = [...ids]; room > 0 && !stopped(); room--) {
    const logits = await reader.after(ids, stopped);
    if (!logits) return;
    const best = logits.reduce((best, score, id) => score > logits[best] ? id : best, 0);
    if (Number.isNaN(logits[best])) throw new Error("the model's logits are not numbers");
    yield best;
    if (stops.includes(best)) return;
    ids.push(best);
    await new Promise(done => { port1.onmessage = done; port2.postMessage(null); });   // hears "stop"
  }
}

// The answers of a set as the chat template writes them after a question, sorted by their tokens:
// [{ text, tokens }], with the token that ends an answer.
export function answerTokens(tokenizer, choices, stops) {
  const render = (messages, prompt) => tokenizer.apply_chat_template(
    messages, { tokenize: false, add_generation_prompt: prompt });
  const encode = text => tokenizer.encode(text, { add_special_tokens: false });
  const question = { role: "user", content: "question" }, start = render([question], true);
  const before = encode(start);
  return choices.map(text => {
    const whole = render([question, { role: "assistant", content: text }], false);
    const all = encode(whole.startsWith(start) ? whole : text);
    // Where the tokens of prompt and answer do not part, the answer is read by itself.
    const own = before.every((id, i) => id === all[i]) ? all.slice(before.length)
      : encode(whole.startsWith(start) ? whole.slice(start.length) : text);
    const end = own.findIndex(id => stops.includes(id));
    return { text, tokens: [...(end < 0 ? own : own.slice(0, end)), own[end] ?? stops[0]] };
  }).sort((a, b) => {
    const i = a.tokens.findIndex((id, i) => id !== b.tokens[i]);
    return a.tokens[i] - b.tokens[i];
  });
}

// Best-first search, as in minismoe/runtime/choices.py: the likeliest beginning is read on until
// `best` answers are whole. Gives [{ text, probability }], the likeliest first: among all answers;
// undefined if `stopped()` in between.
export async function likeliest(reader, ids, answers, best, stopped) {
  const found = [], heap = [{ loss: 0, group: answers }];
  while (heap.length && found.length < best) {
    const { loss, group } = heap.shift();
    if (group.length === 1) {
      found.push({ text: group[0].text, probability: Math.exp(-loss) });
      continue;
    }
    const [first, last] = [group[0].tokens, group.at(-1).tokens];    // they are sorted: what these
    const shared = first.findIndex((id, i) => id !== last[i]);       // two share, all do
    const logits = await reader.after([...ids, ...first.slice(0, shared)], stopped);
    if (!logits || stopped()) return undefined;
    const parts = Map.groupBy(group, answer => answer.tokens[shared]);
    const scores = [...parts.keys()].map(id => logits[id]), highest = Math.max(...scores);
    const total = highest + Math.log(scores.reduce((sum, s) => sum + Math.exp(s - highest), 0));
    if (Number.isNaN(total)) throw new Error("the model's logits are not numbers");
    [...parts.values()].forEach((part, i) => {
      heap.push({ loss: loss + total - scores[i], group: part });
    });
    heap.sort((a, b) => a.loss - b.loss);
  }
  return found;
}
