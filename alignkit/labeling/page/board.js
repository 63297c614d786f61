// The bar at the bottom: the order so far, and the buttons for ranks or grades of the selected answer.

import { $, element, letter } from "./dom.js";

/** The order as groups of chips, best first, with gaps between them to drop an answer into; the unranked at the end. */
export function drawBoard(label, selected) {
  const chip = (id) => {
    const index = label.ids.indexOf(id);
    const attributes = { type: "button", class: "chip", tabindex: "-1", "data-index": index, "data-drag": id };
    const name = `Answer ${letter(index)}, ${id in label.ranks ? `rank ${label.ranks[id]}` : "no rank"}`;
    attributes["data-drop"] = id in label.ranks ? `tie:${id}` : null;
    return element("button", { ...attributes, "aria-label": name, "aria-current": index === selected }, letter(index));
  };
  const groups = label.groups();
  const nodes = groups.flatMap((group, i) => [
    gap(i),
    element(
      "span",
      { class: "group", "data-drop": `tie:${group[0]}` },
      element("span", { class: "number" }, String(label.ranks[group[0]])),
      ...group.map(chip),
    ),
  ]);
  const unranked = label.unranked();
  const rest = element(
    "span",
    { class: "group unranked", "data-drop": "none" },
    element("span", { class: "number" }, unranked.length ? "Not ranked" : "All ranked"),
    ...unranked.map(chip),
  );
  $("board").replaceChildren(element("span", { class: "end" }, "Best"), ...nodes, gap(groups.length), rest);
}

function gap(position) {
  return element("span", { class: "gap", "data-drop": `gap:${position}` });
}

/** The number buttons of the mode: ranks (for a pair: left, tie, right) or grades. */
export function drawNumbers({ label, selected, mode, scale }) {
  const id = label.ids[selected];
  const pair = mode === "rank" && label.ids.length === 2;
  const question = `${mode === "rank" ? "Rank" : "Grade"} of answer ${letter(selected)}`;
  $("numbers").setAttribute("aria-label", pair ? "Which answer is better?" : question);
  $("numbers").classList.toggle("pair", pair);
  $("board").hidden = label.ids.length === 2;
  if (pair) {
    const verdict = verdictOf(label);
    const texts = ["A is better", "Tie", "B is better"];
    $("numbers").replaceChildren(...texts.map((text, i) => number(i + 1, verdict === i + 1, text)));
  } else {
    const current = mode === "rank" ? label.ranks[id] : label.grades[id];
    const count = mode === "rank" ? label.ids.length : scale;
    const numbers = Array.from({ length: count }, (_, i) => number(i + 1, current === i + 1));
    const ends = mode === "rank" ? ["best", "worst"] : ["worst", "best"];
    const [low, high] = ends.map((text) => element("span", { class: "end", "aria-hidden": "true" }, text));
    $("numbers").replaceChildren(element("b", { class: "of" }, letter(selected)), low, ...numbers, high);
  }
}

function number(value, pressed, text) {
  const key = value <= 9 ? String(value) : null;
  const attributes = { type: "button", "data-number": value, "aria-pressed": pressed, "aria-keyshortcuts": key };
  const content = text ? [`${text} `, element("kbd", {}, key)] : [String(value)];
  return element("button", attributes, ...content);
}

/** A pair's ranks as its key: 1 the left one is better, 2 a tie, 3 the right one is better. */
function verdictOf(label) {
  const [left, right] = label.ids.map((id) => label.ranks[id]);
  return left === undefined || right === undefined ? null : 2 + Math.sign(left - right);
}

export function drawModes(mode, scale, pair) {
  $("modes").hidden = !scale;
  for (const button of $("modes").children) button.setAttribute("aria-pressed", button.dataset.mode === mode);
  $("compare-button").hidden = pair;
}
