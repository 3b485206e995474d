/** An address that leads nowhere. */

import { html } from "../view.js";
import { t } from "../words.js";

export default function None() {
  return html`<div class="empty">
    <h1>${t("notFound.title")}</h1>
    <p><a href="/">${t("notFound.back")}</a></p>
  </div>`;
}
