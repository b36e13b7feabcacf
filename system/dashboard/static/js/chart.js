// One panel: a uPlot chart with what was trained again, the starts of attempts, and a cursor for the keyboard.
import { colour, make } from "./dom.js";
import { number, whole } from "./format.js";

const SYNC = "steps";
const short = new Intl.NumberFormat("en-US", { notation: "compact", maximumFractionDigits: 1 });

export class Chart {
  // actions: zoom(from, to), reset(), magnify(factor), read(text)
  constructor(panel, actions) {
    this.panel = panel;
    this.actions = actions;
    this.lost = [];
    this.starts = [];
    this.runs = 0;
    this.output = make("output", {});
    this.canvas = make("div", { class: "canvas", tabindex: "0", role: "img" });
    const title = make("h3", {}, panel.title, make("small", {}, panel.note));
    this.element = make("figure", { class: "plot", "data-scalar": panel.scalar },
      make("figcaption", {}, title, this.output), this.canvas);
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.resize()).observe(this.canvas);
    document.addEventListener("themechange", () => this.rebuild());
  }

  // curves: {live, lost} of each run, the first being the one that is looked at.
  show(curves, starts, range) {
    this.lost = curves[0]?.lost ?? [];
    this.starts = starts;
    this.range = range;
    const tables = curves.map((curve) => [curve?.live.steps ?? [], curve?.live.values ?? []]);
    this.data = tables.length > 1 ? uPlot.join(tables) : tables[0];
    this.describe(tables[0]);
    if (this.plot && this.runs === tables.length) this.plot.setData(this.data, false);
    else { this.runs = tables.length; this.rebuild(); }
    this.scale();
  }

  describe([steps, values]) {
    const last = values.findLastIndex((value) => value !== null);
    const say = this.panel.format;
    this.output.textContent = last < 0 ? "–" : say(values[last]);
    const finite = values.filter((value) => value !== null);
    const low = finite.reduce((a, b) => Math.min(a, b), Infinity), high = finite.reduce((a, b) => Math.max(a, b), -Infinity);
    const again = this.lost.length ? `; ${this.lost.length} stretches were trained again` : "";
    this.canvas.setAttribute("aria-label", last < 0 ? `${this.panel.title}: no values here`
      : `${this.panel.title} by step: ${say(values[last])} at step ${whole(steps[last])}, from ${say(low)} to ${say(high)}${again}. Arrow keys read values.`);
  }

  rebuild() {
    this.plot?.destroy();
    this.plot = null;
    if (!this.data || !this.canvas.clientWidth) return;
    this.plot = new uPlot(this.options(), this.data, this.canvas);
    this.scale();
  }

  resize() {
    if (this.plot) this.plot.setSize({ width: this.canvas.clientWidth, height: this.canvas.clientHeight });
    else this.rebuild();
  }

  scale() {
    if (!this.plot || !this.data[0].length) return;
    const steps = this.data[0], ends = this.lost.flatMap((line) => line.steps.slice(-1));
    const last = Math.max(steps[steps.length - 1], ...(this.range ? [] : ends));
    this.plot.setScale("x", this.range ? { min: this.range[0], max: this.range[1] } : { min: steps[0], max: Math.max(last, steps[0] + 1) });
  }

  options() {
    const ink = colour("--muted"), grid = colour("--grid");
    const axis = { stroke: ink, grid: { stroke: grid, width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
    const value = (u, ticks) => ticks.map((tick) => (tick === null ? "" : tick !== 0 && Math.abs(tick) < 1e-3 ? tick.toExponential(0) : short.format(tick) === "0" ? number(tick) : Math.abs(tick) < 10 ? number(tick) : short.format(tick)));
    return {
      width: this.canvas.clientWidth,
      height: this.canvas.clientHeight,
      padding: [8, 10, 0, 0],
      legend: { show: false },
      cursor: { sync: { key: SYNC, setSeries: false }, drag: { x: true, y: false, setScale: false }, points: { size: 6 }, bind: { dblclick: () => () => this.actions.reset() } },
      scales: { x: { time: false }, y: { range: (u, low, high) => this.bounds(low, high) } },
      axes: [{ ...axis, size: 22, space: 60, values: (u, ticks) => ticks.map((tick) => short.format(tick)) }, { ...axis, size: 46, space: 26, values: value }],
      series: [{}, ...Array.from({ length: this.runs }, (_, run) => ({ stroke: colour(`--run-${run % 4}`), width: 1.4, points: { show: this.data[0].length < 3 } }))],
      hooks: {
        drawClear: [(u) => this.marks(u)],
        draw: [(u) => this.again(u)],
        setSelect: [(u) => this.select(u)],
      },
    };
  }

  bounds(low, high) {
    for (const line of this.lost) for (const value of line.values) {
      if (value !== null) { low = Math.min(low ?? value, value); high = Math.max(high ?? value, value); }
    }
    if (low === null || low === undefined) return [0, 1];
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    return [low - room, high + room];
  }

  select(u) {
    if (u.select.width < 3) return;
    this.actions.zoom(u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x"));
    u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
  }

  // Behind the lines: where an attempt began.
  marks(u) {
    const { ctx, bbox } = u;
    ctx.save();
    ctx.strokeStyle = colour("--line");
    ctx.setLineDash([3, 3]);
    for (const step of this.starts) {
      const x = u.valToPos(step, "x", true);
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      ctx.beginPath(); ctx.moveTo(x, bbox.top); ctx.lineTo(x, bbox.top + bbox.height); ctx.stroke();
    }
    ctx.restore();
  }

  // Dashed: steps that a later attempt trained again.
  again(u) {
    const { ctx, bbox } = u;
    ctx.save();
    ctx.beginPath(); ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height); ctx.clip();
    ctx.strokeStyle = colour("--lost");
    ctx.lineWidth = 1.3 * devicePixelRatio;
    ctx.setLineDash([4 * devicePixelRatio, 3 * devicePixelRatio]);
    for (const line of this.lost) {
      ctx.beginPath();
      line.steps.forEach((step, i) => {
        if (line.values[i] !== null) ctx.lineTo(u.valToPos(step, "x", true), u.valToPos(line.values[i], "y", true));
      });
      ctx.stroke();
    }
    ctx.restore();
  }

  key(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -50, PageDown: 50 };
    if (event.key === "+" || event.key === "=") this.actions.magnify(0.5);
    else if (event.key === "-") this.actions.magnify(2);
    else if (event.key === "0" || event.key === "Escape") this.actions.reset();
    else if (moves[event.key] && this.plot) this.step(moves[event.key]);
    else return;
    event.preventDefault();
  }

  step(by) {
    const u = this.plot, last = u.data[0].length - 1;
    const index = Math.min(last, Math.max(0, (u.cursor.idx ?? (by > 0 ? -1 : last + 1)) + by));
    const step = u.data[0][index], value = u.data[1][index];
    u.setCursor({ left: u.valToPos(step, "x"), top: value === null || value === undefined ? 0 : u.valToPos(value, "y") });
    this.actions.read(`${this.panel.title}, step ${whole(step)}: ${this.panel.format(value)}`);
  }
}
