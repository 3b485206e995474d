/** What travels: requests with their errors, and the socket that comes back by itself. */

/** An answer that is an error, as RFC 9457 has it; `status` 0 means that nobody answered. */
export class ApiError extends Error {
  /** @param {number} status @param {{type?: string, title?: string, detail?: string}} problem */
  constructor(status, problem = {}) {
    super(problem.detail || problem.title || `HTTP ${status}`);
    this.status = status;
    this.type = problem.type;
  }
}

/**
 * Make a request and return its JSON, or null when there is none.
 * @param {"GET" | "POST" | "DELETE"} method
 * @param {string} path
 * @param {object} [body]
 * @returns {Promise<any>}
 * @throws {ApiError}
 */
export async function ask(method, path, body) {
  /** @type {RequestInit} */
  const asked = { method };
  if (body !== undefined) {
    asked.headers = { "Content-Type": "application/json" };
    asked.body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(path, asked);
  } catch {
    throw new ApiError(0, { title: "no answer" });
  }
  const isJson = (response.headers.get("Content-Type") ?? "").includes("json");
  const answer = isJson ? await response.json().catch(() => null) : null;
  if (!response.ok) throw new ApiError(response.status, answer ?? { title: response.statusText });
  return answer;
}

/** The server speaks every 5 s at least: silence for two beats and a bit is a lost connection. */
export const SILENCE_MS = 12_000;
const LOOK_MS = 1_000;
const BACKOFF_MS = { first: 500, most: 15_000 };

/**
 * Return how long to wait before another try: it doubles, and half of it is chance, so that not
 * all pages come back in the same moment.
 * @param {number} failures how many tries failed in a row
 * @param {number} chance from 0 to 1
 */
export function backoffMs(failures, chance) {
  const most = Math.min(BACKOFF_MS.most, BACKOFF_MS.first * 2 ** failures);
  return most / 2 + (most / 2) * chance;
}

/**
 * @typedef {{state: "connecting" | "live" | "lost", since: number, nextTry?: number}} Link
 * @typedef {{topic: string, pluginId?: string, batch?: boolean, backfill?: number}} Wish
 */

/**
 * A connection to `/ws/plugins` that reconnects and then asks again for what was subscribed.
 *
 * It is live when the bootstrap has come, and lost when it closes or falls silent, even while the
 * browser still holds it for open.
 */
export class Socket {
  /** @type {Map<string, {wish: Wish, after: () => number}>} */
  #wishes = new Map();
  /** @type {WebSocket | null} */
  #socket = null;
  /** @type {Link} */
  #link = { state: "connecting", since: 0 };
  #failures = 0;
  #heard = 0;
  #retry = 0;
  #watch = 0;

  /**
   * @param {object} given
   * @param {string} given.url
   * @param {(frame: {type: string, payload: any}) => void} given.onFrame
   * @param {(link: Link) => void} given.onLink
   * @param {() => Promise<boolean>} given.mayRetry asked after a refused connection, because a
   *   browser does not tell why it was refused; false ends the tries
   * @param {(url: string) => WebSocket} [given.open]
   * @param {{now: () => number, after: Function, every: Function, cancel: Function}} [given.time]
   * @param {() => number} [given.chance]
   */
  constructor({ url, onFrame, onLink, mayRetry, open, time, chance }) {
    this.url = url;
    this.onFrame = onFrame;
    this.onLink = onLink;
    this.mayRetry = mayRetry;
    this.open = open ?? ((to) => new WebSocket(to));
    this.time = time ?? {
      now: () => Date.now(),
      after: (ms, then) => setTimeout(then, ms),
      every: (ms, then) => setInterval(then, ms),
      cancel: (timer) => clearTimeout(timer),
    };
    this.chance = chance ?? Math.random;
  }

  /** Connect, and stay connected until `stop`. */
  start() {
    if (this.#watch) return;
    this.#failures = 0;
    this.#tell({ state: "connecting", since: this.time.now() });
    this.#watch = this.time.every(LOOK_MS, () => this.#look());
    this.#connect();
  }

  stop() {
    this.time.cancel(this.#watch);
    this.time.cancel(this.#retry);
    this.#watch = 0;
    this.#drop();
  }

  /** Try at once, for instance because the network came back. */
  hurry() {
    if (!this.#watch || this.#link.state === "live" || this.#socket) return;
    this.time.cancel(this.#retry);
    this.#connect();
  }

  /**
   * Ask for a topic now and after every reconnect.
   * @param {Wish} wish
   * @param {() => number} [after] the last sequence already here; 0 for none
   */
  subscribe(wish, after = () => 0) {
    const entry = { wish, after };
    this.#wishes.set(key(wish), entry);
    if (this.#link.state === "live") this.#send(entry);
  }

  /** @param {Wish} wish */
  unsubscribe({ topic, pluginId }) {
    this.#wishes.delete(key({ topic, pluginId }));
    if (this.#link.state === "live") {
      this.#socket?.send(JSON.stringify({ action: "UNSUB", topic, pluginId }));
    }
  }

  #connect() {
    const socket = this.open(this.url);
    this.#socket = socket;
    this.#heard = this.time.now();
    socket.onmessage = (event) => this.#hear(event.data);
    socket.onclose = () => this.#lose();
  }

  #hear(text) {
    this.#heard = this.time.now();
    const frame = JSON.parse(text);
    if (frame.type === "bootstrap") {
      this.#failures = 0;
      this.#tell({ state: "live", since: this.#heard });
      this.onFrame(frame);
      for (const entry of this.#wishes.values()) this.#send(entry);
      return;
    }
    this.onFrame(frame);
  }

  #send({ wish, after }) {
    const last = after();
    // With `after` the server brings all it can; a back-fill would cut that short.
    const { backfill, ...rest } = wish;
    const since = last > 0 ? { after: last } : { backfill };
    this.#socket?.send(JSON.stringify({ action: "SUB", ...rest, ...since }));
  }

  #look() {
    if (this.#socket && this.time.now() - this.#heard > SILENCE_MS) this.#lose();
  }

  async #lose() {
    this.#drop();
    const now = this.time.now();
    const wait = backoffMs(this.#failures, this.chance());
    const refused = this.#link.state !== "live";
    const since = this.#link.state === "live" ? this.#heard : this.#link.since;
    this.#failures += 1;
    this.#tell({ state: "lost", since, nextTry: now + wait });
    this.#retry = this.time.after(wait, () => this.#connect());
    if (refused && !(await this.mayRetry())) this.stop();
  }

  /** Let go of the connection; a half open one would tell us of its end only much later. */
  #drop() {
    const socket = this.#socket;
    this.#socket = null;
    if (!socket) return;
    socket.onmessage = null;
    socket.onclose = null;
    socket.close();
  }

  /** @param {Link} link */
  #tell(link) {
    this.#link = link;
    this.onLink(link);
  }
}

/** @param {Wish} wish */
function key({ topic, pluginId }) {
  return `${topic} ${pluginId ?? ""}`;
}
