/** One field for the key, and where it is found. */

import { html, useEffect, useRef, useSignal } from "../view.js";
import { ApiError } from "../wire.js";
import { store } from "../store.js";
import { t } from "../words.js";
import { Icon } from "../parts/icon.js";

/** @param {{wrongLink: boolean}} props */
export default function SignIn({ wrongLink }) {
  const field = useRef(/** @type {any} */ (null));
  const wrong = useSignal(wrongLink ? t("signIn.wrongLink") : "");
  const busy = useSignal(false);
  useEffect(() => field.current.focus(), []);

  const submit = async (/** @type {Event} */ event) => {
    event.preventDefault();
    const key = field.current.value.trim();
    if (key === "" || busy.value) {
      if (key === "") wrong.value = t("signIn.empty");
      return;
    }
    busy.value = true;
    try {
      await store.signIn(key);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (error.status === 401) wrong.value = t("signIn.wrong");
      else wrong.value = error.status === 0 ? t("action.noAnswer") : error.message;
      field.current.select();
    } finally {
      busy.value = false;
    }
  };

  const [before, between, after] = t("signIn.hint", { file: "\u0000", command: "\u0000" }).split(
    "\u0000",
  );
  return html`<form class="sign-in" onSubmit=${submit} novalidate>
    <p class="brand big"><${Icon} name="brand" /><span>bkg</span></p>
    <h1>${t("signIn.title")}</h1>
    <label for="key">${t("signIn.key")}</label>
    <input
      id="key"
      ref=${field}
      type="password"
      autocomplete="current-password"
      spellcheck=${false}
      aria-invalid=${wrong.value ? "true" : "false"}
      aria-describedby="key-wrong key-hint"
    />
    <p id="key-wrong" class="wrong" role="alert" data-wrong>${wrong.value}</p>
    <button class="button primary" type="submit" aria-disabled=${busy.value ? "true" : "false"}>
      ${t("signIn.submit")}
    </button>
    <p id="key-hint" class="quiet">
      ${before}<code>admin.key</code>${between}<code>bkg up</code>${after}
    </p>
  </form>`;
}
