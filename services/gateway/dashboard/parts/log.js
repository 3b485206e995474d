/** A plugin's log as it happens: the tools above it, the list, the line that is looked at. */

import { batch, html, useEffect, useSignal } from "../view.js";
import { LEVELS, plain, textOf } from "../ring.js";
import { choose, route } from "../route.js";
import { recall, remember } from "../preferences.js";
import { store } from "../store.js";
import { dateTime, named, number, t } from "../words.js";
import { Icon } from "./icon.js";
import { LogList } from "./log-list.js";

const TYPING_MS = 150;

/** @param {{plugin: string}} props */
export function Log({ plugin }) {
  const query = route.value.query;
  const level = useSignal(levelOf(query.get("level") ?? recall("log.level")));
  const text = useSignal(query.get("q") ?? "");
  const follow = useSignal(true);
  /** How many lines have come since the list stopped following. */
  const fresh = useSignal(0);
  /** @type {import("../view.js").Signal<import("../ring.js").Row | null>} */
  const chosen = useSignal(null);

  useEffect(() => {
    store.openLog(plugin);
    store.filterLog(level.value, text.value);
    return () => store.closeLog(plugin);
  }, [plugin]);
  useEffect(() => {
    const timer = setTimeout(() => {
      store.filterLog(level.value, text.value);
      choose({ level: level.value === LEVELS[0] ? "" : level.value, q: text.value.trim() });
    }, TYPING_MS);
    return () => clearTimeout(timer);
  }, [level.value, text.value]);

  return html`<div class="log">
    <div class="log-tools">
      <label class="visually-hidden" for="log-level">${t("log.level")}</label>
      <select
        id="log-level"
        value=${level.value}
        onChange=${(/** @type {any} */ event) => {
          level.value = event.target.value;
          remember("log.level", level.value);
        }}
      >
        ${LEVELS.map(
          (one) => html`<option key=${one} value=${one} selected=${one === level.value}>
            ${named("log.levelFrom", one)}
          </option>`,
        )}
      </select>
      <span class="search">
        <${Icon} name="search" />
        <input
          type="search"
          aria-label=${t("log.search")}
          placeholder=${t("log.search")}
          value=${text.value}
          onInput=${(/** @type {any} */ event) => {
            text.value = event.target.value;
          }}
          data-log-search
        />
      </span>
      <${Count} />
      <button
        class="button"
        aria-pressed=${follow.value ? "true" : "false"}
        onClick=${() => batch(() => {
          follow.value = !follow.value;
          fresh.value = 0;
        })}
        data-log-follow
      >
        <${Icon} name="down" />${t("log.follow")}
      </button>
    </div>
    <div class=${chosen.value ? "log-body split" : "log-body"}>
      <div class="log-stage">
        <${LogList} plugin=${plugin} follow=${follow} fresh=${fresh} chosen=${chosen} />
        ${!follow.value &&
        fresh.value > 0 &&
        html`<button
          class="button primary log-fresh"
          onClick=${() => batch(() => {
            follow.value = true;
            fresh.value = 0;
          })}
          data-log-new
        >
          <${Icon} name="down" />${t("log.newLines", { count: fresh.value })}
        </button>`}
      </div>
      ${chosen.value && html`<${Detail} row=${chosen.value} close=${() => (chosen.value = null)} />`}
    </div>
  </div>`;
}

function Count() {
  // Read for its changes: the ring itself is no signal.
  void store.logged.value;
  const { rows, shown } = store.ring;
  return html`<span class="log-count" data-log-count>
    ${rows.length === shown.length
      ? t("log.lines", { count: rows.length })
      : t("log.linesOf", { count: shown.length, total: rows.length })}
  </span>`;
}

/** @param {{row: import("../ring.js").Row, close: () => void}} props */
function Detail({ row, close }) {
  const copied = useSignal("");
  const { event } = row;
  if (!event) return null;
  const { fields = {}, timestamp, level, message } = event;
  const copy = (/** @type {string} */ what, /** @type {string} */ text) => async () => {
    await navigator.clipboard.writeText(text);
    copied.value = what;
  };
  const line = `${timestamp} ${level.toUpperCase()} ${textOf(row)}`.trim();
  /** @type {[string, unknown][]} */
  const known = [
    [t("log.time"), `${dateTime(timestamp)} (${timestamp})`],
    [t("log.level"), named("level", level)],
    [t("instance.slot"), event.slot],
    [t("log.instance"), event.instance],
    [t("log.host"), event.host],
    [t("log.logger"), event.logger],
    [t("log.trace"), event.trace],
    [t("log.sequence"), event.seq === undefined ? undefined : number(event.seq)],
  ];
  return html`<aside
    class="log-detail"
    aria-label=${t("log.details")}
    data-log-detail
    onKeyDown=${(/** @type {KeyboardEvent} */ pressed) => pressed.key === "Escape" && close()}
  >
    <div class="log-detail-head">
      <h3 class="log-detail-message">${message}</h3>
      <button class="button plain icon-only" aria-label=${t("action.close")} onClick=${close}>
        <${Icon} name="close" />
      </button>
    </div>
    <div class="log-detail-body" tabindex="0" role="group" aria-label=${t("log.details")}>
      <dl class="pairs strong">
        ${Object.entries(fields).map(
          ([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${plain(value)}</dd></div>`,
        )}
      </dl>
      <dl class="pairs">
        ${known
          .filter(([, value]) => value !== undefined && value !== null)
          .map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${value}</dd></div>`)}
      </dl>
    </div>
    ${globalThis.isSecureContext &&
    html`<div class="log-detail-tools">
      <button class="button" onClick=${copy("line", line)}>
        ${t(copied.value === "line" ? "log.copied" : "log.copyLine")}
      </button>
      <button class="button" onClick=${copy("json", JSON.stringify(event, null, 2))}>
        ${t(copied.value === "json" ? "log.copied" : "log.copyJson")}
      </button>
    </div>`}
  </aside>`;
}

/** @param {string | null} text */
function levelOf(text) {
  return text !== null && LEVELS.includes(text) ? text : LEVELS[0];
}
