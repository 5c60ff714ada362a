// SPDX-License-Identifier: Apache-2.0
// The status page in Debian's Chromium, against a cluster of processes: what it shows, what it asks for, and whether
// everybody can use it (axe-core's rules, a keyboard, a phone's width, both palettes).
//
// run.py starts the cluster and says where it is in the environment. MILLRACE_SHOTS names a folder for screenshots; the
// pictures in docs/images were made so.
import assert from "node:assert/strict";
import { readFileSync, writeSync } from "node:fs";
import { createRequire } from "node:module";
import { after, afterEach, before, test } from "node:test";

const require = createRequire(`${process.env.MILLRACE_BROWSER}/`);
const { chromium } = require("playwright-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
const URL_ = process.env.MILLRACE_OPERATOR_URL;
const DESK = { width: 1280, height: 900 }, PHONE = { width: 390, height: 844 };
const PATIENCE = { timeout: 60_000 };

let browser, page, complaints, foreign;
before(async () => {
  browser = await chromium.launch({ executablePath: process.env.MILLRACE_CHROMIUM ?? "/usr/bin/chromium" });
});
after(() => browser.close());
afterEach(async () => {
  await page?.context().close();
  page = undefined;
});

// A page that is up to date. What the browser complains of (scripts, policies) and whom else it asked is kept.
async function open({ colorScheme = "light", viewport = DESK } = {}) {
  const context = await browser.newContext({ colorScheme, viewport, reducedMotion: "reduce" });
  page = await context.newPage();
  page.setDefaultTimeout(PATIENCE.timeout);
  complaints = [];
  foreign = [];
  page.on("console", (message) => ["error", "warning"].includes(message.type()) && complaints.push(message.text()));
  page.on("pageerror", (error) => complaints.push(String(error)));
  page.on("request", (request) => new URL(request.url()).origin !== new URL(URL_).origin && foreign.push(request.url()));
  await page.goto(URL_);
  await page.waitForSelector('#readiness[data-state="ready"]');
}

// run.py ends the router, or starts it again, at our word.
const turnRouter = (how) => writeSync(Number(process.env.MILLRACE_ROUTER_SWITCH), `${how}\n`);
const status = async () => (await fetch(URL_)).json();
const textOf = (selector) => page.textContent(selector);

test("the frame comes with a policy that lets nothing from elsewhere in", async () => {
  const reply = await fetch(URL_, { headers: { Accept: "text/html" } });
  assert.match(reply.headers.get("content-type"), /^text\/html/);
  const policy = reply.headers.get("content-security-policy");
  for (const rule of ["default-src 'none'", "script-src 'self'", "style-src 'self'", "frame-ancestors 'none'"]) {
    assert.ok(policy.includes(rule), policy);
  }
  assert.doesNotMatch(policy, /unsafe|\*|https?:/);
  assert.doesNotMatch(await reply.text(), /https?:\/\/|style=|onclick=|<script>/);
  assert.equal((await fetch(`${process.env.MILLRACE_URL}page/page.js`)).status, 404, "not on the public port");
});

test("it shows who is there and moves by itself", async () => {
  await open();
  const { cluster, model } = await status();
  assert.equal(await textOf("#model"), model);
  for (const role of ["prefill", "decode", "expert"]) {
    const names = await page.locator(`#workers-${role} strong`).allTextContents();
    assert.deepEqual(names, cluster.workers.filter((worker) => worker.role === role).map((worker) => worker.name));
  }
  assert.equal(await textOf("#workers-decode .badge"), "ready");
  const families = cluster.cache.families;
  assert.equal(families.reduce((sum, family) => sum + family.bytes, 0), cluster.cache.page_bytes);
  assert.deepEqual(await page.locator("#cache tbody th").allTextContents(),
    [...families.map((family) => family.name), "state slot"]);
  const age = await textOf("#workers-router .foot");
  await page.waitForFunction((old) => document.querySelector("#workers-router .foot").textContent !== old, age);
  assert.deepEqual([complaints, foreign], [[], []]);
});

test("a prompt's answer streams in, word for word what the server sent", async () => {
  await open();
  await page.fill("#prompt", "Spell the word river.");
  const reply = page.waitForResponse((response) => response.url().endsWith("/v1/chat/completions"));
  await page.click("#send");
  const sent = (await (await reply).text()).split("\n").filter((line) => line.startsWith("data: {"))
    .map((line) => JSON.parse(line.slice(6)).choices[0]?.delta?.content ?? "").join("");
  await page.waitForFunction(() => document.querySelector("#answer-facts").textContent.includes("first after"));
  assert.ok(sent.length > 0);
  assert.equal(await textOf("#answer"), sent);
  assert.match(await textOf("#answer-facts"), /^\d+ tokens, first after [\d.]+ s.* request req-[0-9a-f]{24}$/);
  assert.equal(await page.isEnabled("#send"), true);
  assert.deepEqual([complaints, foreign], [[], []]);
});

test("with the keyboard alone: asked, and stopped in the middle", async () => {
  await open();
  await page.keyboard.press("Tab");
  assert.equal(await page.evaluate(() => document.activeElement.className), "skip");
  for (let i = 0; i < 5 && await page.evaluate(() => document.activeElement.id) !== "prompt"; ++i) {
    await page.keyboard.press("Tab");
  }
  await page.keyboard.press("Control+a");
  await page.keyboard.type("Tell me a long story.");
  await page.fill("#max-tokens", "5000");
  await page.focus("#prompt");
  await page.keyboard.press("Control+Enter");
  await page.waitForFunction(() => document.querySelector("#answer").textContent.length > 0);
  if (await page.isEnabled("#stop")) {  // a quick model may be through
    await page.focus("#stop");
    await page.keyboard.press("Enter");
  }
  await page.waitForFunction(() => !document.querySelector("#send").disabled);
  for (const end = Date.now() + 30_000; ;) {
    const { cluster } = await status();
    if (cluster.open_generations + cluster.open_attempts === 0) break;
    assert.ok(Date.now() < end, "the stopped request is still there");
  }
});

test("a request is explained: why that pair, where its time went", async () => {
  await open();
  await page.fill("#prompt", "Spell the word river.");
  await page.click("#send");
  await page.waitForFunction(() => document.querySelector("#answer-facts").textContent.includes("first after"));
  const id = (await textOf("#answer-facts")).match(/req-[0-9a-f]{24}/)[0];
  await page.getByRole("button", { name: id }).click();
  assert.equal(await textOf("#explain-title"), id);
  assert.match(await textOf("#explain-facts"), /POST \/v1\/chat\/completions: ok, 200 after [\d.]+ (ms|s|min)/);
  const phases = await page.locator("#explain-phases tbody tr td:first-child").allTextContents();
  for (const phase of ["queue", "placement", "reserve", "prefill", "handoff", "decode"]) assert.ok(phases.includes(phase));
  assert.match(await textOf("#explain-phases"), /prefill workers with room it had the fewest prompt tokens waiting/);
  await page.evaluate(axe);
  const found = await page.evaluate(async () => (await globalThis.axe.run()).violations.map((rule) => rule.id));
  assert.deepEqual(found, []);
  if (process.env.MILLRACE_SHOTS) await page.screenshot({ path: `${process.env.MILLRACE_SHOTS}/explain.png` });
  await page.keyboard.press("Escape");
  assert.equal(await page.isVisible("#explain-dialog"), false);
  assert.deepEqual([complaints, foreign], [[], []]);
});

test("an error is shown as one, and a refused prompt is no end", async () => {
  await open();
  await page.fill("#max-tokens", "99999");
  await page.click("#send");
  await page.waitForSelector("#answer .error");
  assert.match(await textOf("#answer"), /max_tokens|context/);
  await page.fill("#max-tokens", "5");
  await page.click("#send");
  await page.waitForFunction(() => document.querySelector("#answer-facts").textContent.includes("first after"));
});

for (const [name, options] of [["light", {}], ["dark", { colorScheme: "dark" }], ["phone", { viewport: PHONE }],
  ["phone-dark", { viewport: PHONE, colorScheme: "dark" }]]) {
  test(`anybody can read it: ${name}`, async () => {
    await open(options);
    await page.fill("#prompt", "Tell me a story.");
    await page.click("#send");
    await page.waitForFunction(() => document.querySelector("#answer-facts").textContent.includes("first after"));
    const { scroll, width } = await page.evaluate(() => ({
      scroll: document.documentElement.scrollWidth, width: document.documentElement.clientWidth,
    }));
    assert.ok(scroll <= width, `${scroll} pixels wide on a screen of ${width}`);
    await page.evaluate(axe);
    const found = await page.evaluate(async () => (await globalThis.axe.run()).violations
      .map((rule) => `${rule.id}: ${rule.nodes.map((node) => node.html).join(" ").slice(0, 300)}`));
    assert.deepEqual(found, []);
    if (process.env.MILLRACE_SHOTS) {
      await page.screenshot({ path: `${process.env.MILLRACE_SHOTS}/${name}.png`, fullPage: true });
    }
  });
}

test("when the router cannot be reached it says so, and recovers", async () => {
  await open();
  await page.context().setOffline(true);
  await page.waitForSelector('#readiness[data-state="gone"]');
  assert.match(await textOf("#notice"), /does not answer/);
  await page.context().setOffline(false);
  await page.waitForSelector('#readiness[data-state="ready"]');
  assert.equal(await page.isVisible("#notice"), false);
});

test("a router that restarts is found again, and what was on the page is still there", async () => {
  await open();
  await page.fill("#prompt", "Spell the word river.");
  await page.click("#send");
  await page.waitForFunction(() => document.querySelector("#answer-facts").textContent.includes("first after"));
  const answer = await textOf("#answer"), up = await textOf("#workers-router .foot");
  await page.waitForFunction(() => document.querySelector("#requests table"));
  await page.fill("#prompt", "Half a question");
  turnRouter("off");
  await page.waitForSelector('#readiness[data-state="gone"]');
  assert.match(await textOf("#notice"), /does not answer .* this page goes on asking\. What is shown is as of/);
  await page.waitForFunction(() => /no answer for [1-9]/.test(document.querySelector("#freshness").textContent));
  assert.equal(await page.locator("#workers-decode .worker").count(), 2, "what is known stays, and is said to be old");
  await page.evaluate(axe);
  const found = await page.evaluate(async () => (await globalThis.axe.run()).violations.map((rule) => rule.id));
  assert.deepEqual(found, []);
  if (process.env.MILLRACE_SHOTS) await page.screenshot({ path: `${process.env.MILLRACE_SHOTS}/gone.png`, fullPage: true });
  // From now on no worker's card may be missing for a moment.
  await page.evaluate(() => {
    globalThis.fewest = 2;
    new MutationObserver(() => {
      globalThis.fewest = Math.min(globalThis.fewest, document.querySelectorAll("#workers-decode .worker").length);
    }).observe(document.body, { childList: true, subtree: true });
  });
  turnRouter("on");
  await page.waitForFunction(() => document.querySelector("#readiness").dataset.state === "ready"
    && [...document.querySelectorAll("#workers-decode .badge")].every((badge) => badge.textContent === "ready"));
  assert.equal(await page.evaluate(() => globalThis.fewest), 2);
  assert.equal(await page.isVisible("#notice"), false);
  assert.equal(await page.getAttribute("#main", "data-stale"), null);
  assert.notEqual(await textOf("#workers-router .foot"), up);
  assert.equal(await textOf("#answer"), answer);
  assert.equal(await page.inputValue("#prompt"), "Half a question");
  assert.ok(await page.locator("#requests tbody tr").count() > 0);
});

// Last: it costs a worker.
test("a worker is drained after a second look, and leaves the page", async () => {
  await open();
  const button = page.getByRole("button", { name: "Drain decode-1" });
  await button.click();
  assert.equal(await textOf("#drain-name"), "decode-1");
  await page.keyboard.press("Escape");
  await page.waitForTimeout(500);
  assert.equal((await status()).cluster.workers.find((worker) => worker.name === "decode-1").state, "ready");
  await button.click();
  await page.click('#drain-dialog button[value="yes"]');
  await page.waitForFunction(() => document.querySelectorAll("#workers-decode .worker").length === 1);
  assert.equal(await textOf("#workers-decode strong"), "decode-0");
});
