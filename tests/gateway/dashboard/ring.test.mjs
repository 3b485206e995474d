import assert from "node:assert/strict";
import { test } from "node:test";

import { Ring, textOf } from "../../../services/gateway/dashboard/ring.js";

const line = (seq, level = "info", message = `line ${seq}`, more = {}) => ({
  plugin: "candle", level, message, timestamp: "2026-11-24T10:00:00Z", seq, ...more,
});
const lines = (from, to) => Array.from({ length: to - from + 1 }, (_, i) => line(from + i));
const seqs = (rows) => rows.map((row) => row.event?.seq ?? `${row.gap.from}-${row.gap.to}`);

test("a record that is here already is dropped", () => {
  const ring = new Ring();
  ring.take(lines(1, 3));
  ring.take(lines(2, 5));
  assert.deepEqual(seqs(ring.rows), [1, 2, 3, 4, 5]);
  assert.equal(ring.last, 5);
});

test("missing records are a row, and neighbouring holes are one", () => {
  const ring = new Ring();
  ring.take(lines(1, 2));
  ring.takeGap({ from: 3, to: 6 });
  ring.takeGap({ from: 7, to: 9 });
  ring.take(lines(10, 10));
  assert.deepEqual(seqs(ring.rows), [1, 2, "3-9", 10]);
});

test("a hole that was filled before it was told of is none", () => {
  const ring = new Ring();
  ring.take(lines(1, 9));
  ring.takeGap({ from: 3, to: 6 });
  assert.deepEqual(seqs(ring.rows), [1, 2, 3, 4, 5, 6, 7, 8, 9]);
});

test("the filter takes levels upward and any case, and what comes later too", () => {
  const ring = new Ring();
  ring.take([line(1, "debug", "Cat"), line(2, "warn", "cat"), line(3, "error", "dog")]);
  ring.filter("warn", "CAT");
  assert.deepEqual(seqs(ring.shown), [2]);
  ring.take([line(4, "error", "a cat again"), line(5, "info", "cat")]);
  assert.deepEqual(seqs(ring.shown), [2, 4]);
  ring.filter("debug", "");
  assert.deepEqual(seqs(ring.shown), [1, 2, 3, 4, 5]);
});

test("a search takes signs as they are and looks into fields and the part that speaks", () => {
  const ring = new Ring();
  ring.take([
    line(1, "info", "a.b (c)"), line(2, "info", "axb"),
    line(3, "info", "x", { fields: { path: "../y.json", rows: 3 }, logger: "services.candle" }),
  ]);
  for (const [text, found] of [["a.b (", [1]], ["rows=3", [3]], ["Candle", [3]], ["../y", [3]]]) {
    ring.filter("debug", text);
    assert.deepEqual(seqs(ring.shown), found, text);
  }
});

test("gaps pass every filter", () => {
  const ring = new Ring();
  ring.take(lines(1, 1));
  ring.takeGap({ from: 2, to: 3 });
  ring.filter("error", "nothing has this");
  assert.deepEqual(seqs(ring.shown), ["2-3"]);
});

test("the oldest leave in one go, and it is counted how many of those shown", () => {
  const ring = new Ring(10, 6);
  ring.filter("warn", "");
  ring.take(Array.from({ length: 10 }, (_, i) => line(i + 1, i % 2 ? "warn" : "info")));
  assert.equal(ring.left, 0);
  ring.take([line(11, "warn")]);
  assert.deepEqual(seqs(ring.rows), [6, 7, 8, 9, 10, 11]);
  assert.deepEqual(seqs(ring.shown), [6, 8, 10, 11]);
  assert.equal(ring.left, 2);
});

test("a record as text is its message, its values and who speaks", () => {
  const event = line(1, "info", "model.loaded", { fields: { id: "iris", dim: 4 }, logger: "c" });
  assert.equal(textOf({ event }), "model.loaded id=iris dim=4 c");
});
