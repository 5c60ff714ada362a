// SPDX-License-Identifier: Apache-2.0
// What the pages of the cache consist of, as a table, and how evenly the pool's members are used, in a sentence.
import { element, humanBytes, humanCount, setText } from "./dom.js";

// rows: [[head, cell, ...], ...]; a table of the same shape is only changed.
function fill(box, caption, heads, rows) {
  const shape = `${heads.join("|")} ${rows.map((row) => row[0]).join("|")}`;
  if (box.dataset.shape !== shape) {
    box.dataset.shape = shape;
    box.replaceChildren(element("table", {},
      element("caption", {}, ""),
      element("thead", {}, element("tr", {}, ...heads.map((head) => element("th", { scope: "col" }, head)))),
      element("tbody", {}, ...rows.map((row) => element("tr", {}, element("th", { scope: "row" }, row[0]),
        ...row.slice(1).map(() => element("td")))))));
  }
  setText(box.querySelector("caption"), caption);
  rows.forEach((row, i) => row.slice(1).forEach((text, j) =>
    setText(box.querySelectorAll("tbody tr")[i].querySelectorAll("td")[j], text)));
}

function say(box, text) {
  delete box.dataset.shape;
  if (box.textContent !== text) box.replaceChildren(element("p", { class: "quiet" }, text));
}

export function showCache(box, status) {
  const cache = status.cluster.cache;
  const workers = status.cluster.workers.filter((worker) => worker.role === "decode" && worker.pages_total > 0);
  if (workers.length === 0) return say(box, "No decode worker is ready.");
  const used = workers.reduce((pages, worker) => pages + worker.pages_total - worker.pages_free, 0);
  const slots = workers.reduce((sum, worker) => sum + worker.slots_total - worker.slots_free, 0);
  const rows = cache.families.map((family) => [family.name, humanBytes(family.bytes), humanBytes(family.bytes * used)]);
  rows.push(["state slot", humanBytes(cache.slot_bytes), humanBytes(cache.slot_bytes * slots)]);
  fill(box, `In use on decode workers: pages of ${cache.page_tokens} tokens, ${humanCount(used)}; state slots, ${slots}.`,
    ["part", "each", "in use"], rows);
}

// Each member's share is on its card; this says how even they are.
export function showExperts(box, status) {
  const members = status.cluster.workers.filter((worker) => worker.role === "expert" && worker.experts.length > 0);
  if (members.length === 0) return setText(box, "No pool: prefill and decode workers run the experts themselves.");
  const total = members.reduce((sum, worker) => sum + worker.tokens_total, 0);
  const most = Math.max(...members.map((worker) => worker.tokens_total));
  setText(box, total === 0 ? "Nothing computed yet."
    : `Since they started, the busiest member computed ${(most * members.length / total).toFixed(2)} times the mean.`);
}
