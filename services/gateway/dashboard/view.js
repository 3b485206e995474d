/** The view library as the rest of the page knows it; nobody else imports from vendor/. */

import { h } from "./vendor/preact.js";
import htm from "./vendor/htm.js";

export { Fragment, render } from "./vendor/preact.js";
export { useEffect, useLayoutEffect, useRef } from "./vendor/preact-hooks.js";
export { batch, computed, effect, signal, useComputed, useSignal } from "./vendor/signals.js";

/** Turn a template into elements. Markup in it is not type-checked: look at the page. */
export const html = htm.bind(h);
