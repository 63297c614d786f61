// What the page says: the message in the bar, the banner under the head, and the progress.

import { $, duration, element } from "./dom.js";

/** A short message about what just happened; screen readers speak it. */
export function say(text) {
  $("message").textContent = text;
}

/** A banner that stays until it is removed with an empty text. */
export function banner(text) {
  if ($("banner").textContent !== text) $("banner").textContent = text;
  $("banner").hidden = !text;
}

export function drawProgress({ done, skipped, total, seconds_per_item: pace }) {
  const left = total - done - skipped;
  const texts = [`${done + skipped} of ${total} done`];
  if (pace) texts.push(`${duration(pace)} each`);
  if (pace && left > 0) texts.push(`about ${duration(pace * left)} left`);
  $("progress").max = total || 1;
  $("progress").value = done + skipped;
  $("progress-text").replaceChildren(...texts.map((text) => element("span", {}, text)));
  $("finished-text").textContent = `${done} labeled, ${skipped} skipped. Thank you.`;
}
