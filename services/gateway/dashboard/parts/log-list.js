/**
 * A long list of lines, of which only those in sight are in the document.
 *
 * The browser's own virtualisation (`content-visibility`) took 1.1 s for each 100 lines appended to
 * 100,000; this takes one picture. Rows have one height, and an element is used again for the line
 * that takes its place.
 */

import { batch, html, useEffect, useLayoutEffect, useRef, useSignal } from "../view.js";
import { textOf } from "../ring.js";
import { store } from "../store.js";
import { language, named, t, timeOfDay } from "../words.js";

/** As in log.css. */
const ROW_PX = 22;
const SPARE_ROWS = 8;

/**
 * @typedef {import("../view.js").Signal<any>} Signal
 * @param {{plugin: string, follow: Signal, fresh: Signal, chosen: Signal}} props
 */
export function LogList({ plugin, follow, fresh, chosen }) {
  const box = useRef(/** @type {any} */ (null));
  const at = useRef({ top: 0, left: 0, shown: 0, ring: /** @type {any} */ (null) });
  const top = useSignal(0);
  const height = useSignal(0);
  // Read for their changes: the ring is no signal, and times are written in a language.
  void store.logged.value;
  void language.value;
  const { ring } = store;
  const { shown } = ring;

  useEffect(() => {
    const watch = new ResizeObserver(() => {
      height.value = box.current?.clientHeight ?? 0;
    });
    watch.observe(box.current);
    return () => watch.disconnect();
  }, []);

  useLayoutEffect(() => {
    const seen = at.current;
    const isSame = seen.ring === ring && ring.left >= seen.left;
    const left = isSame ? ring.left - seen.left : 0;
    const added = isSame ? shown.length + left - seen.shown : 0;
    at.current = { ...seen, left: ring.left, shown: shown.length, ring };
    if (follow.value) {
      scrollTo(box.current.scrollHeight);
      return;
    }
    // Without this the text would run away under the eyes of a reader whenever old rows leave.
    if (left > 0) scrollTo(Math.max(0, box.current.scrollTop - left * ROW_PX));
    if (added > 0) fresh.value += added;
  }, [store.logged.value, follow.value, height.value]);

  const scrollTo = (/** @type {number} */ place) => {
    box.current.scrollTop = place;
    at.current.top = box.current.scrollTop;
    top.value = at.current.top;
  };
  const scrolled = () => {
    const { scrollTop, scrollHeight, clientHeight } = box.current;
    const wentUp = scrollTop < at.current.top;
    const isAtEnd = scrollHeight - scrollTop - clientHeight < ROW_PX;
    at.current.top = scrollTop;
    batch(() => {
      top.value = scrollTop;
      if (isAtEnd) {
        follow.value = true;
        fresh.value = 0;
      } else if (wentUp) {
        follow.value = false;
      }
    });
  };
  const pressed = (/** @type {KeyboardEvent} */ event) => {
    const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (event.key === "Escape") chosen.value = null;
    else if (event.key === "Enter" && !chosen.value) chosen.value = lastLine(shown);
    else if (step && chosen.value) {
      const next = shown[shown.indexOf(chosen.value) + step];
      if (next?.event) chosen.value = next;
      const index = shown.indexOf(chosen.value);
      const { scrollTop, clientHeight } = box.current;
      if (index * ROW_PX < scrollTop) box.current.scrollTop = index * ROW_PX;
      else if ((index + 1) * ROW_PX > scrollTop + clientHeight) {
        box.current.scrollTop = (index + 1) * ROW_PX - clientHeight;
      }
    } else return;
    event.preventDefault();
  };

  const inSight = Math.ceil(height.value / ROW_PX) + 2 * SPARE_ROWS;
  const last = Math.max(0, shown.length - inSight);
  const first = Math.min(last, Math.max(0, Math.floor(top.value / ROW_PX) - SPARE_ROWS));
  return html`<div
    class="log-list"
    ref=${box}
    role="table"
    tabindex="0"
    aria-label=${`${t("plugin.log")} ${plugin}`}
    aria-rowcount=${shown.length}
    onScroll=${scrolled}
    onKeyDown=${pressed}
    data-log-list
  >
    ${shown.length === 0
      ? html`<div role="row" class="log-none">
          <span role="cell">${t(ring.rows.length === 0 ? "log.none" : "log.noneFit")}</span>
        </div>`
      : html`<div role="rowgroup" style=${{ height: `${shown.length * ROW_PX}px` }}>
          ${shown.slice(first, first + inSight).map((row, index) => {
            const place = first + index;
            return html`<${LogRow}
              key=${place % inSight}
              row=${row}
              place=${place}
              isChosen=${chosen.value === row}
              choose=${() => (chosen.value = row)}
            />`;
          })}
        </div>`}
  </div>`;
}

/** @param {any} props */
function LogRow({ row, place, isChosen, choose }) {
  const style = { transform: `translateY(${place * ROW_PX}px)` };
  const { event, gap } = row;
  if (gap) {
    return html`<div
      class="log-row gap"
      role="row"
      aria-rowindex=${place + 1}
      style=${style}
      data-log-gap
    >
      <span role="cell">${t("log.gap", { count: gap.to - gap.from + 1 })}</span>
    </div>`;
  }
  const text = textOf(row);
  const time = timeOfDay(event.timestamp);
  const level = named("level", event.level);
  const fields = text.slice(event.message.length, text.length - (event.logger ?? "").length);
  return html`<div
    class="log-row"
    role="row"
    aria-rowindex=${place + 1}
    style=${style}
    onClick=${choose}
    data-log-row
    data-level=${event.level}
    data-seq=${event.seq}
    data-chosen=${isChosen ? "" : undefined}
  >
    <span role="cell" class="log-time">
      ${time.slice(0, 8)}<span class="log-millis">${time.slice(8)}</span>
    </span>
    <span role="cell" class="log-level" data-short=${level[0]}><span>${level}</span></span>
    <span role="cell" class="log-slot" title=${event.instance}>${event.slot ?? ""}</span>
    <span role="cell" class="log-message">
      <span>${event.message}</span>
      <span class="log-fields">${fields}</span>
    </span>
    <span role="cell" class="log-logger">${event.logger ?? ""}</span>
  </div>`;
}

/** @param {import("../ring.js").Row[]} rows */
function lastLine(rows) {
  return rows.findLast((row) => row.event) ?? null;
}
