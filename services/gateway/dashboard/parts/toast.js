/** Messages that stay until they are read. */

import { html } from "../view.js";
import { store } from "../store.js";
import { t } from "../words.js";
import { Icon } from "./icon.js";

export function Toasts() {
  return html`<section class="toasts" aria-label=${t("notices.label")} aria-live="assertive">
    ${store.notices.value.map(
      ({ id, title, text }) => html`<div class="toast" key=${id} data-notice>
        <${Icon} name="alert" />
        <p>
          ${title && !text.startsWith(title) && html`<strong>${title}</strong>${" "}`}
          ${text || t("action.noAnswer")}
        </p>
        <button
          class="button plain icon-only"
          aria-label=${t("action.close")}
          onClick=${() => store.dismiss(id)}
        >
          <${Icon} name="close" />
        </button>
      </div>`,
    )}
  </section>`;
}
