// The files of the export and of transformers.js. Each is asked of the server once, compared with
// its hash, and kept under its hash in the browser's storage. So files of two exports never mix, a
// load that broke off goes on where it stopped, and the page works offline.

const CDN = "https://cdn.jsdelivr.net/npm/";
const SCRIPT = "@huggingface/transformers@4.3.1/dist/transformers.min.js";
const RUNTIME = "onnxruntime-web@1.31.0-dev.20260914-8d85527a0/dist/ort-wasm-simd-threaded";
const LIBRARY = {
  [SCRIPT]: {
    bytes: 586230, sha256: "8d6716d9086f57c30a4bf367dba61b887593573c770c454465e8019b2703e743" },
  [`${RUNTIME}.mjs`]: {                  // without WebGPU, and several times as fast on the CPU
    bytes: 24381, sha256: "c57ca56328877353a575e51bbca6f18450027d6c9bf2307a2cb2c41363b4de9f" },
  [`${RUNTIME}.wasm`]: {
    bytes: 14264838, sha256: "06ba057753da3847e4c24f02d91ab133455b0817c69a44993a9a53a2146df9e3" },
  [`${RUNTIME}.asyncify.mjs`]: {
    bytes: 53057, sha256: "0966b6105cd936744498aa60df7a22cbd47af3374dbc64a9ab561c08a71e3611" },
  [`${RUNTIME}.asyncify.wasm`]: {
    bytes: 26861777, sha256: "49871f5a4409519797e127440868a6d1923339d9185907f301a5b2a1d90af082" },
};

class Files {
  seen = () => {};                       // called with the size of each piece of a file
  keeps = "caches" in self;              // over https and on localhost, and while there is room
  cdn = "";                              // the host of the CDN, if files came from there

  // home: the address of the page's folder.
  constructor(home) { this.home = home; }

  // The content of export.json: the server's or, offline, that of the export which is kept.
  async open() {
    this.cache = this.keeps && await caches.open(`minismoe ${this.home}`);
    const kept = this.cache && await this.cache.match(`${this.home}export.json`);
    this.text = await this.fetched("export.json").then(response => response.text()).catch(error => {
      if (error.status || !kept) throw error;
      this.offline = true;
      return kept.text();
    });
    const info = JSON.parse(this.text);
    this.listed = { ...info.files, ...LIBRARY };
    if (!this.offline) {
      this.page = await this.fetched("./");
      await this.compare("index.html", await this.page.clone().arrayBuffer(),
                         this.listed["index.html"].sha256);
    }
    return info;
  }

  // How many bytes of these files are not kept yet. Older exports make room; if there is still too
  // little, nothing more is kept.
  async lacking(names) {
    let bytes = 0;
    for (const { start, end, hash } of names.flatMap(name => this.shards(name))) {
      if (!await this.kept(hash)) bytes += end - start;
    }
    const fits = async () => {
      const { quota = Infinity, usage = 0 } = await navigator.storage?.estimate() ?? {};
      return bytes <= quota - usage;
    };
    if (this.keeps && !await fits()) {
      await this.cache.delete(`${this.home}export.json`);
      await this.tidy();
      this.keeps = await fits();
    }
    return bytes;
  }

  // A file, which was compared with its hash when it came.
  async bytes(name) {
    const whole = new Uint8Array(this.listed[name].bytes), read = this.reader(name);
    for (const { start, end, hash } of this.shards(name)) {
      const kept = await this.kept(hash);
      if (kept) {
        whole.set(new Uint8Array(await kept.arrayBuffer()), start);
        this.seen(end - start);
        continue;
      }
      const shard = await read(start, end);
      await this.compare(name, shard, hash);
      await this.put(this.address(hash), new Response(shard));
      whole.set(shard, start);
    }
    return whole;
  }

  // Remembers this export once it works, and drops older ones.
  async remember() {
    if (!this.cache || this.offline) return;
    await this.put(this.home, this.page);
    await this.put(`${this.home}export.json`, new Response(this.text));
    await this.tidy();
  }

  async tidy() {
    const ours = Object.keys(this.listed).flatMap(name => this.shards(name)).map(shard => shard.hash);
    const stay = new Set([this.home, `${this.home}export.json`, ...ours.map(h => this.address(h))]);
    for (const request of await this.cache.keys()) {
      if (!stay.has(request.url)) await this.cache.delete(request);
    }
  }

  // The parts of a file that come and are kept as one, by export.json.
  shards(name) {
    const { bytes, sha256, shards } = this.listed[name];
    const size = shards?.bytes ?? bytes;
    return (shards?.sha256 ?? [sha256]).map((hash, i) => (
      { start: i * size, end: Math.min(bytes, (i + 1) * size), hash }));
  }

  address(hash) { return `${this.home}sha256/${hash}`; }

  async kept(hash) { return this.cache && this.cache.match(this.address(hash)); }

  async put(address, response) {
    if (this.keeps) await this.cache.put(address, response).catch(() => { this.keeps = false; });
  }

  // (start, end) -> those bytes of a file on the server. What follows the bytes of the last call
  // comes over the same connection.
  reader(name) {
    let stream, at, rest;
    const lost = () => {
      throw new Error(`the connection broke at ${name}: reload the page, and loading goes on`);
    };
    return async (start, end) => {
      if (at !== start) {
        const response = await this.fetched(name, start);
        stream = response.body.getReader();
        at = response.status === 206 ? start : 0;    // some servers send what came before, too
        rest = new Uint8Array();
      }
      const bytes = new Uint8Array(end - start);
      while (at < end) {
        if (!rest.length) ({ value: rest = lost() } = await stream.read().catch(lost));
        const piece = rest.subarray(0, (at < start ? start : end) - at);
        if (at >= start) {
          bytes.set(piece, at - start);
          this.seen(piece.length);
        }
        at += piece.length;
        rest = rest.subarray(piece.length);
      }
      return bytes;
    };
  }

  // The server's answer. Of transformers.js, vendor/ is asked first, and the CDN if it lacks it.
  async fetched(name, start = 0) {
    const places = name in LIBRARY
      ? [`vendor/node_modules/${name.replace(/@[\d][^/]*/, "")}`, CDN + name] : [name];
    for (const place of places) {
      const response = await fetch(new URL(place, this.home), {
        cache: "no-store", headers: start ? { Range: `bytes=${start}-` } : {} })
        .catch(() => { throw new Error(`${place} cannot be fetched: is the server there?`); });
      if (response.ok) {
        if (place.startsWith(CDN)) this.cdn = new URL(CDN).host;
        return response;
      }
      if (response.status !== 404) break;
    }
    throw Object.assign(new Error(`${places.join(" and ")} is missing: copy the folder whole`),
                        { status: 404 });
  }

  // Throws if bytes do not have a hash. A page that is not over https has nothing to compute it.
  async compare(name, bytes, hash) {
    if (!crypto.subtle) return;
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
    if (Array.from(digest, byte => byte.toString(16).padStart(2, "0")).join("") === hash) return;
    if (name in LIBRARY) throw new Error(`${name} is not what npm has: install vendor/ again`);
    throw new Error(`${name} is not the file that export.json names: copy the folder whole, or ${
      name === "index.html" ? "take a server that adds no scripts to pages" : "export again"}`);
  }
}
