# SPDX-License-Identifier: Apache-2.0
"""Mistakes that show only when processes run: a document that says two things, workers that do not fit, a card too many.

What an operator gets wrong in values is tests/helm/refusals_test.py's. Asserted here: nothing serves what it should
not, the reason is where an operator looks, and it names what was found.
"""
import json
import os
import subprocess
import tempfile
import unittest

from cluster import BINARY, MODEL, PATIENCE, Cluster, wait_until


class Documents(unittest.TestCase):
    def start(self, text, role="decode", env=None):
        """Exit status and last words of a worker that reads this."""
        with tempfile.NamedTemporaryFile("w", suffix=".json") as document:
            document.write(text)
            document.flush()
            done = subprocess.run([BINARY, role, "--config", document.name], capture_output=True, text=True,
                                  timeout=PATIENCE, stdin=subprocess.DEVNULL, env=dict(os.environ, **(env or {})))
        return done.returncode, done.stderr.splitlines()[-1]

    def test_a_key_that_is_written_twice(self):
        status, words = self.start('{"model": {"path": "m"}, "decode": [{"cache_pages": 64, "cache_pages": 128}]}')
        self.assertEqual(status, 78, words)
        self.assertIn('found key "cache_pages" twice', words)

    def test_ten_megabytes(self):
        status, words = self.start(json.dumps({"model": {"path": "m" * 10_000_000}}))
        self.assertEqual(status, 78, words)
        self.assertIn("larger than 1 MiB", words)

    def test_yaml_with_anchors_and_tabs(self):
        status, words = self.start("model: &a\n\tpath: m\ndecode: [*a, *a]\n")
        self.assertEqual(status, 78, words)

    def test_a_document_that_is_not_there(self):
        done = subprocess.run([BINARY, "decode", "--config", "/nowhere/cluster.json"], capture_output=True, text=True,
                              timeout=PATIENCE)
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("/nowhere/cluster.json", done.stderr)

    def test_a_card_where_there_is_none(self):
        document = {"model": {"path": MODEL, "device": "cuda"}, "transfer": {"listen_address": "127.0.0.1"},
                    "router": {"control_listen": "127.0.0.1:1"}, "decode": [{}]}
        status, words = self.start(json.dumps(document), env={"CUDA_VISIBLE_DEVICES": ""})
        self.assertEqual(status, 65, words)
        # Of a driver, of a card, or of the backend in this binary: what is missing is named.
        self.assertRegex(words, "device: cuda needs .*found none|device: this build has no CUDA backend")


class Pairing(unittest.TestCase):
    """A prefill and a decode worker that compute differently: both are well, and nothing may go from one to the other."""

    def test_workers_that_do_not_fit_are_told_apart_and_readyz_says_why(self):
        # One decode worker of two is started with another document, as a half-done upgrade would.
        cluster = Cluster(prefill=1, decode=2, experts=0, router_section={"queue_timeout_ms": 500})
        self.addCleanup(cluster.stop)
        for name in ("router", "prefill-0"):
            cluster.start(name)

        def states():
            try:
                return {worker["name"]: worker["state"] for worker in cluster.status()["workers"]}
            except OSError:  # not listening yet
                return {}
        wait_until(lambda: states() == {"prefill-0": "ready"}, "prefill ready")
        with open(cluster.config_path) as source:
            document = json.load(source)
        right = json.dumps(document)
        document["model"]["numerics"] = "exact"
        with open(cluster.config_path, "w") as out:
            json.dump(document, out)
        cluster.start("decode-0")
        wait_until(lambda: states() == {"prefill-0": "ready", "decode-0": "ready"}, "both ready")
        status, words = cluster.get("/readyz")
        self.assertEqual(status, 503)
        self.assertIn("no_compatible_pair", words)
        self.assertIn("model, numerics and layout", words)
        self.assertFalse(cluster.status()["ready"])
        self.assertEqual(len({worker["compat_hash"] for worker in cluster.status()["workers"]}), 2)
        request = {"model": "demo", "prompt": "Compute 1 + 1.", "max_tokens": 2}
        status, reply = cluster.post("/v1/completions", request)
        self.assertEqual((status, reply["error"]["code"]), (503, "no_compatible_pair"))

        with open(cluster.config_path, "w") as out:
            out.write(right)
        cluster.start("decode-1")
        wait_until(lambda: cluster.get("/readyz")[0] == 200, "a pair that fits")
        for _ in range(4):
            self.assertEqual(cluster.post("/v1/completions", request)[0], 200)
        granted = {worker["name"]: worker for worker in cluster.status()["workers"]}
        self.assertEqual(granted["decode-0"]["state"], "ready")  # well, and asked for nothing


if __name__ == "__main__":
    unittest.main(verbosity=2)
