# SPDX-License-Identifier: Apache-2.0
"""Locks of a cluster of real processes: who gets in, who does not, and what changes while it runs.

The table of internal methods is tried cell by cell in services/common/peer_security_test.cc; here processes hold it.
"""
import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
import unittest

from cluster import BINARY, PATIENCE, ROOT, Cluster, Stream, wait_until
from cluster_test import ClusterCase, completion


def make_certificates(directory, *options):
    subprocess.run([os.path.join(ROOT, "deploy/certificates.sh"), directory, *options], check=True)
    return {"certificate": os.path.join(directory, "{role}.pem"), "key": os.path.join(directory, "{role}.key"),
            "ca": os.path.join(directory, "ca.pem"), "reload_interval_ms": 1000}


class SecurityCase(ClusterCase):
    def setUp(self):
        self.directory = tempfile.mkdtemp(prefix="millrace-locks-")
        self.addCleanup(shutil.rmtree, self.directory)

    def listening(self, cluster, name):
        """(address, port) of every TCP socket that a process listens on."""
        lines = subprocess.run(["ss", "-Hltnp"], capture_output=True, check=True, text=True).stdout.splitlines()
        mine = [line.split()[3] for line in lines if f"pid={cluster.processes[name].pid}," in line]
        return [(entry.rsplit(":", 1)[0].replace("[::ffff:127.0.0.1]", "127.0.0.1"), int(entry.rsplit(":", 1)[1]))
                for entry in mine]


class Tls(SecurityCase):
    def tls_accepts(self, port, certificate=None, trust="ca.pem"):
        """Whether a TLS client of ours gets as far as a server's first HTTP/2 frame."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(os.path.join(self.directory, trust))
        context.set_alpn_protocols(["h2"])
        if certificate:
            context.load_cert_chain(certificate + ".pem", certificate + ".key")
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
                with context.wrap_socket(plain) as tls:
                    tls.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
                    return len(tls.recv(9)) == 9
        except (ssl.SSLError, ConnectionError):
            return False

    def plain_accepts(self, port):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
            plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
            try:
                first = plain.recv(9)
            except ConnectionError:
                return False
            return len(first) == 9 and first[3] == 4  # SETTINGS

    def grpc_port(self, cluster, name):
        with open(os.path.join(cluster.directory, name + ".log")) as log:
            return int(re.search(r"listening on 127\.0\.0\.1:(\d+)", log.read()).group(1))

    def test_the_same_bits_and_no_stranger(self):
        security = {"tls": make_certificates(self.directory)}
        strangers = os.path.join(self.directory, "strangers")
        make_certificates(strangers)
        with Cluster(experts=2, expert_transport="grpc", security=security) as cluster:
            for length in (1, 128, 300):
                self.assert_same_bits(cluster, completion(length))
            for name in ("prefill-0", "decode-0", "expert-0", "expert-1"):
                port = self.grpc_port(cluster, name)
                self.assertTrue(self.tls_accepts(port, os.path.join(self.directory, "router")), name)  # the control
                self.assertFalse(self.tls_accepts(port), name)
                self.assertFalse(self.tls_accepts(port, os.path.join(strangers, "router")), name)
                self.assertFalse(self.plain_accepts(port), name)
            cluster.expect_nothing_left()

    def test_certificates_change_under_running_streams(self):
        security = {"tls": make_certificates(self.directory)}
        with Cluster(experts=1, security=security) as cluster:
            stream = cluster.stream("/v1/completions", completion(300, max_tokens=600))
            events = stream.events()
            next(events)
            # A CA of its own, so that whoever held the old files could not connect any more.
            os.remove(os.path.join(self.directory, "ca.key"))
            make_certificates(self.directory)
            incarnation = cluster.incarnations["decode-0"]
            rest = list(events)
            self.assertEqual(rest[-1], "[DONE]")
            self.assertEqual(rest[-2]["choices"][0]["finish_reason"], "length")
            self.assertEqual(cluster.incarnations["decode-0"], incarnation)
            # A worker that starts now has only the new files; everybody else has read them again.
            wait_until(lambda: self.tls_accepts(self.grpc_port(cluster, "decode-0"),
                                                os.path.join(self.directory, "router")), "new files in use", 30)
            stream.close()
            cluster.restart("prefill-0")
            self.assert_same_bits(cluster, completion(128))

    def test_a_worker_with_another_roles_certificate_does_not_start(self):
        tls = make_certificates(self.directory)
        with Cluster(experts=1, security={"tls": tls}) as cluster:
            for kind in ("pem", "key"):
                shutil.copy(os.path.join(self.directory, "expert." + kind), os.path.join(self.directory, "decode." + kind))
            done = subprocess.run([BINARY, "decode", "--config", cluster.config_path], capture_output=True, text=True,
                                  timeout=PATIENCE)
            self.assertEqual(done.returncode, 78, done.stderr)
            self.assertIn("names spiffe://cluster.local/millrace/expert, allowed "
                          "spiffe://cluster.local/millrace/decode", done.stderr)

    def test_a_worker_of_another_ca_is_refused_and_says_so(self):
        strangers = os.path.join(self.directory, "strangers")
        with Cluster(experts=1, security={"tls": make_certificates(self.directory)}) as cluster:
            with open(cluster.config_path) as source:
                document = json.load(source)
            document["security"] = {"tls": make_certificates(strangers)}
            document["decode"][0]["worker"]["name"] = "intruder"
            path = os.path.join(self.directory, "intruder.json")
            with open(path, "w") as out:
                json.dump(document, out)
            with open(os.path.join(self.directory, "intruder.log"), "wb") as log:
                intruder = subprocess.Popen([BINARY, "decode", "--config", path], stdout=log, stderr=log)
            try:
                wait_until(lambda: "the stream to the router" in open(log.name).read(), "the refusal in its log")
                self.assertNotIn("intruder", [worker["name"] for worker in cluster.status()["workers"]])
            finally:
                intruder.send_signal(signal.SIGTERM)
                intruder.wait(40)

    def test_blocks_and_everything_else_stay_on_loopback(self):
        with Cluster(experts=1) as cluster:
            self.assert_same_bits(cluster, completion(128))
            for name in cluster.roles:
                sockets = self.listening(cluster, name)
                self.assertTrue(sockets, name)
                for address, port in sockets:
                    self.assertEqual(address, "127.0.0.1", f"{name} listens on {address}:{port}")

    def test_leaving_loopback_without_a_lock_is_refused(self):
        with Cluster(experts=0) as cluster:
            with open(cluster.config_path) as source:
                document = json.load(source)
            document["decode"][0]["worker"]["listen"] = "0.0.0.0:0"
            path = os.path.join(self.directory, "open.json")
            with open(path, "w") as out:
                json.dump(document, out)
            done = subprocess.run([BINARY, "decode", "--config", path], capture_output=True, text=True,
                                  timeout=PATIENCE)
            self.assertEqual(done.returncode, 78)
            self.assertIn('decode-0: worker.listen: found "0.0.0.0:0" without security.tls', done.stderr)


class Memory(SecurityCase):
    def owner_of_its_memory(self, *options):
        """Who may look into a router of an ordinary user: that user, or root alone."""
        user = 65534 if os.geteuid() == 0 else os.geteuid()
        with open(os.path.join(ROOT, "deploy/demo/cluster.json")) as source:
            document = json.load(source)
        document["model"]["path"] = os.path.join(ROOT, "deploy/demo/model")
        document["router"] = {f"{port}_listen": "127.0.0.1:0" for port in ("http", "operator", "grpc", "control")}
        path = os.path.join(self.directory, "cluster.json")
        with open(path, "w") as out:
            json.dump(document, out)
        os.chmod(self.directory, 0o755)
        log = os.path.join(self.directory, "router.log")
        with open(log, "wb") as out:
            router = subprocess.Popen([BINARY, "router", "--config", path, *options], stdout=out, stderr=out, user=user)
        try:
            wait_until(lambda: "router ready" in open(log).read() or router.poll() is not None, "the router")
            self.assertIsNone(router.poll(), open(log).read())
            return os.stat(f"/proc/{router.pid}/mem").st_uid, user, open(log).read()
        finally:
            router.kill()
            router.wait()

    def test_what_requests_say_is_in_no_core_dump_and_no_other_process_reads_it(self):
        # The kernel gives the files of a process that may not be dumped to root.
        owner, user, said = self.owner_of_its_memory()
        self.assertEqual(owner, 0)
        self.assertNotIn("core dump", said)
        owner, user, said = self.owner_of_its_memory("--core-dumps")
        self.assertEqual(owner, user)
        self.assertIn("core dump", said)


class Wire:
    """Hears the loopback interface while it is open: which marks went over which pair of TCP ports."""

    MARKS = {b"MRXT": "block header", b"MXRW": "expert header", b"MRSL": "seal", bytes(512): "zeros"}

    def __enter__(self):
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))  # IPv4
        self.socket.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
        self.socket.bind(("lo", 0))
        self.socket.settimeout(0.2)
        self.heard, self.over = {}, False
        self.thread = threading.Thread(target=self.hear)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over = True
        self.thread.join()
        self.socket.close()

    def hear(self):
        while not self.over:
            try:
                frame = self.socket.recv(1 << 17)
            except TimeoutError:
                continue
            ip = frame[14:]
            if len(ip) < 40 or ip[9] != socket.IPPROTO_TCP:
                continue
            tcp = ip[4 * (ip[0] & 15):]
            ports = int.from_bytes(tcp[:2], "big"), int.from_bytes(tcp[2:4], "big")
            for mark, name in self.MARKS.items():
                if mark in tcp:
                    self.heard.setdefault(ports, set()).add(name)

    def among(self, ports):
        return set().union(*(marks for pair, marks in self.heard.items() if ports & set(pair)))


class Sealed(SecurityCase):
    def ports(self, cluster):
        """Local TCP ports of the workers: machines that run tests have other clusters on the same interface."""
        lines = subprocess.run(["ss", "-Htanp"], capture_output=True, check=True, text=True).stdout.splitlines()
        pids = [f"pid={process.pid}," for name, process in cluster.processes.items() if name != "router"]
        return {int(line.split()[3].rsplit(":", 1)[1]) for line in lines if any(pid in line for pid in pids)}

    def heard(self, **options):
        with Cluster(experts=2, security={"tls": make_certificates(self.directory)}, **options) as cluster:
            with Wire() as wire:
                for length in (1, 128, 300):
                    self.assert_same_bits(cluster, completion(length))
                ports = self.ports(cluster)
            cluster.expect_nothing_left()
        return wire.among(ports)

    def test_the_same_bits_and_nothing_that_can_be_read(self):
        try:
            socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close()
        except PermissionError:
            self.skipTest("NOT TESTED: hearing the interface needs CAP_NET_RAW")
        # The control: what a listener on the wire finds when nothing is sealed.
        self.assertEqual(self.heard(), {"block header", "expert header", "zeros"})
        self.assertEqual(self.heard(transfer={"seal": True}), {"seal"})

    def test_a_worker_that_does_not_seal_is_not_paired(self):
        with Cluster(experts=0, transfer={"seal": True}) as cluster:
            with open(cluster.config_path) as source:
                document = json.load(source)
            document["transfer"] = {"seal": False}
            document["decode"][0]["worker"]["name"] = "plain"
            path = os.path.join(self.directory, "plain.json")
            with open(path, "w") as out:
                json.dump(document, out)
            with open(os.path.join(self.directory, "plain.log"), "wb") as log:
                plain = subprocess.Popen([BINARY, "decode", "--config", path, "--name", "plain"], stdout=log, stderr=log)
            try:
                workers = lambda: {worker["name"]: worker for worker in cluster.status()["workers"]}
                wait_until(lambda: workers().get("plain", {}).get("state") == "ready", "the plain worker")
                self.assertRegex(workers()["decode-0"]["compat_hash"], r"^w\d+-sealed-[0-9a-f]{16}$")
                self.assertNotIn("sealed", workers()["plain"]["compat_hash"])
                cluster.kill("decode-0")
                wait_until(lambda: workers().get("decode-0", {}).get("state") != "ready", "its death to be noticed")
                status, reply = cluster.post("/v1/completions", completion(3))
                self.assertEqual(status, 503, reply)
            finally:
                plain.send_signal(signal.SIGTERM)
                plain.wait(40)
            cluster.start("decode-0")  # one that seals again
            cluster.wait_ready()
            self.assertEqual(cluster.post("/v1/completions", completion(3))[0], 200)


def new_key(tenant):
    """A key and its digest, as `millrace key` gives them."""
    lines = subprocess.run([BINARY, "key", "--tenant", tenant], capture_output=True, check=True, text=True).stdout
    key, entry = lines.splitlines()
    entry = json.loads(entry)
    assert entry["name"] == tenant
    return key, entry["keys"][0]


class Keys(SecurityCase):
    def setUp(self):
        super().setUp()
        self.path = os.path.join(self.directory, "keys.json")
        self.keys = {name: new_key(name) for name in ("alpha", "beta", "ops")}

    def write(self, *tenants):
        with open(self.path + ".new", "w") as out:
            json.dump({"tenants": tenants}, out)
        os.rename(self.path + ".new", self.path)

    def tenant(self, name, **quota):
        return {"name": name, "keys": [self.keys[name][1]], **quota}

    def call(self, cluster, method, path, body=None, key=None, port=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", port or cluster.http_port, timeout=PATIENCE)
        if key:
            headers["Authorization"] = key if " " in key else f"Bearer {key}"
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            reply = connection.getresponse()
            return reply.status, dict(reply.getheaders()), reply.read().decode()
        finally:
            connection.close()

    def ask(self, cluster, name, **options):
        return self.call(cluster, "POST", "/v1/completions", completion(3, **options), self.keys[name][0])

    def test_keys_open_the_public_routes_and_nothing_else_does(self):
        self.write(self.tenant("alpha"), self.tenant("ops", may_operate=True))
        with Cluster(experts=0, security={"api_keys_file": self.path}) as cluster:
            said = set()
            alpha, ops = self.keys["alpha"][0], self.keys["ops"][0]
            for key in (None, "mr-" + "0" * 64, self.keys["beta"][0], alpha[:-1], alpha + "0", "Basic " + alpha, ops,
                        self.keys["alpha"][1], "Bearer eyJhbGciOiJub25lIn0.e30.", "Bearer " + "x" * 7000):
                for method, path, body in (("POST", "/v1/completions", completion(3)),
                                           ("POST", "/v1/chat/completions", {}), ("GET", "/v1/models", None),
                                           ("GET", "/v1/models/demo", None)):
                    status, headers, text = self.call(cluster, method, path, body, key)
                    self.assertEqual((status, headers.get("WWW-Authenticate")), (401, "Bearer"), (key, path))
                    error = json.loads(text)["error"]
                    self.assertEqual((error["code"], error["type"]), ("invalid_api_key", "authentication_error"))
                    self.assertTrue(error.pop("request_id"))
                    said.add(json.dumps(error))
            self.assertEqual(len(said), 1, said)
            self.assertEqual(self.ask(cluster, "alpha")[0], 200)
            self.assertEqual(self.call(cluster, "GET", "/v1/models", key=alpha)[0], 200)
            for path in ("/healthz", "/readyz"):
                self.assertEqual(self.call(cluster, "GET", path)[0], 200)
            for path in ("/metrics", "/", "/workers/decode-0/drain", "/v1/../v1/models"):
                self.assertEqual(self.call(cluster, "GET", path, key=alpha)[0], 404, path)
            # Verbs of the operator's port need an operator's key, what Prometheus reads needs none.
            drain = lambda key: self.call(cluster, "POST", "/workers/nobody/drain", {}, key, cluster.operator_port)[0]
            self.assertEqual((drain(None), drain(alpha), drain(ops)), (401, 401, 404))
            self.assertEqual(self.call(cluster, "GET", "/metrics", port=cluster.operator_port)[0], 200)

    def test_our_own_operator_commands_bring_a_key(self):
        self.write(self.tenant("alpha"), self.tenant("ops", may_operate=True))
        key_file = os.path.join(self.directory, "ops.key")
        with open(key_file, "w") as out:
            out.write(self.keys["ops"][0] + "\n")
        with Cluster(experts=0, security={"api_keys_file": self.path}) as cluster:
            def command(*arguments, key=None):
                environment = {name: value for name, value in os.environ.items() if name != "MILLRACE_OPERATOR_KEY"}
                return subprocess.run([BINARY, *arguments, "--operator", f"127.0.0.1:{cluster.operator_port}"],
                                      env=environment | ({"MILLRACE_OPERATOR_KEY": key} if key else {}),
                                      capture_output=True, text=True, timeout=PATIENCE)

            # What only looks needs none, and takes one.
            for arguments in (("top", "--count", "1"), ("explain",), ("top", "--count", "1", "--api-key-file", key_file)):
                done = command(*arguments)
                self.assertEqual(done.returncode, 0, done.stderr)
            for done in (command("drain", "decode-0"), command("drain", "decode-0", key=self.keys["alpha"][0])):
                self.assertEqual(done.returncode, 69)
                self.assertIn("--api-key-file FILE, or MILLRACE_OPERATOR_KEY", done.stderr)
                self.assertNotIn("mr-", done.stderr)
            self.assertEqual(command("drain", "nobody", key=self.keys["ops"][0]).returncode, 64)
            self.assertEqual(command("drain", "decode-0", key="two words").returncode, 78)
            done = command("drain", "decode-0", "--api-key-file", key_file)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertIn("decode-0 has left", done.stdout)
            self.assertEqual(cluster.processes["decode-0"].wait(PATIENCE), 0)
            cluster.start("decode-0")
            cluster.wait_ready()
            done = command("drain", "decode-0", "--no-wait", key=self.keys["ops"][0])
            self.assertEqual((done.returncode, done.stdout), (0, "decode-0 has been asked to drain\n"), done.stderr)

    def test_no_body_is_read_of_a_stranger(self):
        self.write(self.tenant("alpha"))
        with Cluster(experts=0, security={"api_keys_file": self.path}) as cluster:
            with socket.create_connection(("127.0.0.1", cluster.http_port), timeout=10) as stranger:
                stranger.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                                 b"Content-Length: 1000000\r\n\r\n{")
                reply = b""
                while piece := stranger.recv(4096):
                    reply += piece
            self.assertTrue(reply.startswith(b"HTTP/1.1 401 "), reply)
            self.assertIn(b"WWW-Authenticate: Bearer", reply)

    def test_a_new_key_file_is_taken_while_streams_run(self):
        self.write(self.tenant("alpha"))
        with Cluster(experts=0, security={"api_keys_file": self.path}) as cluster:
            stream = Stream(cluster.http_port, "/v1/completions", completion(3, max_tokens=400), self.keys["alpha"][0])
            events = stream.events()
            next(events)
            self.assertEqual(self.ask(cluster, "beta")[0], 401)
            self.write(self.tenant("beta"))
            wait_until(lambda: self.ask(cluster, "beta")[0] == 200, "the new key", 30)
            self.assertEqual(self.ask(cluster, "alpha")[0], 401)
            self.assertEqual(list(events)[-1], "[DONE]")
            stream.close()
            with open(self.path, "w") as out:
                out.write("{")
            wait_until(lambda: "the keys before it stay" in open(os.path.join(cluster.directory, "router.log")).read()
                       or self.ask(cluster, "beta")[0] != 200, "the broken file noticed", 30)
            self.assertEqual(self.ask(cluster, "beta")[0], 200)

    def test_quotas_are_a_tenants_own_and_say_when_to_come_back(self):
        self.write(self.tenant("alpha", requests_per_minute=2), self.tenant("beta", max_concurrent=1))
        with Cluster(experts=0, security={"api_keys_file": self.path}) as cluster:
            self.assertEqual([self.ask(cluster, "alpha")[0] for _ in range(2)], [200, 200])
            status, headers, text = self.ask(cluster, "alpha")
            self.assertEqual((status, json.loads(text)["error"]["code"]), (429, "rate_limit_exceeded"))
            self.assertTrue(1 <= int(headers["Retry-After"]) <= 30, headers)
            stream = Stream(cluster.http_port, "/v1/completions", completion(3, max_tokens=1500), self.keys["beta"][0])
            next(stream.events())
            status, headers, text = self.ask(cluster, "beta")
            self.assertEqual((status, headers["Retry-After"]), (429, "1"))
            self.assertIn("max_concurrent 1", text)
            stream.close()
            wait_until(lambda: self.ask(cluster, "beta")[0] == 200, "room after the hang-up", 30)
            self.write(self.tenant("beta", tokens_per_minute=60))
            wait_until(lambda: self.ask(cluster, "alpha")[0] == 401, "the new file", 30)
            self.assertEqual(self.ask(cluster, "beta", max_tokens=200)[0], 200)
            status, headers, text = self.ask(cluster, "beta")
            self.assertEqual(status, 429)
            self.assertIn("tokens_per_minute 60", text)
            self.assertGreater(int(headers["Retry-After"]), 60)
            cluster.expect_nothing_left()

    def test_request_ids_are_a_tenants_own(self):
        self.write(self.tenant("alpha"), self.tenant("beta"))
        with Cluster(experts=0, security={"api_keys_file": self.path}) as cluster:
            stream = Stream(cluster.http_port, "/v1/completions", completion(3, max_tokens=1500), self.keys["alpha"][0],
                            **{"x-request-id": "mine"})
            next(stream.events())
            ask = lambda name: self.call(cluster, "POST", "/v1/completions", completion(3), self.keys[name][0],
                                         **{"x-request-id": "mine"})[0]
            self.assertEqual((ask("alpha"), ask("beta")), (409, 200))
            stream.close()

    def test_a_wrong_key_file_stops_the_start(self):
        with Cluster(experts=0) as cluster:
            with open(cluster.config_path) as source:
                document = json.load(source)
            document["security"] = {"api_keys_file": self.path}
            path = os.path.join(self.directory, "cluster.json")
            with open(path, "w") as out:
                json.dump(document, out)
            for text, reason in ((None, "cannot be read"), ('{"tenants":[{"name":"a","keys":["mr-plain"]}]}', "keys[0]")):
                if text:
                    with open(self.path, "w") as out:
                        out.write(text)
                done = subprocess.run([BINARY, "router", "--config", path], capture_output=True, text=True,
                                      timeout=PATIENCE)
                self.assertEqual(done.returncode, 78, done.stderr)
                self.assertIn("security.api_keys_file", done.stderr)
                self.assertIn(reason, done.stderr)
                self.assertNotIn("mr-plain", done.stderr)


class PublicTls(SecurityCase):
    def setUp(self):
        super().setUp()
        make_certificates(self.directory)
        self.security = {"public_tls": {kind: os.path.join(self.directory, "public." + end)
                                        for kind, end in (("certificate", "pem"), ("key", "key"))}}

    def context(self, ca="ca.pem", version=None):
        context = ssl.create_default_context(cafile=os.path.join(self.directory, ca))
        if version:
            context.maximum_version = version
        return context

    def connect(self, cluster, **options):
        return http.client.HTTPSConnection("127.0.0.1", cluster.http_port, timeout=PATIENCE,
                                           context=self.context(**options))

    def post(self, connection, body):
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())

    def serial(self, cluster):
        with socket.create_connection(("127.0.0.1", cluster.http_port), timeout=10) as plain:
            with self.context().wrap_socket(plain, server_hostname="localhost") as tls:
                return tls.getpeercert()["serialNumber"], tls.version()

    def test_requests_streams_and_keep_alive_over_tls(self):
        with Cluster(experts=0, security=self.security) as cluster:
            connection = self.connect(cluster)
            request = completion(128)
            for _ in range(2):  # the second on the same connection
                status, reply = self.post(connection, request)
                self.assertEqual(status, 200, reply)
            connection.request("POST", "/v1/completions", json.dumps(dict(request, stream=True, max_tokens=50)),
                               {"Content-Type": "application/json"})
            lines = connection.getresponse().read().decode().strip().split("\n\n")
            self.assertEqual(lines[-1], "data: [DONE]")
            self.assertGreater(len(lines), 20)
            connection.close()
            long = self.connect(cluster)  # a prompt larger than any buffer of TLS
            status, reply = self.post(long, {"model": "demo", "prompt": "x " * 400_000, "max_tokens": 1})
            self.assertEqual((status, reply["error"]["code"]), (400, "context_length_exceeded"))
            long.close()
            self.assertEqual(self.serial(cluster)[1], "TLSv1.3")
            old = self.connect(cluster, version=ssl.TLSVersion.TLSv1_2)
            self.assertEqual(self.post(old, request)[0], 200)
            old.close()
            with self.assertRaises(ssl.SSLError):
                self.post(self.connect(cluster, version=ssl.TLSVersion.TLSv1_1), request)
            with self.assertRaises((ConnectionError, http.client.HTTPException)):
                cluster.get("/healthz")  # plain HTTP
            # A client that hangs up is noticed as on a plain connection.
            gone = self.connect(cluster)
            gone.request("POST", "/v1/completions", json.dumps(dict(request, stream=True, max_tokens=1500)),
                         {"Content-Type": "application/json"})
            gone.getresponse().readline()
            gone.close()
            cluster.expect_nothing_left()

    def test_a_new_certificate_serves_new_connections(self):
        with Cluster(experts=0, security=self.security) as cluster:
            before = self.serial(cluster)[0]
            connection = self.connect(cluster)
            connection.request("POST", "/v1/completions", json.dumps(completion(3, stream=True, max_tokens=600)),
                               {"Content-Type": "application/json"})
            reply = connection.getresponse()
            reply.readline()
            make_certificates(self.directory)
            wait_until(lambda: self.serial(cluster)[0] != before, "the new certificate", 30)
            self.assertTrue(reply.read().decode().strip().endswith("data: [DONE]"))
            connection.close()

    def test_a_handshake_that_stalls_is_ended(self):
        with Cluster(experts=0, security=self.security,
                     router_section={"limits": {"header_timeout_ms": 1000}}) as cluster:
            with socket.create_connection(("127.0.0.1", cluster.http_port), timeout=30) as silent:
                self.assertEqual(silent.recv(1), b"")

    def test_our_own_client_speaks_it(self):
        other = os.path.join(self.directory, "other")
        make_certificates(other)
        key, digest = new_key("alpha")
        keys, key_file = os.path.join(self.directory, "keys.json"), os.path.join(self.directory, "key")
        with open(keys, "w") as out:
            json.dump({"tenants": [{"name": "alpha", "keys": [digest]}]}, out)
        with open(key_file, "w") as out:
            out.write(key + "\n")
        with Cluster(experts=0, security=dict(self.security, api_keys_file=keys)) as cluster:
            def chat(*options):
                environment = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
                return subprocess.run([BINARY, "chat", "--address", f"127.0.0.1:{cluster.http_port}", "--quiet",
                                       "--message", "Spell the word river.", "--temperature", "0", *options],
                                      capture_output=True, text=True, timeout=PATIENCE, env=environment)
            done = chat("--ca", os.path.join(self.directory, "ca.pem"), "--api-key-file", key_file)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertIn("R-I-V-E-R", done.stdout)
            done = chat("--ca", os.path.join(self.directory, "ca.pem"))
            self.assertEqual(done.returncode, 69)
            self.assertIn("invalid_api_key", done.stderr)
            done = chat("--ca", os.path.join(other, "ca.pem"), "--api-key-file", key_file)
            self.assertEqual(done.returncode, 69)
            self.assertIn("its certificate is not believed", done.stderr)


if __name__ == "__main__":
    unittest.main(verbosity=2)
