// Getting requests to the server over a connection that may fail, one at a time.

import { Lost, request, untilAnswered } from "./api.js";
import { banner, say } from "./notices.js";

const KEPT = "What you entered is kept in this browser";

let busy = false;

export const isBusy = () => busy;

/** Runs one action at a time: what is pressed meanwhile is ignored. A refusal is shown as the server's sentence. */
export async function exclusively(action) {
  if (busy) return;
  busy = true;
  document.documentElement.classList.add("busy");
  try {
    await action();
  } catch (error) {
    if (error instanceof Lost) banner(`${error.message} Try again in a moment.`);
    else if (error.status === 401) banner(`${error.message} ${KEPT}.`);
    else if (error.status === 404) banner(`${error.message} ${KEPT}. Reload the page.`);
    else if (error.status) say(error.message);
    else throw error;
  } finally {
    busy = false;
    document.documentElement.classList.remove("busy");
  }
}

/** Repeats an idempotent request until the server answers; meanwhile a banner gives the reason and `consequence`. */
export async function steadily(send, consequence) {
  const reply = await untilAnswered(send, (error) => banner(`${error.message} ${consequence}`));
  banner("");
  return reply;
}

/** Sends what a former page could not get to the server. Returns why the server refused one of them, or "". */
export async function deliverPending(drafts) {
  let refused = "";
  for (const pending of drafts.pending()) {
    try {
      await deliver(drafts, pending);
    } catch (error) {
      if (!error.status) throw error;
      refused = `An earlier label was refused: ${error.message}`;
    }
  }
  return refused;
}

/** Submits the label of an item, or skips it. The request is kept in the browser until the server has confirmed it. */
export async function deliver(drafts, pending) {
  const { method, path, body, id } = pending;
  drafts.keep(pending);
  try {
    await steadily(() => request(method, path, body), `${KEPT} and is sent again.`);
  } catch (error) {
    if (error.status !== 401) drafts.confirmed(pending); // refused for good; the draft is still there
    throw error;
  }
  drafts.confirmed(pending);
  if (method === "PUT") drafts.forget(id);
}
