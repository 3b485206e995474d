import assert from "node:assert/strict";
import { test } from "node:test";

import { Store, hindrance } from "../../../services/gateway/dashboard/store.js";
import { ApiError } from "../../../services/gateway/dashboard/wire.js";

const NOW = Date.parse("2026-11-24T10:00:00Z");
const plugin = (name, more = {}) => ({
  name, status: "running", capabilities: [], config: { name }, generation: 1, revision: 1,
  replicas: { desired: 1, ready: 1 }, instances: [], ...more,
});
const snapshot = (name, second, cpu = 1) => ({
  plugin: name, cpu, memBytes: 10, timestamp: new Date(NOW + 1000 * second).toISOString(),
});
const made = (request) => new Store({ request, soon: (then) => then(), now: () => NOW });
const bootstrap = (plugins, telemetry = []) => ({
  type: "bootstrap", payload: { plugins, telemetry },
});
const admin = { role: "admin", pending: false, live: true };

test("a bootstrap replaces what was known: what is gone vanishes", () => {
  const store = made();
  store.apply(bootstrap([plugin("a"), plugin("b")], [snapshot("b", 1)]));
  store.apply(bootstrap([plugin("a")]));
  assert.deepEqual(store.names.value, ["a"]);
  assert.equal(store.telemetry.value.size, 0);
});

test("an older state does not replace a newer one", () => {
  const store = made();
  store.apply(bootstrap([plugin("a", { revision: 5 })]));
  store.apply({ type: "status", payload: plugin("a", { revision: 4, status: "stopped" }) });
  assert.equal(store.plugins.value.get("a").status, "running");
  store.apply({ type: "status", payload: plugin("a", { revision: 5, status: "degraded" }) });
  assert.equal(store.plugins.value.get("a").status, "degraded");
  assert.equal(store.faults.value, 1);
});

test("measurements are kept for five minutes, each once", () => {
  const store = made();
  for (const second of [0, 2, 2, 299, 301]) {
    store.apply({ type: "telemetry", payload: snapshot("a", second, second) });
  }
  const { points, last } = store.telemetry.value.get("a");
  assert.deepEqual(points.map(({ cpu }) => cpu), [2, 299, 301]);
  assert.equal(last.cpu, 301);
});

test("what has ended uses nothing, whatever was measured last", () => {
  const store = made();
  store.apply(bootstrap([plugin("a")], [snapshot("a", 1, 7)]));
  assert.equal(store.measured("a").last.cpu, 7);
  store.apply({ type: "status", payload: plugin("a", { status: "stopped" }) });
  assert.equal(store.measured("a"), undefined);
  store.apply({ type: "status", payload: plugin("a", { status: "starting" }) });
  assert.equal(store.measured("a").points.length, 1);
});

test("log records come one by one or many in a frame", () => {
  const store = made();
  const record = (seq) => ({ plugin: "a", level: "info", message: "x", timestamp: "", seq });
  store.apply({ type: "logs", payload: record(1) });
  store.apply({ type: "logs", payload: [record(2), record(3)] });
  store.apply({ type: "gap", payload: { from: 4, to: 5 } });
  assert.equal(store.ring.rows.length, 4);
  assert.equal(store.logged.value, 3);
});

test("an action lies over the state until it is answered, and a second click does nothing", async () => {
  const asked = [];
  let answer;
  const store = made((...call) => {
    asked.push(call);
    return new Promise((resolve) => {
      answer = resolve;
    });
  });
  store.apply(bootstrap([plugin("a")]));
  const done = store.act("a", "restart");
  await store.act("a", "restart");
  assert.deepEqual(asked, [["POST", "/api/plugins/a/restart"]]);
  assert.equal(store.pending.value.get("a").verb, "restart");
  assert.equal(store.plugins.value.get("a").status, "running");
  answer(plugin("a", { revision: 2, generation: 2 }));
  await done;
  assert.equal(store.pending.value.size, 0);
  assert.equal(store.plugins.value.get("a").generation, 2);
});

test("an action that is refused says so in the server's words", async () => {
  const store = made(async () => {
    throw new ApiError(504, { detail: "a: not ready within 30 s" });
  });
  await store.act("a", "start");
  assert.equal(store.notices.value[0].text, "a: not ready within 30 s");
  assert.equal(store.pending.value.size, 0);
  store.dismiss(store.notices.value[0].id);
  assert.deepEqual(store.notices.value, []);
});

test("a session that has ended leads to the sign-in", async () => {
  const store = made(async () => {
    throw new ApiError(401, {});
  });
  store.session.value = { state: "in", role: "admin", auth: "session", version: "1" };
  await store.act("a", "start");
  assert.equal(store.session.value.state, "out");
  assert.equal(await store.enter(), false);
});

test("without an answer nobody is signed out", async () => {
  const store = made(async () => {
    throw new ApiError(0, {});
  });
  store.session.value = { state: "in", role: "admin", auth: "session", version: "1" };
  await assert.rejects(store.enter());
  assert.equal(store.session.value.state, "in");
});

test("a clock that differs from the server's is allowed for", () => {
  const store = made();
  store.apply({ type: "tick", payload: { time: new Date(NOW + 500).toISOString() } });
  assert.equal(store.now, NOW);
  store.apply({ type: "tick", payload: { time: new Date(NOW + 90_000).toISOString() } });
  assert.equal(store.now, NOW + 90_000);
});

for (const [verb, state, at, reason] of [
  ["start", {}, {}, "action.isStarted"],
  ["stop", {}, {}, ""],
  ["restart", {}, {}, ""],
  ["start", { status: "stopped", replicas: { desired: 0, ready: 0 } }, {}, ""],
  ["stop", { status: "stopped", replicas: { desired: 0, ready: 0 } }, {}, "action.isStopped"],
  ["restart", { status: "error", replicas: { desired: 1, ready: 0 } }, {}, ""],
  ["stop", { config: null }, {}, "action.notOurs"],
  ["stop", {}, { role: "viewer" }, "action.needsAdmin"],
  ["stop", {}, { live: false }, "action.needsLink"],
  ["stop", {}, { pending: true }, "action.pending"],
]) {
  const name = `${verb} of ${JSON.stringify(state)} at ${JSON.stringify(at)}: ${reason || "allowed"}`;
  test(name, () => {
    assert.equal(hindrance(plugin("a", state), verb, { ...admin, ...at }), reason);
  });
}
