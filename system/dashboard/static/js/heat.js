// Ranks by time: one row a rank, lighter is slower; and in words who is slowest.
import { fill, make, options } from "./dom.js";
import { duration, number, utc } from "./format.js";

const LOW = [24, 42, 78], MIDDLE = [43, 138, 143], HIGH = [253, 200, 70];
const mix = (a, b, t) => a.map((value, i) => value + (b[i] - value) * t);

export function showRanks(element, select, grid) {
  const names = Object.keys(grid.measures);
  options(select, names, (name) => name.replaceAll("_", " "));
  select.hidden = names.length < 2;
  const rows = grid.measures[select.value];
  if (!rows) {
    fill(element, make("p", { class: "note" }, "No measure of two ranks yet."));
    return;
  }
  const cells = rows.flat().filter((value) => value !== null).sort((a, b) => a - b);
  const low = cells[0], high = cells[Math.floor((cells.length - 1) * 0.99)];
  const height = Math.max(40, Math.min(260, 16 * rows.length));
  const canvas = make("canvas", { class: "heat", width: rows[0].length, height: rows.length, role: "img" });
  const means = rows.map((row) => mean(row.filter((value) => value !== null)));
  const slowest = means.reduce((best, value, rank) => (value > (means[best] ?? -1) ? rank : best), 0);
  const text = `${rows.length} ranks; slowest on average rank ${slowest} with ${duration3(means[slowest])}, median ${duration3(median(means))}`;
  canvas.setAttribute("aria-label", `${select.value.replaceAll("_", " ")} by rank and time. ${text}`);
  paint(canvas, rows, low, high);
  const span = `${utc(grid.start)} to ${utc(grid.start + grid.seconds * rows[0].length)} UTC`;
  element.replaceChildren(canvas, make("div", { class: "axis" }, make("span", {}, span),
    make("span", {}, `dark ${duration3(low)}, light ${duration3(high)}`)), make("p", { class: "note" }, `${text}.`));
  canvas.style.height = `${height}px`;
}

const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : null);
const median = (values) => values.filter((v) => v !== null).sort((a, b) => a - b)[Math.floor(values.filter((v) => v !== null).length / 2)];
const duration3 = (seconds) => (seconds < 10 ? `${number(seconds)} s` : duration(seconds));

function paint(canvas, rows, low, high) {
  const image = new ImageData(rows[0].length, rows.length);
  rows.forEach((row, rank) => row.forEach((value, column) => {
    if (value === null) return;
    const share = high > low ? Math.min(1, (value - low) / (high - low)) : 0.5;
    const rgb = share < 0.5 ? mix(LOW, MIDDLE, 2 * share) : mix(MIDDLE, HIGH, 2 * share - 1);
    image.data.set([...rgb, 255], 4 * (rank * row.length + column));
  }));
  canvas.getContext("2d").putImageData(image, 0, 0);
}
