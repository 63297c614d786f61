// Requests to the server. Only this file calls fetch.

const TIMEOUT = 15_000; // ms; a server that is silent for longer counts as lost
const LONGEST_PAUSE = 4_000; // ms between attempts

/** The server refused the request; `message` is its sentence for the labeler. */
export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** No answer arrived, or the server failed. The request may or may not have been carried out. */
export class Lost extends Error {}

export async function request(method, path, body) {
  const options = { method, cache: "no-store", redirect: "error", signal: AbortSignal.timeout(TIMEOUT) };
  if (body !== undefined) {
    options.headers = { "Content-Type": "application/json" };
    options.body = JSON.stringify(body);
  }
  let response, reply;
  try {
    response = await fetch(path, options);
    reply = await response.json();
  } catch {
    throw new Lost("No connection to the server.");
  }
  if (response.status >= 500) throw new Lost(sentence(reply.error ?? "the server failed"));
  if (!response.ok) throw new Refused(sentence(reply.error ?? "the server refused the request"), response.status);
  return reply;
}

const sentence = (text) => `${text.charAt(0).toUpperCase()}${text.slice(1)}.`;

/** Repeats an idempotent request until an answer arrives; calls `onLost` after every attempt that got none. */
export async function untilAnswered(send, onLost) {
  for (let pause = 500; ; pause = Math.min(2 * pause, LONGEST_PAUSE)) {
    try {
      return await send();
    } catch (error) {
      if (!(error instanceof Lost)) throw error;
      onLost(error);
      await online(pause);
    }
  }
}

/** Resolves after `pause` ms, or as soon as the browser is online again. */
function online(pause) {
  return new Promise((resolve) => {
    const done = () => {
      clearTimeout(timer);
      removeEventListener("online", done);
      resolve();
    };
    const timer = setTimeout(done, pause);
    addEventListener("online", done);
  });
}
