# SPDX-License-Identifier: Apache-2.0
"""The unmodified official Python SDK (PyPI `openai`, requirements.txt) against a cluster of processes.

What is looked at is what the SDK makes of a reply: its types, its iterators, its exceptions, its retries. What the
tokens are is tests/cluster's business. Run by run.py, which finds the SDK.
"""
import asyncio
import json
import signal
import threading
import time
import unittest

import openai

from case import GET_WEATHER, MODEL, MULTIPLY, ClientCase, question


class PythonCase(ClientCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.sdk = openai.OpenAI(base_url=f"http://127.0.0.1:{cls.cluster.http_port}/v1", api_key="unused",
                                max_retries=0, timeout=60)
        cls.addClassCleanup(cls.sdk.close)

    def client(self, **options):
        return self.sdk.with_options(**options) if options else self.sdk

    def chat(self, text, **options):
        return self.client().chat.completions.create(
            model=MODEL, messages=question(text), **{"temperature": 0, **options})

    def complete(self, prompt, **options):
        return self.client().completions.create(model=MODEL, prompt=prompt, **{"temperature": 0, **options})

    def endless(self):
        """A stream that ends only when somebody ends it."""
        return self.complete("Tell me", stream=True, max_tokens=20000, extra_body={"ignore_eos": True})

    def assert_error(self, kind, call, status=None, code=None, param=None):
        """`call` raises exactly this class of the SDK, with the fields of our error object in their places."""
        with self.assertRaises(openai.APIError) as caught:
            call()
        error = caught.exception
        self.assertIs(type(error), kind, error)
        self.assertEqual((error.status_code, error.code, error.param), (status, code, param), error)
        self.assertTrue(error.message)
        self.assertTrue(error.request_id)
        return error


class Models(PythonCase):
    def test_list_and_retrieve(self):
        models = self.client().models.list()
        self.assertEqual([(model.id, model.object) for model in models], [(MODEL, "model")])
        self.assertEqual(self.client().models.retrieve(MODEL).owned_by, "millrace")

    def test_an_unknown_model_is_not_found(self):
        for call in (lambda: self.client().models.retrieve("other"),
                     lambda: self.client().chat.completions.create(model="other", messages=question("Hi"))):
            self.assert_error(openai.NotFoundError, call, 404, "model_not_found", "model")


class Chat(PythonCase):
    def test_answer_usage_and_ids(self):
        reply = self.chat("Compute 34 + 29.")
        self.assertEqual(reply.object, "chat.completion")
        self.assertTrue(reply.id.startswith("chatcmpl-"))
        self.assertLess(abs(reply.created - time.time()), 60)
        choice, = reply.choices
        self.assertEqual((choice.message.role, choice.message.content, choice.finish_reason),
                         ("assistant", "63", "stop"))
        self.assertEqual(reply.usage.total_tokens, reply.usage.prompt_tokens + reply.usage.completion_tokens)
        self.assertEqual(reply.usage.completion_tokens, 3)  # two digits and the end
        self.assertEqual(reply.usage.prompt_tokens_details.cached_tokens, 0)

    def test_stream_is_the_whole_answer_in_pieces(self):
        text = "Say this: jewel ocean piano flame dream heron island"
        whole = self.chat(text)
        chunks = list(self.chat(text, stream=True))
        self.assertEqual(len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}), 1)
        self.assertEqual({chunk.object for chunk in chunks}, {"chat.completion.chunk"})
        self.assertEqual(chunks[0].choices[0].delta.role, "assistant")
        self.assertEqual("".join(chunk.choices[0].delta.content or "" for chunk in chunks),
                         whole.choices[0].message.content)
        reasons = [chunk.choices[0].finish_reason for chunk in chunks]
        self.assertEqual(reasons[-1], "stop")
        self.assertEqual(set(reasons[:-1]), {None})
        self.assertGreater(len(chunks), 4)
        self.assertTrue(all(chunk.usage is None for chunk in chunks))  # not asked for

    def test_usage_comes_last_in_a_stream_that_asks_for_it(self):
        whole = self.chat("Compute 34 + 29.")
        *chunks, last = self.chat("Compute 34 + 29.", stream=True, stream_options={"include_usage": True})
        self.assertTrue(all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks))
        self.assertEqual(last.choices, [])
        self.assertEqual(last.usage, whole.usage)

    def test_no_character_is_cut(self):
        self.assertEqual(self.chat("What is heron in Chinese?").choices[0].message.content, "苍鹭")
        emoji = [chunk.choices[0].delta.content for chunk in self.chat("Show me the emoji of a house.", stream=True)
                 if chunk.choices[0].delta.content]
        self.assertEqual("".join(emoji), "🏠")
        self.assertNotIn("\ufffd", "".join(emoji))

    def test_reasoning_is_apart_from_the_answer(self):
        reply = self.chat("328+281", reasoning_effort="high")
        message = reply.choices[0].message
        self.assertEqual(message.content, "609")
        self.assertIn("So 328+281=609.", message.reasoning_content)
        self.assertGreater(reply.usage.completion_tokens_details.reasoning_tokens, 10)
        deltas = [chunk.choices[0].delta for chunk in self.chat("328+281", reasoning_effort="high", stream=True)]
        self.assertEqual("".join(getattr(delta, "reasoning_content", "") or "" for delta in deltas),
                         message.reasoning_content)
        self.assertEqual("".join(delta.content or "" for delta in deltas), "609")
        self.assertFalse(hasattr(self.chat("328+281", reasoning_effort="none").choices[0].message,
                                 "reasoning_content"))

    def test_several_choices_with_one_seed(self):
        def ask():
            return [choice.message.content for choice in
                    self.chat("Tell me a story about a falcon.", n=3, temperature=1, seed=11, max_tokens=24).choices]
        first = ask()
        self.assertEqual(ask(), first)
        self.assertEqual(len(set(first)), 3)  # each draws its own
        streamed = {0: "", 1: "", 2: ""}
        for chunk in self.chat("Tell me a story about a falcon.", n=3, temperature=1, seed=11, max_tokens=24,
                               stream=True):
            streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        self.assertEqual([streamed[index] for index in range(3)], first)

    def test_length_and_stop_say_why_they_ended(self):
        text = "Say this: jewel ocean piano flame dream heron island"
        self.assertEqual(self.chat(text, max_completion_tokens=2).choices[0].finish_reason, "length")
        for stop in ("piano", ["nothing like it", "piano"]):
            choice = self.chat(text, stop=stop).choices[0]
            self.assertEqual((choice.message.content, choice.finish_reason), ("jewel ocean ", "stop"))
            pieces = [chunk.choices[0].delta.content or "" for chunk in self.chat(text, stop=stop, stream=True)]
            self.assertEqual("".join(pieces), "jewel ocean ")

    def test_log_probabilities(self):
        choice = self.chat("Show me the emoji of a house.", logprobs=True, top_logprobs=3).choices[0]
        tokens = choice.logprobs.content
        spelt = bytes(byte for token in tokens for byte in token.bytes).decode()
        self.assertEqual(spelt.removesuffix("<｜end▁of▁sentence｜>"), choice.message.content)
        for token in tokens:
            self.assertEqual(len(token.top_logprobs), 3)
            self.assertEqual(token.logprob, max(top.logprob for top in token.top_logprobs))  # greedy
        streamed = [token for chunk in self.chat("Show me the emoji of a house.", logprobs=True, top_logprobs=3,
                                                 stream=True)
                    if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
        self.assertEqual(streamed, tokens)


class Tools(PythonCase):
    def test_a_call_and_the_turn_after_it(self):
        messages = question("How is the weather in Delhi?")
        reply = self.client().chat.completions.create(model=MODEL, messages=messages, tools=[GET_WEATHER],
                                                      temperature=0)
        choice = reply.choices[0]
        self.assertEqual(choice.finish_reason, "tool_calls")
        self.assertIsNone(choice.message.content)
        call, = choice.message.tool_calls
        self.assertEqual((call.type, call.function.name), ("function", "get_weather"))
        self.assertEqual(json.loads(call.function.arguments), {"city": "Delhi"})
        # The message goes back as the SDK made it; the answer to the call follows.
        messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "{\"sky\": \"clear\"}"}]
        after = self.client().chat.completions.create(model=MODEL, messages=messages, tools=[GET_WEATHER],
                                                      temperature=0)
        self.assertGreater(after.usage.prompt_tokens, reply.usage.total_tokens)
        self.assertEqual(after.choices[0].finish_reason, "stop")
        self.assertTrue(after.choices[0].message.content)

    def test_a_streamed_call_is_put_together_by_the_sdk(self):
        with self.client().chat.completions.stream(model=MODEL, messages=question("Multiply 57 by 87."),
                                                   tools=[MULTIPLY], temperature=0) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_completion()
        self.assertIn("tool_calls.function.arguments.delta", kinds)
        self.assertIn("tool_calls.function.arguments.done", kinds)
        call, = final.choices[0].message.tool_calls
        self.assertTrue(call.id.startswith("call_"))
        self.assertEqual(call.function.name, "multiply")
        self.assertEqual(json.loads(call.function.arguments), {"a": 57, "b": 87})
        self.assertEqual(final.choices[0].finish_reason, "tool_calls")

    def test_none_makes_no_call(self):
        choice = self.chat("How is the weather in Delhi?", tools=[GET_WEATHER], tool_choice="none").choices[0]
        self.assertIsNone(choice.message.tool_calls)
        self.assertEqual(choice.finish_reason, "stop")

    def test_a_call_cannot_be_forced(self):
        for forced in ("required", {"type": "function", "function": {"name": "get_weather"}}):
            self.assert_error(openai.BadRequestError,
                              lambda: self.chat("Hi", tools=[GET_WEATHER], tool_choice=forced),  # noqa: B023
                              400, "unsupported_parameter", "tool_choice")


class Completions(PythonCase):
    def test_text_ids_echo_and_stream(self):
        reply = self.complete("one two three", max_tokens=5, extra_body={"ignore_eos": True})
        self.assertEqual(reply.object, "text_completion")
        self.assertEqual((reply.choices[0].finish_reason, reply.usage.completion_tokens), ("length", 5))
        text = reply.choices[0].text
        self.assertEqual(self.complete("one two three", max_tokens=5, echo=True,
                                       extra_body={"ignore_eos": True}).choices[0].text, "one two three" + text)
        pieces = self.complete("one two three", max_tokens=5, stream=True, extra_body={"ignore_eos": True})
        self.assertEqual("".join(chunk.choices[0].text for chunk in pieces), text)
        self.assertEqual(self.complete([40, 41, 42], max_tokens=2).usage.prompt_tokens, 3)

    def test_several_prompts_are_answered_as_if_they_were_sent_alone(self):
        prompts = ["one two three", "Compute 34 + 29.", "Tell me"]
        options = {"max_tokens": 6, "temperature": 1, "seed": 3, "extra_body": {"ignore_eos": True}}
        alone = [self.complete(prompt, n=2, **options) for prompt in prompts]
        together = self.complete(prompts, n=2, **options)
        self.assertEqual([choice.index for choice in together.choices], list(range(6)))
        self.assertEqual([choice.text for choice in together.choices],
                         [choice.text for reply in alone for choice in reply.choices])
        self.assertEqual(together.usage.prompt_tokens, sum(reply.usage.prompt_tokens for reply in alone))
        streamed = [""] * 6
        for chunk in self.complete(prompts, n=2, stream=True, **options):
            streamed[chunk.choices[0].index] += chunk.choices[0].text
        self.assertEqual(streamed, [choice.text for choice in together.choices])

    def test_log_probabilities_in_the_older_form(self):
        logprobs = self.complete("one two three", max_tokens=4, logprobs=2,
                                 extra_body={"ignore_eos": True}).choices[0].logprobs
        self.assertEqual([len(part) for part in (logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs,
                                                 logprobs.text_offset)], [4, 4, 4, 4])
        for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs):
            self.assertEqual(top[token], logprob)

    def test_seed(self):
        def ask(seed):
            return self.complete("one two three", temperature=1, seed=seed, max_tokens=24,
                                 extra_body={"ignore_eos": True}).choices[0].text
        self.assertEqual(ask(5), ask(5))
        self.assertNotEqual(ask(5), ask(6))


class Errors(PythonCase):
    def test_a_bad_request_names_the_field(self):
        for options, code, param in (
                ({"temperature": 3}, "invalid_value", "temperature"),
                ({"stop": [""]}, "invalid_value", "stop[0]"),
                ({"n": 9}, "invalid_value", "n"),
                ({"max_tokens": 10**6}, "context_length_exceeded", None),
                ({"extra_body": {"top_k": "many"}}, "invalid_type", "top_k"),
                ({"extra_body": {"guided_json": {}}}, "unsupported_parameter", "guided_json")):
            with self.subTest(options):
                error = self.assert_error(openai.BadRequestError, lambda: self.chat("Hi", **options),  # noqa: B023
                                          400, code, param)
                self.assertEqual(error.type, "invalid_request_error")

    def test_an_unknown_route_is_not_found(self):
        self.assert_error(openai.NotFoundError,
                          lambda: self.client().embeddings.create(model=MODEL, input="Hi"), 404, "not_found")

    def test_a_request_id_that_is_in_use_conflicts(self):
        headers = {"x-request-id": "same"}
        stream = self.complete("Tell me", stream=True, max_tokens=20000, extra_body={"ignore_eos": True},
                               extra_headers=headers)
        next(iter(stream))
        self.assert_error(openai.ConflictError, lambda: self.chat("Hi", extra_headers=headers), 409,
                          "duplicate_request_id", "x-request-id")
        stream.close()

    def test_a_deadline_that_passes_is_a_gateway_timeout(self):
        error = self.assert_error(
            openai.InternalServerError,
            lambda: self.complete("Hi", max_tokens=20000, extra_body={"ignore_eos": True},
                                  extra_headers={"x-request-timeout-ms": "300"}), 504, "deadline_exceeded")
        self.assertEqual(error.type, "timeout_error")

    def test_an_impatient_client_leaves_nothing(self):
        client = self.client(timeout=0.3)
        with self.assertRaises(openai.APITimeoutError):
            client.completions.create(model=MODEL, prompt="Hi", max_tokens=20000, extra_body={"ignore_eos": True})

    def test_request_ids_and_ignored_fields_are_in_the_headers(self):
        raw = self.client().chat.completions.with_raw_response.create(
            model=MODEL, messages=question("Compute 34 + 29."), seed=7, extra_headers={"x-request-id": "mine-1"},
            extra_body={"unheard_of": 1})
        self.assertEqual(raw.headers["x-request-id"], "mine-1")
        self.assertEqual(raw.headers["x-ignored-params"], "unheard_of")
        self.assertEqual(raw.headers["x-seed"], "7")
        self.assertEqual(raw.parse()._request_id, "mine-1")


class Cancels(PythonCase):
    def test_a_closed_stream_leaves_nothing(self):
        for _ in range(5):
            stream = self.endless()
            for count, _ in enumerate(stream):
                if count == 3:
                    break
            stream.close()
            self.cluster.expect_nothing_left()

    def test_cancelled_tasks_leave_nothing(self):
        async def run():
            async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{self.cluster.http_port}/v1",
                                          api_key="unused", max_retries=0) as client:
                async def ask(started):
                    async for _ in await client.completions.create(
                            model=MODEL, prompt="Tell me", stream=True, max_tokens=20000,
                            extra_body={"ignore_eos": True}):
                        started.set()
                started = [asyncio.Event() for _ in range(6)]
                tasks = [asyncio.create_task(ask(event)) for event in started]
                await asyncio.wait_for(asyncio.gather(*(event.wait() for event in started)), 60)
                for task in tasks:
                    task.cancel()
                ends = await asyncio.gather(*tasks, return_exceptions=True)
                self.assertTrue(all(isinstance(end, asyncio.CancelledError) for end in ends), ends)
        asyncio.run(run())


class Busy(PythonCase):
    OPTIONS = {"experts": 0, "router_section": {"max_requests": 1}}

    def test_a_refusal_is_a_rate_limit_with_a_time_to_come_back(self):
        stream = self.endless()
        next(iter(stream))
        error = self.assert_error(openai.RateLimitError, lambda: self.chat("Hi"), 429, "overloaded")
        self.assertEqual(error.response.headers["retry-after"], "1")
        stream.close()

    def test_the_sdk_comes_back_by_itself(self):
        stream = self.endless()
        next(iter(stream))
        threading.Timer(1, stream.close).start()
        begin = time.monotonic()
        raw = self.client(max_retries=5).chat.completions.with_raw_response.create(
            model=MODEL, messages=question("Compute 34 + 29."), temperature=0)
        self.assertEqual(raw.parse().choices[0].message.content, "63")
        self.assertGreaterEqual(raw.retries_taken, 1)
        self.assertGreaterEqual(time.monotonic() - begin, 1)  # it kept to Retry-After


class Lost(PythonCase):
    OPTIONS = {"experts": 0}

    def test_without_a_worker_the_sdk_waits_until_there_is_one(self):
        self.cluster.kill("decode-0")
        error = self.assert_error(openai.InternalServerError, lambda: self.chat("Hi"), 503, "no_capacity")
        self.assertIn("retry-after", error.response.headers)
        threading.Timer(0.5, lambda: self.cluster.start("decode-0")).start()
        raw = self.client(max_retries=8).chat.completions.with_raw_response.create(
            model=MODEL, messages=question("Compute 34 + 29."), temperature=0)
        self.assertEqual(raw.parse().choices[0].message.content, "63")
        self.assertGreaterEqual(raw.retries_taken, 1)

    def test_a_worker_that_dies_ends_a_stream_with_an_error_of_the_sdk(self):
        self.cluster.wait_ready()
        stream = self.endless()
        chunks = iter(stream)
        next(chunks)
        self.cluster.kill("decode-0", signal.SIGKILL)
        with self.assertRaises(openai.APIError) as caught:
            for _ in chunks:
                pass
        self.assertEqual(caught.exception.code, "worker_lost")
        self.cluster.start("decode-0")
        self.cluster.wait_ready()


if __name__ == "__main__":
    unittest.main(verbosity=2)
