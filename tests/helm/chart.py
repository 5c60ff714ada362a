# SPDX-License-Identifier: Apache-2.0
"""The chart as Helm renders it: objects, documents and refusals for the tests beside this file.

Real Helm from tools.sh; nothing here knows how a template works.
"""
import json
import os
import subprocess
import sys
import tempfile
import unittest

import yaml

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CHART = os.path.join(ROOT, "helm/millrace")
TOOLS = os.environ.get("MILLRACE_TOOLS", os.path.join(ROOT, ".cache/kubernetes"))
HELM = os.path.join(TOOLS, "bin/helm")
RELEASE, NAMESPACE = "millrace", "serving"
RENDERED = {}
OPEN = {"allowInsecure": True, "tls": {"enabled": False}}
ROLES = ("router", "prefill", "decode", "expert")


def values_files():
    """Every values file by name: the chart's own and the one with every option."""
    files = {name[:-5]: os.path.join(CHART, "values", name) for name in os.listdir(os.path.join(CHART, "values"))}
    files["everything"] = os.path.join(ROOT, "tests/helm/values/everything.yaml")
    return dict(sorted(files.items()))


def helm(*arguments, check=True, timeout=300):
    # Helm keeps state of its own; none of the user's may change what a test sees.
    with tempfile.TemporaryDirectory() as home:
        environment = {"PATH": os.environ["PATH"], "HOME": home}
        done = subprocess.run([HELM, *arguments], capture_output=True, text=True, timeout=timeout, env=environment)
    if check and done.returncode != 0:
        raise AssertionError(f"helm {' '.join(arguments)}: {done.stderr}")
    return done


def template(values=None, files=(), check=True):
    """`helm template` over `files` and then `values`, a dict. The chart does not change while a test runs."""
    key = (json.dumps(values), tuple(files), check)
    if key not in RENDERED:
        RENDERED[key] = render(values, files, check)
    return RENDERED[key]


def render(values, files, check):
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as overlay:
        yaml.safe_dump(values or {}, overlay)
        overlay.flush()
        arguments = ["template", RELEASE, CHART, "--namespace", NAMESPACE]
        for path in [*files, overlay.name]:
            arguments += ["--values", path]
        return helm(*arguments, check=check)


class Rendered:
    """The objects of one rendering; without a file that says more, of a demo without locks."""

    def __init__(self, values=None, files=()):
        self.text = template(dict({} if files else OPEN, **(values or {})), files).stdout
        self.objects = [item for item in yaml.safe_load_all(self.text) if item]

    def of(self, kind):
        return [item for item in self.objects if item["kind"] == kind]

    def one(self, kind, ending):
        found = [item for item in self.of(kind) if item["metadata"]["name"].endswith(ending)]
        if len(found) != 1:
            raise AssertionError(f"wanted one {kind} ...{ending}, found {[i['metadata']['name'] for i in found]}")
        return found[0]

    def document(self):
        """The configuration document as the processes read it."""
        return json.loads(next(item["data"]["cluster.json"] for item in self.of("ConfigMap")
                               if "cluster.json" in item["data"]))

    def workload(self, role):
        """The object that runs a role's pods."""
        for kind in ("Deployment", "StatefulSet", "LeaderWorkerSet"):
            for item in self.of(kind):
                if item["metadata"]["labels"].get("app.kubernetes.io/component") == role:
                    return item
        return None

    def pod_template(self, role):
        workload = self.workload(role)
        if workload is None:
            return None
        if workload["kind"] == "LeaderWorkerSet":
            return workload["spec"]["leaderWorkerTemplate"]["workerTemplate"]
        return workload["spec"]["template"]

    def pod_specs(self):
        """(name, spec) of every pod that anything here would start."""
        specs = [(role, self.pod_template(role)["spec"]) for role in ROLES if self.workload(role)]
        specs += [(job["metadata"]["name"], job["spec"]["template"]["spec"]) for job in self.of("Job")]
        specs += [(pod["metadata"]["name"], pod["spec"]) for pod in self.of("Pod")]
        return specs


def refusal(values):
    """Why Helm renders nothing from these values; fails if it renders."""
    done = template(values, check=False)
    if done.returncode == 0:
        raise AssertionError(f"rendered in spite of {values}")
    return done.stderr


def main(lacking=None):
    """Runs the tests of the calling file; ends with 77, which ctest takes for skipped, where `lacking` names a tool.

    Without an argument it is Helm that is needed."""
    if lacking is None:
        lacking = "" if os.path.exists(HELM) else "helm"
    if lacking:
        name = os.path.basename(sys.argv[0])
        print(f"SKIPPED, NOT TESTED: {name}: missing here: {lacking} (tests/helm/tools.sh builds what it can)", flush=True)
        sys.exit(77)
    unittest.main(module="__main__", verbosity=2)
