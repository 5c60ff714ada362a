// SPDX-License-Identifier: Apache-2.0
// The status page: asks the router once a second who is there, and hands the answer to the parts of the page.
//
// One request at a time, none while the page is hidden. What it shows is the JSON that `curl` gets from the same
// address; rates are differences of counters between two answers, taken here. While nobody answers, it keeps what it
// has, says how old that is, and goes on asking: a router that restarts is found again without a reload. The parts: numbers.js (what the whole
// does), workers.js (who is there), tables.js (cache and experts), requests.js (the last ones, explained), ask.js (the
// prompt).
import { startAsking } from "./ask.js";
import { humanDuration, setText } from "./dom.js";
import { Numbers } from "./numbers.js";
import { Requests } from "./requests.js";
import { showCache, showExperts } from "./tables.js";
import { Workers } from "./workers.js";

const kIntervalMs = 1000;
const kTimeoutMs = 5000;

const byId = (id) => document.getElementById(id);
const numbers = new Numbers(byId("numbers"));
const requests = new Requests({
  list: byId("requests"), dialog: byId("explain-dialog"), title: byId("explain-title"), facts: byId("explain-facts"),
  phases: byId("explain-phases"),
});
const workers = new Workers({
  dialog: byId("drain-dialog"), dialogName: byId("drain-name"), key: byId("key"), keyRow: byId("key-row"),
  complain: (text) => say(byId("trouble"), text),
});
let lastAnswer = 0; // 0: none yet
let silentSince = 0; // 0: it answers

// In an alert: said once, not every second.
function say(box, text) {
  setText(box, text);
  box.hidden = !text;
}

const clock = (ms) => new Date(ms).toLocaleTimeString();

function setReadiness(state, text) {
  const badge = byId("readiness");
  if (badge.textContent === text && badge.dataset.state === state) return; // said once, not every second
  badge.dataset.state = state;
  badge.textContent = text;
}

function show(status) {
  const now = performance.now() / 1000;
  byId("model").textContent = status.model;
  byId("version").textContent = status.version;
  document.title = `${status.ready ? "" : "not ready · "}${status.model} · millrace`;
  setReadiness(status.ready ? "ready" : "waiting", status.ready ? "ready" : "not ready");
  say(byId("notice"), status.ready ? "" : `Not ready: ${status.why_not_ready}.`);
  const rates = workers.show(status, now);
  numbers.show(status, rates, now);
  showCache(byId("cache"), status);
  showExperts(byId("experts"), status);
}

function showAnswered() {
  lastAnswer = Date.now();
  silentSince = 0;
  delete byId("main").dataset.stale;
  setText(byId("freshness"), `as of ${clock(lastAnswer)}`);
}

function showSilence(error) {
  silentSince ||= Date.now();
  setReadiness("gone", "no answer");
  byId("main").dataset.stale = "";
  numbers.skip();
  const shown = lastAnswer ? ` What is shown is as of ${clock(lastAnswer)}.` : "";
  say(byId("notice"), `The router does not answer (${error.message}); this page goes on asking.${shown}`);
  setText(byId("freshness"), `no answer for ${humanDuration(Date.now() - silentSince)}`);
}

async function ask() {
  try {
    const reply = await fetch("/", {
      headers: { Accept: "application/json" }, cache: "no-store", signal: AbortSignal.timeout(kTimeoutMs),
    });
    if (!reply.ok) throw new Error(`the router answered ${reply.status}`);
    show(await reply.json());
    await requests.update();
    showAnswered();
  } catch (error) {
    showSilence(error);
  }
}

async function run() {
  for (;;) {
    if (!document.hidden) await ask();
    await new Promise((resolve) => {
      const timer = setTimeout(resolve, kIntervalMs);
      document.addEventListener("visibilitychange", () => { clearTimeout(timer); resolve(); }, { once: true });
    });
  }
}

startAsking({
  form: byId("ask-form"), prompt: byId("prompt"), send: byId("send"), stop: byId("stop"), thinking: byId("thinking"),
  maxTokens: byId("max-tokens"), keyRow: byId("key-row"), key: byId("key"), answer: byId("answer"),
  facts: byId("answer-facts"), model: () => byId("model").textContent,
});
run();
