# SPDX-License-Identifier: Apache-2.0
"""What a cluster says of itself: spans through a real collector, and nothing of what its users said, anywhere.

Run by ctest as observability_test.py SUITE. Traces needs the OpenTelemetry Collector, which tests/helm/tools.sh builds
from its Go modules; without it the suite says SKIPPED.
"""
import collections
import http.client
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
import unittest

from cluster import PATIENCE, ROOT, Cluster, free_port, wait_until

COLLECTOR = os.path.join(ROOT, ".cache/kubernetes/bin/otelcol")
GRPCURL = os.path.join(ROOT, ".cache/clients/grpcurl")


def question(text="Compute 12 + 29.", **options):
    return {"model": "demo", "max_tokens": 24, "temperature": 0,
            "messages": [{"role": "user", "content": text}], **options}


class Sink(http.server.BaseHTTPRequestHandler):
    """Takes what the collector sends on: OTLP as JSON."""
    spans = []

    def do_POST(self):  # noqa: N802 (the base class' name)
        document = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        for resource in document["resourceSpans"]:
            who = {item["key"]: item["value"]["stringValue"] for item in resource["resource"]["attributes"]}
            for scope in resource["scopeSpans"]:
                for span in scope["spans"]:
                    Sink.spans.append(dict(span, service=who["service.name"], instance=who["service.instance.id"]))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_):
        pass


class Traces(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        sink = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Sink)
        threading.Thread(target=sink.serve_forever, daemon=True).start()
        cls.addClassCleanup(sink.shutdown)
        port = free_port()
        cls.cluster = Cluster(prefill=1, decode=1, experts=2)
        with open(cls.cluster.config_path) as source:
            document = json.load(source)
        document["tracing"] = {"otlp_endpoint": f"127.0.0.1:{port}"}
        with open(cls.cluster.config_path, "w") as out:
            json.dump(document, out)
        config = (f"{{receivers: {{otlp: {{protocols: {{grpc: {{endpoint: '127.0.0.1:{port}'}}}}}}}},"
                  f" exporters: {{otlphttp: {{endpoint: 'http://127.0.0.1:{sink.server_port}', encoding: json,"
                  " compression: none}},"
                  " service: {telemetry: {metrics: {level: none}},"
                  " pipelines: {traces: {receivers: [otlp], exporters: [otlphttp]}}}}")
        log = open(os.path.join(cls.cluster.directory, "collector.log"), "wb")
        collector = subprocess.Popen([COLLECTOR, f"--config=yaml:{config}"], stdin=subprocess.DEVNULL, stdout=log,
                                     stderr=log)
        log.close()
        cls.addClassCleanup(collector.wait)
        cls.addClassCleanup(collector.terminate)
        cls.cluster.__enter__()
        cls.addClassCleanup(cls.cluster.stop)

    def spans_of(self, trace, complete):
        """The spans of a trace, once `complete` of their (service, name) pairs says that all are here."""
        def found():
            return [span for span in Sink.spans if span["traceId"] == trace]
        try:
            wait_until(lambda: complete(collections.Counter((s["service"], s["name"]) for s in found())),
                       f"spans of {trace}", 30)
        except AssertionError:
            self.fail(f"only {[(s['service'], s['name']) for s in found()]}")
        time.sleep(1.5)  # more than a batch's delay: what should not come would be here now
        return found()

    @staticmethod
    def whole(names):
        wanted = [("millrace-router", "decode"), ("millrace-prefill", "commit"), ("millrace-decode", "decode"),
                  ("millrace-router", "generation")]
        return all(names[pair] for pair in wanted)

    def test_one_request_is_one_tree_over_all_its_processes(self):
        trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
        status, _ = self.cluster.post("/v1/chat/completions", question(ignore_eos=True),
                                      {"traceparent": f"00-{trace}-{parent}-01", "x-request-id": "traced-1"})
        self.assertEqual(status, 200)
        spans = self.spans_of(trace, self.whole)
        by_id = {span["spanId"]: span for span in spans}
        self.assertEqual(len(by_id), len(spans))

        def path(span):
            names = [span["name"]]
            while span["parentSpanId"] in by_id:
                span = by_id[span["parentSpanId"]]
                names.append(span["name"])
            self.assertEqual(span["parentSpanId"], parent, f"{names} does not end at the client's span")
            return "/".join(reversed(names))

        paths = collections.Counter(path(span).removeprefix("POST ") for span in spans)
        root = "/v1/chat/completions"
        router = f"{root}/generation"
        prefill, decode = f"{router}/prefill/prefill worker", f"{router}/reserve/decode worker"
        for wanted in (root, router, f"{router}/queue", f"{router}/placement", f"{router}/reserve", f"{router}/prefill",
                       f"{router}/handoff", f"{router}/decode", prefill, f"{prefill}/queue", f"{prefill}/prefill",
                       f"{prefill}/handoff", f"{prefill}/handoff/tail", f"{prefill}/handoff/commit",
                       f"{prefill}/handoff/commit/verify", decode, f"{decode}/receive"):
            self.assertEqual(paths[wanted], 1, f"{wanted}: {sorted(paths)}")
        # Under the router's decode span, unless the state was there before the router's stream.
        self.assertEqual(paths[f"{router}/decode/decode"] + paths[f"{decode}/decode"], 1, sorted(paths))
        for span in spans:
            begin, end = int(span["startTimeUnixNano"]), int(span["endTimeUnixNano"])
            self.assertLessEqual(begin, end)
            self.assertLess(abs(begin / 1e9 - time.time()), 300, "not wall time")
            above = by_id.get(span["parentSpanId"])
            if above is not None:  # one machine, one clock: a span begins after what caused it
                self.assertGreaterEqual(begin + 2_000_000, int(above["startTimeUnixNano"]), span["name"])
        top = next(span for span in spans if span["parentSpanId"] == parent)
        attributes = {item["key"]: next(iter(item["value"].values())) for item in top["attributes"]}
        self.assertEqual(attributes["millrace.request_id"], "traced-1")
        self.assertEqual(attributes["gen_ai.operation.name"], "chat")
        self.assertEqual(attributes["gen_ai.request.model"], "demo")
        self.assertEqual(attributes["gen_ai.usage.output_tokens"], "24")
        self.assertEqual(attributes["http.response.status_code"], "200")

    def test_a_client_that_does_not_sample_is_not_recorded(self):
        trace = "1af7651916cd43dd8448eb211c80319c"
        status, _ = self.cluster.post("/v1/chat/completions", question(),
                                      {"traceparent": f"00-{trace}-b7ad6b7169203331-00"})
        self.assertEqual(status, 200)
        sampled = "2af7651916cd43dd8448eb211c80319c"
        self.cluster.post("/v1/chat/completions", question(ignore_eos=True),
                          {"traceparent": f"00-{sampled}-b7ad6b7169203331-01"})
        self.spans_of(sampled, self.whole)
        self.assertFalse([span for span in Sink.spans if span["traceId"] == trace])
        # Nor is one without a header, at a ratio of 0.
        self.assertFalse([span for span in Sink.spans if span["traceId"] not in
                          (sampled, "0af7651916cd43dd8448eb211c80319c", "3af7651916cd43dd8448eb211c80319c")])

    def test_a_refused_request_has_a_span_that_says_so(self):
        trace = "3af7651916cd43dd8448eb211c80319c"
        status, _ = self.cluster.post("/v1/chat/completions", question(temperature=9),
                                      {"traceparent": f"00-{trace}-b7ad6b7169203331-01"})
        self.assertEqual(status, 400)
        (span,) = self.spans_of(trace, lambda names: names.total() >= 1)
        self.assertEqual(span["status"], {"code": 2, "message": "INVALID_ARGUMENT"})

    def test_spans_that_left_are_counted(self):
        wait_until(lambda: self.cluster.metric('millrace_trace_spans_total{outcome="exported"}') or
                   self.cluster.metric("millrace_trace_spans_total"), "a count", 30)


# Nothing of these may be found anywhere. Words that no program says by itself, and ids that no list has by itself.
CANARY = "zqxjkvwombat"
CANARY_IDS = [1117, 731, 1093, 877, 1301, 641]


class Canary(unittest.TestCase):
    """Prompts, outputs and keys go in through every door, at log level debug; then everything readable is searched."""

    @classmethod
    def setUpClass(cls):
        cls.cluster = Cluster(prefill=1, decode=2, experts=2, router_section={"log_level": "debug"})
        with open(cls.cluster.config_path) as source:
            document = json.load(source)
        cls.targets = {"router": cls.cluster.operator_port}
        for role in ("prefill", "decode", "expert"):
            for entry in document[role]:
                port = free_port()
                entry["worker"].update(operator_listen=f"127.0.0.1:{port}", log_level="debug")
                cls.targets[entry["worker"]["name"]] = port
        document["metrics"] = {"compatibility": ["vllm", "sglang"]}
        with open(cls.cluster.config_path, "w") as out:
            json.dump(document, out)
        cls.addClassCleanup(cls.cluster.stop)
        for name in cls.cluster.roles:
            # Errors inside the cluster say what they say.
            cls.cluster.start(name, {"MILLRACE_FAILPOINTS": "d.before_commit=error(INTERNAL)@3"}
                              if name == "decode-0" else None)  # equal ones are taken by name
        cls.cluster.wait_ready()
        cls.outputs, cls.statuses = [], collections.Counter()
        cls.send()

    @classmethod
    def post(cls, path, body, headers=None):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", cls.cluster.http_port, timeout=PATIENCE)
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json",
                                                    "Authorization": f"Bearer sk-{CANARY}", **(headers or {})})
            reply = connection.getresponse()
            text = reply.read().decode(errors="replace")
        finally:
            connection.close()
        cls.statuses[reply.status] += 1
        return reply.status, text

    @classmethod
    def send(cls):
        chat, plain = "/v1/chat/completions", "/v1/completions"
        tool = {"type": "function", "function": {"name": CANARY, "description": CANARY, "parameters": {
            "type": "object", "properties": {CANARY: {"type": "string"}}}}}
        whole = question(CANARY, user=CANARY, stop=[CANARY], metadata={CANARY: CANARY}, tools=[tool],
                         cache_salt=CANARY)
        for _ in range(6):  # past the failpoint
            status, text = cls.post(chat, whole)
        cls.post(chat, dict(whole, stream=True, stream_options={"include_usage": True}))
        for body in (question(f"Repeat: {CANARY}"), question("Tell me a story.", max_tokens=60)):
            status, text = cls.post(chat, body)
            if status == 200:
                cls.outputs.append(json.loads(text)["choices"][0]["message"]["content"] or "")
        cls.post(plain, {"model": "demo", "prompt": CANARY_IDS, "max_tokens": 8, "echo": True})
        cls.post(plain, {"model": "demo", "prompt": f"{CANARY} {CANARY}", "max_tokens": 8, "n": 2})
        # Every kind of refusal with the canary where the mistake is.
        for body in (question(CANARY, model=CANARY), question(CANARY, temperature=CANARY), question(CANARY, n=99),
                     question(CANARY, max_tokens=10**9), question(CANARY, **{CANARY: CANARY}),
                     question(CANARY, tool_choice={"type": "function", "function": {"name": CANARY}}, tools=[tool]),
                     {"model": "demo", "messages": CANARY}, {"model": "demo", "messages": [{"role": CANARY}]},
                     {"model": "demo", "messages": [{"role": "user", "content": [{"type": CANARY, "text": CANARY}]}]},
                     question(CANARY, response_format={"type": CANARY}), question(CANARY, logit_bias={CANARY: 1}),
                     question(CANARY, reasoning_effort=CANARY), question(CANARY * 100_000),
                     f'{{"model": "demo", "{CANARY}'.encode(), CANARY.encode(), b'{"a":' * 40 + CANARY.encode()):
            cls.post(chat, body)
        cls.post(plain, {"model": "demo", "prompt": [*CANARY_IDS, 10**8]})
        cls.post(f"/{CANARY}", question())
        cls.post(chat, question(), {"Content-Type": f"text/{CANARY}"})
        cls.post(chat, question(), {"x-request-timeout-ms": CANARY})
        cls.post(chat, question(), {"traceparent": CANARY, "tracestate": CANARY})
        cls.post(chat, question(CANARY), {"x-request-timeout-ms": "1"})
        stream = cls.cluster.stream(chat, question(CANARY, max_tokens=2000, ignore_eos=True))
        next(stream.events(), None)
        stream.close()  # a client that leaves
        if os.path.exists(GRPCURL):
            for method, body in (("Chat", {"messages": [{"role": "user", "content": CANARY}]}),
                                 ("Generate", {"text": CANARY}), ("Generate", {"text": CANARY, "model": CANARY}),
                                 ("Tokenize", {"text": CANARY}), ("Detokenize", {"ids": CANARY_IDS})):
                subprocess.run([GRPCURL, "-plaintext", "-max-time", "60", "-d", json.dumps(body),
                                f"127.0.0.1:{cls.cluster.grpc_port}", f"millrace.v1.Inference/{method}"],
                               capture_output=True, timeout=PATIENCE)
        # A worker dies over a request of its own.
        dying = threading.Thread(target=lambda: cls.post(chat, question(CANARY, max_tokens=3000, ignore_eos=True)))
        dying.start()
        time.sleep(1)
        cls.cluster.kill("decode-1")
        cls.cluster.kill("decode-0")
        dying.join(PATIENCE)
        time.sleep(1)

    def readable(self):
        """(where, text) of everything that an operator, or anybody on the machine, can read."""
        cluster = self.cluster
        for name, port in self.targets.items():
            if cluster.processes[name].poll() is None:
                yield f"metrics of {name}", cluster.get("/metrics", port)[1]
        for path in ("/", "/healthz", "/readyz"):
            yield f"operator port {path}", cluster.get(path, cluster.operator_port)[1]
        for name in os.listdir(cluster.directory):
            if name.endswith(".log"):
                with open(os.path.join(cluster.directory, name), errors="replace") as log:
                    yield f"log {name}", log.read()
        for name, process in cluster.processes.items():
            if process.poll() is None:
                for file in ("cmdline", "environ"):
                    with open(f"/proc/{process.pid}/{file}", errors="replace") as source:
                        yield f"{file} of {name}", source.read()

    def test_the_doors_were_open(self):
        self.assertGreaterEqual(self.statuses[200], 5, self.statuses)
        for status in (400, 404, 500, 503):
            self.assertGreater(self.statuses[status], 0, self.statuses)
        self.assertTrue([text for text in self.outputs if len(text) > 20], self.outputs)

    def test_nothing_readable_holds_what_was_said(self):
        ids = [r"\D+".join(str(one) for one in CANARY_IDS[i:i + 3]) for i in range(len(CANARY_IDS) - 2)]
        secrets = [re.compile(re.escape(CANARY), re.I), *(re.compile(rf"\b{pattern}\b") for pattern in ids)]
        for output in self.outputs:
            if len(output) > 20:
                secrets.append(re.compile(re.escape(output[:20])))
        searched = 0
        for where, text in self.readable():
            searched += len(text)
            for secret in secrets:
                found = secret.search(text)
                if found is not None:
                    self.fail(f"{where}: ...{text[max(0, found.start() - 200):found.end() + 50]}...")
        self.assertGreater(searched, 20_000)

    def test_the_search_would_find_it(self):
        # A log that says it, as one would that quotes a request.
        self.assertTrue(re.compile(re.escape(CANARY), re.I).search(f'refused "{CANARY.upper()}"'))

    def test_lines_about_a_request_carry_its_ids(self):
        lines = collections.defaultdict(list)
        for name in ("router", "prefill-0", "decode-0", "decode-1"):
            with open(os.path.join(self.cluster.directory, name + ".log")) as log:
                for line in log:
                    if line.startswith("{"):
                        lines[name].append(json.loads(line))
        for name, entries in lines.items():
            self.assertTrue(entries, name)
            about = [entry for entry in entries if "request_id" in entry]
            self.assertTrue(about, name)
            for entry in entries:
                self.assertEqual(entry["worker"], name)
                self.assertEqual(entry["role"], re.sub(r"-\d$", "", name))
            for entry in about:
                self.assertRegex(entry["trace_id"], "^[0-9a-f]{32}$")
        # The same request under the same id at all three.
        joined = set.intersection(*({entry.get("request_id") for entry in lines[name]} - {None}
                                    for name in ("router", "prefill-0")))
        self.assertTrue(joined)


if __name__ == "__main__":
    if sys.argv[1:] == ["Traces"] and not os.path.exists(COLLECTOR):
        print("SKIPPED, NOT TESTED: no collector here (tests/helm/tools.sh collector builds it from Go modules)", flush=True)
        sys.exit(77)
    unittest.main(verbosity=2)
