# SPDX-License-Identifier: Apache-2.0
"""A real Kubernetes control plane on loopback: etcd, API server, controller manager and scheduler, with kwok as nodes.

Objects are admitted, controllers act and pods are placed as in a cluster; containers do not run, kwok says they do. The
binaries are built by tools.sh. Everything lives in one temporary folder and ends with stop().
"""
import json
import os
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

from chart import TOOLS

TOKEN = "for-this-test-only"
NODES = 4


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def missing():
    """Programs that are not built; empty if none."""
    programs = ("helm", "etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kwok")
    return ", ".join(name for name in programs if not os.path.exists(os.path.join(TOOLS, "bin", name)))


class ControlPlane:
    def __init__(self):
        self.directory = tempfile.mkdtemp(prefix="millrace-kubernetes-")
        self.processes = []
        self.port = free_port()
        self.context = ssl.create_default_context()
        self.context.check_hostname = False
        self.context.verify_mode = ssl.CERT_NONE
        self.kubeconfig = self.path("kubeconfig")
        with open(self.kubeconfig, "w") as out:
            json.dump({"apiVersion": "v1", "kind": "Config", "current-context": "test",
                       "clusters": [{"name": "test", "cluster": {"server": f"https://127.0.0.1:{self.port}",
                                                                 "insecure-skip-tls-verify": True}}],
                       "users": [{"name": "test", "user": {"token": TOKEN}}],
                       "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}]}, out)
        os.chmod(self.kubeconfig, 0o600)

    def path(self, name):
        return os.path.join(self.directory, name)

    def start(self):
        etcd, peer, kubelet = free_port(), free_port(), free_port()
        subprocess.run(["openssl", "genrsa", "-out", self.path("sa.key"), "2048"], check=True, capture_output=True)
        with open(self.path("tokens.csv"), "w") as out:
            out.write(f"{TOKEN},test,test,system:masters\n")
        self.run("etcd", "--data-dir", self.path("etcd"), "--listen-client-urls", f"http://127.0.0.1:{etcd}",
                 "--advertise-client-urls", f"http://127.0.0.1:{etcd}", "--listen-peer-urls",
                 f"http://127.0.0.1:{peer}", "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}",
                 "--initial-cluster", f"default=http://127.0.0.1:{peer}", "--unsafe-no-fsync")
        self.run("kube-apiserver", "--etcd-servers", f"http://127.0.0.1:{etcd}", "--bind-address", "127.0.0.1",
                 "--secure-port", str(self.port), "--cert-dir", self.path("certificates"),
                 "--service-cluster-ip-range", "10.96.0.0/16", "--token-auth-file", self.path("tokens.csv"),
                 "--service-account-key-file", self.path("sa.key"), "--service-account-signing-key-file",
                 self.path("sa.key"), "--service-account-issuer", "https://kubernetes.default.svc",
                 "--authorization-mode", "Node,RBAC")
        self.wait("the API server", lambda: self.get("/readyz") is not None)
        self.run("kube-controller-manager", "--kubeconfig", self.kubeconfig, "--service-account-private-key-file",
                 self.path("sa.key"), "--leader-elect=false", "--bind-address", "127.0.0.1", "--secure-port",
                 str(free_port()), "--cert-dir", self.path("certificates"))
        self.run("kube-scheduler", "--kubeconfig", self.kubeconfig, "--leader-elect=false", "--bind-address",
                 "127.0.0.1", "--secure-port", str(free_port()), "--cert-dir", self.path("certificates"))
        self.run("kwok", "--kubeconfig", self.kubeconfig, "--config", os.path.join(TOOLS, "kwok.yaml"),
                 "--manage-all-nodes=true", "--server-address", f"127.0.0.1:{kubelet}")
        capacity = {"cpu": "64", "memory": "256Gi", "pods": "110", "ephemeral-storage": "100Gi"}
        for index in range(NODES):
            name = f"node-{index}"
            self.post("/api/v1/nodes", {
                "apiVersion": "v1", "kind": "Node",
                "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
                "status": {"capacity": capacity, "allocatable": capacity}})
        self.wait("service accounts", lambda: self.get("/api/v1/namespaces/default/serviceaccounts/default"))
        return self

    def run(self, program, *arguments):
        log = open(self.path(program + ".log"), "wb")
        self.processes.append((program, subprocess.Popen(
            [os.path.join(TOOLS, "bin", program), *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log)))
        log.close()

    def stop(self):
        for _, process in reversed(self.processes):
            process.terminate()
        for _, process in reversed(self.processes):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def wait(self, what, condition, seconds=120):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for program, process in self.processes:
                if process.poll() is not None:
                    with open(self.path(program + ".log"), errors="replace") as log:
                        raise AssertionError(f"{program} ended: {''.join(log.readlines()[-10:])}")
            found = condition()
            if found:
                return found
            time.sleep(0.2)
        raise AssertionError(f"not within {seconds} s: {what}")

    # The API.

    def request(self, method, path, body=None, content_type="application/json"):
        request = urllib.request.Request(f"https://127.0.0.1:{self.port}{path}", method=method,
                                         data=None if body is None else json.dumps(body).encode(),
                                         headers={"Authorization": f"Bearer {TOKEN}", "Content-Type": content_type})
        with urllib.request.urlopen(request, context=self.context, timeout=30) as reply:
            text = reply.read()
        return json.loads(text) if text.startswith(b"{") else text

    def get(self, path):
        """The object, or None while there is none or no server."""
        try:
            return self.request("GET", path)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return None

    def post(self, path, body):
        return self.request("POST", path, body)

    def patch(self, path, body):
        return self.request("PATCH", path, body, "application/merge-patch+json")

    def list(self, path):
        return self.request("GET", path)["items"]
