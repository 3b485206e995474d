/** All state that more than one part of the page shares, and the only ways to change it. */

import { ApiError, ask } from "./wire.js";
import { Ring } from "./ring.js";
import { batch, computed, signal } from "./view.js";

const HISTORY_MS = 5 * 60_000;
const SKEW_MIN_MS = 2_000;
const LOG_BACKFILL = 500;

/**
 * @typedef {{slot: number, host: string, status: string, since: string, restarts: number,
 *   id?: string, pid?: number, port?: number | "internal", lastExit?: string, error?: string,
 *   version?: string, lastHeartbeat?: string, generation?: number}} Instance
 * @typedef {{name: string, status: string, capabilities: string[], config: any,
 *   replicas: {desired: number, ready: number}, instances: Instance[], generation: number,
 *   revision: number, pid?: number, port?: number | "internal", lastHeartbeat?: string,
 *   error?: string}} Plugin
 * @typedef {{plugin: string, cpu: number, memBytes: number, timestamp: string,
 *   modelsLoaded?: number, datasets?: number, entries?: number}} Snapshot
 * @typedef {{time: number, cpu: number, memBytes: number}} Point
 * @typedef {"start" | "stop" | "restart"} Verb
 */

/** What is observed is never edited here: what was asked for lies over it until it is answered. */
export class Store {
  /** @param {{request?: typeof ask, soon?: (then: () => void) => void, now?: () => number}} given */
  constructor({ request = ask, soon = nextFrame, now = () => Date.now() } = {}) {
    this.request = request;
    this.soon = soon;
    this.localNow = now;

    /** Who looks at the page: unknown yet, out, or in with a role. */
    this.session = signal({ state: "unknown", role: "", auth: "", version: "" });
    /** @type {import("./view.js").Signal<import("./wire.js").Link>} */
    this.link = signal({ state: "connecting", since: now() });
    /** @type {import("./view.js").Signal<ReadonlyMap<string, Plugin>>} */
    this.plugins = signal(new Map());
    /** @type {import("./view.js").Signal<ReadonlyMap<string, {last: Snapshot, points: Point[]}>>} */
    this.telemetry = signal(new Map());
    /** @type {import("./view.js").Signal<ReadonlyMap<string, {verb: Verb, since: number}>>} */
    this.pending = signal(new Map());
    /** @type {import("./view.js").Signal<{id: number, title: string, text: string}[]>} */
    this.notices = signal([]);
    /** Whether the server has told what there is. */
    this.known = signal(false);
    /** The page's own clock, for everything that says how long something lasts. */
    this.clock = signal(now());
    /** Counts the changes of the log; the records themselves are in `ring`. */
    this.logged = signal(0);
    this.ring = new Ring();

    this.names = computed(() => [...this.plugins.value.keys()].sort());
    this.faults = computed(
      () => [...this.plugins.value.values()].filter((plugin) => isFault(plugin)).length,
    );

    /** @type {import("./wire.js").Socket | null} */
    this.socket = null;
    this.skewMs = 0;
    this.noticeId = 0;
    this.logSoon = false;
  }

  // --- What comes in -----------------------------------------------------------------------------

  /** @param {{type: string, payload: any}} frame */
  apply({ type, payload }) {
    if (type === "bootstrap") this.#replace(payload);
    else if (type === "status") this.#applyStatus(payload);
    else if (type === "telemetry") this.#applyTelemetry(payload);
    else if (type === "logs") this.#applyLogs(Array.isArray(payload) ? payload : [payload]);
    else if (type === "gap") this.#applyGap(payload);
    else if (type === "tick") this.#applyTime(payload.time);
    else if (type === "error") this.notify("", payload.message ?? payload.detail ?? "");
  }

  /** The present time of the server, which the browser's clock may not show. */
  get now() {
    return this.clock.value + this.skewMs;
  }

  /** @param {{plugins: Plugin[], telemetry: Snapshot[]}} bootstrap */
  #replace({ plugins, telemetry }) {
    batch(() => {
      this.plugins.value = new Map(plugins.map((plugin) => [plugin.name, plugin]));
      const kept = [...this.telemetry.value].filter(([name]) => this.plugins.value.has(name));
      this.telemetry.value = new Map(kept);
      for (const snapshot of telemetry) this.#applyTelemetry(snapshot);
      this.known.value = true;
    });
  }

  /** @param {Plugin} plugin */
  #applyStatus(plugin) {
    const before = this.plugins.value.get(plugin.name);
    if (before && (plugin.revision ?? 0) < (before.revision ?? 0)) return;
    this.plugins.value = new Map(this.plugins.value).set(plugin.name, plugin);
  }

  /** @param {Snapshot} snapshot */
  #applyTelemetry(snapshot) {
    const time = Date.parse(snapshot.timestamp);
    const before = this.telemetry.value.get(snapshot.plugin)?.points ?? [];
    const latest = before.at(-1);
    // The bootstrap and the answer to SUB bring the same snapshot twice.
    if (latest && latest.time >= time) return;
    const points = before.filter((point) => point.time > time - HISTORY_MS);
    points.push({ time, cpu: snapshot.cpu, memBytes: snapshot.memBytes });
    this.telemetry.value = new Map(this.telemetry.value).set(snapshot.plugin, {
      last: snapshot,
      points,
    });
  }

  /** @param {import("./ring.js").LogEvent[]} events */
  #applyLogs(events) {
    this.ring.take(events);
    this.#logChanged();
  }

  /** @param {{from: number, to: number}} gap */
  #applyGap(gap) {
    this.ring.takeGap(gap);
    this.#logChanged();
  }

  /** Many frames may come between two pictures; the list is drawn once for all of them. */
  #logChanged() {
    if (this.logSoon) return;
    this.logSoon = true;
    this.soon(() => {
      this.logSoon = false;
      this.logged.value += 1;
    });
  }

  /** @param {string} time */
  #applyTime(time) {
    const skew = Date.parse(time) - this.localNow();
    if (Math.abs(skew - this.skewMs) > SKEW_MIN_MS) {
      this.skewMs = Math.abs(skew) > SKEW_MIN_MS ? skew : 0;
    }
  }

  /**
   * Return what a plugin uses; nothing once it has ended, though its last numbers are kept.
   * @param {string} name
   */
  measured(name) {
    const status = this.plugins.value.get(name)?.status;
    const ended = status === undefined || status === "stopped" || status === "error";
    return ended ? undefined : this.telemetry.value.get(name);
  }

  // --- What the reader does ----------------------------------------------------------------------

  /** Learn who looks at the page. Throws what `ask` throws, except for 401. */
  async enter() {
    try {
      const told = await this.request("GET", "/auth/session");
      this.session.value = { state: "in", role: told.role, auth: told.auth, version: told.version };
      return true;
    } catch (error) {
      if (!(error instanceof ApiError) || error.status !== 401) throw error;
      this.session.value = { state: "out", role: "", auth: "", version: "" };
      return false;
    }
  }

  /** @param {string} key */
  async signIn(key) {
    await this.request("POST", "/auth/session", { key });
    await this.enter();
  }

  async signOut() {
    await this.request("DELETE", "/auth/session");
    this.session.value = { state: "out", role: "", auth: "", version: "" };
  }

  /**
   * Start, stop or restart a plugin; until it is answered this lies over its status.
   * @param {string} name
   * @param {Verb} verb
   */
  async act(name, verb) {
    if (this.pending.value.has(name)) return;
    this.#setPending(name, { verb, since: this.localNow() });
    try {
      const answer = await this.request(
        "POST",
        `/api/plugins/${encodeURIComponent(name)}/${verb}`,
      );
      if (answer?.name === name) this.#applyStatus(answer);
    } catch (error) {
      this.#failed(name, error);
    } finally {
      this.#setPending(name, null);
    }
  }

  /** Read all plugins anew, for those who trust a button more than a socket. */
  async refresh() {
    try {
      for (const plugin of await this.request("GET", "/api/plugins")) this.#applyStatus(plugin);
    } catch (error) {
      this.#failed("", error);
    }
  }

  /** @param {string} plugin */
  openLog(plugin) {
    this.ring = new Ring();
    this.logged.value += 1;
    const ring = this.ring;
    this.socket?.subscribe(
      { topic: "logs", pluginId: plugin, batch: true, backfill: LOG_BACKFILL },
      () => ring.last,
    );
  }

  /** @param {string} plugin */
  closeLog(plugin) {
    this.socket?.unsubscribe({ topic: "logs", pluginId: plugin });
  }

  /** @param {string} level @param {string} text */
  filterLog(level, text) {
    this.ring.filter(level, text);
    this.logged.value += 1;
  }

  /** @param {string} title @param {string} text */
  notify(title, text) {
    this.noticeId += 1;
    // More than a few are no help; the newest says most.
    this.notices.value = [...this.notices.value, { id: this.noticeId, title, text }].slice(-4);
  }

  /** @param {number} id */
  dismiss(id) {
    this.notices.value = this.notices.value.filter((notice) => notice.id !== id);
  }

  /** @param {string} title @param {unknown} error */
  #failed(title, error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status === 401) this.session.value = { ...this.session.value, state: "out" };
    else this.notify(title, error.status === 0 ? "" : error.message);
  }

  /** @param {string} name @param {{verb: Verb, since: number} | null} what */
  #setPending(name, what) {
    const pending = new Map(this.pending.value);
    if (what) pending.set(name, what);
    else pending.delete(name);
    this.pending.value = pending;
  }
}

/** @param {Plugin} plugin */
export function isFault(plugin) {
  return plugin.status === "error" || plugin.status === "degraded";
}

/**
 * Return why a plugin cannot be told to do something just now, as a key of the words; "" if it can.
 * @param {Plugin} plugin
 * @param {Verb} verb
 * @param {{role: string, pending: boolean, live: boolean}} at
 */
export function hindrance(plugin, verb, { role, pending, live }) {
  if (role !== "admin") return "action.needsAdmin";
  if (!live) return "action.needsLink";
  if (pending) return "action.pending";
  const wanted = plugin.replicas ? plugin.replicas.desired > 0 : plugin.status !== "stopped";
  if (!plugin.config) return "action.notOurs";
  if (verb === "start" && wanted) return "action.isStarted";
  if (verb !== "start" && !wanted) return "action.isStopped";
  return "";
}

/** @param {() => void} then */
function nextFrame(then) {
  // A hidden page draws nothing; what it missed is drawn when it is seen again.
  requestAnimationFrame(then);
}

export const store = new Store();
