// SPDX-License-Identifier: Apache-2.0
// The unmodified official Node SDK (npm `openai`, package-lock.json) against a cluster of processes.
//
// What is looked at is what the SDK makes of a reply; python_test.py goes further into fields, this into what the two
// SDKs do differently: the stream's controller, helpers, abort signals, exceptions. run.py starts the cluster and says
// where it is in the environment.
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { afterEach, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";

const OpenAI = createRequire(`${process.env.MILLRACE_NODE_SDK}/`)("openai").OpenAI;
const MODEL = process.env.MILLRACE_MODEL;
const client = new OpenAI({ baseURL: process.env.MILLRACE_URL, apiKey: "unused", maxRetries: 0, timeout: 60_000 });

const question = (content) => [{ role: "user", content }];
const chat = (content, options = {}, request = {}) =>
  client.chat.completions.create({ model: MODEL, messages: question(content), temperature: 0, ...options }, request);
const endless = (request = {}) =>
  client.completions.create(
    { model: MODEL, prompt: "Tell me", stream: true, max_tokens: 20000, ignore_eos: true }, request);
const MULTIPLY = {
  type: "function",
  function: {
    name: "multiply",
    description: "Multiply two numbers.",
    parameters: {
      type: "object",
      properties: { a: { type: "integer" }, b: { type: "integer" } },
      required: ["a", "b"],
    },
  },
};

// Every test leaves the cluster empty. The operator's page counts what is held for requests.
afterEach(async () => {
  const end = Date.now() + 60_000;
  for (;;) {
    const { cluster } = await (await fetch(process.env.MILLRACE_OPERATOR_URL)).json();
    const held = cluster.open_generations + cluster.open_attempts;
    if (held === 0) return;
    assert.ok(Date.now() < end, `still held: ${cluster.open_generations} generations, ${cluster.open_attempts} attempts`);
    await sleep(50);
  }
});

async function fails(kind, call, status, code, param) {
  const error = await call().then(() => assert.fail("no error"), (reason) => reason);
  assert.equal(error.constructor, kind, String(error));
  assert.deepEqual([error.status, error.code, error.param], [status, code, param]);
  assert.ok(error.requestID);
  return error;
}

test("models are listed and found by name", async () => {
  const ids = [];
  for await (const model of client.models.list()) ids.push(model.id);
  assert.deepEqual(ids, [MODEL]);
  assert.equal((await client.models.retrieve(MODEL)).object, "model");
  await fails(OpenAI.NotFoundError, () => client.models.retrieve("other"), 404, "model_not_found", "model");
});

test("a chat has its answer, usage and headers", async () => {
  const { data, response, request_id: id } = await chat("Compute 34 + 29.").withResponse();
  assert.equal(data.choices[0].message.content, "63");
  assert.equal(data.choices[0].finish_reason, "stop");
  assert.equal(data.usage.completion_tokens, 3);
  assert.equal(response.headers.get("x-request-id"), id);
});

test("a stream is the whole answer in pieces, usage last", async () => {
  const text = "Say this: jewel ocean piano flame dream heron island";
  const whole = await chat(text);
  const chunks = [];
  for await (const chunk of await chat(text, { stream: true, stream_options: { include_usage: true } })) {
    chunks.push(chunk);
  }
  const last = chunks.pop();
  assert.deepEqual(last.choices, []);
  assert.deepEqual(last.usage, whole.usage);
  assert.equal(chunks.map((chunk) => chunk.choices[0].delta.content ?? "").join(""), whole.choices[0].message.content);
  assert.equal(chunks.at(-1).choices[0].finish_reason, "stop");
});

test("reasoning is apart from the answer", async () => {
  const { message } = (await chat("328+281", { reasoning_effort: "high" })).choices[0];
  assert.equal(message.content, "609");
  assert.match(message.reasoning_content, /So 328\+281=609\./);
});

test("the SDK runs a tool and brings the result back", async () => {
  const calls = [];
  const multiply = ({ a, b }) => {
    calls.push([a, b]);
    return String(a * b);
  };
  const runner = client.chat.completions.runTools({
    model: MODEL,
    messages: question("Multiply 57 by 87."),
    temperature: 0,
    stream: true,
    tools: [{ ...MULTIPLY, function: { ...MULTIPLY.function, function: multiply, parse: JSON.parse } }],
  }, { maxChatCompletions: 2 });
  const messages = [];
  runner.on("message", (message) => messages.push(message));
  await runner.done();
  assert.deepEqual(calls[0], [57, 87]);
  assert.equal(messages.find((message) => message.role === "tool").content, "4959");
});

test("no tool is called when none is the choice", async () => {
  const { message, finish_reason: reason } = (
    await chat("Multiply 57 by 87.", { tools: [MULTIPLY], tool_choice: "none" })).choices[0];
  assert.equal(message.tool_calls, undefined);
  assert.equal(reason, "stop");
});

test("completions, stop strings, log-probabilities and seeds", async () => {
  const ask = (options) => client.completions.create({ model: MODEL, prompt: "one two three", max_tokens: 8, ...options });
  const drawn = await ask({ seed: 5, logprobs: 1, ignore_eos: true });
  assert.equal(drawn.choices[0].logprobs.tokens.length, 8);
  assert.equal((await ask({ seed: 5, ignore_eos: true })).choices[0].text, drawn.choices[0].text);
  const stopped = await chat("Say this: jewel ocean piano flame dream heron island", { stop: ["piano"] });
  assert.equal(stopped.choices[0].message.content, "jewel ocean ");
  assert.equal(stopped.choices[0].finish_reason, "stop");
});

test("errors are the SDK's own, with code and field", async () => {
  await fails(OpenAI.BadRequestError, () => chat("Hi", { temperature: 3 }), 400, "invalid_value", "temperature");
  await fails(OpenAI.BadRequestError, () => chat("Hi", { tools: [MULTIPLY], tool_choice: "required" }), 400,
    "unsupported_parameter", "tool_choice");
  await fails(OpenAI.NotFoundError, () => chat("Hi", { model: "other" }), 404, "model_not_found", "model");
  await fails(OpenAI.InternalServerError,
    () => client.completions.create({ model: MODEL, prompt: "Hi", max_tokens: 20000, ignore_eos: true },
      { headers: { "x-request-timeout-ms": "300" } }), 504, "deadline_exceeded", null);
});

test("a stream that is left, aborted or cancelled leaves nothing", async () => {
  for await (const chunk of await endless()) {
    assert.ok(chunk.id);
    break;  // the SDK aborts the request
  }
  const controller = new AbortController();
  const stream = await endless({ signal: controller.signal });
  const ended = (async () => {
    for await (const chunk of stream) assert.ok(chunk.id);
  })();
  await sleep(200);
  controller.abort();
  await ended;
  const third = await endless();
  await third[Symbol.asyncIterator]().next();
  third.controller.abort();
});

test("a client that gives up leaves nothing", async () => {
  const error = await client.completions
    .create({ model: MODEL, prompt: "Hi", max_tokens: 20000, ignore_eos: true }, { timeout: 300 })
    .then(() => assert.fail("no error"), (reason) => reason);
  assert.ok(error instanceof OpenAI.APIConnectionTimeoutError, String(error));
});

test("a refused client comes back when it was told to", async () => {
  // The cluster takes MILLRACE_MAX_REQUESTS at a time: with that many running, one more is refused.
  const running = await Promise.all(
    Array.from({ length: Number(process.env.MILLRACE_MAX_REQUESTS) }, () => endless()));
  const refused = await fails(OpenAI.RateLimitError, () => chat("Hi"), 429, "overloaded", null);
  assert.match(refused.headers.get("retry-after"), /^[1-9][0-9]*$/);
  setTimeout(() => running.forEach((stream) => stream.controller.abort()), 500);
  const reply = await client.chat.completions.create(
    { model: MODEL, messages: question("Compute 34 + 29."), temperature: 0 }, { maxRetries: 6 });
  assert.equal(reply.choices[0].message.content, "63");
});
