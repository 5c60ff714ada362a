# SPDX-License-Identifier: Apache-2.0
"""Rules and dashboards against what the processes really say.

A demo cluster of real processes is loaded and hurt, a real Prometheus scrapes it every second and evaluates our rules,
and every expression of every panel and alert is asked of it. A metric that does not exist, a label that is spelt
otherwise, or a panel that shows nothing fails here.
"""
import concurrent.futures
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.parse
import urllib.request

import yaml

from chart import CHART, ROOT, TOOLS, main
from dashboards_test import panels

sys.path.insert(0, os.path.join(ROOT, "tests/cluster"))
from cluster import PATIENCE, Cluster, free_port, wait_until  # noqa: E402  (a folder beside this one)

PROMETHEUS = os.path.join(TOOLS, "bin/prometheus")
PROMTOOL = os.path.join(TOOLS, "bin/promtool")
RULES = [os.path.join(CHART, "files/rules", name) for name in ("recording.yml", "alerts.yml")]
RUNBOOK = os.path.join(ROOT, "docs/operations.md")
CASES = os.path.join(ROOT, "tests/helm/rules_test.yml")


def rules(kind):
    for path in RULES:
        with open(path) as source:
            for group in yaml.safe_load(source)["groups"]:
                for rule in group["rules"]:
                    if kind in rule:
                        yield rule


def catalogue():
    """What docs/metrics.md says, by name; it is written from the code."""
    metrics = {}
    with open(os.path.join(ROOT, "docs/metrics.md")) as source:
        for line in source:
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if len(cells) != 6 or not cells[0].startswith("`"):
                continue
            roles = {"router", "prefill", "decode", "expert"} if cells[4] == "all" else set(cells[4].split(", "))
            metrics[cells[0].strip("`")] = {"type": cells[1], "labels": set(filter(None, cells[3].split(", "))),
                                            "roles": roles}
    return metrics


def metric_names(expression):
    return set(re.findall(r"\bmillrace_[a-z0-9_]+", expression))


def family(name):
    return re.sub(r"_(bucket|sum|count)$", "", name)


class Files(unittest.TestCase):
    """Without a cluster: syntax, cases, addresses. Dashboards' files are dashboards_test.py's."""

    def test_rules_are_sound(self):
        done = subprocess.run([PROMTOOL, "check", "rules", *RULES], capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def test_the_configuration_for_a_cluster_outside_kubernetes_is_sound(self):
        path = os.path.join(ROOT, "deploy/prometheus/prometheus.yml")
        done = subprocess.run([PROMTOOL, "check", "config", path], capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertIn("alerts.yml", done.stdout)

    def test_alerts_fire_and_stay_silent_as_they_should(self):
        done = subprocess.run([PROMTOOL, "test", "rules", CASES], capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def test_each_alert_has_a_case_in_which_it_fires(self):
        # A case states what fires exactly, so an alert that never fires breaks the one that expects it.
        with open(CASES) as source:
            cases = yaml.safe_load(source)["tests"]
        expected = set()
        for case in cases:
            for check in case.get("alert_rule_test", []):
                if check["exp_alerts"]:
                    expected.add(check["alertname"])
            for check in case.get("promql_expr_test", []):
                if any(sample["value"] for sample in check["exp_samples"]):
                    expected.update(re.findall(r'alertname="(\w+)"', check["expr"] + str(check["exp_samples"])))
        for rule in rules("alert"):
            with self.subTest(rule["alert"]):
                self.assertIn(rule["alert"], expected)

    def test_each_alert_leads_to_its_paragraph(self):
        with open(RUNBOOK) as source:
            anchors = {re.sub(r"[^a-z0-9 -]", "", line.lstrip("#").strip().lower()).replace(" ", "-")
                       for line in source if line.startswith("#")}
        for rule in rules("alert"):
            with self.subTest(rule["alert"]):
                page, anchor = rule["annotations"]["runbook_url"].split("#")
                self.assertEqual(page, "docs/operations.md")
                self.assertIn(anchor, anchors)


class Scrape(unittest.TestCase):
    """A loaded, hurt cluster; a Prometheus beside it."""

    @classmethod
    def setUpClass(cls):
        # Little room, so that a modest load is refused and queues: what panels of refusals show must exist.
        cls.cluster = Cluster(
            decode=2, experts=2, prefill_section={"max_sequences": 1, "max_queue": 1},
            decode_section={"max_sequences": 6})
        with open(cls.cluster.config_path) as source:
            document = json.load(source)
        cls.targets = {"router": cls.cluster.operator_port}
        for role in ("prefill", "decode", "expert"):
            for entry in document[role]:
                port = free_port()
                entry["worker"]["operator_listen"] = f"127.0.0.1:{port}"
                cls.targets[entry["worker"]["name"]] = port
        document["router"].update(max_requests=8, queue_timeout_ms=500)
        document["timers"] = {"expert_timeout_ms": 15000, "watchdog_ms": 15000, "dead_after_ms": 15000}
        document["expert"][1]["max_queue"] = 3
        # A collector that is away: its spans are counted, and nothing waits for them.
        document["tracing"] = {"otlp_endpoint": "127.0.0.1:9", "sample_ratio": 1}
        with open(cls.cluster.config_path, "w") as out:
            json.dump(document, out)
        cls.addClassCleanup(cls.cluster.stop)
        for name in cls.cluster.roles:
            # One of the decode workers refuses every commit, which is what the panels of failures are for.
            cls.cluster.start(name, {"MILLRACE_FAILPOINTS": "d.before_commit=error(INTERNAL);"
                                     "d.reserve=error(RESOURCE_EXHAUSTED)@3"} if name == "decode-1" else None)
        cls.cluster.wait_ready()
        cls.start_prometheus()
        # What a crowd meets depends on the machine: rounds until everything has been seen once. What is missing at the
        # end is what the tests report.
        cls.codes = {}
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and (cls.empty_panels() or cls.codes.get(200, 0) < 10):
            cls.calm(seconds=3)
            cls.crowd(seconds=5)
            time.sleep(2)  # two scrapes more: what a counter did last must be in a rate
    @classmethod
    def tearDownClass(cls):
        """Pictures for docs/operations.md: after what was hurt above, the same cluster well and under a milder load."""
        folder = os.environ.get("MILLRACE_PICTURES")
        if not folder:
            return
        sys.path.insert(0, os.path.join(ROOT, "deploy/grafana"))
        import draw  # from there
        cls.cluster.restart("decode-1")
        for seconds, askers in ((30, 1), (40, 2), (30, 3), (20, 1)):
            end = time.monotonic() + seconds
            with concurrent.futures.ThreadPoolExecutor(askers) as threads:
                for index in range(askers):
                    threads.submit(cls.ask, 4 * index + 1, end)
        draw.draw_all(f"http://127.0.0.1:{cls.port}", folder, minutes=4)

    @classmethod
    def start_prometheus(cls):
        cls.port = free_port()
        folder = tempfile.mkdtemp(prefix="millrace-prometheus-")
        cls.addClassCleanup(shutil.rmtree, folder)
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"}, "rule_files": RULES,
            "scrape_configs": [{"job_name": "millrace", "static_configs": [
                {"targets": [f"127.0.0.1:{port}"], "labels": {"namespace": "demo", "instance": name}}
                for name, port in cls.targets.items()]}]}
        # Rules are evaluated by their own interval in production, every second here.
        config["rule_files"] = []
        for path in RULES:
            with open(path) as source:
                content = yaml.safe_load(source)
            for group in content["groups"]:
                group.pop("interval", None)
            fast = os.path.join(folder, os.path.basename(path))
            with open(fast, "w") as out:
                yaml.safe_dump(content, out)
            config["rule_files"].append(fast)
        with open(os.path.join(folder, "prometheus.yml"), "w") as out:
            yaml.safe_dump(config, out)
        log = open(os.path.join(folder, "log"), "wb")
        process = subprocess.Popen(
            [PROMETHEUS, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
             f"--web.listen-address=127.0.0.1:{cls.port}"], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        log.close()
        cls.addClassCleanup(process.wait)
        cls.addClassCleanup(process.terminate)
        wait_until(lambda: len(cls.query('up{job="millrace"} == 1')) == len(cls.targets), "every target scraped", 60)

    @classmethod
    def query(cls, expression):
        address = f"http://127.0.0.1:{cls.port}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        try:
            with urllib.request.urlopen(address, timeout=20) as reply:
                return json.load(reply)["data"]["result"]
        except OSError:
            return []

    @classmethod
    def ask(cls, index, end):
        body = {"model": "demo", "max_tokens": 24, "temperature": 0, "ignore_eos": True,
                # A request of several choices passes the front and meets the limit of choices behind it.
                "n": 1 if index % 4 else 6,
                "messages": [{"role": "user", "content": f"Compute {index} + 29."}]}
        while time.monotonic() < end:
            try:
                code = cls.cluster.post("/v1/chat/completions", body)[0]
            except OSError:
                code = "refused at accept"
            cls.codes[code] = cls.codes.get(code, 0) + 1
            if code != 200:
                time.sleep(0.05)

    @classmethod
    def calm(cls, seconds):
        cls.ask(1, time.monotonic() + seconds)

    @classmethod
    def crowd(cls, seconds):
        """More requests and connections than there is room for, and a member of the pool that stops now and then."""
        end = time.monotonic() + seconds
        with concurrent.futures.ThreadPoolExecutor(16) as threads:
            for index in range(16):
                threads.submit(cls.ask, index, end)
            while time.monotonic() < end - 1:
                # 64 connections from one address are allowed.
                idle = [socket.create_connection(("127.0.0.1", cls.cluster.http_port)) for _ in range(80)]
                time.sleep(0.5)
                for connection in idle:
                    connection.close()
                # Who stands still for a moment finds more messages waiting than it queues.
                cls.cluster.kill("expert-1", signal.SIGSTOP)
                time.sleep(0.5)
                cls.cluster.kill("expert-1", signal.SIGCONT)

    @classmethod
    def empty_panels(cls):
        empty = []
        for name, panel in panels():
            for target in panel["targets"]:
                expression = target["expr"].replace("$__rate_interval", "15s").replace('"$namespace"', '".*"')
                values = [float(sample["value"][1]) for sample in cls.query(expression)]
                if not [value for value in values if value == value and abs(value) != float("inf")]:
                    empty.append(f"{name}: {panel['title']}: {expression}")
        return empty

    def scrape(self):
        return {name: self.cluster.get("/metrics", port)[1] for name, port in self.targets.items()}

    def test_the_load_did_what_it_should(self):
        self.assertGreaterEqual(self.codes.get(200, 0), 10, self.codes)
        self.assertGreater(self.codes.get(429, 0), 0, self.codes)
        self.assertGreater(self.codes.get(503, 0), 0, self.codes)

    def test_every_metric_named_exists(self):
        exposed = {line.split()[2] for text in self.scrape().values() for line in text.splitlines()
                   if line.startswith("# TYPE ")}
        recorded = {rule["record"] for rule in rules("record")}
        named = {}
        for rule in [*rules("record"), *rules("alert")]:
            named.setdefault(rule.get("alert") or rule["record"], set()).update(metric_names(rule["expr"]))
        for name, panel in panels():
            for target in panel["targets"]:
                named.setdefault(f"{name}: {panel['title']}", set()).update(metric_names(target["expr"]))
        for where, metrics in named.items():
            for metric in metrics:
                if any(metric in record for record in recorded):
                    continue
                with self.subTest(f"{where}: {metric}"):
                    self.assertIn(family(metric), exposed)

    def test_every_panel_shows_something_finite(self):
        self.assertEqual("\n".join(self.empty_panels()), "")

    def test_every_alert_can_be_evaluated(self):
        address = f"http://127.0.0.1:{self.port}/api/v1/rules"
        with urllib.request.urlopen(address, timeout=20) as reply:
            groups = json.load(reply)["data"]["groups"]
        found = {rule["name"]: rule for group in groups for rule in group["rules"]}
        for rule in [*rules("record"), *rules("alert")]:
            name = rule.get("alert") or rule["record"]
            with self.subTest(name):
                self.assertEqual(found[name]["health"], "ok", found[name].get("lastError"))

    def test_selectors_of_alerts_match_series_that_exist(self):
        # An alert's comparison hides a misspelt label: its operands without the comparison must find series.
        for rule in rules("alert"):
            for selector in re.findall(r"(millrace_[a-z0-9_]+)(\{[^}]*\})", rule["expr"]):
                if ":" in rule["expr"].split(selector[0])[0][-12:]:
                    continue
                with self.subTest(f"{rule['alert']}: {''.join(selector)}"):
                    self.assertTrue(self.query("".join(selector)))

    def test_what_is_exposed_is_what_the_reference_says(self):
        reference = catalogue()
        for process, text in self.scrape().items():
            role = re.sub(r"-\d$", "", process)
            types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.M))
            for name, kind in types.items():
                with self.subTest(f"{process}: {name}"):
                    self.assertIn(name, reference)
                    self.assertEqual(reference[name]["type"], kind)
                    self.assertIn(role, reference[name]["roles"])
            for line in text.splitlines():
                if line.startswith("#") or "{" not in line:
                    continue
                name, labels = re.match(r"(\w+)\{(.*)\} ", line).groups()
                found = set(re.findall(r'(?:^|,)(\w+)="', labels)) - {"le"}
                # The router has no worker label where workers have one.
                self.assertIn(reference[family(name)]["labels"] - found, (set(), {"worker"}), line)
                self.assertLessEqual(found, reference[family(name)]["labels"], line)

    def test_what_the_reference_says_is_exposed(self):
        text = self.scrape()
        for name, metric in catalogue().items():
            # Counters by a word of their own begin with their first event; there is no card here.
            if metric["type"] == "counter" and metric["labels"] - {"role", "worker", "model", "direction"}:
                continue
            if name == "millrace_device_memory_bytes":
                continue
            for process in text:
                if re.sub(r"-\d$", "", process) in metric["roles"]:
                    with self.subTest(f"{process}: {name}"):
                        self.assertIn(f"# TYPE {name} ", text[process])

    def test_names_and_help_are_as_prometheus_wants_them(self):
        for process, text in self.scrape().items():
            done = subprocess.run([PROMTOOL, "check", "metrics"], input=text, capture_output=True, text=True)
            with self.subTest(process):
                self.assertEqual((done.returncode, done.stdout + done.stderr), (0, ""))

    def test_a_process_stays_below_its_share_of_series(self):
        for name, text in self.scrape().items():
            series = [line for line in text.splitlines() if line and not line.startswith("#")]
            with self.subTest(name):
                self.assertLess(len(series), 3000)


if __name__ == "__main__":
    main("" if os.path.exists(PROMTOOL) else "prometheus")
