/** What a reader chose about the page itself: kept in this browser, and nowhere else. */

import { bestLanguage, language } from "./words.js";
import { effect, signal } from "./view.js";

/** @typedef {"light" | "dark" | "system"} Theme */

/** @type {import("./view.js").Signal<Theme>} */
export const theme = signal("system");

/** Read the choices, and write each change of them to the document and to the browser. */
export function followPreferences() {
  const chosen = recall("language");
  language.value = bestLanguage(chosen ? [chosen] : navigator.languages);
  const kept = recall("theme");
  if (kept === "light" || kept === "dark") theme.value = kept;
  effect(() => {
    document.documentElement.lang = language.value;
  });
  effect(() => {
    if (theme.value === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme.value;
  });
}

/** @param {import("./words.js").Language} to */
export function chooseLanguage(to) {
  language.value = to;
  remember("language", to);
}

/** @param {Theme} to */
export function chooseTheme(to) {
  theme.value = to;
  remember("theme", to === "system" ? null : to);
}

/** @param {string} name */
export function recall(name) {
  try {
    return localStorage.getItem(`bkg.${name}`);
  } catch {
    return null; // Storage may be forbidden; then nothing is remembered.
  }
}

/** @param {string} name @param {string | null} value */
export function remember(name, value) {
  try {
    if (value === null) localStorage.removeItem(`bkg.${name}`);
    else localStorage.setItem(`bkg.${name}`, value);
  } catch {
    // As above.
  }
}
