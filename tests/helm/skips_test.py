# SPDX-License-Identifier: Apache-2.0
"""Where a tool is missing, what is not tested is said aloud: by each suite of the chart, their builder and tests/run.sh.

A suite that ended well without having looked at anything would be worse than none. Needs no tool itself.
"""
import os
import subprocess
import sys
import tempfile
import unittest

from chart import ROOT

HERE = os.path.dirname(os.path.abspath(__file__))
SUITES = {"chart": "helm", "refusals": "helm", "network": "helm", "image": "helm, hadolint", "processes": "helm",
          "dashboards": "grafana-check", "monitoring": "prometheus",
          "kubernetes": "helm, etcd, kube-apiserver, kube-controller-manager, kube-scheduler, kwok"}
SCRIPTS = {"processes": "process_test.py"}


class Skips(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.environment = dict(os.environ, MILLRACE_TOOLS=os.path.join(self.folder, "tools"))

    def run_here(self, *command, **environment):
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120,
                              env=dict(self.environment, **environment))

    def path_without_go(self):
        """A PATH with everything of this machine but a Go compiler."""
        commands = os.path.join(self.folder, "commands")
        os.mkdir(commands)
        for folder in ("/usr/bin", "/bin", "/usr/sbin", "/sbin"):
            for name in os.listdir(folder):
                if name != "go" and not os.path.lexists(os.path.join(commands, name)):
                    os.symlink(os.path.join(folder, name), os.path.join(commands, name))
        return commands

    def test_a_suite_without_its_tools_ends_as_skipped_and_names_them(self):
        for suite, lacking in SUITES.items():
            with self.subTest(suite):
                script = SCRIPTS.get(suite, f"{suite}_test.py")
                done = self.run_here(sys.executable, "-B", os.path.join(HERE, script))
                # What ctest takes for skipped: tests/helm/CMakeLists.txt.
                self.assertEqual(done.returncode, 77, done.stdout + done.stderr)
                self.assertIn(f"SKIPPED, NOT TESTED: {script}: missing here: {lacking}", done.stdout)
                self.assertNotIn("OK", done.stderr)

    def test_every_suite_is_asked(self):
        with open(os.path.join(HERE, "CMakeLists.txt")) as source:
            registered = {line.split("(")[1].split()[0].lower() for line in source if line.startswith("chart_test(")}
        self.assertEqual(registered, set(SUITES) | {"skips"})

    def test_without_go_the_builder_says_so_and_so_does_the_run(self):
        path = self.path_without_go()
        for what in ("chart", "kubernetes", "dashboards", "collector"):
            with self.subTest(what):
                done = self.run_here("tests/helm/tools.sh", what, PATH=path)
                self.assertEqual(done.returncode, 3)
                self.assertIn("no Go compiler", done.stderr)
                done = self.run_here("bash", "-c", f"source tests/run.sh; chart_tools {what}", PATH=path)
                self.assertEqual(done.returncode, 0)
                self.assertIn("SKIPPED", done.stderr)

    def test_without_a_network_the_builder_says_what_could_not_be_had(self):
        nothing = os.path.join(self.folder, "modules")
        done = self.run_here("tests/helm/tools.sh", "dashboards", GOPROXY="off", GOMODCACHE=nothing)
        self.assertEqual(done.returncode, 3)
        # Where there is no Go either, that is what it says.
        self.assertRegex(done.stderr, "dashboards .* could not be built|no Go compiler|Go is go")

    def test_the_run_repeats_why_something_was_skipped(self):
        log = os.path.join(self.folder, "LastTest.log")
        with open(log, "w") as out:
            out.write("1/2 Test: helm.Kubernetes\nSKIPPED, NOT TESTED: kubernetes_test.py: missing here: etcd\nend\n")
        done = self.run_here("bash", "-c", f"source tests/run.sh; say_skipped '{log}'")
        self.assertEqual(done.stdout, "SKIPPED, NOT TESTED: kubernetes_test.py: missing here: etcd\n")


if __name__ == "__main__":
    unittest.main(verbosity=2)
