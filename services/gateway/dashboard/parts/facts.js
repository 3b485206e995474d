/** Numbers about a plugin, gathered in one place for the cards and the page. */

import { html } from "../view.js";
import { store } from "../store.js";
import { bytes, dateTime, duration, named, number, percent, t } from "../words.js";
import { Sparkline } from "./sparkline.js";

const MIB = 1024 * 1024;
const CPU_LEAST = 10;
const MEMORY_LEAST = 64 * MIB;

/**
 * Return what a plugin holds, as far as it counts something.
 * @param {import("../store.js").Snapshot | undefined} snapshot
 * @returns {[string, string][]} name and value
 */
export function holdings(snapshot) {
  return /** @type {[string, number | undefined][]} */ ([
    [t("plugin.models"), snapshot?.modelsLoaded],
    [t("plugin.datasets"), snapshot?.datasets],
    [t("plugin.entries"), snapshot?.entries],
  ])
    .filter(([, count]) => count !== undefined && count !== null)
    .map(([name, count]) => [name, number(Number(count))]);
}

/** @param {import("../store.js").Plugin} plugin */
export function restartsOf(plugin) {
  return (plugin.instances ?? []).reduce((sum, { restarts }) => sum + (restarts ?? 0), 0);
}

/**
 * Return since when a plugin is what it is: the first of its instances in that status.
 * @param {import("../store.js").Plugin} plugin
 */
export function sinceOf(plugin) {
  const instances = plugin.instances ?? [];
  const same = instances.filter(({ status }) => status === plugin.status);
  const times = (same.length > 0 ? same : instances).map(({ since }) => since).filter(Boolean);
  return times.sort().at(0);
}

/** Time that has passed, with the moment itself when pointed at. @param {{since?: string}} props */
export function Since({ since }) {
  if (!since) return "–";
  return html`<time datetime=${since} title=${`${dateTime(since)} · ${since}`}>
    ${duration(store.now - Date.parse(since))}
  </time>`;
}

/** @param {{name: string}} props */
export function Cpu({ name }) {
  const measured = store.measured(name);
  const value = measured ? percent(measured.last.cpu) : "–";
  return html`<${Measured}
    title=${t("plugin.cpu")}
    value=${value}
    label=${t("plugin.cpuChart", { name, value })}
    points=${(measured?.points ?? []).map(({ time, cpu }) => ({ time, value: cpu }))}
    least=${CPU_LEAST}
    kind="cpu"
  />`;
}

/** @param {{name: string}} props */
export function Memory({ name }) {
  const measured = store.measured(name);
  const plugin = store.plugins.value.get(name);
  // The limit is one instance's, the number that of all of them together.
  const most = (plugin?.config?.memoryMaxBytes ?? 0) * Math.max(1, plugin?.replicas?.ready ?? 1);
  const used = measured ? bytes(measured.last.memBytes) : "–";
  const value = most ? t("plugin.memoryOf", { used, most: bytes(most) }) : used;
  return html`<${Measured}
    title=${t("plugin.memory")}
    value=${value}
    label=${t("plugin.memoryChart", { name, value })}
    points=${(measured?.points ?? []).map(({ time, memBytes }) => ({ time, value: memBytes }))}
    least=${MEMORY_LEAST}
    kind="memory"
  />`;
}

/** @param {any} props */
function Measured({ title, value, label, points, least, kind }) {
  return html`<div class="fact" data-fact=${kind}>
    <dt>${title}</dt>
    <dd>
      <span class="figure">${value}</span>
      <${Sparkline} points=${points} least=${least} label=${label} />
    </dd>
  </div>`;
}

/** @param {{name: string, title: string, children?: any}} props */
export function Fact({ name, title, children }) {
  return html`<div class="fact" data-fact=${name}>
    <dt>${title}</dt>
    <dd><span class="figure">${children}</span></dd>
  </div>`;
}

/** @param {{names: string[]}} props */
export function Capabilities({ names }) {
  if (names.length === 0) return html`<p class="quiet">${t("plugin.noCapabilities")}</p>`;
  return html`<ul class="tags" aria-label=${t("plugin.capabilities")}>
    ${names.map((name) => html`<li class="tag" key=${name}>${name}</li>`)}
  </ul>`;
}

/** What is wrong, in the plugin's own words. @param {{plugin: import("../store.js").Plugin}} props */
export function Fault({ plugin }) {
  if (!plugin.error) return null;
  return html`<p class="fault" data-error>
    <span class="visually-hidden">${named("status", "error")}: </span>${plugin.error}
  </p>`;
}
