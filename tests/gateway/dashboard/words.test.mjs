import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";

import { de } from "../../../services/gateway/dashboard/de.js";
import { en } from "../../../services/gateway/dashboard/en.js";
import {
  bestLanguage, bytes, duration, language, named, percent, t,
} from "../../../services/gateway/dashboard/words.js";

beforeEach(() => {
  language.value = "en";
});

const placeholders = (phrase) => [...phrase.matchAll(/\{\w+\}/g)].map(String).sort();

test("the dictionaries have the same keys, in the same order", () => {
  assert.deepEqual(Object.keys(de), Object.keys(en));
});

for (const key of Object.keys(en)) {
  test(`${key} has the same forms and placeholders in both languages`, () => {
    const [ours, theirs] = [en[key], de[key]].map((phrase) =>
      typeof phrase === "string" ? { other: phrase } : phrase);
    assert.deepEqual(Object.keys(theirs), Object.keys(ours));
    for (const form of Object.keys(ours)) {
      assert.notEqual(theirs[form].trim(), "");
      // The form for one may leave the number out.
      if (form === "other") assert.deepEqual(placeholders(theirs[form]), placeholders(ours[form]));
    }
  });
}

test("one and many have their own form, and numbers the language's signs", () => {
  assert.equal(t("log.newLines", { count: 1 }), "1 new line");
  assert.equal(t("log.newLines", { count: 1234 }), "1,234 new lines");
  language.value = "de";
  assert.equal(t("log.newLines", { count: 1234 }), "1.234 neue Zeilen");
});

test("what has no word speaks for itself", () => {
  assert.equal(named("status", "running"), "Running");
  assert.equal(named("status", "hibernating"), "hibernating");
});

for (const [wanted, best] of [
  [["de-CH", "en"], "de"], [["fr", "de"], "de"], [["fr-FR"], "en"], [[], "en"],
  [["en-US@posix"], "en"], [["DE"], "de"],
]) {
  test(`a reader of ${wanted.join(", ") || "nothing"} reads ${best}`, () => {
    assert.equal(bestLanguage(wanted), best);
  });
}

for (const [ms, text] of [
  [0, "0 s"], [-5, "0 s"], [12_400, "12 s"], [125_000, "2 min 5 s"], [7_200_000, "2 h"],
  [90_061_000, "1 d 1 h"],
]) {
  test(`${ms} ms are ${text}`, () => assert.equal(duration(ms), text));
}

test("sizes and shares have as many digits as they need", () => {
  assert.equal(bytes(512), "512 B");
  assert.equal(bytes(1.5 * 1024 ** 2), "1.5 MiB");
  assert.equal(bytes(183 * 1024 ** 2), "183 MiB");
  assert.equal(percent(3.14), "3.1 %");
  assert.equal(percent(31.4), "31 %");
});
