# SPDX-License-Identifier: Apache-2.0
"""The chart in a real control plane: admitted, installed, tested, scaled, upgraded, rolled back, uninstalled, by Helm.

The namespace enforces the "restricted" Pod Security Standard. Containers do not run here; that what they would run
works is process_test.py. Needs `tools.sh kubernetes`, which tests/run.sh asks for.
"""
import glob
import os
import subprocess
import threading
import time
import unittest
import urllib.error

import yaml

import control_plane
from chart import CHART, HELM, ROLES, TOOLS, main, values_files

NAMESPACE = "serving"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
CLAIMS = f"/api/v1/namespaces/{NAMESPACE}/persistentvolumeclaims"
TEST_POD = f"{PODS}/millrace-test-completion"


class Lifecycle(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.plane = control_plane.ControlPlane()
        cls.addClassCleanup(cls.plane.stop)
        cls.plane.start()
        cls.plane.post("/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {
            "name": NAMESPACE, "labels": {"pod-security.kubernetes.io/enforce": "restricted",
                                          "pod-security.kubernetes.io/enforce-version": "v1.34"}}})
        for path in glob.glob(os.path.join(TOOLS, "crds/*.yaml")):
            with open(path) as source:
                cls.plane.post("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", yaml.safe_load(source))

    def helm(self, *arguments, check=True):
        environment = {"PATH": os.environ["PATH"], "HOME": self.plane.directory, "KUBECONFIG": self.plane.kubeconfig}
        done = subprocess.run([HELM, "--namespace", NAMESPACE, *arguments], capture_output=True, text=True, timeout=300,
                              env=environment)
        if check and done.returncode != 0:
            self.fail(f"helm {' '.join(arguments)}: {done.stderr}{self.pod_states()}")
        return done

    def pod_states(self):
        return "".join(f"\n{pod['metadata']['name']}: {pod['status'].get('phase')} "
                       f"{[c['message'] for c in pod['status'].get('conditions', []) if c.get('message')]}"
                       for pod in self.plane.list(PODS))

    def tearDown(self):
        self.remove()

    def remove(self):
        """Uninstalls, and deletes the claim that stays on purpose: another one could not take its name."""
        self.helm("uninstall", "millrace", "--ignore-not-found", "--wait")
        self.plane.request("DELETE", CLAIMS)
        self.plane.wait("no claim", lambda: not self.plane.list(CLAIMS))

    def install(self, *arguments):
        return self.helm("install", "millrace", CHART, "--values", values_files()["cpu-demo"], "--wait", "--timeout",
                         "120s", *arguments).stdout

    def identities(self, role=None):
        """Pod name -> uid: a pod that was replaced has another one."""
        return {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in self.plane.list(PODS)
                if role is None or pod["metadata"]["labels"]["app.kubernetes.io/component"] == role}

    def settled(self, role, count):
        def check():
            pods = [pod for pod in self.plane.list(PODS)
                    if pod["metadata"]["labels"]["app.kubernetes.io/component"] == role]
            return len(pods) == count and all(pod["status"].get("phase") == "Running"
                                              and "deletionTimestamp" not in pod["metadata"] for pod in pods)
        self.plane.wait(f"{count} {role} pods run", check)

    def test_installs_under_the_restricted_standard_and_says_how_to_ask(self):
        notes = self.install()
        for words in ("helm -n serving test millrace", "/v1/chat/completions", "encrypted or authenticated"):
            self.assertIn(words, notes)
        for role, count in (("router", 1), ("prefill", 1), ("decode", 1), ("expert", 2)):
            self.settled(role, count)
        budgets = self.plane.list(f"/apis/policy/v1/namespaces/{NAMESPACE}/poddisruptionbudgets")
        self.assertEqual(len(budgets), len(ROLES))

    def test_a_pod_that_asks_for_root_is_not_admitted(self):
        # The namespace enforces what the test above relies on.
        done = self.helm("install", "millrace", CHART, "--set", "allowInsecure=true,tls.enabled=false,unsafe.runAsRoot=true",
                         "--set-json", 'decode.podSecurityContext={"runAsUser":0,"runAsNonRoot":false}',
                         "--wait", "--timeout", "15s", check=False)
        self.assertNotEqual(done.returncode, 0)
        events = self.plane.list(f"/api/v1/namespaces/{NAMESPACE}/events")
        self.assertTrue(any("violates PodSecurity" in event.get("message", "") for event in events))

    def test_the_control_service_has_endpoints_before_the_router_is_ready(self):
        self.install()
        router = next(iter(self.identities("router")))
        self.plane.patch(f"{PODS}/{router}/status", {"status": {"conditions": [
            {"type": "Ready", "status": "False", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}})

        def slices(service):
            return self.plane.list(f"/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices?"
                                   f"labelSelector=kubernetes.io/service-name%3D{service}")

        def ready(service):
            return [endpoint["conditions"]["ready"] for part in slices(service) for endpoint in part["endpoints"]]
        self.plane.wait("the public Service forgets the router", lambda: ready("millrace") == [False])
        self.assertEqual(ready("millrace-control"), [True])

    def test_helm_test_reports_what_the_pod_did(self):
        self.install()
        for phase, succeeds in (("Succeeded", True), ("Failed", False)):
            with self.subTest(phase):
                # Containers do not run here: somebody has to say how the test's pod ended.
                actor = threading.Thread(target=self.end_test_pod, args=(phase,))
                actor.start()
                done = self.helm("test", "millrace", "--timeout", "60s", check=False)
                actor.join()
                self.assertEqual(done.returncode == 0, succeeds, done.stdout + done.stderr)
        spec = self.plane.get(TEST_POD)["spec"]
        self.assertEqual(spec["containers"][0]["args"][:3],
                         ["chat", "--address", "millrace.serving.svc.cluster.local:8080"])

    def end_test_pod(self, phase):
        ended = set()
        end = time.monotonic() + 60
        while time.monotonic() < end and not ended:
            pod = self.plane.get(TEST_POD)
            if pod and pod["status"].get("phase") == "Running" and "deletionTimestamp" not in pod["metadata"]:
                self.plane.patch(TEST_POD + "/status", {"status": {"phase": phase}})
                ended.add(pod["metadata"]["uid"])
            time.sleep(0.1)

    def test_scaling_restarts_nobody_and_rolling_back_undoes_it(self):
        self.install()
        before = self.identities()
        self.helm("upgrade", "millrace", CHART, "--reuse-values", "--set", "decode.replicas=3", "--wait")
        self.settled("decode", 3)
        self.assertEqual({name: uid for name, uid in self.identities().items() if name in before}, before)
        self.helm("rollback", "millrace", "1", "--wait")
        self.settled("decode", 1)
        self.assertEqual(self.identities(), before)

    def test_a_changed_setting_replaces_the_pods_that_read_it(self):
        self.install()
        before = {role: self.identities(role) for role in ROLES}
        self.helm("upgrade", "millrace", CHART, "--reuse-values", "--set", "decode.config.max_batch=8", "--wait")
        self.plane.wait("another decode pod", lambda: self.identities("decode").keys() == before["decode"].keys()
                        and self.identities("decode") != before["decode"])
        for role in ("router", "prefill", "expert"):
            self.assertEqual(self.identities(role), before[role], role)
        document = self.plane.get(f"/api/v1/namespaces/{NAMESPACE}/configmaps/millrace")["data"]["cluster.json"]
        self.assertIn('"max_batch": 8', document)

    def test_a_refused_upgrade_changes_nothing(self):
        self.install()
        before = self.identities()
        done = self.helm("upgrade", "millrace", CHART, "--reuse-values", "--set", "decode.replicas=0", check=False)
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("decode needs at least 1", done.stderr)
        self.assertEqual(self.identities(), before)
        self.assertIn("deployed", self.helm("status", "millrace").stdout)

    def test_a_budget_stops_the_second_eviction_of_a_role(self):
        self.install()
        first, second = sorted(self.identities("expert"))

        def evict(name):
            self.plane.post(f"{PODS}/{name}/eviction", {"apiVersion": "policy/v1", "kind": "Eviction",
                                                        "metadata": {"name": name, "namespace": NAMESPACE}})

        def disruptions():
            path = f"/apis/policy/v1/namespaces/{NAMESPACE}/poddisruptionbudgets/millrace-expert"
            return self.plane.get(path)["status"].get("disruptionsAllowed")
        self.plane.wait("the budget counts its pods", lambda: disruptions() == 1)
        # Nobody may be placed again, so that the first pod stays away.
        for node in self.plane.list("/api/v1/nodes"):
            self.plane.patch(f"/api/v1/nodes/{node['metadata']['name']}", {"spec": {"unschedulable": True}})
        try:
            evict(first)
            with self.assertRaises(urllib.error.HTTPError) as refused:
                evict(second)
            self.assertEqual(refused.exception.code, 429)
        finally:
            for node in self.plane.list("/api/v1/nodes"):
                self.plane.patch(f"/api/v1/nodes/{node['metadata']['name']}", {"spec": {"unschedulable": None}})

    def test_every_option_is_admitted(self):
        for name in ("everything", "single-node-8gpu", "rdma-multinode"):
            with self.subTest(name):
                self.helm("install", "millrace", CHART, "--values", values_files()[name])
                self.remove()

    def test_uninstalling_leaves_the_claim_with_the_model_and_nothing_else(self):
        self.helm("install", "millrace", CHART, "--values", values_files()["everything"])
        self.helm("uninstall", "millrace", "--wait")
        self.assertEqual([claim["metadata"]["name"] for claim in self.plane.list(CLAIMS)], ["millrace-models"])
        selector = "labelSelector=app.kubernetes.io/managed-by%3DHelm"
        for path in ("/api/v1/namespaces/serving/services", "/api/v1/namespaces/serving/configmaps",
                     "/api/v1/namespaces/serving/serviceaccounts", "/apis/apps/v1/namespaces/serving/statefulsets",
                     "/apis/apps/v1/namespaces/serving/deployments", "/apis/batch/v1/namespaces/serving/jobs",
                     "/apis/networking.k8s.io/v1/namespaces/serving/networkpolicies",
                     "/apis/policy/v1/namespaces/serving/poddisruptionbudgets"):
            self.assertEqual([item["metadata"]["name"] for item in self.plane.list(f"{path}?{selector}")], [], path)


if __name__ == "__main__":
    main(control_plane.missing())
