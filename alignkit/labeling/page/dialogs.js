// The dialogs: the labeler's name, and the results.

import { request } from "./api.js";
import { $, duration, element } from "./dom.js";

/** Asks for the labeler's name until the server accepts one; resolves to the session. */
export function askName() {
  const dialog = $("name-dialog");
  dialog.addEventListener("cancel", (event) => event.preventDefault());
  dialog.showModal();
  return new Promise((resolve) => {
    $("name-form").addEventListener("submit", async (event) => {
      event.preventDefault();
      try {
        const session = await request("POST", "/api/session", { labeler: $("name").value.trim() });
        dialog.close();
        resolve(session);
      } catch (error) {
        $("name-error").textContent = error.message;
      }
    });
  });
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
  const head = element("thead", {}, row("th", "Labeler", "Labelled", "Skipped", "Time per item"));
  const rows = status.labelers.map((each) =>
    row("td", each.name, each.done, each.skipped, each.seconds_per_item === null ? "–" : duration(each.seconds_per_item)),
  );
  return [
    element("p", {}, `${status.done} of ${status.total} items have a ranking.`),
    element("table", {}, head, element("tbody", {}, ...rows)),
    element("p", {}, agreement(status)),
  ];
}

function agreement({ agreement, alpha }) {
  if (!agreement) return "Agreement appears here once two labelers have ranked the same items.";
  const percent = (share) => (100 * share).toFixed(1);
  const error = agreement.error === null ? "" : ` ± ${percent(agreement.error)}`;
  const share = `Labelers order ${percent(agreement.share)}${error} % of ${agreement.pairs} pairs alike.`;
  return `${share} InstructGPT's labelers: 72.6 ± 1.5 %.${alpha === null ? "" : ` Krippendorff's alpha: ${alpha.toFixed(2)}.`}`;
}
