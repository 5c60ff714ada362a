// SPDX-License-Identifier: Apache-2.0
// The last requests, and one of them explained: why it went where it went, and where its time went.
//
// The list is asked for every few seconds, an explanation when somebody wants it. Neither holds a prompt or an output.
import { element, humanDuration } from "./dom.js";

const kShown = 12;

const took = (ms) => (ms < 10000 ? `${ms.toFixed(1)} ms` : humanDuration(ms));
const endOf = (request) => (request.state === "running" ? "running"
  : `${request.outcome}${request.http_status ? `, ${request.http_status}` : ""}`);

function table(heads, rows) {
  const kind = (i) => (heads[i].startsWith("<") ? { class: "text" } : {});
  return element("table", {},
    element("thead", {}, element("tr", {}, ...heads.map((head, i) =>
      element("th", { scope: "col", ...kind(i) }, head.replace("<", ""))))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map((cell, i) => element("td", kind(i), cell))))));
}

async function getJson(path) {
  const reply = await fetch(path, { headers: { Accept: "application/json" }, cache: "no-store" });
  const json = await reply.json();
  if (!reply.ok) throw new Error(json.error?.message ?? `the router answered ${reply.status}`);
  return json;
}

export class Requests {
  // parts: list, dialog, title, facts, phases.
  constructor(parts) {
    this.parts = parts;
    this.known = "";
  }

  async update() {
    const { requests } = await getJson("/requests");
    const shown = requests.slice(0, kShown);
    // Only what is new is drawn: whoever has the keyboard on a line keeps it.
    const now = JSON.stringify(shown.map((request) => [request.request_id, request.state]));
    if (now === this.known) return;
    this.known = now;
    // A router that has just started knows of none; those of the one before are what there is to see.
    if (shown.length === 0 && this.parts.list.querySelector("table")) return;
    if (shown.length === 0) {
      this.parts.list.replaceChildren(element("p", { class: "quiet" }, "None yet."));
      return;
    }
    this.parts.list.replaceChildren(table(["<request", "<route", "began", "took", "tokens", "tries", "end"],
      shown.map((request) => {
        const link = element("button", { type: "button", class: "link" }, request.request_id);
        link.addEventListener("click", () => this.explain(request.request_id));
        const began = new Date(Date.now() - request.age_ms).toLocaleTimeString();
        return [link, request.route, began, took(request.total_ms), request.output_tokens, request.attempts, endOf(request)];
      })));
  }

  async explain(id) {
    const { dialog, title, facts, phases } = this.parts;
    title.textContent = id;
    phases.replaceChildren();
    try {
      const request = await getJson(`/requests/${encodeURIComponent(id)}`);
      facts.textContent = `${request.route}: ${endOf(request)} after ${took(request.total_ms)}; ${request.input_tokens} `
        + `prompt tokens, ${request.output_tokens} drawn; trace ${request.trace_id}`;
      phases.append(table(["<phase", "try", "<worker", "at", "took", "<what"], request.phases
        .filter((phase) => phase.name !== "generation")
        .map((phase) => [phase.name, phase.attempt, phase.worker, took(phase.start_ms), took(phase.ms),
          [phase.detail, phase.outcome === "ok" ? "" : phase.outcome].filter(Boolean).join("; ")])));
    } catch (error) {
      facts.textContent = error.message;
    }
    dialog.showModal();
  }
}
