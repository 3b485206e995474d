import assert from "node:assert/strict";
import { test } from "node:test";

import {
  ApiError, SILENCE_MS, Socket, ask, backoffMs,
} from "../../../services/gateway/dashboard/wire.js";

/** Time that passes when told to. */
function clock() {
  let present = 1_000_000;
  let timers = [];
  const add = (ms, ring, every) => {
    const timer = { at: present + ms, ring, every: every ? ms : 0 };
    timers.push(timer);
    return timer;
  };
  return {
    now: () => present,
    after: (ms, ring) => add(ms, ring, false),
    every: (ms, ring) => add(ms, ring, true),
    cancel: (timer) => {
      timers = timers.filter((one) => one !== timer);
    },
    pass(ms) {
      const end = present + ms;
      for (;;) {
        const next = timers.filter((one) => one.at <= end).sort((a, b) => a.at - b.at)[0];
        if (!next) break;
        present = next.at;
        if (next.every) next.at += next.every;
        else this.cancel(next);
        next.ring();
      }
      present = end;
    },
  };
}

function connection({ mayRetry = async () => true } = {}) {
  const time = clock();
  const opened = [];
  const links = [];
  const frames = [];
  const socket = new Socket({
    url: "ws://x/ws/plugins",
    onFrame: (frame) => frames.push(frame),
    onLink: (link) => links.push(link),
    mayRetry,
    open: () => {
      const one = { sent: [], closed: false, send: (text) => one.sent.push(JSON.parse(text)) };
      one.close = () => {
        one.closed = true;
      };
      one.say = (type, payload = {}) => one.onmessage({ data: JSON.stringify({ type, payload }) });
      opened.push(one);
      return one;
    },
    time,
    chance: () => 1,
  });
  return { socket, time, opened, links, frames, state: () => links.at(-1).state };
}

test("it is live once the bootstrap has come, and then subscribes", () => {
  const at = connection();
  at.socket.subscribe({ topic: "status" });
  at.socket.start();
  assert.equal(at.state(), "connecting");
  assert.deepEqual(at.opened[0].sent, []);
  at.opened[0].say("bootstrap");
  assert.equal(at.state(), "live");
  assert.deepEqual(at.opened[0].sent, [{ action: "SUB", topic: "status" }]);
});

test("after a reconnect it asks again, for logs from where it had come", () => {
  const at = connection();
  let last = 0;
  at.socket.start();
  at.opened[0].say("bootstrap");
  at.socket.subscribe({ topic: "logs", pluginId: "candle", batch: true, backfill: 500 }, () => last);
  const wish = { action: "SUB", topic: "logs", pluginId: "candle", batch: true };
  assert.deepEqual(at.opened[0].sent, [{ ...wish, backfill: 500 }]);
  last = 41;
  at.opened[0].onclose();
  at.time.pass(500);
  at.opened[1].say("bootstrap");
  assert.deepEqual(at.opened[1].sent, [{ ...wish, after: 41 }]);
});

test("what was unsubscribed is not asked for again", () => {
  const at = connection();
  at.socket.start();
  at.opened[0].say("bootstrap");
  at.socket.subscribe({ topic: "logs", pluginId: "a" });
  at.socket.unsubscribe({ topic: "logs", pluginId: "a" });
  assert.deepEqual(at.opened[0].sent.at(-1), { action: "UNSUB", topic: "logs", pluginId: "a" });
  at.opened[0].onclose();
  at.time.pass(500);
  at.opened[1].say("bootstrap");
  assert.deepEqual(at.opened[1].sent, []);
});

test("silence is a lost connection, even while the socket is open", () => {
  const at = connection();
  at.socket.start();
  at.opened[0].say("bootstrap");
  at.time.pass(SILENCE_MS - 2_000);
  at.opened[0].say("tick");
  at.time.pass(SILENCE_MS - 2_000);
  assert.equal(at.state(), "live");
  const heard = at.time.now() - (SILENCE_MS - 2_000);
  at.time.pass(3_100);
  assert.equal(at.state(), "lost");
  assert.equal(at.links.at(-1).since, heard);
  assert.ok(at.opened[0].closed);
});

test("a half open connection that wakes up late is not listened to", () => {
  const at = connection();
  at.socket.start();
  at.opened[0].say("bootstrap");
  at.time.pass(SILENCE_MS + 2_000);
  assert.equal(at.opened[0].onmessage, null);
  assert.equal(at.opened[0].onclose, null);
});

test("tries come less and less often, and it counts as lost since the first", () => {
  const at = connection();
  at.socket.start();
  at.opened[0].say("bootstrap");
  const since = at.time.now();
  const waits = [];
  for (let i = 0; i < 7; i += 1) {
    at.opened.at(-1).onclose();
    waits.push(at.links.at(-1).nextTry - at.time.now());
    at.time.pass(waits.at(-1));
  }
  assert.deepEqual(waits, [500, 1_000, 2_000, 4_000, 8_000, 15_000, 15_000]);
  assert.equal(at.links.at(-1).since, since);
});

test("half of a wait is chance", () => {
  assert.equal(backoffMs(2, 0), 1_000);
  assert.equal(backoffMs(2, 1), 2_000);
});

test("one who is refused for want of a session does not try for ever", async () => {
  const at = connection({ mayRetry: async () => false });
  at.socket.start();
  at.opened[0].onclose();
  await Promise.resolve();
  await Promise.resolve();
  at.time.pass(60_000);
  assert.equal(at.opened.length, 1);
  at.socket.start();
  assert.equal(at.opened.length, 2);
});

test("a reader in a hurry need not wait", () => {
  const at = connection();
  at.socket.start();
  at.opened[0].onclose();
  at.socket.hurry();
  at.socket.hurry();
  assert.equal(at.opened.length, 2);
});

test("a problem becomes an error with its sentence", async (context) => {
  const headers = { "Content-Type": "application/problem+json" };
  const problem = { type: "urn:bkg:problem:conflict", title: "Conflict", detail: "candle runs" };
  context.mock.method(globalThis, "fetch", async () =>
    new Response(JSON.stringify(problem), { status: 409, headers }));
  await assert.rejects(ask("POST", "/api/plugins/candle/start"), (error) => {
    assert.ok(error instanceof ApiError);
    assert.equal(error.status, 409);
    assert.equal(error.message, "candle runs");
    assert.equal(error.type, "urn:bkg:problem:conflict");
    return true;
  });
});

test("an answer without a body is null, and none at all is status 0", async (context) => {
  const fetched = context.mock.method(globalThis, "fetch", async () =>
    new Response(null, { status: 204 }));
  assert.equal(await ask("POST", "/auth/session", { key: "k" }), null);
  assert.equal(fetched.mock.calls[0].arguments[1].body, '{"key":"k"}');
  fetched.mock.mockImplementation(async () => {
    throw new TypeError("failed to fetch");
  });
  await assert.rejects(ask("GET", "/"), (error) => error.status === 0);
});
