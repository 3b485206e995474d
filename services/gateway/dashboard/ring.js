/** The log buffer of one page, and what a filter leaves of it. Knows no document. */

export const LEVELS = ["debug", "info", "warn", "error"];

/**
 * @typedef {{plugin: string, level: string, message: string, timestamp: string, seq?: number,
 *   slot?: number, instance?: string, host?: string, logger?: string, trace?: string,
 *   fields?: Record<string, unknown>}} LogEvent
 * @typedef {{event?: LogEvent, gap?: {from: number, to: number}, text?: string}} Row
 */

/** Records in order, without doubles; the oldest leave when there are too many. */
export class Ring {
  /**
   * @param {number} [limit] how many rows are held at most
   * @param {number} [keep] how many are left when the limit is passed: rarely many, not often one
   */
  constructor(limit = 100_000, keep = Math.floor(limit * 0.9)) {
    this.limit = limit;
    this.keep = keep;
    /** @type {Row[]} */
    this.rows = [];
    /** The rows that the filter lets through. @type {Row[]} */
    this.shown = [];
    /** The highest sequence seen. */
    this.last = 0;
    /** How many rows ever left `shown` at its beginning, so that a view can stay where it is. */
    this.left = 0;
    this.level = "debug";
    this.text = "";
    this.#fits = everything;
  }

  #fits;

  /**
   * Take records, in the order of their sequence; those that are here already are dropped.
   * @param {LogEvent[]} events
   */
  take(events) {
    for (const event of events) {
      if (event.seq !== undefined && event.seq <= this.last) continue;
      this.last = event.seq ?? this.last;
      this.#push({ event });
    }
    this.#trim();
  }

  /**
   * Take the news that records are missing.
   * @param {{from: number, to: number}} hole
   */
  takeGap(hole) {
    const from = Math.max(hole.from, this.last + 1);
    if (hole.to < from) return;
    this.last = hole.to;
    const before = this.rows.at(-1)?.gap;
    if (before) before.to = hole.to;
    else this.#push({ gap: { from, to: hole.to } });
    this.#trim();
  }

  /**
   * Show records from a level upward that contain a text, in any case. Gaps are always shown.
   * @param {string} level
   * @param {string} text
   */
  filter(level, text) {
    this.level = level;
    this.text = text;
    const least = LEVELS.indexOf(level);
    const needle = text.trim() === "" ? null : new RegExp(escaped(text.trim()), "iu");
    this.#fits =
      least <= 0 && !needle
        ? everything
        : (/** @type {Row} */ row) =>
            !row.event ||
            (LEVELS.indexOf(row.event.level) >= least && (!needle || needle.test(textOf(row))));
    this.shown = this.rows.filter(this.#fits);
    this.left = 0;
  }

  /** @param {Row} row */
  #push(row) {
    this.rows.push(row);
    if (this.#fits(row)) this.shown.push(row);
  }

  #trim() {
    if (this.rows.length <= this.limit) return;
    const gone = new Set(this.rows.splice(0, this.rows.length - this.keep));
    // Both lists have the same order, so what left the one is a beginning of the other.
    let leaving = 0;
    while (leaving < this.shown.length && gone.has(this.shown[leaving])) leaving += 1;
    this.shown.splice(0, leaving);
    this.left += leaving;
  }
}

/**
 * Return a record as one line of text, which is also what a search looks through.
 * @param {Row} row
 */
export function textOf(row) {
  if (row.text === undefined) {
    const { message, fields, logger } = /** @type {LogEvent} */ (row.event);
    const values = Object.entries(fields ?? {}).map(([name, value]) => `${name}=${plain(value)}`);
    row.text = [message, ...values, logger ?? ""].join(" ");
  }
  return row.text;
}

/** @param {unknown} value */
export function plain(value) {
  return typeof value === "string" ? value : JSON.stringify(value);
}

function everything() {
  return true;
}

/** @param {string} text */
function escaped(text) {
  return text.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&");
}
