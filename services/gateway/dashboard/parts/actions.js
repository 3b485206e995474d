/** Start, stop, restart. A button that may not be used says why. */

import { html } from "../view.js";
import { hindrance, store } from "../store.js";
import { t } from "../words.js";
import { confirmed } from "./dialog.js";
import { Icon } from "./icon.js";

/** @type {import("../store.js").Verb[]} */
const VERBS = ["start", "stop", "restart"];

/** @param {{plugin: import("../store.js").Plugin, small?: boolean}} props */
export function Actions({ plugin, small }) {
  const at = {
    role: store.session.value.role,
    live: store.link.value.state === "live",
    pending: store.pending.value.has(plugin.name),
  };
  return html`<div class=${small ? "actions small" : "actions"}>
    ${VERBS.map((verb) => {
      const reason = hindrance(plugin, verb, at);
      return html`<button
        key=${verb}
        class="button"
        data-action=${verb}
        aria-label=${t(`action.${verb}Name`, { name: plugin.name })}
        aria-disabled=${reason ? "true" : "false"}
        title=${reason ? t(reason) : undefined}
        onClick=${() => !reason && act(plugin, verb)}
      >
        <${Icon} name=${verb} />${t(`action.${verb}`)}
      </button>`;
    })}
  </div>`;
}

/** @param {import("../store.js").Plugin} plugin @param {import("../store.js").Verb} verb */
async function act(plugin, verb) {
  const { name } = plugin;
  if (verb === "stop") {
    const count = Math.max(1, plugin.replicas?.desired ?? 1);
    const yes = await confirmed({
      title: t("stop.title", { name }),
      text: t("stop.text", { count }),
      yes: t("action.stop"),
      danger: true,
    });
    if (!yes) return;
  }
  await store.act(name, verb);
}
