/** What the page says, in the reader's language: words, numbers, sizes, times. */

import { de } from "./de.js";
import { en } from "./en.js";
import { signal } from "./view.js";

/** @typedef {"en" | "de"} Language */
/** @typedef {keyof typeof en} Key */

const DICTIONARIES = { en, de };

/** @type {import("./view.js").Signal<Language>} */
export const language = signal("en");

/**
 * Return the first language of the reader's that we speak.
 * @param {readonly string[]} wanted
 * @returns {Language}
 */
export function bestLanguage(wanted) {
  for (const one of wanted) {
    const short = one.toLowerCase().split(/[-_]/)[0];
    if (short === "de" || short === "en") return short;
  }
  return "en";
}

/**
 * Say something. A phrase with forms for one and many takes its form from `count`.
 * @param {Key} key
 * @param {Record<string, string | number>} [values]
 */
export function t(key, values = {}) {
  const phrase = DICTIONARIES[language.value][key];
  const text =
    typeof phrase === "string"
      ? phrase
      : /** @type {any} */ (phrase)[plurals().select(Number(values.count)) === "one" ? "one" : "other"];
  return text.replace(/\{(\w+)\}/g, (/** @type {string} */ _, /** @type {string} */ name) =>
    typeof values[name] === "number" ? number(values[name]) : (values[name] ?? ""),
  );
}

/** Return the words for a status or a level; one that we do not know speaks for itself. */
export function named(/** @type {string} */ group, /** @type {string} */ name) {
  const key = /** @type {Key} */ (`${group}.${name}`);
  return key in en ? t(key) : name;
}

/** @param {number} value @param {number} [digits] at most, behind the point */
export function number(value, digits = 0) {
  return format("number", digits, () => new Intl.NumberFormat(language.value, {
    maximumFractionDigits: digits,
  })).format(value);
}

/** @param {number} value percent of one core */
export function percent(value) {
  return `${number(value, value < 10 ? 1 : 0)} %`;
}

/** @param {number} value */
export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let size = value;
  let unit = 0;
  while (size >= 1024 && unit < units.length - 1) {
    size /= 1024;
    unit += 1;
  }
  return `${number(size, size < 10 && unit > 0 ? 1 : 0)} ${units[unit]}`;
}

/** Return a duration by its two largest units: `3 d 4 h`, `12 min 5 s`, `8 s`. */
export function duration(/** @type {number} */ ms) {
  const seconds = Math.max(0, Math.floor(ms / 1000));
  const parts = [
    [Math.floor(seconds / 86_400), t("unit.day")],
    [Math.floor(seconds / 3600) % 24, t("unit.hour")],
    [Math.floor(seconds / 60) % 60, t("unit.minute")],
    [seconds % 60, t("unit.second")],
  ];
  const first = parts.findIndex(([count]) => Number(count) > 0);
  if (first < 0) return `0 ${t("unit.second")}`;
  return parts
    .slice(first, first + 2)
    .filter(([count]) => Number(count) > 0)
    .map(([count, unit]) => `${count} ${unit}`)
    .join(" ");
}

/** Return a time of day with milliseconds, in the viewer's zone. */
export function timeOfDay(/** @type {string} */ iso) {
  return format("time", 3, () => new Intl.DateTimeFormat(language.value, {
    hour: "2-digit", minute: "2-digit", second: "2-digit", fractionalSecondDigits: 3,
    hourCycle: "h23",
  })).format(new Date(iso));
}

/** Return a date and time, in the viewer's zone. */
export function dateTime(/** @type {string} */ iso) {
  return format("date", 0, () => new Intl.DateTimeFormat(language.value, {
    dateStyle: "medium", timeStyle: "medium",
  })).format(new Date(iso));
}

/** @type {Map<string, any>} */
const formats = new Map();

/**
 * Making a formatter takes longer than using it a hundred times.
 * @template T
 * @param {string} kind
 * @param {number} detail
 * @param {() => T} make
 * @returns {T}
 */
function format(kind, detail, make) {
  const key = `${language.value} ${kind} ${detail}`;
  if (!formats.has(key)) formats.set(key, make());
  return formats.get(key);
}

function plurals() {
  return format("plural", 0, () => new Intl.PluralRules(language.value));
}
