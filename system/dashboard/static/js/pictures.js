// The last evaluation: its scores, and what was found for pictures and for captions.
import { at, make, table } from "./dom.js";
import { whole } from "./format.js";

export function showEvaluation(found) {
  at("evaluation-section").hidden = !found;
  if (!found) return;
  at("evaluation-title").textContent = `Evaluation at step ${whole(found.step)}, ${found.tower} tower`;
  const scores = table(
    [["task", "text"], ["measure", "text"], ["result"], ["95 % interval"], ["chance"]],
    found.scores.map((one) => [one.task, one.measure, one.result, one.interval, one.chance]), "No scores.");
  const parts = [make("p", { class: "note" }, `${whole(found.data.samples)} images of ${found.data.uri}`), scores];
  if (found.examples) {
    const name = found.pictures_of_step === found.step ? "" : ` (step ${whole(found.pictures_of_step)})`;
    parts.push(make("h3", {}, `Retrieved, best first${name}`), make("div", { class: "pairs" },
      ...found.examples.image_to_text.map((one) => pair(found.pictures, one, true)),
      ...found.examples.text_to_image.map((one) => pair(found.pictures, one, false))));
  }
  at("evaluation").replaceChildren(...parts);
}

function picture(pictures, number, alt) {
  return make("img", { src: `data:image/jpeg;base64,${pictures[number]}`, alt, width: 96, height: 96 });
}

function pair(pictures, example, withPicture) {
  const answers = example.answers.map((answer) =>
    make("li", { class: answer.right ? "right" : null }, picture(pictures, answer.picture, ""), answer.right ? make("b", {}, "✓ ") : null, answer.caption));
  return make("div", { class: "pair" },
    make("div", { class: "ask" }, withPicture ? picture(pictures, example.picture, example.caption) : null,
      make("strong", {}, example.caption), ` right: rank ${whole(example.rank)}`),
    make("ol", { class: "answers" }, ...answers));
}
