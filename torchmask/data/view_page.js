"use strict";
// Ids, weights, roles and rules lie in a few attributes of each stretch of tokens; what a token says of itself is put
// together when it is pointed at. The page is complete without this script, but for toggles and attention pictures.
const info = document.getElementById("info");
const floats = matchMedia("(hover: hover) and (min-width: 641px)");
let last = null, unseen = [];

function numbers(text) { return text ? text.split(" ").map(Number) : null; }

// [[value, count], ...] -> one value a slot
function spread(text) {
  return text ? JSON.parse(text).flatMap(([value, count]) => Array(count).fill(value)) : null;
}

function facts(box) {
  if (!box.facts) {
    const data = box.dataset;
    box.facts = {
      slot: Number(data.slot), position: Number(data.position), ids: numbers(data.ids), weights: numbers(data.weights),
      rules: spread(data.rules), roles: spread(data.roles),
    };
  }
  return box.facts;
}

function place(node) { return Array.prototype.indexOf.call(node.parentElement.children, node); }

function text(node) { return "“" + node.textContent.replace(/\n/g, "") + "”"; }

function describe(node) {
  const box = node.parentElement, own = facts(box), at = place(node), next = box.children[at + 1];
  const trained = node.tagName === "B";
  const said = ["id " + own.ids[at]];
  if (own.roles) said.push("role " + own.roles[at]);
  said.push(trained ? "trained, weight " + (own.weights ? own.weights[at] : 1) : "not trained");
  if (own.rules) said.push("decided by " + own.rules[at]);
  if (node.classList.contains("h")) said.push("hidden from later tokens");
  said.push("slot " + (own.slot + at), "position " + (own.position + at));
  if (next ? next.tagName === "B" : box.dataset.next) {
    said.push("label " + (next ? own.ids[at + 1] + " " + text(next) : box.dataset.next));
  } else {
    said.push("no label");
  }
  return said;
}

function show(node) {
  info.textContent = "";
  const head = document.createElement("strong");
  head.textContent = text(node);
  info.append(head);
  for (const part of describe(node)) {
    const span = document.createElement("span");
    span.textContent = part;
    info.append(span);
  }
  info.style.left = info.style.top = "";
  if (floats.matches) {
    const box = node.getClientRects()[0], own = info.getBoundingClientRect();
    const below = box.bottom + 6 + own.height < innerHeight;
    info.style.left = Math.max(8, Math.min(box.left, innerWidth - own.width - 8)) + "px";
    info.style.top = (below ? box.bottom + 6 : box.top - own.height - 6) + "px";
  }
}

function tokenOf(event) {
  const node = event.target;
  return node instanceof Element && node.parentElement && node.parentElement.dataset.ids ? node : null;
}

function point(event) {
  const node = tokenOf(event);
  if (last) last.classList.remove("on");
  last = node;
  if (!node) {
    info.textContent = "";
    return;
  }
  node.classList.add("on");
  show(node);
}

document.addEventListener("mouseover", point);
document.addEventListener("click", (event) => {
  if (event.target instanceof Element && event.target.closest(".toggles, .attention")) return;
  point(event);
  markUnseen(last);
  if (last) picture(last.closest(".row"), facts(last.parentElement).slot + place(last));
});
addEventListener("scroll", () => { if (floats.matches) info.textContent = ""; }, { passive: true });

// Toggles

const toggles = document.querySelector(".toggles");
toggles.hidden = false;
toggles.addEventListener("change", (event) => {
  const box = event.target;
  document.body.classList.toggle(box.dataset.toggle, box.checked !== ("inverse" in box.dataset));
  if (box.dataset.toggle === "ids" && box.checked) {
    for (const stretch of document.querySelectorAll("[data-ids]")) {
      stretch.dataset.ids.split(" ").forEach((id, at) => {
        if (stretch.children[at]) stretch.children[at].dataset.id = id;
      });
    }
  }
  if (box.dataset.toggle === "sight") markUnseen(last);
});

// Attention: query q sees key k iff from[k] <= q < until[k]

function sight(row) {
  if (!row.sight) {
    const until = spread(row.dataset.until), starts = spread(row.dataset.from);
    row.sight = { until, from: starts || until.map((_, slot) => slot) };
  }
  return row.sight;
}

function tokensOf(row) {
  if (!row.tokens) {
    row.tokens = [];
    for (const box of row.querySelectorAll("[data-ids]")) {
      Array.from(box.children).forEach((node, at) => { row.tokens[facts(box).slot + at] = node; });
    }
  }
  return row.tokens;
}

function markUnseen(node) {
  unseen.forEach((other) => other.classList.remove("unseen"));
  unseen = [];
  if (!node || !document.body.classList.contains("sight")) return;
  const row = node.closest(".row"), { until, from } = sight(row), q = facts(node.parentElement).slot + place(node);
  tokensOf(row).forEach((other, k) => { if (!(from[k] <= q && q < until[k])) unseen.push(other); });
  unseen.forEach((other) => other.classList.add("unseen"));
}

function picture(row, query) {
  const canvas = row.querySelector("canvas");
  if (!canvas || !row.querySelector("details").open) return;
  const { until, from } = sight(row), slots = until.length, size = canvas.width = canvas.height = 720;
  const pen = canvas.getContext("2d", { willReadFrequently: true }), pixels = pen.createImageData(size, size), hues = spread(row.dataset.hues);
  const colours = new Map();
  for (const hue of new Set(hues)) {  // the browser's own arithmetic for hsl, one pixel a colour
    pen.fillStyle = hue < 0 ? "hsl(150 4% 55%)" : `hsl(${hue} 45% 52%)`;
    pen.fillRect(0, 0, 1, 1);
    colours.set(hue, pen.getImageData(0, 0, 1, 1).data);
  }
  pen.clearRect(0, 0, size, size);
  for (let y = 0; y < size; y++) {
    const q = Math.floor(y * slots / size);
    for (let x = 0; x < size; x++) {
      const k = Math.floor(x * slots / size);
      if (from[k] <= q && q < until[k]) pixels.data.set(colours.get(hues[k]), 4 * (y * size + x));
    }
  }
  pen.putImageData(pixels, 0, 0);
  if (query !== undefined) {
    const step = size / slots;
    pen.strokeStyle = getComputedStyle(document.body).color;
    pen.lineWidth = 2;
    pen.strokeRect(0, query * step, size, Math.max(step, 1));
  }
}

function readPicture(event) {
  const canvas = event.target, row = canvas.closest(".row"), area = canvas.getBoundingClientRect();
  const { until, from } = sight(row), tokens = tokensOf(row), slots = until.length;
  const at = (offset, length) => Math.max(0, Math.min(slots - 1, Math.floor(offset / length * slots)));
  const q = at(event.clientY - area.top, area.height), k = at(event.clientX - area.left, area.width);
  const named = (slot) => "slot " + slot + (tokens[slot] ? " " + text(tokens[slot]) : "");
  const verb = from[k] <= q && q < until[k] ? " sees " : " does not see ";
  row.querySelector("output").textContent = named(q) + verb + named(k);
}

for (const details of document.querySelectorAll(".attention")) {
  details.hidden = false;
  details.addEventListener("toggle", () => picture(details.closest(".row")));
  details.querySelector("canvas").addEventListener("pointermove", readPicture);
  details.querySelector("canvas").addEventListener("click", readPicture);
}
