# SPDX-License-Identifier: Apache-2.0
"""The unmodified grpcurl (go.mod) against a cluster of processes: an independent gRPC stack, and no .proto files.

Everything it knows of the services it learns by reflection, which in C++ carries the fields' own names: that is how it
writes JSON. Run by run.py, which finds it.
"""
import base64
import json
import os
import subprocess
import unittest

from case import CACHE, ClientCase

GRPCURL = os.path.join(CACHE, "grpcurl")
SERVICE = "millrace.v1.Inference"
ENDLESS = {"text": "Tell me", "options": {"max_tokens": 20000, "ignore_eos": True}}


def messages(text):
    """The JSON documents that grpcurl wrote one after the other."""
    decoder, found, at = json.JSONDecoder(), [], 0
    while at < len(text.rstrip()):
        message, at = decoder.raw_decode(text, at)
        found.append(message)
        while at < len(text) and text[at].isspace():
            at += 1
    return found


class GrpcurlCase(ClientCase):
    def command(self, method, data=None, port=None, flags=()):
        body = [] if data is None else ["-d", json.dumps(data)]
        return [GRPCURL, "-plaintext", "-max-time", "60", "-format-error", *flags, *body,
                f"127.0.0.1:{port or self.cluster.grpc_port}", *method]

    def call(self, *method, data=None, port=None, flags=()):
        return subprocess.run(self.command(method, data, port, flags), capture_output=True, text=True, timeout=90)

    def ask(self, method, data=None, flags=()):
        """Replies of a call that ends well."""
        done = self.call(f"{SERVICE}/{method}", data=data or {}, flags=flags)
        self.assertEqual(done.returncode, 0, done.stderr)
        return messages(done.stdout)

    def refused(self, method, data, flags=()):
        """The status of a call that does not, as an object; its details by name."""
        done = self.call(f"{SERVICE}/{method}", data=data, flags=flags)
        self.assertNotEqual(done.returncode, 0, done.stdout)
        status = json.loads(done.stderr)
        details = {detail["@type"].removeprefix("type.googleapis.com/google.rpc."): detail
                   for detail in status.get("details", [])}
        return status, details


class Reflection(GrpcurlCase):
    def test_lists_what_the_public_port_serves_and_nothing_else(self):
        services = self.call("list").stdout.split()
        self.assertEqual(services, ["grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection", SERVICE])
        self.assertEqual(self.call("list", SERVICE).stdout.split(),
                         [f"{SERVICE}.{name}" for name in ("Abort", "Chat", "Detokenize", "Generate", "ListModels",
                                                           "Tokenize")])

    def test_describes_methods_and_messages(self):
        self.assertIn("rpc Generate ( .millrace.v1.GenerateRequest ) returns ( stream .millrace.v1.GenerateEvent );",
                      self.call("describe", SERVICE).stdout)
        options = self.call("describe", "millrace.v1.GenerationOptions").stdout
        self.assertIn("optional float temperature = 1;", options)
        template = self.call("describe", "millrace.v1.ChatRequest", flags=["-msg-template"]).stdout
        self.assertIn('"reasoning_effort": "REASONING_EFFORT_UNSPECIFIED"', template)

    def test_health(self):
        for service in ("", SERVICE):
            done = self.call("grpc.health.v1.Health/Check", data={"service": service})
            self.assertEqual(messages(done.stdout), [{"status": "SERVING"}], done.stderr)


class Calls(GrpcurlCase):
    def test_models(self):
        model, = self.ask("ListModels")[0]["models"]
        self.assertEqual((model["id"], model["numerics"], model["ready"]), ("demo", "release", True))

    def test_tokenize_and_back(self):
        ids = self.ask("Tokenize", {"text": "What is heron in 中文?"})[0]["ids"]
        text = self.ask("Detokenize", {"ids": ids})[0]["text"]
        self.assertEqual(base64.b64decode(text).decode(), "What is heron in 中文?")

    def test_generate_streams_tokens_and_one_end(self):
        *events, end = self.ask("Generate", {"text": "one two three", "request_id": "mine",
                                             "options": {"temperature": 0, "max_tokens": 8, "ignore_eos": True}})
        indices = [int(token.get("index", 0)) for event in events for token in event["tokens"].get("tokens", [])]
        self.assertEqual(indices, list(range(8)))
        self.assertEqual(end["end"]["reason"], "FINISH_REASON_LENGTH")
        self.assertEqual(end["end"]["request_id"], "mine")
        self.assertEqual(int(end["end"]["usage"]["completion_tokens"]), 8)

    def test_chat_has_reasoning_content_and_calls(self):
        *events, end = self.ask("Chat", {"messages": [{"role": "user", "content": "328+281"}],
                                         "reasoning_effort": "REASONING_EFFORT_HIGH",
                                         "options": {"temperature": 0}})
        text = {"content": "", "reasoning_content": ""}
        for event in events:
            for key in text:
                text[key] += event["delta"].get(key, "")
        self.assertEqual(text["content"], "609")
        self.assertIn("So 328+281=609.", text["reasoning_content"])
        self.assertEqual(end["end"]["reason"], "FINISH_REASON_STOP")
        schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
        *events, end = self.ask("Chat", {
            "messages": [{"role": "user", "content": "How is the weather in Delhi?"}], "options": {"temperature": 0},
            "tools": [{"name": "get_weather", "description": "Get the weather of a city.",
                       "parameters_json": json.dumps(schema)}]})
        pieces = [call for event in events for call in event["delta"].get("tool_calls", [])]
        self.assertEqual(pieces[0]["name"], "get_weather")
        self.assertEqual(json.loads("".join(piece.get("arguments_delta", "") for piece in pieces)), {"city": "Delhi"})
        self.assertEqual(end["end"]["reason"], "FINISH_REASON_TOOL_CALLS")

    def test_a_killed_caller_and_an_abort_leave_nothing(self):
        caller = subprocess.Popen(self.command([f"{SERVICE}/Generate"], ENDLESS), stdout=subprocess.PIPE)
        caller.stdout.readline()
        caller.kill()
        caller.communicate()
        self.cluster.expect_nothing_left()
        caller = subprocess.Popen(self.command([f"{SERVICE}/Generate"], dict(ENDLESS, request_id="mine")),
                                  stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while not self.cluster.status()["open_generations"]:
            self.assertIsNone(caller.poll())
        self.assertEqual(self.ask("Abort", {"request_id": "mine"}), [{"was_running": True}])
        self.assertEqual(json.loads(caller.communicate(timeout=60)[1])["code"], 1)  # CANCELLED
        self.assertEqual(self.ask("Abort", {"request_id": "mine"}), [{}])


class Refusals(GrpcurlCase):
    OPTIONS = {"experts": 0, "router_section": {"max_requests": 1}}

    def test_a_bad_field_is_named_in_the_details(self):
        status, details = self.refused("Generate", {"text": "Hi", "options": {"temperature": 3}})
        self.assertEqual(status["code"], 3)
        self.assertEqual((details["ErrorInfo"]["reason"], details["ErrorInfo"]["domain"]), ("INVALID_VALUE", "millrace"))
        violation, = details["BadRequest"]["field_violations"]
        self.assertEqual(violation["field"], "temperature")
        self.assertIn(violation["description"], status["message"])
        self.assertNotIn("RetryInfo", details)

    def test_what_cannot_be_served_has_its_own_code(self):
        for data, code, reason in (({"text": "Hi", "model": "other"}, 5, "MODEL_NOT_FOUND"),
                                   ({}, 3, "MISSING_FIELD"),
                                   ({"ids": {"ids": [5, -1]}}, 3, "INVALID_TOKEN_ID"),
                                   ({"text": "Hi", "options": {"max_tokens": 10**6}}, 3, "CONTEXT_LENGTH_EXCEEDED")):
            with self.subTest(reason):
                status, details = self.refused("Generate", data)
                self.assertEqual((status["code"], details["ErrorInfo"]["reason"]), (code, reason))
                self.assertNotIn("RetryInfo", details)

    def test_internal_services_are_not_there(self):
        done = self.call("millrace.v1.Handoff/Reserve", data={})
        self.assertEqual(json.loads(done.stderr)["code"], 12)  # UNIMPLEMENTED

    def test_a_full_cluster_says_when_to_come_back(self):
        caller = subprocess.Popen(self.command([f"{SERVICE}/Generate"], ENDLESS), stdout=subprocess.DEVNULL)
        try:
            while not self.cluster.status()["open_generations"]:
                self.assertIsNone(caller.poll())
            status, details = self.refused("Generate", {"text": "Hi"})
        finally:
            caller.kill()
            caller.wait()
        self.assertEqual((status["code"], details["ErrorInfo"]["reason"]), (8, "OVERLOADED"))
        self.assertEqual(details["RetryInfo"]["retry_delay"], "2s")

    def test_a_cluster_without_workers_says_when_to_come_back(self):
        self.cluster.kill("decode-0")
        try:
            status, details = self.refused("Generate", {"text": "Hi"})
        finally:
            self.cluster.start("decode-0")
            self.cluster.wait_ready()
        self.assertEqual((status["code"], details["ErrorInfo"]["reason"]), (14, "NO_CAPACITY"))
        self.assertRegex(details["RetryInfo"]["retry_delay"], "^[1-9][0-9]*s$")


if __name__ == "__main__":
    unittest.main(verbosity=2)
