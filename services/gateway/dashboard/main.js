/** The page put together: state, socket, address, and the gate of sign-in. */

import { ApiError, Socket } from "./wire.js";
import { Shell } from "./parts/shell.js";
import { effect, html, render, signal } from "./view.js";
import { followAddress, route } from "./route.js";
import { followPreferences } from "./preferences.js";
import { store } from "./store.js";
import { t } from "./words.js";

const ASK_AGAIN_MS = 3_000;

const PAGES = {
  overview: () => import("./pages/overview.js"),
  plugin: () => import("./pages/plugin.js"),
  none: () => import("./pages/none.js"),
  "sign-in": () => import("./pages/sign-in.js"),
};

/** The module of the page to be seen; the old one stays until the new one has come. */
const page = signal({ name: "", Page: /** @type {any} */ (null) });
const wrongLink = takeKeyFromAddress();

const socket = new Socket({
  url: `${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/ws/plugins`,
  onFrame: (frame) => store.apply(frame),
  onLink: (link) => {
    store.link.value = link;
    document.documentElement.dataset.link = link.state;
  },
  mayRetry: async () => {
    try {
      return await store.enter();
    } catch {
      return true; // Nobody answers, so nobody refuses.
    }
  },
});
store.socket = socket;
socket.subscribe({ topic: "status" });
socket.subscribe({ topic: "telemetry" });

followPreferences();
followAddress();
effect(() => void show(store.session.value.state === "out" ? "sign-in" : route.value.page));
effect(() => {
  const faults = store.faults.value;
  const where = page.value.name === "plugin" ? route.value.plugin : t(titleKey(page.value.name));
  document.title = `${faults > 0 ? `(${faults}) ` : ""}${where} – bkg`;
});
effect(() => {
  if (store.session.value.state === "in") socket.start();
  else socket.stop();
});
setInterval(() => {
  if (!document.hidden) store.clock.value = Date.now();
}, 1_000);
addEventListener("online", () => socket.hurry());
document.addEventListener("visibilitychange", () => {
  if (document.hidden) return;
  store.clock.value = Date.now();
  socket.hurry();
});

render(html`<${Shell} page=${page} wrongLink=${wrongLink} />`, document.getElementById("app"));
await enter();

/** Learn who looks; as long as nobody answers, ask again. */
async function enter() {
  try {
    await store.enter();
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    store.link.value = {
      state: "lost",
      since: store.link.value.since,
      nextTry: Date.now() + ASK_AGAIN_MS,
    };
    setTimeout(enter, ASK_AGAIN_MS);
  }
}

/** @param {keyof typeof PAGES} name */
async function show(name) {
  const module = await PAGES[name]();
  const wanted = store.session.peek().state === "out" ? "sign-in" : route.peek().page;
  if (name === wanted) page.value = { name, Page: module.default };
}

/** A link with a right key leads on without it; with a wrong one it must not stay in sight. */
function takeKeyFromAddress() {
  const query = new URLSearchParams(location.search);
  if (!query.has("key")) return false;
  query.delete("key");
  history.replaceState(null, "", location.pathname + (query.size ? `?${query}` : ""));
  return true;
}

/** @param {string} name */
function titleKey(name) {
  if (name === "sign-in") return "signIn.title";
  return name === "none" ? "notFound.title" : "title.overview";
}
