import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { fileURLToPath } from "node:url";

import { ceilingOf, curve } from "../../../services/gateway/dashboard/parts/sparkline.js";
import { routeOf } from "../../../services/gateway/dashboard/route.js";

const HOME = new URL("../../../services/gateway/dashboard/", import.meta.url);
const text = (path) => readFileSync(fileURLToPath(new URL(path, HOME)), "utf-8");
const IMPORT = /(?:^|[\s;}])(?:import|export)\s*[^"'();]*?from\s*"([^"]+)"/g;

/** Every module that comes with another, without waiting for a click. */
function reached(path, found = new Set()) {
  found.add(path);
  for (const [, name] of text(path).matchAll(IMPORT)) {
    const next = new URL(name, new URL(path, HOME)).href.slice(HOME.href.length);
    if (!found.has(next)) reached(next, found);
  }
  return found;
}

test("the document preloads exactly the modules that the first picture needs", () => {
  const preloaded = [...text("index.html").matchAll(/modulepreload" href="\/ui\/\{hash\}\/([^"]+)/g)];
  const needed = [...reached("main.js")].filter((path) => path !== "main.js");
  assert.deepEqual(preloaded.map(([, path]) => path), needed.sort());
});

test("the document has no script and no style of its own, which the policy would block", () => {
  const html = text("index.html");
  assert.doesNotMatch(html, /<style|\sstyle=|\son\w+=/);
  assert.doesNotMatch(html, /<script(?![^>]*\ssrc=)/);
  assert.doesNotMatch(html.replaceAll("/ui/{hash}/", ""), /(?:src|href)="(?!\w)/);
});

test("only view.js imports the libraries", () => {
  const others = [...reached("main.js"), ...reached("pages/plugin.js"), ...reached("pages/overview.js")]
    .filter((path) => path !== "view.js" && !path.startsWith("vendor/"));
  for (const path of others) assert.doesNotMatch(text(path), /vendor\//, path);
});

test("no page imports a page, and no part a page", () => {
  for (const path of [...reached("pages/plugin.js"), ...reached("pages/overview.js")]) {
    assert.doesNotMatch(text(path), /from "[^"]*pages\//, path);
  }
});

for (const [path, page, plugin] of [
  ["/", "overview", ""], ["/plugins", "overview", ""], ["/plugins/candle", "plugin", "candle"],
  ["/plugins/a%20b/", "plugin", "a b"], ["/plugins/%zz", "plugin", "%zz"], ["/x", "none", ""],
]) {
  test(`${path} is ${page} ${plugin}`, () => {
    const route = routeOf(path, "?q=x");
    assert.deepEqual([route.page, route.plugin, route.query.get("q")], [page, plugin, "x"]);
  });
}

test("the upper edge of a curve is calm", () => {
  assert.deepEqual([3, 11, 21, 99, 130].map((peak) => ceilingOf(peak, 10)), [10, 20, 50, 100, 200]);
});

test("a curve ends at the right, and begins anew after a silence", () => {
  const at = (second, value) => ({ time: 1000 * second, value });
  assert.match(curve([at(0, 5), at(2, 10), at(60, 0)], 10), /^M0\.0 [\d.]+L[\d.]+ 2\.0M120\.0 31\.0$/);
});
