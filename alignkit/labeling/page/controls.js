// Connects keys, buttons and dragging with the actions of the page.

import { $ } from "./dom.js";
import { enableDragging } from "./drag.js";
import { listen } from "./keys.js";

export function connect(actions) {
  listen(actions);
  const buttons = {
    "guide-button": actions.guide,
    "undo-button": actions.undo,
    "results-button": actions.results,
    "finished-results": actions.results,
    "help-button": actions.help,
    labeler: actions.name,
    "flags-button": actions.flags,
    "flags-close": actions.flags,
    "compare-button": actions.compare,
    "skip-button": actions.skip,
    "submit-button": actions.submit,
  };
  for (const [id, action] of Object.entries(buttons)) {
    $(id).addEventListener("click", (event) => event.detail > 1 || action()); // a double click does not skip two items
  }
  onClick("modes", "button", (button) => actions.mode(button.dataset.mode));
  onClick("board", ".chip", (chip) => actions.choose(Number(chip.dataset.index)));
  onClick("numbers", "button", (button, event) => pressNumber(actions, button.dataset.number, event));
  $("flags").addEventListener("change", (event) => actions.flag(event.target.value));
  $("flags").addEventListener("submit", (event) => event.preventDefault());
  enableDragging(actions.drop);
  addEventListener("resize", actions.resize);
  for (const type of ["scroll", "pointermove", "pointerdown", "keydown"]) addEventListener(type, actions.active);
}

function onClick(id, selector, action) {
  $(id).addEventListener("click", (event) => {
    const target = event.target.closest(selector);
    if (target) action(target, event);
  });
}

/** After a click the focus goes to the answer, so that Enter submits. A button that was pressed by key keeps it. */
function pressNumber(actions, number, event) {
  const byKey = event.detail === 0;
  actions.digit(Number(number), { moveFocus: !byKey });
  if (byKey) $("numbers").querySelector(`[data-number="${number}"]`)?.focus();
}
