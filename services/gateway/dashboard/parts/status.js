/** A status, told by colour, by shape and in words. */

import { html } from "../view.js";
import { named } from "../words.js";

/**
 * @param {{status: string, pending?: {verb: string}}} props `pending` is what was asked for and
 *   is not answered yet
 */
export function Status({ status, pending }) {
  const shown = pending ? "pending" : status;
  const words = pending ? named("pending", pending.verb) : named("status", status);
  return html`<span class="chip" data-look=${shown} data-chip>
    <${Dot} status=${shown} />${words}
  </span>`;
}

/** @param {{status: string}} props */
export function Dot({ status }) {
  return html`<span class="dot" data-look=${status} aria-hidden="true"></span>`;
}
