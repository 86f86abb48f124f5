"use strict";
// Token ids lie in one attribute a document; what a token says of itself is put together when it is pointed at.
const info = document.getElementById("info");
let last = null;

function shown(node) { return "“" + node.textContent.replace(/\n/g, "") + "”"; }

function describe(node) {
  const box = node.parentElement, data = box.dataset;
  const at = Array.prototype.indexOf.call(box.children, node);
  const ids = data.ids.split(" "), weights = data.weights ? data.weights.split(" ") : null;
  const next = box.children[at + 1];
  let label = "label none";
  if (next) {
    if (next.tagName === "B") label = "label " + ids[at + 1] + " " + shown(next);
  } else if (data.next) {
    label = "label " + data.next;
  }
  const trained = node.tagName === "B";
  return [
    shown(node), "id " + ids[at], "slot " + (Number(data.slot) + at), "position " + at, label,
    trained ? "trained, weight " + (weights ? weights[at] : 1) : "not trained",
  ].concat(node.classList.contains("h") ? ["hidden from later tokens"] : []).join(" · ");
}

function point(event) {
  const node = event.target;
  if (!(node instanceof Element) || !node.parentElement || !node.parentElement.dataset.ids) return;
  if (last) last.classList.remove("on");
  last = node;
  node.classList.add("on");
  node.title = info.textContent = describe(node);
}

document.addEventListener("mouseover", point);
document.addEventListener("click", point);
