# SPDX-License-Identifier: Apache-2.0
"""A cluster of real processes gives the same bits as one process, survives deaths and cancels, and leaves nothing.

Run by ctest as cluster_test.py SUITE; without an argument all suites run.
"""
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import unittest

from cluster import BINARY, MODEL, PATIENCE, ROOT, Cluster, float32, run_alone, wait_until

LENGTHS = [*range(1, 7), *range(127, 134), *range(255, 259), *range(511, 515), 1000, 3000, 6000]
VOCABULARY = 1400  # below the demo's added tokens


def prompt_of(length):
    """Random but fixed ids: the same prompt of one length in every run."""
    draw = random.Random(length)
    return [draw.randrange(10, VOCABULARY) for _ in range(length)]


def completion(length, **options):
    return {"model": "demo", "prompt": prompt_of(length), "max_tokens": 12, "temperature": 0, "logprobs": 0,
            "ignore_eos": True, **options}


class Answers:
    """What one process gives, computed once per request."""
    cache = {}

    @classmethod
    def alone(cls, request):
        key = repr(sorted(request.items()))
        if key not in cls.cache:
            cls.cache[key] = run_alone(request)
        return cls.cache[key]


class ClusterCase(unittest.TestCase):
    def assert_same_bits(self, cluster, request):
        status, reply = cluster.post("/v1/completions", request)
        self.assertEqual(status, 200, reply)
        alone = Answers.alone(request)
        choice = reply["choices"][0]
        logprobs = [float32(value) for value in choice["logprobs"]["token_logprobs"]]
        self.assertEqual(logprobs, [float32(value) for value in alone["logprobs"]],
                         f"prompt of {len(request['prompt'])}: log-probabilities differ")
        self.assertEqual(choice["text"], alone["message"]["content"])
        self.assertEqual(choice["finish_reason"], alone["finish_reason"])
        self.assertEqual(reply["usage"]["completion_tokens"], len(alone["ids"]))


class SameBits(ClusterCase):
    def check(self, lengths, **cluster_options):
        with Cluster(**cluster_options) as cluster:
            for length in lengths:
                self.assert_same_bits(cluster, completion(length))
            # Together: batching, interleaving and queueing must not show in a single bit.
            failures = []

            def ask(length):
                try:
                    self.assert_same_bits(cluster, completion(length))
                except AssertionError as error:
                    failures.append(str(error))
            threads = [threading.Thread(target=ask, args=(length,)) for length in lengths if length < 3000]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.assertEqual(failures, [])
            cluster.expect_nothing_left()

    def test_every_boundary_with_one_expert_worker(self):
        self.check(LENGTHS, experts=1)

    def test_every_boundary_with_three_expert_workers(self):
        self.check(LENGTHS, experts=3)

    def test_without_an_expert_pool_and_with_two_of_each(self):
        self.check([1, 4, 127, 128, 129, 300], experts=0, prefill=2, decode=2)

    def test_experts_over_grpc(self):
        self.check([1, 5, 128, 300], experts=2, expert_transport="grpc")

    def test_drawn_tokens_depend_on_the_seed_alone(self):
        with Cluster(experts=2) as cluster:
            for seed in (1, 2, 12345678901):
                self.assert_same_bits(cluster, completion(20, temperature=1, top_p=0.9, seed=seed,
                                                          repetition_penalty=1.2))


class Goldens(ClusterCase):
    """The demo model's recorded answers, asked over HTTP as chat requests and completions."""

    @classmethod
    def setUpClass(cls):
        with open(os.path.join(ROOT, "tests/data/demo/golden_greedy.json")) as source:
            cls.goldens = json.load(source)

    @staticmethod
    def request_of(golden):
        body = {"model": "demo", "temperature": 0, "max_tokens": len(golden["greedy_ids"])}
        if "fim" in golden:
            return "/v1/completions", dict(body, prompt=golden["fim"]["prefix"], suffix=golden["fim"]["suffix"],
                                           logprobs=0)
        names = [tool["function"]["name"] for tool in golden.get("tools") or []]
        if len(names) != len(set(names)):  # a server refuses tools that share a name: ask with the prompt's ids
            return "/v1/completions", dict(body, prompt=golden["prompt_ids"], logprobs=0)
        body.update(messages=golden["messages"], logprobs=True,
                    thinking={"type": "enabled" if golden["thinking"] else "disabled"})
        for key in ("tools", "reasoning_effort"):
            if golden.get(key):
                body[key] = golden[key]
        return "/v1/chat/completions", body

    @staticmethod
    def logprobs_of(reply):
        logprobs = reply["choices"][0]["logprobs"]
        if "content" in logprobs:
            return [float32(token["logprob"]) for token in logprobs["content"]]
        return [float32(value) for value in logprobs["token_logprobs"]]

    def test_all_twenty_in_exact_numerics(self):
        with Cluster(experts=2, numerics="exact") as cluster:
            for number, golden in enumerate(self.goldens):
                with self.subTest(number):
                    path, body = self.request_of(golden)
                    status, reply = cluster.post(path, body)
                    self.assertEqual(status, 200, reply)
                    self.assertEqual(reply["usage"]["prompt_tokens"], len(golden["prompt_ids"]))
                    logprobs = self.logprobs_of(reply)
                    self.assertEqual(len(logprobs), len(golden["greedy_ids"]))
                    for ours, theirs in zip(logprobs, golden["greedy_logprobs"]):
                        self.assertLess(abs(ours - theirs), 1e-3)
                    if path == "/v1/chat/completions":
                        drawn = reply["choices"][0]["logprobs"]["content"]
                        text = bytes(byte for token in drawn for byte in token["bytes"]).decode()
                        self.assertEqual(text, golden["text"])
                    else:
                        self.assertEqual("".join(reply["choices"][0]["logprobs"]["tokens"]), golden["text"])

    def test_all_twenty_in_release_numerics_as_one_process_gives(self):
        with Cluster(experts=2, numerics="release") as cluster:
            for number, golden in enumerate(self.goldens):
                with self.subTest(number):
                    path, body = self.request_of(golden)
                    status, reply = cluster.post(path, body)
                    self.assertEqual(status, 200, reply)
                    alone = run_alone(body, "release")
                    self.assertEqual(self.logprobs_of(reply), [float32(value) for value in alone["logprobs"]])
                    self.assertEqual(reply["choices"][0]["finish_reason"], alone["finish_reason"])
                    if path == "/v1/chat/completions":
                        message = reply["choices"][0]["message"]
                        self.assertEqual(message["content"] or "", alone["message"]["content"])
                        self.assertEqual(message.get("reasoning_content") or "",
                                         alone["message"].get("reasoning_content", ""))


class Deaths(ClusterCase):
    def setUp(self):
        self.cluster = Cluster(experts=2)
        self.addCleanup(lambda: self.cluster.stop())
        self.cluster.__enter__()

    def long_request(self):
        return {"model": "demo", "prompt": prompt_of(200), "max_tokens": 4000, "ignore_eos": True}

    def assert_ends_with_error(self, stream, within):
        """The stream ends soon, with an error that says to try again, and without [DONE]."""
        start = time.monotonic()
        last = None
        for event in stream.events():
            last = event
        self.assertLess(time.monotonic() - start, within)
        self.assertIsInstance(last, dict, "the stream ended as if all was well")
        self.assertIn("error", last)
        stream.close()

    def wound(self, name, how):
        stream = self.cluster.stream("/v1/completions", self.long_request())
        self.assertEqual(stream.status, 200)
        events = stream.events()
        for _ in range(5):
            next(events)
        self.cluster.kill(name, how)
        return stream

    def recover(self, name):
        self.cluster.start(name)
        self.cluster.wait_ready()
        self.assert_same_bits(self.cluster, completion(131))
        self.cluster.expect_nothing_left()

    def test_each_worker_killed_while_decoding(self):
        for name in ("decode-0", "expert-0"):
            with self.subTest(name):
                stream = self.wound(name, signal.SIGKILL)
                self.assert_ends_with_error(stream, 10)
                self.recover(name)

    def test_prefill_killed_while_decoding_costs_nothing(self):
        request = dict(self.long_request(), max_tokens=300)
        stream = self.cluster.stream("/v1/completions", request)
        events = stream.events()
        for _ in range(5):
            next(events)
        self.cluster.kill("prefill-0")
        self.assertEqual(list(events)[-1], "[DONE]")
        stream.close()
        self.recover("prefill-0")

    def test_workers_killed_during_prefill(self):
        for name in ("prefill-0", "decode-0", "expert-1"):
            with self.subTest(name):
                outcome = {}

                def ask():
                    try:
                        outcome["reply"] = self.cluster.post(
                            "/v1/completions", {"model": "demo", "prompt": prompt_of(8000), "max_tokens": 4})
                    except Exception as error:  # noqa: BLE001 - shown below
                        outcome["reply"] = error
                thread = threading.Thread(target=ask)
                thread.start()
                wait_until(lambda: any(worker["assigned_prompt_tokens"] for worker in
                                       self.cluster.status()["workers"]), "prefill under way", 20)
                self.cluster.kill(name)
                thread.join(20)
                self.assertFalse(thread.is_alive(), "the request hangs")
                status, reply = outcome["reply"]
                # Fast machines may have answered before the blow fell.
                self.assertIn(status, (200, 503), reply)
                self.recover(name)

    def test_a_stopped_worker_is_dead_after_three_seconds(self):
        stream = self.wound("decode-0", signal.SIGSTOP)
        self.assert_ends_with_error(stream, 15)
        self.cluster.kill("decode-0", signal.SIGCONT)
        self.cluster.wait_ready()
        self.assert_same_bits(self.cluster, completion(131))
        self.cluster.expect_nothing_left()

    def test_router_killed_and_started_again_finds_its_workers(self):
        stream = self.cluster.stream("/v1/completions", self.long_request())
        next(stream.events())
        self.cluster.kill("router")
        stream.close()
        self.cluster.start("router")
        self.cluster.wait_ready()
        self.assert_same_bits(self.cluster, completion(131))
        self.cluster.expect_nothing_left()

    def test_a_dead_pool_is_said_at_once(self):
        self.cluster.kill("decode-0")
        wait_until(lambda: self.cluster.get("/readyz")[0] == 503, "unready", 10)
        start = time.monotonic()
        status, reply = self.cluster.post("/v1/completions", completion(4))
        self.assertEqual(status, 503, reply)
        self.assertEqual(reply["error"]["code"], "no_capacity")
        self.assertLess(time.monotonic() - start, 2)
        self.recover("decode-0")


class Points(ClusterCase):
    """A worker dies at a named place and is started again, as a supervisor would. Before the first token that costs
    nothing but time; after it the client gets the whole answer or an error. The next one gets its answer."""

    PLACES = {
        "prefill-0": ["p.before_prefill", "p.during_prefill", "p.after_prefill", "p.before_transfer",
                      "p.during_transfer", "p.after_transfer", "p.before_commit", "p.after_commit"],
        "decode-0": ["d.reserve", "d.before_commit", "d.after_commit", "d.before_step", "d.after_step",
                     "d.before_send"],
        "expert-1": ["e.before_compute", "e.after_compute"],
    }

    BEFORE_THE_FIRST_TOKEN = {"p.before_prefill", "p.during_prefill", "p.after_prefill", "d.reserve",
                              "e.before_compute", "e.after_compute"}

    def test_death_at_every_named_place(self):
        with Cluster(experts=2) as cluster:
            expected = Answers.alone(completion(600))
            for name, places in self.PLACES.items():
                for place in places:
                    with self.subTest(place):
                        cluster.restart(name, env={"MILLRACE_FAILPOINTS": f"{place}=crash@1"})
                        dead = cluster.processes[name]

                        def start_again():
                            wait_until(lambda: dead.poll() is not None, f"{name} dead at {place}", 20)
                            cluster.start(name)
                        supervisor = threading.Thread(target=start_again)
                        supervisor.start()
                        stream = cluster.stream("/v1/completions", completion(600))
                        last, text = None, ""
                        if stream.status == 200:
                            for last in stream.events():
                                if isinstance(last, dict) and last.get("choices"):
                                    text += last["choices"][0]["text"]
                        stream.close()
                        supervisor.join()
                        self.assertIsNotNone(dead.poll(), f"{name} lives: {place} was not passed")
                        if last == "[DONE]":
                            self.assertEqual(text, expected["message"]["content"])
                        elif place in self.BEFORE_THE_FIRST_TOKEN:
                            self.fail(f"{stream.status}, {last}: nothing had reached the client yet")
                        elif stream.status == 200:
                            self.assertIn("error", last)
                            self.assertTrue(expected["message"]["content"].startswith(text))
                        else:
                            self.assertEqual(stream.status, 503)
                        cluster.wait_ready()
                        self.assert_same_bits(cluster, completion(600))
                        cluster.expect_nothing_left()


class Leaks(ClusterCase):
    def test_two_hundred_mixed_requests_leave_nothing(self):
        with Cluster(experts=2, decode_section={"max_sequences": 8}) as cluster:
            def mixed(seed):
                draw = random.Random(seed)
                body = completion(draw.choice([1, 5, 130, 400]), max_tokens=draw.choice([1, 2, 20, 60]))
                kind = draw.randrange(4)
                if kind == 0:
                    status, reply = cluster.post("/v1/completions", body)
                    self.assertIn(status, (200, 429), reply)
                    return
                stream = cluster.stream("/v1/completions", body)
                if stream.status == 200 and kind != 1:
                    for count, event in enumerate(stream.events()):
                        if kind == 2 and count >= draw.randrange(1, 10):
                            break
                stream.close()

            def round_of(seeds):
                failures = []

                def one(seed):
                    try:
                        mixed(seed)
                    except Exception as error:  # noqa: BLE001 - collected
                        failures.append(repr(error))
                for begin in range(0, len(seeds), 8):
                    threads = [threading.Thread(target=one, args=(seed,)) for seed in seeds[begin:begin + 8]]
                    for thread in threads:
                        thread.start()
                    for thread in threads:
                        thread.join()
                self.assertEqual(failures, [])
                cluster.expect_nothing_left()

            round_of(list(range(40)))  # warm: channels, pools and threads are there
            time.sleep(2)
            before = {name: (cluster.descriptors(name), cluster.threads(name)) for name in cluster.roles}
            round_of(list(range(100, 300)))
            # gRPC and HTTP keep a connection or a thread for a while; what grows with requests would be far above this.
            def settled():
                return all(cluster.descriptors(name) <= before[name][0] + 4 and
                           cluster.threads(name) <= before[name][1] + 4 for name in cluster.roles)
            try:
                wait_until(settled, "descriptors and threads back", 60)
            except AssertionError:
                after = {name: (cluster.descriptors(name), cluster.threads(name)) for name in cluster.roles}
                self.fail(f"(descriptors, threads) before {before}, after {after}")
            self.assertEqual(cluster.metric("millrace_router_aborts_unanswered_total"), 0)


class Rolling(ClusterCase):
    """An upgrade as the chart does it, under load: no request fails, and none is answered with other tokens."""

    LENGTHS = [3, 60, 130, 400]
    CLIENTS = 6

    def setUp(self):
        self.failures, self.answered, self.refused, self.stopping = [], 0, 0, threading.Event()
        self.router_is_away = threading.Event()
        self.lock = threading.Lock()

    def ask(self, cluster, draw):
        """One streamed request; what a client would have to complain about, or None."""
        request = completion(draw.choice(self.LENGTHS), max_tokens=draw.choice([1, 2, 40, 120]))
        expected = Answers.alone(request)["message"]["content"]
        away = self.router_is_away.is_set()
        try:
            stream = cluster.stream("/v1/completions", request)
        except OSError as error:  # before its first byte: any client asks again
            return "refused" if away or self.router_is_away.is_set() else f"no connection: {error!r}"
        try:
            if stream.status != 200:
                code = stream.error_code()
                may_refuse = away or self.router_is_away.is_set()
                return "refused" if stream.status == 503 and may_refuse else f"{stream.status} {code}"
            text, last = "", None
            for last in stream.events():
                if isinstance(last, dict) and last.get("choices"):
                    text += last["choices"][0]["text"]
            if last != "[DONE]":
                return f"ended after {len(text)} characters with {last}"
            return None if text == expected else f"another answer for a prompt of {len(request['prompt'])}"
        except (OSError, http.client.HTTPException) as error:
            return f"broken: {error!r}"
        finally:
            stream.close()

    def client(self, cluster, seed):
        draw = random.Random(seed)
        while not self.stopping.is_set():
            outcome = self.ask(cluster, draw)
            with self.lock:
                if outcome is None:
                    self.answered += 1
                elif outcome == "refused":
                    self.refused += 1
                else:
                    self.failures.append(outcome)
            if outcome == "refused":
                time.sleep(0.1)

    def answered_more(self, cluster, count):
        with self.lock:
            until = self.answered + count
        wait_until(lambda: self.answered >= until or self.failures, f"{count} more answers")
        self.assertEqual(self.failures, [])

    def replace(self, cluster, names):
        """All of them at once, as stateful sets roll: each is told to end, and started again when it has."""
        for name in names:
            cluster.kill(name, signal.SIGTERM)
        for name in names:
            self.assertEqual(cluster.processes[name].wait(60), 0, name)
            cluster.start(name)
        cluster.wait_ready()

    def test_every_worker_and_the_router_are_replaced_and_no_request_fails(self):
        for length in self.LENGTHS:
            for max_tokens in (1, 2, 40, 120):
                Answers.alone(completion(length, max_tokens=max_tokens))
        two_of_each = dict(prefill=2, decode=2, experts=2, expert_section={"experts": "0-15"})
        with Cluster(**two_of_each) as cluster:
            clients = [threading.Thread(target=self.client, args=(cluster, seed)) for seed in range(self.CLIENTS)]
            for client in clients:
                client.start()
            try:
                self.answered_more(cluster, 20)
                # Stateful sets replace their pods from the last to the first, every role at the same time.
                for number in (1, 0):
                    self.replace(cluster, [f"{role}-{number}" for role in ("prefill", "decode", "expert")])
                    self.answered_more(cluster, 20)
                # Alone as well: nothing else hides what one role's drain costs.
                for name in ("expert-1", "decode-1", "prefill-1"):
                    self.replace(cluster, [name])
                    self.answered_more(cluster, 10)
                # The only router: whoever it has accepted gets a whole answer; others are told before a first byte.
                self.router_is_away.set()
                self.replace(cluster, ["router"])
                time.sleep(0.2)  # a request sent into the gap has heard of it by now
                self.router_is_away.clear()
                self.answered_more(cluster, 20)
            finally:
                self.stopping.set()
                for client in clients:
                    client.join()
            self.assertEqual(self.failures, [])
            self.assertGreater(self.answered, 100)
            cluster.expect_nothing_left()


class Drain(ClusterCase):
    def test_a_running_request_finishes_while_the_router_drains(self):
        with Cluster(experts=1) as cluster:
            stream = cluster.stream("/v1/completions", {"model": "demo", "prompt": prompt_of(50), "max_tokens": 400,
                                                        "ignore_eos": True})
            events = stream.events()
            next(events)
            cluster.kill("router", signal.SIGTERM)
            self.assertEqual(list(events)[-1], "[DONE]")
            stream.close()


    def test_draining_workers_cost_no_request(self):
        with Cluster(prefill=2, decode=2, experts=1) as cluster:
            streams = [cluster.stream("/v1/completions", completion(50, max_tokens=300)) for _ in range(4)]
            events = [stream.events() for stream in streams]
            for each in events:
                next(each)
            cluster.kill("decode-0", signal.SIGTERM)
            cluster.kill("prefill-0", signal.SIGTERM)
            wait_until(lambda: sum(worker["state"] == "ready" for worker in cluster.status()["workers"]) == 3,
                       "two workers draining or gone", 10)
            self.assert_same_bits(cluster, completion(128))
            for stream, each in zip(streams, events):
                self.assertEqual(list(each)[-1], "[DONE]")
                stream.close()
            for name in ("decode-0", "prefill-0"):
                self.assertEqual(cluster.processes[name].wait(30), 0)


    def test_the_operator_drains_a_worker_and_no_request_is_lost(self):
        with Cluster(prefill=1, decode=2, experts=1) as cluster:
            streams = [cluster.stream("/v1/completions", completion(50, max_tokens=300)) for _ in range(4)]
            events = [stream.events() for stream in streams]
            for each in events:
                next(each)
            self.assertEqual(cluster.post("/workers/nobody/drain", {}, port=cluster.operator_port)[0], 404)
            self.assertEqual(cluster.post("/workers/decode-0/drain", {})[0], 404)  # not on the public port
            status, reply = cluster.post("/workers/decode-0/drain", {}, port=cluster.operator_port)
            self.assertEqual((status, reply["worker"]), (202, "decode-0"))
            for stream, each in zip(streams, events):
                self.assertEqual(list(each)[-1], "[DONE]")
                stream.close()
            self.assertEqual(cluster.processes["decode-0"].wait(40), 0)
            self.assert_same_bits(cluster, completion(128))


class Files(unittest.TestCase):
    """Model files that go wrong after the start, or that keep it from coming."""

    def copy_of_model(self):
        folder = tempfile.mkdtemp(prefix="millrace-model-")
        self.addCleanup(shutil.rmtree, folder)
        for name in os.listdir(MODEL):
            shutil.copy(os.path.join(MODEL, name), folder)
        return folder

    def log_of(self, cluster, name):
        with open(os.path.join(cluster.directory, name + ".log"), errors="replace") as log:
            return log.read()

    def test_a_shard_cut_short_while_it_is_loaded_is_named(self):
        model = self.copy_of_model()
        cluster = Cluster(prefill=1, decode=0, experts=0, model=model)
        self.addCleanup(cluster.stop)
        cluster.start("prefill-0", env={"MILLRACE_FAILPOINTS": "w.load=sleep(3000)"})
        process = cluster.processes["prefill-0"]
        shards = [os.path.join(model, name) for name in os.listdir(model) if name.endswith(".safetensors")]

        def mapped():
            self.assertIsNone(process.poll(), self.log_of(cluster, "prefill-0"))
            with open(f"/proc/{process.pid}/maps") as maps:
                text = maps.read()
            return all(shard in text for shard in shards)
        wait_until(mapped, "shards mapped")
        for shard in shards:
            os.truncate(shard, 4096)
        self.assertEqual(process.wait(PATIENCE), 72)
        self.assertIn(".safetensors", self.log_of(cluster, "prefill-0").splitlines()[-1])

    def test_a_start_that_stands_still_ends_and_says_what_it_waits_for(self):
        cluster = Cluster(prefill=1, decode=0, experts=0, timers={"startup_timeout_ms": 1500})
        self.addCleanup(cluster.stop)
        cluster.start("prefill-0", env={"MILLRACE_FAILPOINTS": "w.load=hang"})
        self.assertEqual(cluster.processes["prefill-0"].wait(PATIENCE), 69)
        log = self.log_of(cluster, "prefill-0")
        self.assertIn("start-up waits for the weights in", log)
        self.assertIn("timers.startup_timeout_ms", log)

    def test_keys_that_would_run_code_are_ignored_with_one_warning(self):
        model = self.copy_of_model()
        path = os.path.join(model, "config.json")
        with open(path) as source:
            config = json.load(source)
        config.update(auto_map={"AutoModel": "evil.Model"}, trust_remote_code=True)
        with open(path, "w") as out:
            json.dump(config, out)
        with Cluster(experts=0, model=model) as cluster:
            self.assertEqual(cluster.post("/v1/completions", completion(4))[0], 200)
            for name in ("prefill-0", "decode-0"):
                self.assertEqual(self.log_of(cluster, name).count("config.json: ignored auto_map, trust_remote_code"), 1)
        done = subprocess.run([BINARY, "run", model, "--prompt", "Hi", "--quiet"], capture_output=True, timeout=PATIENCE)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stderr.decode().count("config.json: ignored auto_map"), 1)


def child_of(parent, word):
    """The process id of the child of `parent` that has `word` among its arguments."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as stat, open(f"/proc/{pid}/cmdline") as command:
                if int(stat.read().rsplit(")", 1)[1].split()[1]) == parent and word in command.read().split("\0"):
                    return int(pid)
        except OSError:  # it has ended meanwhile
            continue
    raise AssertionError(f"no child of {parent} called {word}")


class Up(unittest.TestCase):
    """The supervisor as a user meets it."""

    def config(self, cluster):
        return [BINARY, "up", "--config", cluster.config_path, "--log-dir", cluster.directory]

    def test_once_streams_an_answer_and_drains(self):
        cluster = Cluster(experts=2)
        done = subprocess.run(self.config(cluster) + ["--once", "Sort 9 4 7."], capture_output=True,
                              timeout=PATIENCE * 2)
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        self.assertTrue(done.stdout.decode().strip())
        self.assertIn("Stopped.", done.stderr.decode())

    def test_interrupt_drains_and_a_killed_child_is_started_again(self):
        cluster = Cluster(experts=1)
        told = os.path.join(cluster.directory, "up.log")

        def text():
            with open(told) as log:
                return log.read()
        with open(told, "w") as log:
            up = subprocess.Popen(self.config(cluster), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log)
        try:
            # Its own word: until it has seen them all ready, an interrupt ends it as one that never was.
            wait_until(lambda: "Ready in" in text(), "ready")
            first = {worker["name"]: worker["incarnation"] for worker in cluster.status()["workers"]}
            os.kill(child_of(up.pid, "decode-0"), signal.SIGKILL)
            wait_until(lambda: cluster.ready() and any(
                worker["name"] == "decode-0" and worker["incarnation"] != first["decode-0"]
                for worker in cluster.status()["workers"]), "decode-0 started again")
            up.send_signal(signal.SIGINT)
            self.assertEqual(up.wait(PATIENCE), 0, text())
            self.assertIn("decode-0 ended (killed by SIGKILL)", text())
        finally:
            up.kill()

    def test_junk_at_the_block_port_costs_a_restart_at_most(self):
        # Debian's UCX ends the process that gets it (an assertion of its connection manager); newer ones drop it.
        cluster = Cluster(experts=0)
        told = os.path.join(cluster.directory, "up.log")
        with open(told, "w") as log:
            up = subprocess.Popen(self.config(cluster), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log)
        try:
            wait_until(lambda: "Ready in" in open(told).read(), "ready")
            first = {worker["name"]: worker["incarnation"] for worker in cluster.status()["workers"]}
            stream = cluster.stream("/v1/completions", completion(300, max_tokens=800))
            events = stream.events()
            next(events)
            pid = child_of(up.pid, "decode-0")
            lines = subprocess.run(["ss", "-Hltnp"], capture_output=True, check=True, text=True).stdout.splitlines()
            ports = [int(line.split()[3].rsplit(":", 1)[1]) for line in lines if f"pid={pid}," in line]
            self.assertGreater(len(ports), 1)
            for port in ports:
                try:
                    with socket.create_connection(("127.0.0.1", port), timeout=5) as junk:
                        junk.sendall(bytes(64))
                except OSError:  # it was gone before its last port's turn
                    pass
            last = list(events)[-1]  # never stuck: it goes on elsewhere, or ends in words
            self.assertTrue(last == "[DONE]" or "error" in last, last)
            self.assertIsNone(up.poll())
            for _ in range(30):  # an assertion that fails takes a moment to end its process
                if not os.path.exists(f"/proc/{pid}"):
                    break
                time.sleep(0.1)
            died = not os.path.exists(f"/proc/{pid}")

            def serving():
                status = cluster.status()  # one look: what is there may be gone in the next
                return status["ready"] and any(
                    worker["name"] == "decode-0" and worker["state"] == "ready" and
                    (worker["incarnation"] != first["decode-0"]) == died for worker in status["workers"])

            wait_until(serving, "decode-0 serving")
            with open(told) as log:
                self.assertEqual(died, "decode-0 ended (killed by SIGABRT)" in log.read())
            status, reply = cluster.post("/v1/completions", completion(128))
            self.assertEqual(status, 200, reply)
        finally:
            up.send_signal(signal.SIGINT)
            try:
                self.assertEqual(up.wait(PATIENCE), 0, open(told).read())
            finally:
                up.kill()

    def test_a_bad_model_ends_it_with_65_and_the_reason(self):
        cluster = Cluster(experts=0)
        with open(cluster.config_path) as source:
            config = json.load(source)
        config["model"]["path"] = cluster.directory
        with open(cluster.config_path, "w") as out:
            json.dump(config, out)
        done = subprocess.run(self.config(cluster) + ["--once", "Hi"], capture_output=True, timeout=PATIENCE)
        self.assertEqual(done.returncode, 65, done.stderr.decode())
        self.assertIn("config.json", done.stderr.decode())


if __name__ == "__main__":
    unittest.main(verbosity=2)
