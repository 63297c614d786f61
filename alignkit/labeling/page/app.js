// The page: one item after another, from the server's queue to the submitted label.

import { request } from "./api.js";
import { drawBoard, drawModes, drawNumbers } from "./board.js";
import { connect } from "./controls.js";
import { deliver, deliverPending, exclusively, isBusy, steadily } from "./delivery.js";
import { askName, showResults } from "./dialogs.js";
import { $, letter, listed } from "./dom.js";
import { Drafts } from "./drafts.js";
import { drawFlags, flagsHaveFocus, flagsOpen, showFlags } from "./flags.js";
import { card, drawItem, drawMarks, markOverflow, reveal, showPair, toggleAnswer } from "./item-view.js";
import { drawHelp } from "./keys.js";
import { Label } from "./label.js";
import { banner, drawProgress, say } from "./notices.js";

const LONGEST_PAUSE = 120; // s; the rest of a longer break does not count as time spent on an item

let session, drafts;
let item = null; // from the server; null when all are done
let label = null; // the label of the item, as entered so far
let selected = 0; // index of the answer that keys act on
let held = null; // index of the answer that others are compared with; null shows all answers
let mode = "rank"; // what digits give: "rank" or "grade"
let lastActive = performance.now(); // ms

function draw() {
  drawMarks(label, selected, session);
  drawBoard(label, selected);
  drawModes(mode, session.scale, isPair());
  drawNumbers({ label, selected, mode, scale: session.scale });
  drawFlags(label, selected, session.flags);
  $("compare-button").setAttribute("aria-pressed", held !== null);
  showPair(held === null ? null : [held, selected]);
}

const isPair = () => label.ids.length === 2;
const name = (id) => letter(label.ids.indexOf(id));

// Items

async function start() {
  session = await steadily(() => request("GET", "/api/session"), "The page opens as soon as the server answers.");
  if (!session.labeler) return askName();
  drafts = new Drafts(session);
  $("file").textContent = session.file;
  $("labeler").textContent = session.labeler;
  $("guide-button").hidden = !session.guide;
  if (session.guide) $("guide").innerHTML = session.guide; // sanitised by the server
  showGuide(localStorage.getItem("alignkit-label/guide") !== "hidden");
  drawHelp(true, session);
  connect(actions);
  const refused = await deliverPending(drafts);
  await next();
  banner(refused);
}

async function next() {
  open(await steadily(() => request("GET", "/api/next"), "The next item opens as soon as the server answers."));
}

function open(reply) {
  item = reply.item;
  drawProgress(reply.progress);
  for (const id of ["prompt", "answers", "bar"]) $(id).hidden = item === null;
  $("finished").hidden = item !== null;
  held = null;
  mode = "rank";
  document.documentElement.classList.remove("comparing");
  scrollTo(0, 0);
  if (item === null) {
    $("number").textContent = "";
    $("title").textContent = "All done";
    $("finished").focus();
    return;
  }
  label = labelOf(item);
  selected = Math.max(0, label.ids.indexOf(label.unranked()[0]));
  lastActive = performance.now();
  $("number").textContent = `item ${item.number}`;
  $("title").textContent = `Item ${item.number}: rank ${item.answers.length} answers`;
  drawItem(item, select);
  drawHelp(!isPair(), session);
  showFlags(false);
  draw();
  $("prompt").focus({ preventScroll: true });
}

/** A draft in this browser is newer than what the server sends with an item that was reopened. */
function labelOf(item) {
  const draft = drafts.load(item.id);
  if (draft) return new Label(item, draft);
  return item.label ? Label.submitted(item, item.label) : new Label(item);
}

function submit() {
  if (!item) return;
  const missing = label.unranked();
  if (missing.length > 0) {
    goTo(label.ids.indexOf(missing[0]));
    return say(`Rank answer${missing.length > 1 ? "s" : ""} ${listed(missing.map(name))} first, or skip the item.`);
  }
  active();
  save();
  return finish("PUT", "", label.body(), "stored");
}

function skip() {
  if (item) return finish("POST", "/skip", {}, "skipped; u opens it again");
}

async function finish(method, suffix, body, outcome) {
  const { id, number } = item;
  await deliver(drafts, { method, path: `/api/items/${encodeURIComponent(id)}${suffix}`, body, id });
  await next();
  if (item) $("prompt").scrollIntoView(); // on a phone, the guide is above it
  say(`Item ${number} is ${outcome}.`);
}

async function undo() {
  open(await request("POST", "/api/undo", {}));
  save();
  say(`Item ${item.number} is open again.`);
}

// What is entered for an item

/** Keeps the label as a draft, draws it and tells what changed. */
function changed(text) {
  active();
  save();
  draw();
  say(text);
}

function save() {
  try {
    drafts.save(item.id, label.draft());
  } catch {
    banner("This browser keeps no drafts: what you have not submitted is lost when you reload the page.");
  }
}

/** Counts the time since the last sign of the labeler as time spent on this item. */
function active() {
  const now = performance.now();
  if (label) label.seconds += Math.min((now - lastActive) / 1000, LONGEST_PAUSE);
  lastActive = now;
}

function digit(value, options) {
  if (flagsHaveFocus()) return flag(session.flags[value - 1]);
  if (mode === "grade") return grade(value, options);
  return isPair() ? decide(value) : rank(value, options);
}

function rank(value, options) {
  const count = label.ids.length;
  if (value > count) return say(`There are ${count} answers: ranks go from 1 to ${count}.`);
  const id = label.ids[selected];
  label.rank(id, value);
  const rest = label.unranked();
  changed(`${rankOf(id)}${rest.length ? "" : " All answers are ranked: Enter submits."}`);
  advance(rest, options);
}

function rankOf(id) {
  if (!(id in label.ranks)) return `Answer ${name(id)}: no rank.`;
  const ties = label.tied(id).map(name);
  return `Answer ${name(id)}: rank ${label.ranks[id]}${ties.length ? `, tied with ${listed(ties)}` : ""}.`;
}

/** The verdict on a pair: 1 the left answer is better, 2 a tie, 3 the right answer is better. */
function decide(value) {
  if (value > 3) return say("1: A is better. 2: a tie. 3: B is better.");
  const [left, right] = label.ids;
  label.rank(left, value === 3 ? 2 : 1);
  label.rank(right, value === 1 ? 2 : 1);
  changed(`${["A is better", "A tie", "B is better"][value - 1]}: Enter submits.`);
}

function grade(value, options) {
  if (value > session.scale) return say(`Grades go from 1 to ${session.scale}.`);
  const id = label.ids[selected];
  label.grade(id, value);
  const rest = label.ungraded();
  if (rest.length === 0) mode = "rank";
  const text = `Answer ${name(id)}: grade ${value} of ${session.scale}.`;
  changed(rest.length ? text : `${text} All answers are graded: digits give ranks again.`);
  advance(rest.length ? rest : label.unranked(), options);
}

/** Removes the rank or the grade, but on a scale of 10 it is the grade 10. */
function zero() {
  return mode === "grade" && session.scale === 10 ? grade(10) : clear();
}

function clear() {
  label.clear(label.ids[selected], mode === "rank" ? "ranks" : "grades");
  changed(`Answer ${letter(selected)}: no ${mode}.`);
}

function step(direction) {
  label.step(label.ids[selected], direction);
  changed(rankOf(label.ids[selected]));
}

function drop(id, target) {
  const [place, where] = target.split(":");
  if (place === "none") label.clear(id, "ranks");
  else if (place === "gap") label.insert(id, Number(where));
  else label.tie(id, where);
  select(label.ids.indexOf(id));
  changed(rankOf(id));
}

function flag(flag) {
  if (!flag) return;
  const id = label.ids[selected];
  label.toggleFlag(id, flag);
  changed(`Answer ${name(id)}: ${flag}${label.flags[id].includes(flag) ? "" : ", removed"}.`);
}

// What is shown

function select(index) {
  if (index === selected) return;
  if (index === held) held = selected;
  selected = index;
  draw();
}

/** Selects an answer and shows it. The focus follows, unless the labeler works with the flags or with a button. */
function goTo(index, { moveFocus = true } = {}) {
  select(index);
  reveal(index);
  if (moveFocus && !flagsOpen()) card(index).focus({ preventScroll: true });
}

function go(direction) {
  const count = label.ids.length;
  let index = selected;
  do index = (index + direction + count) % count;
  while (index === held);
  goTo(index);
}

/** Goes to the next of the answers that lack a rank or a grade, to the held one last; stays if none does. */
function advance(rest, options) {
  const indices = rest.map((id) => label.ids.indexOf(id)).sort((a, b) => (a === held) - (b === held));
  goTo(indices.find((index) => index > selected && index !== held) ?? indices[0] ?? selected, options);
}

function switchMode(to = mode === "rank" ? "grade" : "rank") {
  if (!session.scale) return;
  mode = to;
  draw();
  const id = label.ids[selected];
  if (mode === "grade" && id in label.grades) advance(label.ungraded());
  say(mode === "grade" ? `Digits give grades: ${session.scale} is the best.` : "Digits give ranks: 1 is the best.");
}

function toggleFlags(shown = !flagsOpen()) {
  if (session.flags.length === 0) return;
  showFlags(shown);
  if (!shown) card(selected).focus({ preventScroll: true });
}

function compare() {
  if (isPair()) return;
  if (held === null) [held, selected] = [selected, (selected + 1) % label.ids.length];
  else held = null;
  draw();
  markOverflow();
  goTo(selected);
  say(held === null ? "All answers." : `Answers ${listed([held, selected].sort((a, b) => a - b).map(letter))}.`);
}

/** While two are compared: the selected answer stays and the other one is selected. */
function hold() {
  if (held === null) return;
  goTo(held);
  say(`Answer ${letter(held)} stays; answer ${letter(selected)} is selected.`);
}

function escape() {
  if (flagsOpen()) toggleFlags(false);
  else if (held !== null) compare();
}

function showGuide(shown) {
  $("guide").hidden = !shown || !session.guide;
  $("guide-button").setAttribute("aria-expanded", shown);
  markOverflow();
}

function toggleGuide() {
  if (!session.guide) return;
  const shown = $("guide").hidden;
  localStorage.setItem("alignkit-label/guide", shown ? "shown" : "hidden");
  showGuide(shown);
}

/** Only while there is an item, and no request on its way. */
const withItem = (action) => (...given) => item && !isBusy() && action(...given);

const actions = {
  ...{ digit: withItem(digit), zero: withItem(zero), clear: withItem(clear), step: withItem(step) },
  ...{ drop: withItem(drop), flag: withItem(flag) },
  ...{ go: withItem(go), choose: withItem(goTo), mode: withItem(switchMode), flags: withItem(() => toggleFlags()) },
  ...{ compare: withItem(compare), hold: withItem(hold), expand: withItem(() => toggleAnswer(selected)) },
  ...{ escape: withItem(escape), resize: withItem(markOverflow), active },
  ...{ submit: () => exclusively(submit), skip: () => exclusively(skip), undo: () => exclusively(undo) },
  ...{ guide: toggleGuide, results: showResults, help: () => $("help-dialog").showModal() },
  name: () => askName(session.labeler),
};

exclusively(start);
