/** Icons from the one sprite; they say nothing, the text beside them does. */

import { html } from "../view.js";

const SPRITE = new URL("../icons.svg", import.meta.url).pathname;

/** @param {{name: string}} props */
export function Icon({ name }) {
  return html`<svg class="icon" aria-hidden="true" focusable="false">
    <use href=${`${SPRITE}#${name}`}></use>
  </svg>`;
}
