# SPDX-License-Identifier: Apache-2.0
"""The rendered chart run for real: its command lines, ConfigMap, users, probes and policies, with the built binary.

No cluster: pods.py is the kubelet. What is proved is that what the chart says works with what the binary does.
"""
import json
import os
import subprocess
import tempfile
import time
import unittest

import pods
from chart import ROLES, ROOT, Rendered, main, values_files

# Machines that run tests are slow and shared: bounds are for hangs, not for speed.
PATIENCE = float(os.environ.get("MILLRACE_TEST_PATIENCE", "120"))


class Pods:
    """A release that serves. `render` makes it, `secrets` are what its Secrets hold."""
    secrets = {}

    @classmethod
    def setUpClass(cls):
        # As chosen for a machine whose cores are somebody else's for seconds.
        timers = {"expert_timeout_ms": 15000, "watchdog_ms": 15000, "dead_after_ms": 15000}
        cls.rendered = cls.render({"timers": timers})
        cls.node = pods.Node(cls.rendered, cls.secrets)
        cls.addClassCleanup(cls.node.close)
        cls.stranger = cls.node.add_outsider("stranger", "default")
        cls.prometheus = cls.node.add_outsider("prometheus", "monitoring")
        cls.node.apply_policies()
        # The order a cluster starts pods in is nobody's promise: the last ones first.
        cls.serving = [pod for role in reversed(ROLES) for pod in cls.node.of_role(role)]
        for pod in cls.serving:
            cls.node.start(pod)
        try:
            for pod in cls.serving:
                pod.wait("startupProbe", PATIENCE)
            for pod in cls.serving:
                pod.wait("readinessProbe", PATIENCE)
        except AssertionError:
            for pod in cls.serving:
                print(pod.tail())
            raise

    def run_test_pod(self):
        """`helm test`: the pod of the test hook, to its end. Its exit status and what it printed."""
        pod = self.node.of_role("tests")[0]
        if pod.log and os.path.exists(pod.log):
            os.remove(pod.log)
        self.node.start(pod)
        status = pod.process.wait(PATIENCE)
        with open(pod.log) as log:
            return status, log.read()


class Serving(Pods, unittest.TestCase):
    """The demo values, as `helm install` would start them."""

    @staticmethod
    def render(values):
        return Rendered(values, files=[values_files()["cpu-demo"]])

    def test_helm_test_gets_a_completion(self):
        status, text = self.run_test_pod()
        self.assertEqual(status, 0, text)
        self.assertRegex(text, "[A-Za-z]{3}")

    def test_processes_run_as_the_pod_says(self):
        for pod in self.serving:
            with self.subTest(pod.name):
                with open(f"/proc/{pod.process.pid}/status") as source:
                    status = dict(line.rstrip("\n").split(":\t", 1) for line in source if ":\t" in line)
                self.assertEqual(status["Uid"].split(), ["65532"] * 4)
                self.assertEqual(int(status["CapBnd"], 16), 0)
                self.assertEqual(status["NoNewPrivs"], "1")
                with open(f"/proc/{pod.process.pid}/cmdline") as source:
                    arguments = source.read().rstrip("\0").split("\0")
                self.assertEqual(arguments[1:], pod.container["args"][:-1] + [pod.name])

    def test_liveness_holds(self):
        for pod in self.serving:
            self.assertTrue(pod.probe("livenessProbe"), pod.name)

    def test_the_health_check_of_the_image_finds_every_role(self):
        ask = (pods.BINARY, "health", "--timeout-ms", "1000")  # as in the Dockerfiles
        for pod in self.serving:
            with self.subTest(pod.name):
                done = pods.shell("ip", "netns", "exec", pod.namespace, *ask, check=False)
                self.assertEqual(done.returncode, 0)
        self.assertEqual(pods.shell("ip", "netns", "exec", self.stranger, *ask, check=False).returncode, 1)

    def test_policies_hold_both_ways(self):
        router = self.node.of_role("router")[0]
        decode = self.node.of_role("decode")[0]
        # A stranger may ask the public port, which is open by default, and reaches nothing else.
        for pod in self.serving:
            for name, port in ((port["name"], port["containerPort"]) for port in pod.container["ports"]):
                with self.subTest(f"stranger to {pod.name} {name}"):
                    self.assertEqual(self.node.can_connect(self.stranger, pod, port),
                                     pod is router and name in ("http", "grpc"))
                with self.subTest(f"prometheus to {pod.name} {name}"):
                    self.assertEqual(self.node.can_connect(self.prometheus, pod, port),
                                     name == "operator" or (pod is router and name in ("http", "grpc")))
        # Inside the release the policies bind as well: a worker has no business with a public port.
        self.assertTrue(self.node.can_connect(decode.namespace, router, router.port("control")))
        self.assertFalse(self.node.can_connect(decode.namespace, router, router.port("http")))
        self.assertFalse(self.node.can_connect(router.namespace, self.node.of_role("expert")[0], 9090))

    def test_blocks_travel_through_the_range_that_policies_name(self):
        first, last = 32768, 60999
        for pod in self.node.of_role("decode") + self.node.of_role("expert"):
            listening = pods.shell("ip", "netns", "exec", pod.namespace, "ss", "-Hltn").stdout.decode().split("\n")
            ports = {int(line.split()[3].rsplit(":", 1)[1]) for line in listening if line}
            others = ports - {port["containerPort"] for port in pod.container["ports"]}
            self.assertTrue(others, pod.name)
            for port in others:
                self.assertTrue(first <= port <= last, f"{pod.name} listens on {port}")

    def test_a_replaced_decode_worker_serves_again(self):
        pod = self.node.of_role("decode")[0]
        self.assertTrue(pod.terminate(), pod.tail())
        router = self.node.of_role("router")[0]
        end = time.monotonic() + PATIENCE
        while router.probe("readinessProbe"):
            self.assertLess(time.monotonic(), end, "the router is ready without a decode worker")
            time.sleep(0.1)
        self.node.start(pod)
        pod.wait("startupProbe", PATIENCE)
        router.wait("readinessProbe", PATIENCE)
        status, text = self.run_test_pod()
        self.assertEqual(status, 0, text)

    def test_zz_a_pod_ends_within_its_grace_and_finishes_what_it_serves(self):
        router = self.node.of_role("router")[0]
        body = json.dumps({"model": "millrace-demo", "stream": True, "temperature": 0, "max_tokens": 400,
                           "ignore_eos": True, "messages": [{"role": "user", "content": "Tell me a story."}]})
        client = subprocess.Popen(
            ["ip", "netns", "exec", self.stranger, "curl", "-sN", "-m", "60", "-H", "content-type: application/json",
             "-d", body, f"http://{router.address}:{router.port('http')}/v1/chat/completions"],
            stdout=subprocess.PIPE)
        self.assertTrue(client.stdout.readline())
        self.assertTrue(router.terminate(), router.tail())
        text = client.stdout.read().decode()
        client.wait()
        client.stdout.close()
        self.assertIn("data: [DONE]", text)
        self.assertIn('"finish_reason":"length"', text)
        for pod in self.serving:
            if pod is not router:
                self.assertTrue(pod.terminate(), pod.tail())


class Locked(Pods, unittest.TestCase):
    """The chart's own defaults: mutual TLS and keys, from Secrets that the documented commands make."""

    @staticmethod
    def render(values):
        return Rendered(dict(values, allowInsecure=False, tls={"enabled": True}, auth={"existingSecret": "tenants"},
                             tests={"existingSecret": "tester"}))

    @classmethod
    def setUpClass(cls):
        with tempfile.TemporaryDirectory() as directory:
            subprocess.run([os.path.join(ROOT, "deploy/certificates.sh"), directory], check=True)

            def text(name):
                with open(os.path.join(directory, name)) as source:
                    return source.read()
            cls.secrets = {f"millrace-{role}-tls": {"tls.crt": text(role + ".pem"), "tls.key": text(role + ".key"),
                                                    "ca.crt": text("ca.pem")} for role in ROLES}
        key, entry = subprocess.run([pods.BINARY, "key", "--tenant", "team"], capture_output=True, check=True,
                                    text=True).stdout.splitlines()
        cls.secrets["tenants"] = {"keys.json": json.dumps({"tenants": [json.loads(entry)]})}
        cls.secrets["tester"] = {"api-key": key}
        super().setUpClass()

    def test_helm_test_gets_a_completion_and_a_stranger_does_not(self):
        status, text = self.run_test_pod()
        self.assertEqual(status, 0, text)
        self.assertRegex(text, "[A-Za-z]{3}")
        router = self.node.of_role("router")[0]
        done = pods.shell("ip", "netns", "exec", self.stranger, "curl", "-s", "-o", "/dev/null", "-w", "%{http_code}",
                          f"http://{router.address}:{router.port('http')}/v1/models")
        self.assertEqual(done.stdout, b"401")

    def test_what_listens_beyond_loopback_has_a_lock_or_one_interface(self):
        for pod in self.serving:
            lines = pods.shell("ip", "netns", "exec", pod.namespace, "ss", "-Hltn").stdout.decode().split("\n")
            for address, port in (line.split()[3].rsplit(":", 1) for line in lines if line):
                if int(port) not in {entry["containerPort"] for entry in pod.container["ports"]}:
                    self.assertEqual(address, pod.address, f"{pod.name} listens on {address}:{port}")

    def test_internal_ports_want_a_certificate(self):
        for pod in self.serving:
            port = pod.port("control") if pod is self.node.of_role("router")[0] else pod.port("grpc")
            done = pod.from_node("curl", "-s", "-m", "5", "--http2-prior-knowledge", "-H", "te: trailers", "-H",
                                 "content-type: application/grpc", "--data-binary", "@-",
                                 f"http://{pod.address}:{port}/grpc.health.v1.Health/Check", input=b"\x00" * 5)
            self.assertNotEqual(done.returncode, 0, pod.name)
            self.assertEqual(done.stdout, b"", pod.name)


if __name__ == "__main__":
    main(pods.missing())
