// Goodput: what the run's time was spent on, stacked over that time, and the sums.
import { fill, make, table } from "./dom.js";
import { DASH, duration, percent } from "./format.js";

const SVG = "http://www.w3.org/2000/svg";

export function showLedger(picture, sums, ledger) {
  if (!ledger.classes.length) {
    fill(picture, make("p", { class: "note" }, "No time has passed yet."));
    fill(sums);
    return;
  }
  fill(picture, stacked(ledger), make("div", { class: "axis" }, make("span", {}, "start"), make("span", {}, `${duration(ledger.wall_seconds)} later`)));
  const rows = ledger.classes.map((one) => [
    make("span", {}, key(one.name), one.name.replaceAll("_", " ")), duration(one.seconds), percent(one.seconds / ledger.wall_seconds), one.meaning,
  ]);
  fill(sums, table([["class"], ["time"], ["share"], ["what it is", "text"]], rows, DASH));
}

function stacked(ledger) {
  const columns = ledger.bins[0].length;
  const picture = document.createElementNS(SVG, "svg");
  picture.setAttribute("viewBox", `0 0 ${columns} 1`);
  picture.setAttribute("preserveAspectRatio", "none");
  picture.setAttribute("role", "img");
  picture.setAttribute("aria-label", `Share of each class over ${duration(ledger.wall_seconds)}; the table has the sums`);
  let below = new Array(columns).fill(0);
  ledger.bins.forEach((shares, k) => {
    const above = shares.map((share, i) => below[i] + share);
    const path = document.createElementNS(SVG, "path");
    const y = (value) => (1 - value).toFixed(4);
    const up = above.map((value, i) => `L${i} ${y(value)}L${i + 1} ${y(value)}`).join("");
    const down = below.map((value, i) => `L${i + 1} ${y(value)}L${i} ${y(value)}`).reverse().join("");
    path.setAttribute("d", `M0 ${y(below[0])}${up}${down}Z`);
    path.setAttribute("fill", `var(--class-${ledger.classes[k].name})`);
    picture.append(path);
    below = above;
  });
  return picture;
}

function key(name) {
  const square = document.createElementNS(SVG, "svg");
  square.setAttribute("class", "key");
  square.setAttribute("viewBox", "0 0 1 1");
  square.setAttribute("aria-hidden", "true");
  const fill = document.createElementNS(SVG, "rect");
  fill.setAttribute("width", "1");
  fill.setAttribute("height", "1");
  fill.setAttribute("fill", `var(--class-${name})`);
  square.append(fill);
  return square;
}
