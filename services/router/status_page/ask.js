// SPDX-License-Identifier: Apache-2.0
// The prompt: sends it as a chat request to this very origin, and shows the answer as it comes.
//
// The operator's port serves the same completions as the public one, so that no other origin need be allowed anything.
import { element, jsonHeaders } from "./dom.js";

// Yields the data of each server-sent event.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    for (let end = text.indexOf("\n\n"); end >= 0; end = text.indexOf("\n\n")) {
      const lines = text.slice(0, end).split("\n").filter((line) => line.startsWith("data:"));
      text = text.slice(end + 2);
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}

class Answer {
  constructor(box) {
    this.box = box;
    box.replaceChildren();
    this.parts = {};
  }
  add(kind, text) {
    if (!text) return;
    if (!this.parts[kind]) {
      this.parts[kind] = element("span", { class: kind });
      this.box.append(this.parts[kind]);
    }
    this.parts[kind].append(text);
  }
}

function describe(started, first, tokens, requestId) {
  if (!first) return `request ${requestId}`;
  const seconds = (performance.now() - first) / 1000;
  const rate = tokens > 1 && seconds > 0 ? `, then ${((tokens - 1) / seconds).toFixed(0)} a second` : "";
  return `${tokens} tokens, first after ${((first - started) / 1000).toFixed(2)} s${rate} · request ${requestId}`;
}

async function ask(parts, signal) {
  const answer = new Answer(parts.answer);
  const started = performance.now();
  let first = 0, tokens = 0, requestId = "";
  try {
    const reply = await fetch("/v1/chat/completions", {
      method: "POST", headers: jsonHeaders(parts.key), signal,
      body: JSON.stringify({
        model: parts.model(), stream: true, stream_options: { include_usage: true },
        max_tokens: Number(parts.maxTokens.value) || 256,
        temperature: 0, // an operator asks to see whether it works: the same prompt has the same answer
        thinking: { type: parts.thinking.checked ? "enabled" : "disabled" },
        messages: [{ role: "user", content: parts.prompt.value }],
      }),
    });
    requestId = reply.headers.get("x-request-id") ?? "";
    if (reply.status === 401) parts.keyRow.hidden = false;
    if (!reply.ok) throw new Error((await reply.json()).error?.message ?? `the router answered ${reply.status}`);
    let whole = false;
    for await (const data of events(reply.body)) {
      if (data === "[DONE]") {
        whole = true;
        continue;
      }
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      if (event.usage) tokens = event.usage.completion_tokens;
      const delta = event.choices?.[0]?.delta ?? {};
      if (!first && (delta.content || delta.reasoning_content)) first = performance.now();
      answer.add("reasoning", delta.reasoning_content);
      answer.add("content", delta.content);
    }
    if (!whole) throw new Error("the answer was cut off");
  } catch (error) {
    // A TypeError is what fetch and its streams throw when the connection breaks.
    const broke = error instanceof TypeError ? `The connection to the router broke (${error.message}).` : error.message;
    answer.add("error", error.name === "AbortError" ? "\n(stopped)" : `\n${broke}`);
  }
  parts.facts.textContent = describe(started, first, tokens, requestId);
}

export function startAsking(parts) {
  let abort = null;
  const busy = (now) => {
    parts.send.disabled = now;
    parts.stop.disabled = !now;
    parts.answer.setAttribute("aria-busy", now);
  };
  parts.form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (abort) return;
    abort = new AbortController();
    busy(true);
    parts.facts.textContent = "";
    await ask(parts, abort.signal);
    abort = null;
    busy(false);
  });
  parts.stop.addEventListener("click", () => abort?.abort());
  parts.prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) parts.form.requestSubmit();
  });
}
