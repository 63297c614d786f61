// What the labeler entered, kept in localStorage until the server has it: a reload loses nothing.

/**
 * The drafts of one labeler of one file, and the requests that the server has not confirmed yet. Ids of items differ
 * between stores, so a draft is never that of another file with the same name.
 */
export class Drafts {
  constructor(session) {
    this.prefix = `alignkit-label/${session.file}/${session.labeler}/`;
  }

  load(id) {
    return this.#read(`${this.prefix}draft/${id}`);
  }

  save(id, draft) {
    localStorage.setItem(`${this.prefix}draft/${id}`, JSON.stringify(draft));
  }

  forget(id) {
    localStorage.removeItem(`${this.prefix}draft/${id}`);
  }

  /** The unconfirmed requests, one for each item, as `keep` got them. */
  pending() {
    const keys = Object.keys(localStorage).filter((key) => key.startsWith(`${this.prefix}pending/`));
    return keys.map((key) => this.#read(key)).filter(Boolean);
  }

  keep(request) {
    localStorage.setItem(`${this.prefix}pending/${request.id}`, JSON.stringify(request));
  }

  confirmed(request) {
    localStorage.removeItem(`${this.prefix}pending/${request.id}`);
  }

  #read(key) {
    try {
      return JSON.parse(localStorage.getItem(key));
    } catch {
      return null; // not written by this page
    }
  }
}
