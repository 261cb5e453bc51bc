// The service worker: it opens the page when the server does not answer. It answers for the page's
// own address alone, and leaves once the server shows another page there.

const PAGE = new URL("./", self.location).href;

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("fetch", event => {
  const { mode, url } = event.request;
  const asks = mode === "navigate" && [PAGE, `${PAGE}index.html`].includes(url.split(/[?#]/)[0]);
  if (asks) event.respondWith(page(url));
});

async function page(url) {
  try {
    const response = await fetch(url, { cache: "no-store", redirect: "manual" });
    const ours = response.status >= 500 || /<title>minismoe</.test(await response.clone().text());
    if (!ours) await self.registration.unregister();
    return response;
  } catch (error) {
    const cache = await caches.open(`minismoe ${PAGE}`);
    const kept = await cache.match(PAGE);
    if (kept) return kept;
    throw error;
  }
}
