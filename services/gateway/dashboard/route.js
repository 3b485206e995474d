/** The address: which page, and what is chosen on it. */

import { signal } from "./view.js";

/**
 * @typedef {{page: "overview" | "plugin" | "none", plugin: string, query: URLSearchParams}} Route
 */

/** @type {import("./view.js").Signal<Route>} */
export const route = signal(routeOf("/", ""));

/**
 * @param {string} path
 * @param {string} search
 * @returns {Route}
 */
export function routeOf(path, search) {
  const query = new URLSearchParams(search);
  if (path === "/" || path === "/plugins" || path === "/plugins/") {
    return { page: "overview", plugin: "", query };
  }
  const found = /^\/plugins\/([^/]+)\/?$/.exec(path);
  return found
    ? { page: "plugin", plugin: decoded(found[1]), query }
    : { page: "none", plugin: "", query };
}

/** Follow the address bar, the Back button and every link of ours. */
export function followAddress() {
  const read = () => {
    route.value = routeOf(location.pathname, location.search);
  };
  addEventListener("popstate", read);
  document.addEventListener("click", (event) => {
    const link = /** @type {Element} */ (event.target).closest?.("a[href^='/']");
    const plain = event.button === 0 && !(event.ctrlKey || event.metaKey || event.shiftKey);
    if (!link || !plain || event.defaultPrevented || link.hasAttribute("download")) return;
    event.preventDefault();
    go(/** @type {HTMLAnchorElement} */ (link).href);
    // The link may leave with its page; who uses the keyboard goes on from the new one.
    document.getElementById("main")?.focus({ preventScroll: true });
  });
  read();
}

/** @param {string} address */
export function go(address) {
  if (address !== location.href) history.pushState(null, "", address);
  route.value = routeOf(location.pathname, location.search);
  scrollTo(0, 0);
}

/**
 * Write choices into the address, without a step for the Back button; "" takes one out.
 * @param {Record<string, string>} choices
 */
export function choose(choices) {
  const query = new URLSearchParams(location.search);
  for (const [name, value] of Object.entries(choices)) {
    if (value) query.set(name, value);
    else query.delete(name);
  }
  const search = query.size ? `?${query}` : "";
  history.replaceState(null, "", location.pathname + search);
  route.value = routeOf(location.pathname, search);
}

/** @param {string} name */
export function pluginPath(name) {
  return `/plugins/${encodeURIComponent(name)}`;
}

/** @param {string} text */
function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}
