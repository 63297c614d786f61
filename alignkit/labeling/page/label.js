// The label of one item while it is being made: ranks, grades and flags. Knows nothing of the page.

/** Ranks count from 1 (best); equal ranks are a tie; an answer without a rank is missing in `ranks`. */
export class Label {
  constructor(item, saved = {}) {
    this.ids = item.answers.map((answer) => answer.id);
    this.ranks = this.#known(saved.ranks, Number.isInteger);
    this.grades = this.#known(saved.grades, Number.isInteger);
    this.flags = this.#known(saved.flags, Array.isArray);
    this.seconds = Number.isFinite(saved.seconds) ? saved.seconds : 0;
  }

  /** From what the server stored: there ranks count from 0. */
  static submitted(item, stored) {
    const ranks = Object.fromEntries(Object.entries(stored.ranks ?? {}).map(([id, rank]) => [id, rank + 1]));
    return new Label(item, { ...stored, ranks });
  }

  #known(values, valid) {
    const known = Object.entries(values ?? {}).filter(([id, value]) => this.ids.includes(id) && valid(value));
    return Object.fromEntries(known);
  }

  /** Answers with a rank, best first: [["2"], ["0", "3"]] is "2" before a tie of "0" and "3". */
  groups() {
    const ranks = [...new Set(Object.values(this.ranks))].sort((a, b) => a - b);
    return ranks.map((rank) => this.ids.filter((id) => this.ranks[id] === rank));
  }

  unranked() {
    return this.ids.filter((id) => !(id in this.ranks));
  }

  ungraded() {
    return this.ids.filter((id) => !(id in this.grades));
  }

  tied(id) {
    return this.ids.filter((other) => other !== id && this.ranks[other] === this.ranks[id]);
  }

  rank(id, rank) {
    this.ranks[id] = rank;
  }

  grade(id, grade) {
    this.grades[id] = grade;
  }

  clear(id, what) {
    delete this[what][id];
  }

  toggleFlag(id, flag) {
    const flags = this.flags[id] ?? [];
    this.flags[id] = flags.includes(flag) ? flags.filter((other) => other !== flag) : [...flags, flag];
  }

  /** Makes an answer a rank of its own, before the group at `position` (or after the last one). */
  insert(id, position) {
    const groups = this.groups();
    groups.splice(position, 0, [id]);
    this.#number(groups.map((group, i) => (i === position ? group : group.filter((other) => other !== id))));
  }

  /** Ties an answer with another one; if that has no rank yet, both become the last rank. */
  tie(id, other) {
    if (!(other in this.ranks)) this.insert(other, this.groups().length);
    this.ranks[id] = this.ranks[other];
    this.#number(this.groups());
  }

  /** One step better (-1) or worse (+1): out of a tie, or into a tie with the neighbor. */
  step(id, direction) {
    const groups = this.groups();
    const at = groups.findIndex((group) => group.includes(id));
    if (at < 0) this.insert(id, groups.length);
    else if (groups[at].length > 1) this.insert(id, direction < 0 ? at : at + 1);
    else if (groups[at + direction]) this.tie(id, groups[at + direction][0]);
  }

  #number(groups) {
    const filled = groups.filter((group) => group.length > 0);
    this.ranks = Object.fromEntries(filled.flatMap((group, i) => group.map((id) => [id, i + 1])));
  }

  draft() {
    return { ranks: this.ranks, grades: this.grades, flags: this.flags, seconds: this.seconds };
  }

  /** The body of the request that submits it: ranks from 0 without gaps, and no empty lists. */
  body() {
    const ranks = Object.fromEntries(this.groups().flatMap((group, rank) => group.map((id) => [id, rank])));
    const flags = Object.fromEntries(Object.entries(this.flags).filter(([, flags]) => flags.length > 0));
    return { ranks, grades: this.grades, flags, seconds: Math.round(10 * this.seconds) / 10 };
  }
}
