// The parts of the page that are words and tables.
import { at, fill, make, table, tag } from "./dom.js";
import { DASH, bytes, duration, number, percent, plain, utc, whole } from "./format.js";

const NUMBERS = [
  ["Step", (v) => [whole(v.story.steps_done), v.story.steps_wanted ? `of ${whole(v.story.steps_wanted)}` : ""]],
  ["Loss", (v) => [number(v.last.loss), v.last.step ? `at step ${whole(v.last.step)}` : ""]],
  ["Pairs/s", (v) => [number(v.last.pairs_per_second), `median ${number(v.story.pairs_per_second)}`]],
  ["MFU", (v) => [percent(v.last.mfu), v.last.mfu === undefined ? "no peak is stated" : "of the stated peak"]],
  ["Goodput", (v) => [percent(v.ledger.share), `of ${duration(v.ledger.wall_seconds)}`]],
  ["Time left", (v) => [duration(left(v)), v.running ? "at this pace" : "not running"]],
  ["Durable state", (v) => [age(v), v.checkpoints.newest ? `old, step ${whole(v.checkpoints.newest.step)}` : "no checkpoint"]],
  ["Attempts", (v) => [whole(v.story.attempts.length), `${whole(v.story.kills)} ${v.story.kills === 1 ? "kill" : "kills"} survived`]],
  ["Trained again", (v) => [whole(v.story.superseded_steps), "steps"]],
  ["Refused", (v) => [whole(v.story.refused_steps), "steps"]],
  ["Position", (v) => [v.position.epoch == null ? whole(v.position.slot) : number(v.position.epoch), v.position.epoch == null ? "slot" : "epochs"]],
];

function left(view) {
  if (!view.running) return null;
  if (view.last.seconds_left !== undefined) return view.last.seconds_left;
  const batch = view.position.global_batch, speed = view.story.pairs_per_second, wanted = view.story.steps_wanted;
  return batch && speed && wanted ? ((wanted - view.story.steps_done) * batch) / speed : null;
}

// Of a run that has ended, how old the state was then.
function age(view) {
  const newest = view.checkpoints.newest, attempts = view.story.attempts;
  if (!newest) return DASH;
  return duration(Math.max(0, (view.running ? view.now : attempts.at(-1).end) - newest.t));
}

export function showHead(view) {
  const { level, headline, detail } = view.story.verdict;
  const state = at("state");
  state.className = `state ${view.running ? "good" : level}`;
  state.textContent = view.running ? "Running" : headline.split(":")[0];
  at("headline").textContent = detail;
  at("headline").title = `${headline}. ${detail}`;
  at("progress").value = view.story.steps_wanted ? view.story.steps_done / view.story.steps_wanted : 0;
  document.title = `${view.name}: ${state.textContent.toLowerCase()}, step ${whole(view.story.steps_done)}`;
  fill(at("numbers"), ...NUMBERS.map(([name, say]) => {
    const [value, note] = say(view);
    return make("div", { "data-number": name }, make("dt", {}, name), make("dd", {}, value, make("small", {}, note)));
  }));
  const found = view.alerts.map((alert) =>
    make("li", { class: alert.level === "page" ? "bad" : "warn" }, make("strong", {}, alert.name), alert.text));
  fill(at("alerts"), ...(found.length ? found : [make("li", { class: "note" }, view.running ? "none" : "none; the run is not running")]));
}

export function showTables(view) {
  fill(at("attempts"), table(
    [["attempt"], ["started (UTC)", "text"], ["from"], ["steps"], ["again"], ["lasted"], ["ranks"], ["how it ended", "text fold"]],
    view.story.attempts.toReversed().map((one) => [
      whole(one.number), utc(one.start), one.resumed_step === null ? "scratch" : whole(one.resumed_step),
      one.first_step === null ? "none" : `${whole(one.first_step)}–${whole(one.last_step)}`,
      whole(one.superseded_steps), duration(one.seconds), one.processes === null ? DASH : whole(one.processes),
      view.running && one.number === view.story.attempts.length ? tag("good", "running") : tag(one.level, one.outcome),
    ]), "No attempt yet."));
  const { count, failed, skipped, rows } = view.checkpoints;
  at("saves").textContent = `${whole(count)} committed, ${whole(failed)} failed, ${whole(skipped)} skipped`;
  const level = { verified: "good", damaged: "bad", deleted: "note" };
  fill(at("checkpoints"), table(
    [["step"], ["age"], ["size"], ["took"], ["stall"], ["state", "text"]],
    rows.map((one) => [whole(one.step), duration(view.now - one.t), bytes(one.bytes), duration(one.seconds), duration(one.stall_seconds), tag(level[one.state], one.state)]),
    "No checkpoint yet."));
  const data = view.position;
  fill(at("data"), facts([
    ["slot of the next sample", data.slot == null ? DASH : whole(data.slot + (data.global_batch ?? 0))], ["epochs", number(data.epoch)],
    ["samples", whole(data.samples)], ["shards", whole(data.shards)], ["global batch", whole(data.global_batch)],
    ["rows rejected by preprocessing", whole(data.rejects)], ["samples that could not be read", whole(data.unreadable_samples)], ["refused steps", whole(data.refused_steps)],
    ["data set", data.uri ?? DASH],
  ]));
  fill(at("changes"), table(
    [["attempt"], ["key", "text"], ["before", "text fold"], ["after", "text fold"]],
    view.changes.toReversed().map((one) => [whole(one.attempt), one.key, plain(one.before), plain(one.after)]),
    view.story.attempts.length > 1 ? "No attempt changed it." : "One attempt so far."));
  const torn = view.torn ? `; ${whole(view.torn)} torn lines were skipped` : "";
  at("footer").textContent = `${view.uri}: ${whole(view.events)} events${torn}`;
}

export function showEvents(events) {
  const words = (found) => Object.entries(found).map(([name, value]) => `${name.replaceAll("_", " ")} ${plain(value)}`).join(", ");
  fill(at("events"), table(
    [["time (UTC)"], ["event", "text"], ["attempt"], ["rank"], ["step"], ["what it says", "text fold"]],
    events.map((one) => [utc(one.t), one.name.replaceAll("_", " "), whole(one.attempt), whole(one.rank), one.step === null ? "" : whole(one.step), words(one.facts)]),
    "No event."));
}

// views: the run that is looked at, and those it is compared with.
export function showCompared(views) {
  at("compared-section").hidden = views.length < 2;
  if (views.length < 2) return;
  const rows = NUMBERS.map(([name, say]) => [name, ...views.map((view) => say(view)[0])]);
  const scalars = [...new Set(views.flatMap((view) => view.scalars))].filter((name) => /image_text|text_image|distill|mlm|grad_norm/.test(name));
  for (const name of scalars) rows.push([name.replaceAll("_", " "), ...views.map((view) => number(view.last[name]))]);
  fill(at("compared"), table([["", ""], ...views.map((view) => [view.name])], rows, ""));
}

function facts(pairs) {
  return make("dl", { class: "facts" }, ...pairs.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
}
