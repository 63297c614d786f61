// Drag and drop with the mouse, a pen or a finger. Elements with data-drag="ID" are dragged. Those with data-drop are
// targets: "gap:2" (a rank of its own before the third), "tie:ID" (a tie with that answer) or "none" (no rank).

const THRESHOLD = 6; // px; a shorter movement is a click

export function enableDragging(onDrop) {
  let drag = null;

  addEventListener("pointerdown", (event) => {
    const handle = event.target.closest("[data-drag]");
    if (handle && event.button === 0) drag = { id: handle.dataset.drag, handle, x: event.clientX, y: event.clientY };
  });

  addEventListener("pointermove", (event) => {
    if (!drag) return;
    if (!drag.ghost) {
      if (Math.hypot(event.clientX - drag.x, event.clientY - drag.y) < THRESHOLD) return;
      start(drag);
    }
    drag.ghost.style.translate = `${event.clientX}px ${event.clientY}px`;
    mark(target(event, drag.id));
  });

  addEventListener("pointerup", (event) => {
    if (drag?.ghost) {
      const drop = target(event, drag.id);
      if (drop) onDrop(drag.id, drop.dataset.drop);
      swallowClick();
    }
    stop();
  });
  addEventListener("pointercancel", stop);
  addEventListener("keydown", (event) => event.key === "Escape" && stop());
  addEventListener("dragstart", (event) => event.target.closest?.("[data-drag]") && event.preventDefault());

  function stop() {
    drag?.ghost?.remove();
    document.documentElement.classList.remove("dragging");
    mark(null);
    drag = null;
  }
}

function start(drag) {
  drag.ghost = drag.handle.cloneNode(true);
  drag.ghost.removeAttribute("data-drag");
  drag.ghost.classList.add("ghost");
  document.body.append(drag.ghost);
  document.documentElement.classList.add("dragging");
  getSelection().removeAllRanges();
}

/** The target under the pointer; an answer is no target for itself. */
function target(event, id) {
  const drop = document.elementFromPoint(event.clientX, event.clientY)?.closest("[data-drop]");
  return drop?.dataset.drop === `tie:${id}` ? null : drop;
}

function mark(drop) {
  for (const marked of document.querySelectorAll(".drop-here")) {
    if (marked !== drop) marked.classList.remove("drop-here");
  }
  drop?.classList.add("drop-here");
}

/** The click that the browser sends after a drag selects nothing. */
function swallowClick() {
  const swallow = (event) => event.stopPropagation();
  addEventListener("click", swallow, { capture: true, once: true });
  setTimeout(() => removeEventListener("click", swallow, { capture: true }));
}
