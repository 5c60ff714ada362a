# SPDX-License-Identifier: Apache-2.0
"""A real cluster of processes for tests: started, asked, wounded, inspected, drained.

Every role is its own `millrace` process on loopback ports that were free a moment ago. Python's standard library only,
since this runs on a fresh Debian. What a test may rely on: logs are kept in `directory` and shown when a test fails;
nothing outlives stop().
"""
import http.client
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
import weakref

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BINARY = os.environ.get("MILLRACE", os.path.join(ROOT, "build/release/bin/millrace"))
MODEL = os.path.join(ROOT, "deploy/demo/model")
# Machines that run tests are slow and shared: bounds are for hangs, not for speed.
PATIENCE = float(os.environ.get("MILLRACE_TEST_PATIENCE", "120"))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def float32(value):
    """The float a JSON number stands for, so that equal bits compare equal however they were printed."""
    return struct.unpack("f", struct.pack("f", value))[0]


def wait_until(condition, what, limit=None):
    end = time.monotonic() + (limit or PATIENCE)
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError(f"not within {limit or PATIENCE:.0f} s: {what}")


def run_alone(request, numerics=None, extra=()):
    """What one process answers: `millrace run --json`."""
    command = [BINARY, "run", MODEL, "--request", "-", "--json", "--quiet", *extra]
    if numerics:
        command += ["--numerics", numerics]
    done = subprocess.run(command, input=json.dumps(request).encode(), capture_output=True, timeout=PATIENCE * 3)
    if done.returncode != 0:
        raise AssertionError(f"millrace run failed: {done.stderr.decode()}")
    return json.loads(done.stdout)


class Cluster:
    def __init__(self, prefill=1, decode=1, experts=1, numerics=None, expert_transport=None, env=None, timers=None,
                 decode_section=None, prefill_section=None, expert_section=None, router_section=None, security=None,
                 transfer=None, model=MODEL):
        self.directory = tempfile.mkdtemp(prefix="millrace-test-")
        weakref.finalize(self, shutil.rmtree, self.directory, ignore_errors=True)
        self.http_port, self.operator_port, self.grpc_port, self.control_port = (free_port() for _ in range(4))
        model = {"path": model, "id": "demo"}
        if numerics:
            model["numerics"] = numerics
        names = {"prefill": prefill, "decode": decode, "expert": experts}
        sections = {role: [{"worker": {"name": f"{role}-{i}"}} for i in range(count)]
                    for role, count in names.items()}
        for section in sections["decode"]:
            section.update(decode_section or {})
        for section in sections["prefill"]:
            section.update(prefill_section or {})
        for section in sections["expert"]:
            section.update(expert_section or {})
        config = {
            "model": model,
            "router": {
                "http_listen": f"127.0.0.1:{self.http_port}",
                "operator_listen": f"127.0.0.1:{self.operator_port}",
                "grpc_listen": f"127.0.0.1:{self.grpc_port}",
                "control_listen": f"127.0.0.1:{self.control_port}",
                **(router_section or {}),
            },
            # The defaults are for machines that serve; one that runs tests may stand still for seconds.
            "timers": {"expert_timeout_ms": 5000, "watchdog_ms": 10000, **(timers or {})},
            **sections,
        }
        if expert_transport or transfer:
            config["transfer"] = {**(transfer or {}), **({"expert_transport": expert_transport} if expert_transport else {})}
        if security:
            config["security"] = security
        self.config_path = os.path.join(self.directory, "cluster.json")
        with open(self.config_path, "w") as out:
            json.dump(config, out, indent=1)
        self.env = dict(os.environ, **(env or {}))
        self.roles = {"router": "router"}
        for role, entries in sections.items():
            self.roles.update({entry["worker"]["name"]: role for entry in entries})
        self.processes = {}
        self.incarnations = {}  # by name, as last seen ready
        self.stale = {}  # by name, of the process that ran before: the router may not have noticed its death yet
        self.told = set()  # processes that had their SIGTERM: a second one means "at once"

    def __enter__(self):
        for name in self.roles:
            self.start(name)
        try:
            self.wait_ready()
        except AssertionError:
            self.stop()
            raise
        return self

    def __exit__(self, kind, value, traceback):
        codes = self.stop()
        if kind is not None:
            self.show_logs()
        else:
            bad = {name: code for name, code in codes.items() if code != 0}
            if bad:
                self.show_logs()
                raise AssertionError(f"did not drain cleanly: {bad}")

    # Processes.

    def start(self, name, env=None, arguments=()):
        self.stale[name] = self.incarnations.get(name)
        command = [BINARY, self.roles[name], "--config", self.config_path, "--name", name, *arguments]
        log = open(os.path.join(self.directory, name + ".log"), "ab")
        self.processes[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                                env=dict(self.env, **(env or {})))
        log.close()

    def kill(self, name, how=signal.SIGKILL):
        self.processes[name].send_signal(how)
        if how == signal.SIGTERM:
            self.told.add(self.processes[name].pid)
        if how == signal.SIGKILL:
            self.processes[name].wait()

    def restart(self, name, env=None):
        """Ends it well and starts it again, perhaps with another environment."""
        self.kill(name, signal.SIGTERM)
        self.processes[name].wait(40)
        self.start(name, env)
        self.wait_ready()

    def stop(self):
        """Drains in the order `up` does. Exit codes by name; a process that had to be killed has None."""
        codes = {}
        for stage in (("router",), ("prefill", "decode"), ("expert",)):
            names = [name for name in self.processes if self.roles[name] in stage]
            for name in names:
                if self.processes[name].poll() is None and self.processes[name].pid not in self.told:
                    self.kill(name, signal.SIGTERM)
            for name in names:
                try:
                    codes[name] = self.processes[name].wait(timeout=40)
                except subprocess.TimeoutExpired:
                    self.processes[name].kill()
                    self.processes[name].wait()
                    codes[name] = None
        return codes

    def show_logs(self):
        for name in self.roles:
            path = os.path.join(self.directory, name + ".log")
            if os.path.exists(path):
                with open(path, errors="replace") as log:
                    lines = log.readlines()[-25:]
                print(f"--- {name} ({path})\n{''.join(lines)}", flush=True)

    def descriptors(self, name):
        return len(os.listdir(f"/proc/{self.processes[name].pid}/fd"))

    def threads(self, name):
        return len(os.listdir(f"/proc/{self.processes[name].pid}/task"))

    # HTTP.

    def get(self, path, port=None):
        connection = http.client.HTTPConnection("127.0.0.1", port or self.http_port, timeout=PATIENCE)
        try:
            connection.request("GET", path)
            reply = connection.getresponse()
            return reply.status, reply.read().decode()
        finally:
            connection.close()

    def post(self, path, body, headers=None, port=None):
        connection = http.client.HTTPConnection("127.0.0.1", port or self.http_port, timeout=PATIENCE * 3)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json", **(headers or {})})
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read())
        finally:
            connection.close()

    def stream(self, path, body):
        return Stream(self.http_port, path, body)

    # What the operator sees.

    def status(self):
        return json.loads(self.get("/", self.operator_port)[1])["cluster"]

    def ready(self):
        try:
            status = self.status()
        except (OSError, http.client.HTTPException, ValueError):
            return False
        workers = {worker["name"]: worker["incarnation"] for worker in status["workers"]
                   if worker["state"] == "ready" and worker["incarnation"] != self.stale.get(worker["name"])}
        self.incarnations.update(workers)
        return status["ready"] and len(workers) == len(self.roles) - 1

    def wait_ready(self):
        def check():
            for name, process in self.processes.items():
                if process.poll() is not None:
                    self.show_logs()
                    raise AssertionError(f"{name} ended with {process.returncode}")
            return self.ready()
        wait_until(check, "the whole cluster ready")

    def metric(self, name):
        total = 0.0
        for line in self.get("/metrics", self.operator_port)[1].splitlines():
            if line.startswith(name) and line[len(name):len(name) + 1] in (" ", "{"):
                total += float(line.rsplit(" ", 1)[1])
        return total

    def leftovers(self):
        """What is held for requests though none is running; empty when all is given back."""
        status = self.status()
        found = []
        for key in ("open_generations", "open_attempts"):
            if status[key]:
                found.append(f"{key} {status[key]}")
        for worker in status["workers"]:
            for key in ("assigned_requests", "assigned_pages", "assigned_prompt_tokens", "running", "queued",
                        "leased"):
                if worker[key]:
                    found.append(f"{worker['name']} {key} {worker[key]}")
            if worker["role"] in ("prefill", "decode"):
                for key in ("pages", "slots"):
                    if worker[key + "_free"] != worker[key + "_total"]:
                        found.append(f"{worker['name']} {key} {worker[key + '_free']} of {worker[key + '_total']}")
        return found

    def expect_nothing_left(self):
        wait_until(lambda: not self.leftovers(), "everything given back", 60)


class Stream:
    """A server-sent event stream that a test can leave at any point."""

    def __init__(self, port, path, body, key=None, **headers):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        if key:
            headers["Authorization"] = "Bearer " + key
        self.connection.request("POST", path, json.dumps(dict(body, stream=True)),
                                {"Content-Type": "application/json", **headers})
        self.reply = self.connection.getresponse()
        self.status = self.reply.status

    def error_code(self):
        """Of a request that was refused before it streamed."""
        return json.loads(self.reply.read())["error"]["code"]

    def events(self):
        """Parsed events; the last one is "[DONE]" if the stream ended well."""
        while True:
            line = self.reply.readline()
            if not line:
                return
            line = line.decode().strip()
            if not line.startswith("data:"):
                continue
            data = line[5:].strip()
            yield data if data == "[DONE]" else json.loads(data)

    def close(self):
        self.connection.close()
