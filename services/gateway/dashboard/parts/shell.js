/** What surrounds every page: the way to the others, the state of the connection, preferences. */

import { html } from "../view.js";
import { pluginPath, route } from "../route.js";
import { chooseLanguage, chooseTheme, theme } from "../preferences.js";
import { store } from "../store.js";
import { duration, language, named, t } from "../words.js";
import { Dialog } from "./dialog.js";
import { Icon } from "./icon.js";
import { Dot } from "./status.js";
import { Toasts } from "./toast.js";

/** @param {{page: any, wrongLink: boolean}} props */
export function Shell({ page, wrongLink }) {
  const { name, Page } = page.value;
  const isOut = name === "sign-in";
  return html`<a class="skip" href="#main">${t("app.skip")}</a>
    <div class=${isOut ? "frame bare" : "frame"}>
      ${isOut ? html`<header class="corner"><${Preferences} /></header>` : html`<${Side} />`}
      <div class="content">
        ${!isOut && html`<${LinkBanner} />`}
        <main id="main" tabindex="-1" data-page=${name}>
          ${Page && html`<${Page} key=${name + route.value.plugin} wrongLink=${wrongLink} />`}
        </main>
      </div>
    </div>
    <${Toasts} /><${Dialog} /><${LinkNews} />`;
}

function Side() {
  const { page, plugin } = route.value;
  const { auth, role, version } = store.session.value;
  const here = (/** @type {boolean} */ is) => (is ? "page" : undefined);
  return html`<header class="side">
    <a class="brand" href="/"><${Icon} name="brand" /><span>bkg</span></a>
    <nav class="nav" aria-label=${t("nav.label")}>
      <a class="nav-link" href="/" aria-current=${here(page === "overview")}>
        <${Icon} name="overview" />${t("nav.overview")}
      </a>
      <p class="nav-title" id="nav-plugins">${t("nav.plugins")}</p>
      <ul class="nav-list" aria-labelledby="nav-plugins">
        ${store.names.value.map((one) => {
          const { status } = /** @type {any} */ (store.plugins.value.get(one));
          const shown = store.pending.value.has(one) ? "pending" : status;
          return html`<li key=${one}>
            <a
              class="nav-link"
              href=${pluginPath(one)}
              aria-current=${here(page === "plugin" && plugin === one)}
            >
              <${Dot} status=${shown} />${one}
              <span class="visually-hidden">, ${named("status", status)}</span>
            </a>
          </li>`;
        })}
      </ul>
    </nav>
    <div class="side-foot">
      <${LinkState} />
      <${Preferences} />
      ${role === "viewer" && html`<p class="quiet">${t("session.viewer")}</p>`}
      ${role === "viewer" &&
      html`<button class="button plain" onClick=${() => askForKey()}>${t("session.signIn")}</button>`}
      ${(auth === "session" || /** @type {any} */ (auth) === true) &&
      html`<button class="button plain" onClick=${() => store.signOut()} data-sign-out>
        <${Icon} name="leave" />${t("session.signOut")}
      </button>`}
      ${version && html`<p class="version">bkg ${version}</p>`}
    </div>
  </header>`;
}

function askForKey() {
  store.session.value = { ...store.session.value, state: "out" };
}

function LinkState() {
  const { state } = store.link.value;
  return html`<p class="link-state" data-link-state=${state}>
    <${Dot} status=${state} />${named("link", state)}
  </p>`;
}

/** Old values look old, and the reader learns how old. */
function LinkBanner() {
  const { state, since, nextTry } = store.link.value;
  if (state === "live") return null;
  const passed = store.clock.value - since;
  // A connection that comes at once needs no banner.
  if (state === "connecting" && passed < 2_000) return null;
  const words = store.known.value ? "link.lostFor" : "link.connectingFor";
  const wait = (nextTry ?? 0) - store.clock.value;
  return html`<div class="banner" role="region" aria-label=${t("link.lost")} data-banner>
    <${Icon} name="alert" />
    <p>
      ${t(words, { time: duration(passed) })}${" "}
      <span class="banner-next">
        ${wait > 500
          ? t("link.nextTry", { time: duration(Math.max(1_000, wait)) })
          : t("link.trying")}
      </span>
    </p>
    <button class="button" onClick=${() => store.socket?.hurry()}>${t("link.retry")}</button>
  </div>`;
}

/** The same for those who listen: said once, not every second. */
function LinkNews() {
  const { state } = store.link.value;
  const words = { lost: "link.lostShort", live: "link.backShort", connecting: "" }[state];
  return html`<p class="visually-hidden" role="status">
    ${words && store.known.value ? t(/** @type {any} */ (words)) : ""}
  </p>`;
}

function Preferences() {
  return html`<div class="preferences">
    <div class="switch" role="group" aria-label=${t("settings.language")}>
      ${[
        ["en", "English"],
        ["de", "Deutsch"],
      ].map(
        ([short, name]) => html`<button
          key=${short}
          lang=${short}
          title=${name}
          aria-label=${name}
          aria-pressed=${language.value === short ? "true" : "false"}
          onClick=${() => chooseLanguage(/** @type {any} */ (short))}
          data-language=${short}
        >
          ${short.toUpperCase()}
        </button>`,
      )}
    </div>
    <div class="switch" role="group" aria-label=${t("settings.theme")}>
      ${["light", "dark", "system"].map(
        (one) => html`<button
          key=${one}
          title=${named("theme", one)}
          aria-label=${named("theme", one)}
          aria-pressed=${theme.value === one ? "true" : "false"}
          onClick=${() => chooseTheme(/** @type {any} */ (one))}
          data-theme-choice=${one}
        >
          <${Icon} name=${one} />
        </button>`,
      )}
    </div>
  </div>`;
}
