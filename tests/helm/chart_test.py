# SPDX-License-Identifier: Apache-2.0
"""What the chart renders, without a cluster: goldens, schemas, who may call whom, what every pod must be.

    chart_test.py [SUITE] [--update]     --update writes the goldens instead of comparing

What is refused is refusals_test.py; that the rendered command lines run is process_test.py.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
import unittest

import yaml

from chart import CHART, ROLES, ROOT, TOOLS, Rendered, helm, main, template, values_files

BINARY = os.environ.get("MILLRACE", os.path.join(ROOT, "build/release/bin/millrace"))
GOLDENS = os.path.join(ROOT, "tests/helm/goldens")
UPDATE = "--update" in sys.argv


def kubeconform(text):
    return subprocess.run(
        [os.path.join(TOOLS, "bin/kubeconform"), "-strict", "-summary", "-schema-location",
         os.path.join(TOOLS, "schemas/{{.ResourceKind}}{{.KindSuffix}}.json")],
        input=text, capture_output=True, text=True, timeout=120)


class Render(unittest.TestCase):
    """Every values file renders to what was reviewed, and every object is one the API knows."""

    def test_lint_finds_nothing(self):
        for name, path in values_files().items():
            with self.subTest(name):
                self.assertIn("0 chart(s) failed", helm("lint", CHART, "--values", path).stdout)

    def test_objects_equal_the_goldens(self):
        for name, path in values_files().items():
            with self.subTest(name):
                # What monitoring.yaml takes from files as it is would only repeat them here.
                text = "---\n".join(part for part in template(files=[path]).stdout.split("---\n")
                                    if "grafana_dashboard" not in part and "kind: PrometheusRule" not in part)
                golden = os.path.join(GOLDENS, name + ".yaml")
                if UPDATE:
                    with open(golden, "w") as out:
                        out.write(text)
                with open(golden) as source:
                    self.assertEqual(text.splitlines(), source.read().splitlines(),
                                     "review the difference, then chart_test.py --update")

    def test_no_golden_without_values(self):
        self.assertEqual(sorted(os.listdir(GOLDENS)), sorted(name + ".yaml" for name in values_files()))

    def test_every_object_fits_its_schema(self):
        for name, path in values_files().items():
            with self.subTest(name):
                done = kubeconform(template(files=[path]).stdout)
                self.assertEqual(done.returncode, 0, done.stdout)
                self.assertIn("Invalid: 0, Errors: 0, Skipped: 0", done.stdout)

    def test_dashboards_and_rules_are_the_files(self):
        rendered = Rendered(files=[values_files()["everything"]])
        shown = {name: text for item in rendered.of("ConfigMap") for name, text in item["data"].items()
                 if name.startswith("millrace-")}
        names = sorted(os.listdir(os.path.join(CHART, "files/dashboards")))
        self.assertEqual(sorted(shown), ["millrace-" + name for name in names])
        for name in names:
            with open(os.path.join(CHART, "files/dashboards", name)) as source:
                self.assertEqual(json.loads(shown["millrace-" + name]), json.load(source))
        groups = {group["name"]: group for group in rendered.of("PrometheusRule")[0]["spec"]["groups"]}
        for name in ("recording.yml", "alerts.yml"):
            with open(os.path.join(CHART, "files/rules", name)) as source:
                text = source.read().replace("docs/operations.md#", "https://runbooks.example/docs/operations.md#")
            for group in yaml.safe_load(text)["groups"]:
                self.assertEqual(groups.pop(group["name"]), group)
        self.assertEqual(groups, {})

    def test_the_schemas_notice_a_key_that_does_not_exist(self):
        text = template(files=[values_files()["everything"]]).stdout
        for key in ("terminationGracePeriodSeconds:", "publishNotReadyAddresses:", "podMetricsEndpoints:",
                    "endpointPickerRef:", "scaleTargetRef:"):
            with self.subTest(key):
                self.assertIn(key, text)
                self.assertNotEqual(kubeconform(text.replace(key, "x" + key, 1)).returncode, 0)

    def test_names_fit_whatever_the_release_is_called(self):
        for release in ("a", "millrace-prod", "x" * 53):
            with self.subTest(release):
                done = helm("template", release, CHART, "--values", values_files()["everything"])
                names = [line.split(":", 1)[1].strip() for line in done.stdout.splitlines()
                         if line.startswith("  name:")]
                self.assertTrue(names)
                for name in names:
                    self.assertLessEqual(len(name), 63, name)


class Document(unittest.TestCase):
    """The ConfigMap holds what the binary accepts, and pods find themselves in it."""

    def ask_binary(self, document, role="prefill", name="nobody"):
        with tempfile.NamedTemporaryFile("w", suffix=".json") as out:
            json.dump(document, out)
            out.flush()
            return subprocess.run([BINARY, role, "--config", out.name, "--name", name], capture_output=True, text=True,
                                  timeout=60)

    def test_the_binary_reads_every_document(self):
        for values, path in values_files().items():
            rendered = Rendered(files=[path])
            for role in ROLES[1:]:
                with self.subTest(f"{values} {role}"):
                    # A name that is not there: past every check of the document, and short of starting.
                    done = self.ask_binary(rendered.document(), role)
                    names = [entry["worker"]["name"] for entry in rendered.document()[role]]
                    self.assertEqual(done.returncode, 78)
                    self.assertIn("the configuration has: " + ", ".join(names), done.stderr)

    def test_the_schema_has_the_keys_of_the_proto(self):
        with open(os.path.join(ROOT, "proto/millrace/v1/config.proto")) as source:
            messages = {name: set(re.findall(r"(\w+) = \d+;", body)) for name, body in re.findall(
                r"message (\w+) \{(.*?)\n\}", source.read(), re.S)}
        with open(os.path.join(CHART, "values.schema.json")) as source:
            schema = json.load(source)
        properties = schema["properties"]
        # Addresses and names are the chart's to write.
        written = {"control_listen", "control_address", "http_listen", "operator_listen", "grpc_listen", "name",
                   "listen", "advertise"}
        sections = {"RouterSection": properties["router"], "PrefillSection": properties["prefill"],
                    "DecodeSection": properties["decode"], "ExpertSection": properties["expert"]}
        allowed = {name: role["properties"]["config"]["properties"] for name, role in sections.items()}
        allowed.update(ModelSection=properties["model"]["properties"],
                       TransferSection=properties["transfer"]["properties"],
                       TimerSection=properties["timers"]["properties"],
                       MetricsSection=properties["metrics"]["properties"],
                       TracingSection=properties["tracing"]["properties"],
                       WorkerSection=schema["definitions"]["worker"]["properties"])
        for message, keys in allowed.items():
            with self.subTest(message):
                self.assertEqual(set(keys), messages[message] - written)

    def test_the_binary_would_have_refused_a_wrong_one(self):
        document = Rendered().document()
        document["decode"][0]["cache_page"] = 3
        done = self.ask_binary(document)
        self.assertEqual(done.returncode, 78)
        self.assertIn("cache_page", done.stderr)

    def test_each_pod_has_an_entry_of_its_name(self):
        for values, path in values_files().items():
            rendered = Rendered(files=[path])
            for role in ROLES[1:]:
                with self.subTest(f"{values} {role}"):
                    workload = rendered.workload(role)
                    names = [entry["worker"]["name"] for entry in rendered.document()[role]]
                    base, spec = workload["metadata"]["name"], workload["spec"]
                    if workload["kind"] == "LeaderWorkerSet":
                        size = spec["leaderWorkerTemplate"]["size"]
                        pods = [f"{base}-{group}" + (f"-{member}" if member else "")
                                for group in range(spec["replicas"]) for member in range(size)]
                    else:
                        pods = [f"{base}-{ordinal}" for ordinal in range(spec.get("replicas", len(names)))]
                    self.assertEqual(names, pods)

    def test_an_autoscaled_role_is_named_up_to_its_maximum(self):
        document = Rendered(files=[values_files()["everything"]]).document()
        self.assertEqual(len(document["prefill"]), 3)
        self.assertEqual(len(document["decode"]), 2)

    def test_advertised_names_are_those_of_the_headless_service(self):
        for values, path in values_files().items():
            rendered = Rendered(files=[path])
            for role in ROLES[1:]:
                with self.subTest(f"{values} {role}"):
                    workload = rendered.workload(role)
                    service = workload["spec"].get("serviceName", workload["metadata"]["name"])
                    for entry in rendered.document()[role]:
                        worker = entry["worker"]
                        self.assertEqual(worker["advertise"].split(":")[0],
                                         f"{worker['name']}.{service}.serving.svc.cluster.local")

    def test_groups_of_experts_hold_every_expert_once_each(self):
        document = Rendered(files=[values_files()["rdma-multinode"]]).document()
        for group in (document["expert"][:8], document["expert"][8:]):
            held = []
            for entry in group:
                first, last = entry["experts"].split("-")
                held += range(int(first), int(last) + 1)
            self.assertEqual(held, list(range(256)))


class Rollout(unittest.TestCase):
    """A change restarts the pods that read it and no others."""

    def checksums(self, values):
        rendered = Rendered(values)
        return {role: rendered.pod_template(role)["metadata"]["annotations"]["checksum/config"] for role in ROLES}

    def changed(self, values):
        before, after = self.checksums({}), self.checksums(values)
        return {role for role in ROLES if before[role] != after[role]}

    def test_scaling_restarts_nobody(self):
        self.assertEqual(self.changed({"decode": {"replicas": 5}, "prefill": {"replicas": 3}}), set())

    def test_another_number_of_experts_restarts_the_pool(self):
        self.assertEqual(self.changed({"expert": {"replicas": 4}}), {"expert"})

    def test_a_setting_of_one_role_restarts_that_role(self):
        self.assertEqual(self.changed({"decode": {"config": {"max_batch": 8}}}), {"decode"})
        self.assertEqual(self.changed({"router": {"config": {"max_requests": 8}}}), {"router"})

    def test_what_all_read_restarts_all(self):
        self.assertEqual(self.changed({"timers": {"heartbeat_ms": 400}}), set(ROLES))

    def test_selectors_never_have_a_version(self):
        rendered = Rendered(files=[values_files()["everything"]])
        for item in rendered.objects:
            for selector in (item.get("spec", {}).get("selector"), item.get("spec", {}).get("podSelector")):
                self.assertNotIn("version", json.dumps(selector))
        for role in ROLES:
            self.assertNotIn("version", json.dumps(rendered.pod_template(role)["metadata"]["labels"]))


class Pods(unittest.TestCase):
    """What holds of every pod, whatever the values."""

    def each(self):
        for values, path in values_files().items():
            for name, spec in Rendered(files=[path]).pod_specs():
                yield values, name, spec

    def test_restricted_but_for_rdma(self):
        for values, name, spec in self.each():
            with self.subTest(f"{values} {name}"):
                self.assertTrue(spec["securityContext"]["runAsNonRoot"])
                self.assertGreater(spec["securityContext"]["runAsUser"], 0)
                self.assertEqual(spec["securityContext"]["seccompProfile"]["type"], "RuntimeDefault")
                self.assertFalse(spec["automountServiceAccountToken"])
                self.assertFalse(spec.get("hostNetwork", False))
                for container in spec["containers"] + spec.get("initContainers", []):
                    context = container["securityContext"]
                    self.assertFalse(context["allowPrivilegeEscalation"])
                    self.assertTrue(context["readOnlyRootFilesystem"])
                    self.assertEqual(context["capabilities"]["drop"], ["ALL"])
                    registers_memory = values == "rdma-multinode" and container["name"] in ROLES[1:]
                    self.assertEqual(context["capabilities"].get("add", []), ["IPC_LOCK"] if registers_memory else [])

    def test_memory_is_limited(self):
        for values, name, spec in self.each():
            for container in spec["containers"]:
                if container["name"] != "verify":
                    with self.subTest(f"{values} {name}"):
                        self.assertIn("memory", container["resources"]["limits"])

    def test_models_are_read_only_for_those_who_serve(self):
        for values, name, spec in self.each():
            for container in spec["containers"] + spec.get("initContainers", []):
                for mount in container.get("volumeMounts", []):
                    if mount["name"] == "models" and container["name"] not in ("verify", "fetch"):
                        with self.subTest(f"{values} {name}"):
                            self.assertTrue(mount.get("readOnly"))

    def test_the_kubelet_waits_longer_than_the_drain(self):
        rendered = Rendered(files=[values_files()["everything"]])
        for role in ROLES:
            spec = rendered.pod_template(role)["spec"]
            pre_stop = spec["containers"][0].get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
            seconds = int(pre_stop[1]) if pre_stop else 0
            drain = rendered.document()["timers"]["drain_grace_ms"] / 1000
            with self.subTest(role):
                self.assertGreater(spec["terminationGracePeriodSeconds"], seconds + drain)

    def test_probes_ask_what_the_process_serves(self):
        rendered = Rendered()
        router = rendered.pod_template("router")["spec"]["containers"][0]
        self.assertEqual(router["readinessProbe"]["httpGet"], {"path": "/readyz", "port": "operator"})
        for role in ROLES[1:]:
            container = rendered.pod_template(role)["spec"]["containers"][0]
            with self.subTest(role):
                self.assertEqual(container["startupProbe"]["grpc"], {"port": 9090})
                self.assertEqual(container["readinessProbe"]["grpc"], {"port": 9090})
                self.assertEqual(container["livenessProbe"]["httpGet"], {"path": "/healthz", "port": "operator"})
                probe = container["startupProbe"]
                self.assertGreaterEqual(probe["periodSeconds"] * probe["failureThreshold"], 3600)

    def test_workers_reach_a_router_that_is_not_ready(self):
        rendered = Rendered()
        self.assertTrue(rendered.one("Service", "-control")["spec"]["publishNotReadyAddresses"])
        self.assertNotEqual(rendered.one("Service", "-control")["spec"].get("clusterIP"), "None")
        for role in ROLES[1:]:
            self.assertTrue(rendered.one("Service", "-" + role)["spec"]["publishNotReadyAddresses"])

    def test_secrets_are_never_optional_and_never_inline(self):
        for values, path in values_files().items():
            rendered = Rendered(files=[path])
            self.assertEqual(rendered.of("Secret"), [])
            self.assertNotIn("optional: true", rendered.text)


if __name__ == "__main__":
    sys.argv = [argument for argument in sys.argv if argument != "--update"]
    main()
