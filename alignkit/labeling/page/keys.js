// The keys, in one table: what the page does for each of them, and what the help says about it.

import { $, element } from "./dom.js";

const HELP = [
  ["1 – 9", "Give the selected answer this rank; the same rank twice is a tie", (many) => many],
  ["1  2  3", "The left answer is better, a tie, the right answer is better", (many) => !many],
  ["g", "Let the digits grade, or rank again", (many, { scale }) => scale],
  ["0  Backspace", "Remove the rank, or the grade"],
  ["←  →  Tab", "Go to the previous or next answer"],
  ["Shift ↑  Shift ↓", "Move the answer one step up or down in the order", (many) => many],
  ["f", "Flags of the selected answer; there digits or Space tick them", (many, { flags }) => flags.length],
  ["e", "Show all of a long answer, or less of it"],
  ["c", "Compare two at a time", (many) => many],
  ["p", "Hold the selected answer in place and compare others with it", (many) => many],
  ["Enter", "Submit, and go to the next item"],
  ["s", "Skip this item"],
  ["u", "Undo: reopen the item before"],
  ["i", "Show or hide the guide", (many, { guide }) => guide],
  ["r", "Results and export"],
  ["?", "This help"],
];

export function drawHelp(many, session) {
  const rows = HELP.filter(([, , applies]) => !applies || applies(many, session));
  const keys = (text) => text.split("  ").map((key) => element("kbd", {}, key));
  const row = (text, help) => [element("th", { scope: "row" }, ...keys(text)), element("td", {}, help)];
  $("help-keys").replaceChildren(...rows.map(([text, help]) => element("tr", {}, ...row(text, help))));
}

/**
 * Calls the action of each key. `actions` has `digit(n)` and one function for each name below; a key that was handled
 * does nothing else in the browser. Buttons and links keep Enter and Space, and an open dialog keeps all keys.
 */
export function listen(actions) {
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    if (document.querySelector("dialog[open]")) return;
    const action = find(event, actions);
    if (!action) return;
    event.preventDefault();
    if (!event.repeat) action();
  });
}

function find(event, actions) {
  const digit = digitOf(event);
  if (digit) return () => actions.digit(digit);
  if (event.shiftKey && event.key === "ArrowUp") return () => actions.step(-1);
  if (event.shiftKey && event.key === "ArrowDown") return () => actions.step(1);
  if (event.key === "Enter") return event.target.closest("button, a") ? null : actions.submit;
  if (event.shiftKey && event.key !== "?") return null;
  return {
    0: actions.zero,
    Backspace: actions.clear,
    Delete: actions.clear,
    ArrowLeft: () => actions.go(-1),
    ArrowRight: () => actions.go(1),
    Escape: actions.escape,
    "?": actions.help,
    g: () => actions.mode(),
    f: actions.flags,
    e: actions.expand,
    c: actions.compare,
    p: actions.hold,
    s: actions.skip,
    u: actions.undo,
    i: actions.guide,
    r: actions.results,
  }[letterOf(event)];
}

/** 1 to 9, also on keyboards whose digits need Shift, such as a French one. */
function digitOf(event) {
  const name = /^[1-9]$/.test(event.key) ? event.key : !event.shiftKey && /^Digit([1-9])$/.exec(event.code)?.[1];
  return Number(name) || null;
}

/** The key's own name, or the Latin letter in its place on keyboards of other scripts. */
function letterOf(event) {
  const latin = event.key.length > 1 || event.key.charCodeAt(0) < 128;
  return latin ? event.key : (/^Key([A-Z])$/.exec(event.code)?.[1] ?? "").toLowerCase();
}
