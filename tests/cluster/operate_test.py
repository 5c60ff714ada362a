# SPDX-License-Identifier: Apache-2.0
"""The operator's commands against a cluster of processes: health, top, drain, config check, doctor.

What they print is for people; asserted is what a script could rely on: exit statuses, the names and numbers of what
there is, and that nothing but a terminal gets escape sequences.
"""
import json
import os
import pty
import re
import select
import signal
import subprocess
import time
import unittest

from cluster import BINARY, PATIENCE, Cluster


def millrace(*arguments, **options):
    return subprocess.run([BINARY, *arguments], capture_output=True, text=True, timeout=PATIENCE,
                          stdin=subprocess.DEVNULL, **options)


class Operate(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.cluster = Cluster(prefill=1, decode=2, experts=2, expert_section={"experts": "0-15"},
                              prefill_section={"cache_pages": 512})
        cls.cluster.__enter__()
        cls.operator = ("--operator", f"127.0.0.1:{cls.cluster.operator_port}")

    @classmethod
    def tearDownClass(cls):
        cls.cluster.__exit__(None, None, None)

    def address_of(self, name):
        return next(worker["address"] for worker in self.cluster.status()["workers"] if worker["name"] == name)

    def test_every_command_explains_itself(self):
        listed = re.findall(r"^  ([a-z]+)  +\S", millrace("--help").stdout, re.M)
        self.assertLessEqual({"doctor", "config", "drain", "top", "health"}, set(listed))
        for command in listed:
            with self.subTest(command):
                told = millrace(command, "--help")
                self.assertEqual(told.returncode, 0)
                if command != "version":
                    self.assertIn(f"millrace {command}", told.stdout)
                self.assertNotIn("\033", told.stdout)

    def test_health_is_an_exit_status(self):
        cluster = self.cluster
        well = [("--http", f"127.0.0.1:{cluster.operator_port}"), ("--http", f"127.0.0.1:{cluster.http_port}", "--ready"),
                ("--grpc", f"127.0.0.1:{cluster.grpc_port}"), ("--grpc", self.address_of("prefill-0")),
                ("--grpc", self.address_of("decode-0"), "--service", "millrace.v1.Decode"),
                ("--http", "127.0.0.1:1", "--http", f"127.0.0.1:{cluster.operator_port}")]
        for arguments in well:
            with self.subTest(arguments):
                done = millrace("health", *arguments)
                self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))
        for arguments in [("--http", "127.0.0.1:1"), ("--grpc", "127.0.0.1:1", "--timeout-ms", "500"),
                          ("--grpc", self.address_of("decode-0"), "--service", "no.such.Service")]:
            with self.subTest(arguments):
                done = millrace("health", *arguments)
                self.assertEqual(done.returncode, 1)
                self.assertEqual(done.stderr.count("\n"), 1)

    def test_health_of_a_process_that_stands_still_does_not_wait_for_it(self):
        worker = self.cluster.processes["decode-0"]
        address = self.address_of("decode-0")
        worker.send_signal(signal.SIGSTOP)
        try:
            start = time.monotonic()
            self.assertEqual(millrace("health", "--grpc", address, "--timeout-ms", "500").returncode, 1)
            self.assertLess(time.monotonic() - start, 5)
        finally:
            worker.send_signal(signal.SIGCONT)
        self.cluster.wait_ready()

    def test_top_is_plain_lines_where_there_is_no_terminal(self):
        done = millrace("top", "--count", "2", "--interval-ms", "200", *self.operator)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertNotIn("\033", done.stdout)
        for name in ("prefill-0", "decode-0", "decode-1", "expert-0", "expert-1"):
            self.assertEqual(len(re.findall(rf"^{name} .* ready ", done.stdout, re.M)), 2, done.stdout)
        self.assertEqual(len(re.findall(r"^drawn \d+/s .*ready 5 of 5$", done.stdout, re.M)), 2)
        self.assertEqual(millrace("top", "--operator", "127.0.0.1:1").returncode, 69)

    def test_top_redraws_a_terminal_and_gives_it_back(self):
        parent, child = pty.openpty()
        top = subprocess.Popen([BINARY, "top", "--interval-ms", "200", *self.operator], stdin=subprocess.DEVNULL,
                               stdout=child, stderr=child, env=dict(os.environ, TERM="xterm"))
        os.close(child)
        text = b""
        told = False
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if not select.select([parent], [], [], 1)[0]:
                continue
            try:
                piece = os.read(parent, 65536)
            except OSError:  # its end is closed
                break
            text += piece
            if not told and text.count(b"expert-1") >= 2:
                top.send_signal(signal.SIGINT)
                told = True
        self.assertEqual(top.wait(PATIENCE), 0)
        os.close(parent)
        self.assertTrue(text.startswith(b"\033[?1049h"), text[:40])
        self.assertTrue(text.rstrip().endswith(b"\033[?1049l"), text[-40:])

    def ask(self, request_id, **options):
        body = {"model": "demo", "prompt": [11] * 600, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **options}
        return self.cluster.post("/v1/completions", body, {"x-request-id": request_id})[0]

    def explain(self, request_id):
        done = millrace("explain", request_id, "--json", *self.operator)
        self.assertEqual(done.returncode, 0, done.stderr)
        return json.loads(done.stdout)

    def test_explain_says_where_a_requests_time_went(self):
        name = "order/7?x=1"
        self.assertEqual(self.ask(name), 200)
        request = self.explain(name)
        self.assertEqual((request["state"], request["outcome"], request["http_status"]), ("ended", "ok", 200))
        self.assertEqual((request["input_tokens"], request["output_tokens"], request["attempts"]), (600, 12, 1))
        self.assertGreater(request["bytes_moved"], 4 * 43008)  # four whole pages and the rest
        phases = {phase["name"]: phase for phase in request["phases"]}
        self.assertEqual(phases["prefill"]["worker"], "prefill-0")
        self.assertIn(phases["decode"]["worker"], ("decode-0", "decode-1"))
        self.assertRegex(phases["placement"]["detail"], "of 1 prefill worker .* of 2 decode workers")
        self.assertRegex(phases["prefill"]["detail"], "ms computing 600 tokens")
        self.assertRegex(phases["handoff"]["detail"], r"in \d+ extents, none sent again")
        parts = sum(phases[part]["ms"] for part in ("queue", "reserve", "prefill", "decode"))
        self.assertLessEqual(parts, request["total_ms"] + 0.01)
        self.assertGreater(parts, request["total_ms"] / 2)  # the rest is the front's and gRPC's
        told = millrace("explain", name, *self.operator).stdout
        self.assertIn("choice 0, attempt 1\n", told)
        self.assertNotIn("\033", told)
        self.assertIn(name, millrace("explain", *self.operator).stdout.splitlines()[1])

    def test_explain_shows_every_try_and_every_refusal(self):
        self.cluster.restart("prefill-0", env={"MILLRACE_FAILPOINTS": "p.before_prefill=error(UNAVAILABLE)@1"})
        self.assertEqual(self.ask("twice"), 200)
        request = self.explain("twice")
        self.assertEqual((request["attempts"], request["outcome"]), (2, "ok"))
        prefills = [phase["outcome"] for phase in request["phases"] if phase["name"] == "prefill"]
        self.assertEqual(prefills, ["unavailable", "ok"])
        self.assertIn("tried 2 times", millrace("explain", "twice", *self.operator).stdout)
        self.assertEqual(self.ask("wrong", max_tokens=-1), 400)
        request = self.explain("wrong")
        self.assertEqual((request["http_status"], request["attempts"], request["phases"]), (400, 0, []))
        done = millrace("explain", "nobody", *self.operator)
        self.assertEqual(done.returncode, 1)
        self.assertIn("no record", done.stderr)

    def test_config_check_counts_what_the_processes_report(self):
        done = millrace("config", "check", self.cluster.config_path, "--json")
        self.assertEqual(done.returncode, 0, done.stderr)
        report = json.loads(done.stdout)
        needs = {process["name"]: process for process in report["processes"]}
        cache = self.cluster.status()["cache"]
        for worker in self.cluster.status()["workers"]:
            need = needs[worker["name"]]
            with self.subTest(worker["name"]):
                self.assertAlmostEqual(need["weight_bytes"] / worker["load_bytes_total"], 1, delta=0.05)
                self.assertEqual(need["page_bytes"], worker["pages_total"] * cache["page_bytes"])
                self.assertEqual(need["slot_bytes"], worker["slots_total"] * cache["slot_bytes"])
        self.assertEqual(report["findings"], [finding for finding in report["findings"] if finding["severity"] == "note"])

    def test_config_check_refuses_what_cannot_work_and_says_what_can(self):
        needs = json.loads(millrace("config", "check", self.cluster.config_path, "--json").stdout)["processes"]
        without_half = sum(need["total_bytes"] - need["page_bytes"] // 2 for need in needs)
        done = millrace("config", "check", self.cluster.config_path, "--memory", str(without_half))
        self.assertEqual(done.returncode, 78)
        self.assertRegex(done.stdout, r"error  cache_pages: all processes together need .* 50 % of each cache_pages fits")
        path = os.path.join(self.cluster.directory, "wrong.json")
        with open(path, "w") as out:
            out.write('{"model": {"path": "x"}, "decod": []}')
        done = millrace("config", "check", path)
        self.assertEqual(done.returncode, 78)
        self.assertIn("decod", done.stderr)
        self.assertEqual(millrace("config", "check").returncode, 64)
        self.assertEqual(millrace("config", "guess", path).returncode, 64)

    def test_doctor_measures_every_pair_and_finds_this_machine_well(self):
        done = millrace("doctor", "--config", self.cluster.config_path, "--json")
        report = json.loads(done.stdout)
        self.assertEqual(done.returncode, 0, [check for check in report["checks"] if check["verdict"] == "bad"])
        pairs = {(entry["from"], entry["to"]) for entry in report["bandwidth"]}
        self.assertEqual(pairs, {(caller, expert) for caller in ("prefill-0", "decode-0", "decode-1")
                                 for expert in ("expert-0", "expert-1")} | {("prefill-0", "decode-0"),
                                                                            ("prefill-0", "decode-1")})
        for entry in report["bandwidth"]:
            self.assertGreater(entry["bytes_per_second"], 1e6, entry)
            self.assertIn("/", entry["lanes"])
        sections = {check["section"] for check in report["checks"]}
        self.assertLessEqual({"Machine", "GPU", "Limits", "Transport", "Bandwidth", "Configuration"}, sections)

    def test_doctor_measures_to_another_machines_doctor(self):
        listener = subprocess.Popen([BINARY, "doctor", "--listen", "127.0.0.1:0"], stdin=subprocess.DEVNULL,
                                    stdout=subprocess.PIPE, text=True)
        try:
            address = listener.stdout.readline().removeprefix("listening on ").strip()
            done = millrace("doctor", "--peer", address)
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
            self.assertRegex(done.stdout, rf"here to {address}: [\d.]+ GB/s")
        finally:
            listener.send_signal(signal.SIGINT)
            self.assertEqual(listener.wait(PATIENCE), 0)
            listener.stdout.close()
        done = millrace("doctor", "--peer", address)
        self.assertEqual(done.returncode, 1)
        self.assertIn(f"BAD   cannot reach {address}", done.stdout)

    def test_a_worker_says_where_others_reach_it(self):
        name = "decode-1"
        self.cluster.kill(name, signal.SIGTERM)
        self.assertEqual(self.cluster.processes[name].wait(40), 0)
        self.cluster.start(name, arguments=("--advertise", "localhost"))
        self.cluster.wait_ready()
        self.assertRegex(self.address_of(name), r"^localhost:\d+$")
        done = millrace("decode", "--config", self.cluster.config_path, "--name", name, "--advertise", ":1")
        self.assertEqual(done.returncode, 64)

    def test_drain_watches_a_worker_go(self):
        name = "expert-1"
        done = millrace("drain", name, *self.operator)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn(f"{name} has been asked to drain\n", done.stdout)
        self.assertRegex(done.stdout, rf"{name} has left after [\d.]+ s")
        self.assertEqual(self.cluster.processes[name].wait(40), 0)
        self.cluster.start(name)
        self.cluster.wait_ready()
        done = millrace("drain", "nobody", *self.operator)
        self.assertEqual(done.returncode, 64)
        self.assertIn("there are: prefill-0, decode-0, decode-1, expert-0, expert-1", done.stderr)
        self.assertEqual(millrace("drain", name, "--operator", "127.0.0.1:1").returncode, 69)


if __name__ == "__main__":
    unittest.main(verbosity=2)
