// Small helpers for the document. Text is always set as text: answers are input that nobody checked.

export const $ = (id) => document.getElementById(id);

/** An element: element("p", { class: "note" }, "text", child). An attribute whose value is null is left out. */
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** The text of an answer or a message: plain, or the HTML that the server made of its Markdown and sanitised. */
export function fillText(node, { text, html }) {
  node.classList.toggle("markdown", html !== undefined);
  if (html === undefined) node.textContent = text;
  else node.innerHTML = html;
}

/** 0 -> "A", 25 -> "Z", 26 -> "AA". */
export function letter(index) {
  return (index >= 26 ? letter(Math.floor(index / 26) - 1) : "") + String.fromCharCode(65 + (index % 26));
}

/** ["A", "B", "C"] -> "A, B and C". */
export function listed(words) {
  return words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} and ${words.at(-1)}`;
}

/** 95 -> "2 min"; 7300 -> "2 h 2 min". */
export function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 90 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}
