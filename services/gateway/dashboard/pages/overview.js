/** Every plugin on a card: does it run, what does it use, what is wrong. */

import { html } from "../view.js";
import { pluginPath } from "../route.js";
import { store } from "../store.js";
import { bytes, number, percent, t } from "../words.js";
import { Actions } from "../parts/actions.js";
import {
  Capabilities, Cpu, Fact, Fault, Memory, Since, holdings, restartsOf, sinceOf,
} from "../parts/facts.js";
import { Icon } from "../parts/icon.js";
import { Status } from "../parts/status.js";

export default function Overview() {
  const names = store.names.value;
  return html`<div class="page-head">
      <h1>${t("title.overview")}</h1>
      ${store.known.value && html`<${Summary} />`}
      <button
        class="button plain push"
        onClick=${() => store.refresh()}
        aria-disabled=${store.link.value.state === "lost" ? "true" : "false"}
      >
        <${Icon} name="restart" />${t("action.refresh")}
      </button>
    </div>
    ${!store.known.value && html`<p class="quiet" role="status">${t("overview.loading")} …</p>`}
    ${store.known.value &&
    names.length === 0 &&
    html`<div class="empty">
      <h2>${t("overview.none")}</h2>
      <p class="quiet">${t("overview.noneText")}</p>
    </div>`}
    <div class="cards data">${names.map((name) => html`<${Card} key=${name} name=${name} />`)}</div>`;
}

function Summary() {
  const plugins = [...store.plugins.value.values()];
  const running = plugins.filter(({ status }) => status === "running").length;
  const faults = store.faults.value;
  const measured = plugins.flatMap(({ name }) => store.measured(name)?.last ?? []);
  const cpu = measured.reduce((sum, one) => sum + one.cpu, 0);
  const memory = measured.reduce((sum, one) => sum + one.memBytes, 0);
  return html`<ul class="summary data">
    <li>${t("overview.running", { count: running, total: plugins.length })}</li>
    <li class=${faults > 0 ? "bad" : ""}>
      ${faults > 0 ? t("overview.faults", { count: faults }) : t("overview.noFaults")}
    </li>
    ${measured.length > 0 &&
    html`<li>${t("plugin.cpu")} ${percent(cpu)}</li>
      <li>${t("plugin.memory")} ${bytes(memory)}</li>`}
  </ul>`;
}

/** @param {{name: string}} props */
function Card({ name }) {
  const plugin = store.plugins.value.get(name);
  if (!plugin) return null;
  const pending = store.pending.value.get(name);
  const { ready, desired } = plugin.replicas ?? { ready: 0, desired: 0 };
  const since = sinceOf(plugin);
  const running = plugin.status === "running" || plugin.status === "degraded";
  return html`<article
    class="card"
    data-plugin=${name}
    data-status=${plugin.status}
    data-pending=${pending?.verb}
    aria-labelledby=${`card-${name}`}
  >
    <header class="card-head">
      <h2 id=${`card-${name}`}><a class="card-link" href=${pluginPath(name)}>${name}</a></h2>
      <${Status} status=${plugin.status} pending=${pending} />
    </header>
    <p class="card-text">${plugin.config?.description ?? ""}</p>
    <${Fault} plugin=${plugin} />
    <dl class="gauges">
      <${Cpu} name=${name} />
      <${Memory} name=${name} />
    </dl>
    <dl class="facts">
      <${Fact} name="replicas" title=${t("plugin.replicas")}>
        ${t("plugin.replicasValue", { ready, desired })}
      </${Fact}>
      ${holdings(store.measured(name)?.last).map(
        ([title, value]) => html`<${Fact} key=${title} name="holding" title=${title}>${value}</${Fact}>`,
      )}
      ${since &&
      html`<${Fact} name="since" title=${t(running ? "plugin.uptime" : "plugin.downtime")}>
        <${Since} since=${since} />
      </${Fact}>`}
      <${Fact} name="restarts" title=${t("plugin.restarts")}>${number(restartsOf(plugin))}</${Fact}>
    </dl>
    <${Capabilities} names=${plugin.capabilities ?? []} />
    <${Actions} plugin=${plugin} small=${true} />
  </article>`;
}
