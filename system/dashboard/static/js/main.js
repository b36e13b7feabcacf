// The page: which run, which steps, what is new.
import * as api from "./api.js";
import { Chart } from "./chart.js";
import { at, fill, make, options } from "./dom.js";
import { duration, percent } from "./format.js";
import { showRanks } from "./heat.js";
import { shown } from "./panels.js";
import { showEvaluation } from "./pictures.js";
import { showCompared, showEvents, showHead, showTables } from "./tables.js";
import { showLedger } from "./timeline.js";

const SLOWEST_MS = 1000; // between two refreshes
const query = new URLSearchParams(location.search);
const page = { run: null, others: query.getAll("with"), range: null, view: null, busy: false, again: false, stop: () => {}, evaluations: -1 };
const charts = new Map();
const actions = {
  zoom: (from, to) => setRange([from, to]),
  reset: () => { at("window").value = "0"; setRange(null); },
  magnify: (factor) => { const [a, b] = span(), half = ((b - a) * factor) / 2, middle = (a + b) / 2; setRange([middle - half, middle + half]); },
  read: (text) => { at("reading").textContent = text; },
};

const ends = () => [1, Math.max(2, page.view?.last.step ?? 2)];
const span = () => page.range ?? window_() ?? ends();

// The newest steps, if a window of them is chosen: it moves on with the run.
function window_() {
  const size = Number(at("window").value), [, last] = ends();
  return size ? [Math.max(1, last - size), last] : null;
}

function setRange(range) {
  const [first, last] = ends();
  if (range) range = [Math.max(first, range[0]), Math.min(last, Math.max(range[1], range[0] + 2))];
  page.range = range && range[0] <= first && range[1] >= last ? null : range;
  refreshCurves();
}

function move(share) {
  const [a, b] = span(), by = (b - a) * share, [first, last] = ends();
  const inside = Math.max(first - a, Math.min(last - b, by));
  setRange([a + inside, b + inside]);
}

async function refresh() {
  if (page.busy) { page.again = true; return; }
  page.busy = true;
  try {
    const run = page.run, names = [run, ...page.others];
    const views = await Promise.all(names.map(api.overview));
    if (run !== page.run) return;
    page.view = views[0];
    showHead(page.view);
    showTables(page.view);
    showLedger(at("timeline"), at("classes"), page.view.ledger);
    showCompared(views);
    options(at("event-name"), ["", ...Object.keys(page.view.counts).sort()], (name) => name.replaceAll("_", " ") || "all events");
    await Promise.all([refreshCurves(), refreshRanks(), refreshEvents(), refreshEvaluation()]);
    document.documentElement.dataset.version = page.view.version;
  } catch (error) {
    notice(error.message);
  } finally {
    setTimeout(() => {
      page.busy = false;
      if (page.again) { page.again = false; refresh(); }
    }, SLOWEST_MS);
  }
}

async function refreshCurves() {
  const view = page.view, panels = shown(view.scalars), range = page.range ?? window_();
  const points = Math.min(2000, Math.max(300, 2 * Math.round((at("curves").clientWidth / 4) * devicePixelRatio)));
  const scalars = panels.map((panel) => panel.scalar);
  if (!scalars.length) return;
  const answers = await Promise.all([page.run, ...page.others].map((run) => api.curves(run, scalars, range, points)));
  const starts = view.story.attempts.slice(1).map((one) => one.first_step).filter((step) => step !== null);
  for (const panel of panels) {
    if (!charts.has(panel.scalar)) charts.set(panel.scalar, new Chart(panel, actions));
  }
  const elements = panels.map((panel) => charts.get(panel.scalar).element);
  if (elements.some((element, i) => at("curves").children[i] !== element)) at("curves").replaceChildren(...elements);
  for (const panel of panels) {
    charts.get(panel.scalar).show(answers.map((answer) => answer.curves[panel.scalar]), starts, range);
  }
  showLegend(view);
}

function showLegend(view) {
  const line = (stroke, dash) => {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg"), path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    svg.setAttribute("viewBox", "0 0 20 10"); svg.setAttribute("aria-hidden", "true");
    for (const [name, value] of Object.entries({ d: "M0 5H20", stroke, "stroke-width": 2, "stroke-dasharray": dash })) path.setAttribute(name, value);
    svg.append(path);
    return svg;
  };
  const items = [page.run, ...page.others].map((run, i) => make("li", {}, line(`var(--run-${i % 4})`, "none"), run));
  if (view.story.superseded_steps) items.push(make("li", {}, line("var(--lost)", "4 3"), "trained again later"));
  if (view.story.attempts.length > 1) items.push(make("li", {}, line("var(--muted)", "2 2"), "an attempt began"));
  fill(at("legend"), ...items);
}

const refreshRanks = async () => showRanks(at("ranks"), at("measure"), await api.ranks(page.run));
const refreshEvents = async () => showEvents(await api.events(page.run, at("event-name").value));

async function refreshEvaluation() {
  const count = page.view.counts.evaluation ?? 0;
  if (count === page.evaluations) return;
  page.evaluations = count;
  showEvaluation(await api.evaluation(page.run));
}

function changed({ read, problem }) {
  if (problem) notice(problem);
  else if (read < 1) notice(`Reading the log: ${percent(read)}. Numbers and curves grow until it is read.`);
  else at("notice").hidden = true;
  refresh();
}

function notice(text) {
  at("notice").textContent = text;
  at("notice").hidden = false;
}

// How long ago the log last said something, every second.
function pulse() {
  if (!page.view) return;
  const newest = page.view.story.attempts.at(-1);
  const since = newest ? Date.now() / 1000 - newest.end : null;
  at("pulse").className = page.view.running ? "pulse live" : "pulse";
  at("pulse").textContent = since === null ? "no event" : `last event ${duration(Math.max(0, since))} ago`;
}

function open(run) {
  page.stop();
  Object.assign(page, { run, range: null, evaluations: -1 });
  page.others = page.others.filter((other) => other !== run);
  const address = new URLSearchParams([["run", run], ...page.others.map((other) => ["with", other])]);
  history.replaceState(null, "", `?${address}`);
  page.stop = api.follow(run, changed, () => notice("The server does not answer; this page tries again."));
  fill(at("others"), ...page.names.filter((name) => name !== run).map((name) => {
    const box = make("input", { type: "checkbox", value: name, checked: page.others.includes(name) });
    return make("label", {}, box, name);
  }));
  at("compare").hidden = page.names.length < 2;
  refresh();
}

async function start() {
  page.names = await api.runs();
  options(at("run"), page.names);
  if (page.names.includes(query.get("run"))) at("run").value = query.get("run");
  page.others = page.others.filter((name) => page.names.includes(name));
  at("run").addEventListener("change", () => open(at("run").value));
  at("others").addEventListener("change", () => {
    page.others = [...at("others").querySelectorAll("input:checked")].map((box) => box.value).slice(0, 3);
    open(page.run);
  });
  at("window").addEventListener("change", () => setRange(null));
  at("measure").addEventListener("change", refreshRanks);
  at("event-name").addEventListener("change", refreshEvents);
  for (const [id, act] of Object.entries({ left: () => move(-0.5), right: () => move(0.5), in: () => actions.magnify(0.5), out: () => actions.magnify(2) })) at(id).addEventListener("click", act);
  const themeName = () => { at("theme").textContent = `Theme: ${window.theme.chosen()}`; };
  at("theme").addEventListener("click", () => { window.theme.next(); themeName(); });
  themeName();
  setInterval(pulse, 1000);
  open(at("run").value);
}

start().catch((error) => notice(error.message));
