// The dialogs: the labeler's name, and the results.

import { request } from "./api.js";
import { $, duration, element } from "./dom.js";

/** Asks for the labeler's name and opens the page again under that name. With a name already, Escape keeps it. */
export function askName(current = "") {
  const dialog = $("name-dialog");
  $("name").value = current;
  dialog.oncancel = (event) => current || event.preventDefault();
  dialog.showModal();
  $("name").select();
  $("name-form").onsubmit = async (event) => {
    event.preventDefault();
    try {
      await request("POST", "/api/session", { labeler: $("name").value });
      location.reload();
    } catch (error) {
      $("name-error").textContent = error.message;
    }
  };
}

export async function showResults() {
  $("results").replaceChildren(element("p", {}, "Loading…"));
  $("results-dialog").showModal();
  try {
    $("results").replaceChildren(...results(await request("GET", "/api/status")));
  } catch (error) {
    $("results").replaceChildren(element("p", { class: "error" }, error.message));
  }
}

function results(status) {
  const row = (tag, ...cells) => element("tr", {}, ...cells.map((cell) => element(tag, {}, String(cell))));
  const time = (seconds) => (seconds === null ? "–" : duration(seconds));
  const rows = status.labelers.map(({ labeler, done, skipped, seconds_per_item: seconds }) =>
    row("td", labeler, done, skipped, time(seconds)),
  );
  const head = element("thead", {}, row("th", "Labeler", "Labeled", "Skipped", "Time per item"));
  return [
    element("p", {}, `${status.done} of ${status.items} items are labeled.`),
    element("table", {}, head, element("tbody", {}, ...rows)),
    element("p", {}, agreement(status.agreement)),
  ];
}

function agreement(measured) {
  if (measured === null) return "Once two labelers have ranked the same items, their agreement is shown here.";
  const { share, error, alpha, pairs } = measured;
  const percent = [share, error].filter((number) => number !== null).map((number) => `${(100 * number).toFixed(1)}%`);
  const texts = [
    `Labelers order ${percent.join(" ± ")} of ${pairs} pairs of answers alike`,
    "(InstructGPT's labelers: 72.6% ± 1.5%).",
  ];
  if (alpha !== null) texts.push(`Krippendorff's alpha is ${alpha.toFixed(2)}.`);
  return texts.join(" ");
}
