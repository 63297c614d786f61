// The panel with the flags of the selected answer.

import { $, element, letter } from "./dom.js";

export const flagsOpen = () => !$("flags").hidden;

export const flagsHaveFocus = () => flagsOpen() && $("flags").contains(document.activeElement);

export function showFlags(open) {
  $("flags").hidden = !open;
  $("flags-button").setAttribute("aria-expanded", open);
  if (open) $("flags").querySelector("input").focus();
}

/** The checkboxes; the first nine have a digit as their key. They are redrawn for each answer, and keep the focus. */
export function drawFlags(label, selected, flags) {
  const set = label.flags[label.ids[selected]] ?? [];
  $("flags-button").hidden = flags.length === 0;
  $("flags-title").textContent = `Flags of answer ${letter(selected)}`;
  if ($("flags-list").childElementCount !== flags.length) {
    $("flags-list").replaceChildren(...flags.map(checkbox));
  }
  [...$("flags-list").querySelectorAll("input")].forEach((input, i) => (input.checked = set.includes(flags[i])));
}

function checkbox(flag, i) {
  const key = i < 9 ? element("kbd", { "aria-hidden": "true" }, String(i + 1)) : "";
  return element("label", {}, element("input", { type: "checkbox", value: flag }), element("span", {}, flag), key);
}
