/** One plugin: its numbers, its instances, its log as it happens, its configuration. */

import { html } from "../view.js";
import { route } from "../route.js";
import { store } from "../store.js";
import { duration, number, t, timeOfDay } from "../words.js";
import { Actions } from "../parts/actions.js";
import {
  Capabilities, Cpu, Fact, Fault, Memory, Since, holdings, restartsOf, sinceOf,
} from "../parts/facts.js";
import { Log } from "../parts/log.js";
import { Status } from "../parts/status.js";

export default function PluginPage() {
  const name = route.value.plugin;
  const plugin = store.plugins.value.get(name);
  if (!plugin) {
    return store.known.value
      ? html`<div class="empty">
          <h1>${t("plugin.unknown", { name })}</h1>
          <p class="quiet">${t("plugin.unknownText")}</p>
          <p><a href="/">${t("notFound.back")}</a></p>
        </div>`
      : html`<p class="quiet" role="status">${t("overview.loading")} …</p>`;
  }
  const pending = store.pending.value.get(name);
  return html`<div
    class="plugin"
    data-plugin=${name}
    data-status=${plugin.status}
    data-pending=${pending?.verb}
  >
    <div class="page-head">
      <h1>${name}</h1>
      <${Status} status=${plugin.status} pending=${pending} />
      <div class="push"><${Actions} plugin=${plugin} /></div>
      <p class="page-text">${plugin.config?.description ?? ""}</p>
    </div>
    <${Fault} plugin=${plugin} />
    <${Numbers} plugin=${plugin} />
    <${Instances} plugin=${plugin} />
    <section aria-labelledby="log-title">
      <h2 id="log-title">${t("plugin.log")}</h2>
      <${Log} plugin=${name} />
    </section>
    <div class="columns data">
      <section aria-labelledby="capabilities-title">
        <h2 id="capabilities-title">${t("plugin.capabilities")}</h2>
        <${Capabilities} names=${plugin.capabilities ?? []} />
      </section>
      <section aria-labelledby="configuration-title">
        <h2 id="configuration-title">${t("plugin.configuration")}</h2>
        ${plugin.config
          ? html`<pre
              class="json"
              tabindex="0"
              role="group"
              aria-labelledby="configuration-title"
              data-config
            >${coloured(plugin.config)}</pre>`
          : html`<p class="quiet">${t("plugin.noConfiguration")}</p>`}
      </section>
    </div>
  </div>`;
}

/** @param {{plugin: import("../store.js").Plugin}} props */
function Numbers({ plugin }) {
  const { name, lastHeartbeat, pid, port, generation } = plugin;
  const { ready, desired } = plugin.replicas ?? { ready: 0, desired: 0 };
  const last = store.measured(name)?.last;
  const running = plugin.status === "running" || plugin.status === "degraded";
  const beat = lastHeartbeat && duration(store.now - Date.parse(lastHeartbeat));
  return html`<dl class="facts wide data">
    <${Cpu} name=${name} />
    <${Memory} name=${name} />
    <${Fact} name="replicas" title=${t("plugin.replicas")}>
      ${t("plugin.replicasValue", { ready, desired })}
    </${Fact}>
    ${holdings(last).map(
      ([title, value]) => html`<${Fact} key=${title} name="holding" title=${title}>${value}</${Fact}>`,
    )}
    <${Fact} name="since" title=${t(running ? "plugin.uptime" : "plugin.downtime")}>
      <${Since} since=${sinceOf(plugin)} />
    </${Fact}>
    <${Fact} name="restarts" title=${t("plugin.restarts")}>${number(restartsOf(plugin))}</${Fact}>
    <${Fact} name="port" title=${t("plugin.port")}>
      ${port === "internal" ? t("plugin.internal") : (port ?? "–")}
    </${Fact}>
    <${Fact} name="pid" title=${t("plugin.pid")}>${pid ?? "–"}</${Fact}>
    <${Fact} name="heartbeat" title=${t("plugin.heartbeat")}>
      ${beat ? t("plugin.heartbeatAgo", { time: beat }) : "–"}
    </${Fact}>
    <${Fact} name="generation" title=${t("plugin.generation")}>${generation ?? "–"}</${Fact}>
    <${Fact} name="updated" title=${t("plugin.updated")}>
      ${last ? timeOfDay(last.timestamp).slice(0, 8) : "–"}
    </${Fact}>
  </dl>`;
}

/** @param {{plugin: import("../store.js").Plugin}} props */
function Instances({ plugin }) {
  const instances = plugin.instances ?? [];
  const head = [
    "slot", "status", "host", "pid", "port", "since", "heartbeat", "restarts", "version", "lastExit",
  ];
  return html`<section class="data" aria-labelledby="instances-title">
    <h2 id="instances-title">${t("plugin.instances")}</h2>
    ${instances.length === 0
      ? html`<p class="quiet">${t("plugin.noInstances")}</p>`
      : html`<div class="scroll" tabindex="0" role="group" aria-labelledby="instances-title">
          <table class="table">
            <thead>
              <tr>
                ${head.map((one) => html`<th key=${one} scope="col">${t(`instance.${one}`)}</th>`)}
              </tr>
            </thead>
            <tbody>
              ${instances.map((one) => html`<${InstanceRow} key=${one.slot} instance=${one} />`)}
            </tbody>
          </table>
        </div>`}
  </section>`;
}

/** @param {{instance: import("../store.js").Instance}} props */
function InstanceRow({ instance }) {
  const { slot, host, status, since, restarts, pid, port, version, lastExit, lastHeartbeat } = instance;
  return html`<tr data-slot=${slot} data-status=${status}>
    <th scope="row">${slot}</th>
    <td><${Status} status=${status} /></td>
    <td>${host}</td>
    <td class="num">${pid ?? "–"}</td>
    <td class="num">${port === "internal" ? t("plugin.internal") : (port ?? "–")}</td>
    <td><${Since} since=${since} /></td>
    <td>
      ${lastHeartbeat
        ? t("plugin.heartbeatAgo", { time: duration(store.now - Date.parse(lastHeartbeat)) })
        : "–"}
    </td>
    <td class="num">${number(restarts ?? 0)}</td>
    <td>${version ?? "–"}</td>
    <td class="long">${instance.error ?? lastExit ?? "–"}</td>
  </tr>`;
}

/**
 * Return JSON with its names, texts and other values told apart.
 * @param {unknown} value
 */
function coloured(value) {
  const text = JSON.stringify(value, null, 2);
  const parts = text.split(/("(?:[^"\\]|\\.)*"(?=:)|"(?:[^"\\]|\\.)*"|\b(?:true|false|null)\b|-?\d[\d.eE+-]*)/);
  return parts.map((part, index) => {
    if (index % 2 === 0) return part;
    if (!part.startsWith('"')) return html`<span class="json-value">${part}</span>`;
    const isName = parts[index + 1]?.startsWith(":");
    return html`<span class=${isName ? "json-name" : "json-text"}>${part}</span>`;
  });
}
