// SPDX-License-Identifier: Apache-2.0
// Who is in the cluster: one card for each process, made once and then only changed, so that focus stays where it is.
import { bar, element, humanBytes, humanCount, humanDuration, humanPass, jsonHeaders, setText } from "./dom.js";

// A router that has started again hears of its workers when they have dialled: until then they are away, not gone.
const kRejoinS = 15;

class Card {
  constructor(list, name, onDrain) {
    this.state = element("span", { class: "badge" });
    this.detail = element("p", { class: "quiet" });
    this.facts = element("dl");
    this.rows = new Map();
    this.age = element("span", { class: "quiet" });
    const foot = element("div", { class: "foot" }, this.age);
    this.node = element("li", { class: "worker" },
      element("header", {}, element("strong", {}, name), this.state), this.detail, this.facts, foot);
    if (onDrain) {
      this.drain = element("button", { type: "button", class: "small", "aria-label": `Drain ${name}` }, "Drain");
      this.drain.addEventListener("click", onDrain);
      foot.append(this.drain);
    }
    list.append(this.node);
  }

  setState(state, detail) {
    if (this.state.dataset.state !== state) {
      this.state.dataset.state = state;
      this.state.textContent = state;
    }
    setText(this.detail, detail);
    this.detail.hidden = !detail;
    if (this.drain) this.drain.hidden = state === "draining" || state === "away";
  }

  // Rows are kept by title; `share` draws a bar under it.
  set(title, text, share) {
    let row = this.rows.get(title);
    if (!row) {
      row = { value: element("dd") };
      const box = element("div", {}, element("dt", {}, title), row.value);
      if (share !== undefined) {
        row.bar = bar();
        box.append(row.bar.node);
      }
      this.facts.append(box);
      this.rows.set(title, row);
    }
    setText(row.value, text);
    if (row.bar) row.bar.set(share ?? 0);
  }
}

export class Workers {
  // parts: dialog, dialogName, key, keyRow, complain.
  constructor(parts) {
    Object.assign(this, parts);
    const { dialog, dialogName } = parts;
    this.cards = new Map(); // by incarnation
    this.last = new Map();  // counters of the answer before, by incarnation
    this.routerUpMs = 0;
    this.rejoinUntil = 0;
    dialog.addEventListener("close", () => {
      if (dialog.returnValue === "yes") this.drain(dialogName.textContent);
    });
  }

  // Returns tokens a second by worker name, of those that were there in the answer before as well.
  show(status, now) {
    const rates = new Map();
    const seen = new Set(["router"]);
    if (status.uptime_ms < this.routerUpMs) this.rejoinUntil = now + kRejoinS;
    this.routerUpMs = status.uptime_ms;
    this.showRouter(status);
    const rows = status.cluster.workers.reduce((sum, one) => sum + (one.role === "expert" ? one.tokens_total : 0), 0);
    for (const worker of status.cluster.workers) {
      seen.add(worker.incarnation);
      const before = this.last.get(worker.incarnation);
      if (before && now > before.at) rates.set(worker.name, (worker.tokens_total - before.tokens) / (now - before.at));
      this.last.set(worker.incarnation, { at: now, tokens: worker.tokens_total });
      const share = worker.role === "expert" && rows > 0 ? worker.tokens_total / rows : undefined;
      this.showWorker(worker, rates.get(worker.name), share);
    }
    for (const [id, card] of this.cards) {
      if (seen.has(id)) continue;
      if (now < this.rejoinUntil) {
        card.setState("away", "not back yet since the router started again");
        continue;
      }
      card.node.remove();
      this.cards.delete(id);
      this.last.delete(id);
    }
    return rates;
  }

  card(id, role, name, onDrain) {
    if (!this.cards.has(id)) this.cards.set(id, new Card(document.getElementById(`workers-${role}`), name, onDrain));
    return this.cards.get(id);
  }

  showRouter(status) {
    const card = this.card("router", "router", "router");
    card.setState(status.ready ? "ready" : "waiting", "");
    card.set("requests", status.requests);
    card.set("generations", status.cluster.open_generations);
    card.set("attempts open", status.cluster.open_attempts);
    card.set("tokens forwarded", humanCount(status.cluster.tokens_forwarded));
    setText(card.age, `up ${humanDuration(status.uptime_ms)}`);
  }

  showWorker(worker, rate, share) {
    const card = this.card(worker.incarnation, worker.role, worker.name, () => {
      this.dialogName.textContent = worker.name;
      this.dialog.returnValue = "no";
      this.dialog.showModal();
    });
    const pass = worker.steps > 0 ? ` · last pass ${humanPass(worker.last_step_us)}` : "";
    setText(card.age, `up ${humanDuration(worker.up_ms)}${pass}`);
    const loading = worker.state === "loading" && worker.load_bytes_total > 0;
    card.setState(worker.suspect ? "suspect" : worker.state,
      worker.suspect ? `nothing heard for ${humanDuration(worker.heard_ms_ago)}` : worker.detail);
    if (loading || card.rows.has("weights")) {
      const { load_bytes_done: done, load_bytes_total: total } = worker;
      card.set("weights", loading ? `${humanBytes(done)} of ${humanBytes(total)}` : humanBytes(total), done / total);
    }
    if (worker.state === "loading") return;
    const work = { prefill: "tokens/s", decode: "tokens/s", expert: "rows/s" }[worker.role];
    card.set(work, rate === undefined ? "–" : humanCount(rate));
    if (worker.role === "expert") {
      card.set("experts", worker.experts.length);
      card.set("share of rows", share === undefined ? "–" : `${(100 * share).toFixed(1)} %`, share ?? 0);
      card.set("messages waiting", worker.queued);
    } else {
      card.set("running", worker.running);
      if (worker.role === "prefill") card.set("waiting", `${worker.queued} (${humanCount(worker.queued_tokens)} tokens)`);
      if (worker.role === "decode") card.set("reserved", worker.leased);
      const used = worker.pages_total - worker.pages_free;
      card.set("pages", `${humanCount(used)} of ${humanCount(worker.pages_total)}`, used / worker.pages_total);
      const slots = worker.slots_total - worker.slots_free;
      card.set("slots", `${slots} of ${worker.slots_total}`, slots / worker.slots_total);
    }
  }

  // With keys configured it takes an operator's; the prompt's field for one serves both.
  async drain(name) {
    this.complain("");
    try {
      const reply = await fetch(`/workers/${encodeURIComponent(name)}/drain`, {
        method: "POST", headers: jsonHeaders(this.key), body: "{}",
      });
      if (reply.status === 401) this.keyRow.hidden = false;
      if (!reply.ok) throw new Error((await reply.json()).error?.message ?? reply.status);
    } catch (error) {
      this.complain(`${name} was not drained: ${error.message}`);
    }
  }
}
