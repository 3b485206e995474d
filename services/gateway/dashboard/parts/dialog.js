/** A question that must be answered before anything else. */

import { html, signal, useEffect, useRef } from "../view.js";
import { t } from "../words.js";

/**
 * @typedef {{title: string, text: string, yes: string, danger?: boolean}} Question
 * @type {import("../view.js").Signal<(Question & {answer: (yes: boolean) => void}) | null>}
 */
const question = signal(null);

/**
 * Ask, and return whether the answer was yes.
 * @param {Question} asked
 * @returns {Promise<boolean>}
 */
export function confirmed(asked) {
  return new Promise((answer) => {
    question.value = { ...asked, answer };
  });
}

export function Dialog() {
  const dialog = useRef(null);
  const asked = question.value;
  useEffect(() => {
    if (asked) dialog.current.showModal();
  }, [asked]);
  if (!asked) return null;
  const close = () => {
    question.value = null;
    asked.answer(dialog.current.returnValue === "yes");
  };
  const answer = (/** @type {string} */ value) => () => dialog.current.close(value);
  return html`<dialog
    class="dialog"
    ref=${dialog}
    aria-labelledby="dialog-title"
    aria-describedby="dialog-text"
    onClose=${close}
    data-dialog
  >
    <h2 id="dialog-title">${asked.title}</h2>
    <p id="dialog-text">${asked.text}</p>
    <div class="dialog-buttons">
      <button class="button" onClick=${answer("")} data-answer="no">${t("action.cancel")}</button>
      <button
        class=${asked.danger ? "button danger" : "button primary"}
        onClick=${answer("yes")}
        data-answer="yes"
      >
        ${asked.yes}
      </button>
    </div>
  </dialog>`;
}
