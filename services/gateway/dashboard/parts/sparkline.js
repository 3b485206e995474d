/** A small curve without axes: is it calm, does it climb? The number stands beside it. */

import { html } from "../view.js";

const WIDTH = 120;
const HEIGHT = 32;
const SPAN_MIN_MS = 30_000;
/** Measurements come every few seconds; after a longer silence the line must not pretend. */
const HOLE_MS = 30_000;

/**
 * Return the curve as the `d` of a path, in pieces where nothing was measured.
 * @param {{time: number, value: number}[]} points oldest first
 * @param {number} ceiling the value at the upper edge
 */
export function curve(points, ceiling) {
  const end = points.at(-1)?.time ?? 0;
  const span = Math.max(SPAN_MIN_MS, end - (points[0]?.time ?? 0));
  let before = -Infinity;
  return points
    .map(({ time, value }) => {
      const x = WIDTH - ((end - time) / span) * WIDTH;
      const y = HEIGHT - 1 - (Math.min(value, ceiling) / ceiling) * (HEIGHT - 3);
      const pen = time - before > HOLE_MS ? "M" : "L";
      before = time;
      return `${pen}${x.toFixed(1)} ${y.toFixed(1)}`;
    })
    .join("");
}

/**
 * Return a calm upper edge: the next 1, 2 or 5 times a power of ten.
 * @param {number} peak
 * @param {number} least
 */
export function ceilingOf(peak, least) {
  if (peak <= least) return least;
  const power = 10 ** Math.floor(Math.log10(peak));
  return power * ([1, 2, 5, 10].find((step) => step * power >= peak) ?? 10);
}

/**
 * @param {{points: {time: number, value: number}[], least: number, label: string}} props `least`:
 *   the upper edge is never lower
 */
export function Sparkline({ points, least, label }) {
  if (points.length === 0) return null;
  const ceiling = ceilingOf(Math.max(0, ...points.map(({ value }) => value)), least);
  const line = curve(points, ceiling);
  // The area closes only under one whole piece.
  const isWhole = points.length > 1 && line.lastIndexOf("M") === 0;
  const left = /^M([\d.]+)/.exec(line)?.[1] ?? 0;
  return html`<svg
    class="sparkline"
    viewBox=${`0 0 ${WIDTH} ${HEIGHT}`}
    preserveAspectRatio="none"
    role="img"
    aria-label=${label}
  >
    ${isWhole && html`<path class="area" d=${`${line}L${WIDTH} ${HEIGHT}L${left} ${HEIGHT}Z`} />`}
    <path class="line" d=${line} />
  </svg>`;
}
