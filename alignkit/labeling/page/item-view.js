// Draws the item: its prompt, the cards of its answers, and the marks on them.

import { $, element, fillText, letter } from "./dom.js";

/** Draws a new item. `onSelect(index)` is called when a card is clicked or gets the focus. */
export function drawItem(item, onSelect) {
  drawPrompt(item.prompt);
  $("answers").dataset.k = item.answers.length;
  $("answers").replaceChildren(...item.answers.map((answer, index) => drawAnswer(answer, index, onSelect)));
  markOverflow();
}

function drawPrompt(messages) {
  const turns = messages.map((message) => {
    const text = element("div", { class: "text", dir: "auto" });
    fillText(text, { text: message.content, html: message.html });
    const role = element("p", { class: "role" }, messages.length > 1 ? roleName(message.role) : "Prompt");
    return element("div", { class: `turn ${message.role}` }, role, text);
  });
  const more = element("button", { type: "button", class: "more", hidden: "" });
  const inner = element("div", { class: "turns" }, ...turns);
  more.addEventListener("click", () => expand($("prompt"), !$("prompt").classList.contains("expanded")));
  $("prompt").classList.remove("expanded");
  $("prompt").classList.toggle("conversation", messages.length > 1);
  $("prompt").replaceChildren(inner, more);
}

function roleName(role) {
  return { user: "User", assistant: "Assistant", system: "System", tool: "Tool", tools: "Tools" }[role] ?? role;
}

function drawAnswer(answer, index, onSelect) {
  const card = $("answer-template").content.cloneNode(true).firstElementChild;
  card.dataset.index = index;
  card.dataset.drop = `tie:${answer.id}`;
  card.setAttribute("aria-labelledby", `answer-${index}`);
  card.querySelector("h2").id = `answer-${index}`;
  card.querySelector("h2").textContent = `Answer ${letter(index)}`;
  card.querySelector(".letter").textContent = letter(index);
  card.querySelector(".letter").dataset.drag = answer.id;
  fillText(card.querySelector(".text"), answer);
  card.querySelector(".more").addEventListener("click", () => toggleAnswer(index));
  card.addEventListener("pointerup", (event) => !event.target.closest("a, button") && onSelect(index));
  card.addEventListener("focus", () => onSelect(index));
  return card;
}

export function card(index) {
  return $("answers").children[index];
}

export function toggleAnswer(index) {
  expand(card(index), !card(index).classList.contains("expanded"));
  if (!card(index).classList.contains("expanded")) reveal(index);
}

function expand(box, expanded) {
  box.classList.toggle("expanded", expanded);
  const more = box.querySelector(".more");
  more.textContent = expanded ? "Show less" : "Show all";
  more.setAttribute("aria-expanded", expanded);
}

/** Offers "Show all" where a text is longer than its box. Called again when the layout changes. */
export function markOverflow() {
  for (const box of [$("prompt"), ...$("answers").children]) {
    if (!box.firstElementChild || box.classList.contains("expanded")) continue;
    const text = box.querySelector(".turns, .text");
    box.querySelector(".more").hidden = text.scrollHeight <= text.clientHeight + 1;
    expand(box, false);
    if (box.classList.contains("conversation")) text.scrollTop = text.scrollHeight; // shows the last turn
  }
}

/** Scrolls an answer into view if its beginning is not on the screen. */
export function reveal(index) {
  const { top } = card(index).getBoundingClientRect();
  const bar = $("bar").getBoundingClientRect();
  if (top < 0 || top > bar.top - 120) card(index).scrollIntoView({ block: "start" });
}

/** The ranks, grades and flags on the cards, and which answer is selected. */
export function drawMarks(label, selected, session) {
  label.ids.forEach((id, index) => {
    const node = card(index);
    const rank = label.ranks[id];
    const tie = rank !== undefined && label.tied(id).length > 0;
    node.classList.toggle("selected", index === selected);
    node.setAttribute("aria-current", index === selected);
    node.querySelector(".rank").textContent = label.ids.length === 2 ? verdict(rank, tie) : rankText(rank, tie);
    node.querySelector(".rank").classList.toggle("best", rank === 1);
    node.querySelector(".grade").textContent = id in label.grades ? `${label.grades[id]} of ${session.scale}` : "";
    const flags = label.flags[id] ?? [];
    node.querySelector(".pills").replaceChildren(...flags.map((flag) => element("li", {}, flag)));
    node.querySelector(".pills").hidden = flags.length === 0;
  });
}

function rankText(rank, tie) {
  return rank === undefined ? "" : `Rank ${rank}${tie ? ", tie" : ""}`;
}

function verdict(rank, tie) {
  return tie ? "Tie" : rank === 1 ? "Better" : "";
}

/** Shows only two answers side by side, or all of them (`pair` null). */
export function showPair(pair) {
  document.documentElement.classList.toggle("comparing", pair !== null);
  [...$("answers").children].forEach((node, index) => {
    node.hidden = pair !== null && !pair.includes(index);
  });
}
