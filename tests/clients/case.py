# SPDX-License-Identifier: Apache-2.0
"""What the suites of this folder share: a cluster per suite, and that every test leaves it empty.

A suite is one client against one cluster of processes (tests/cluster/cluster.py) that serves the demo model. The
cluster outlives the tests of its class; whatever a test started must be gone when the next one begins.
"""
import os
import sys
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
CACHE = os.path.join(os.path.dirname(os.path.dirname(HERE)), ".cache", "clients")
sys.path.insert(0, os.path.join(os.path.dirname(HERE), "cluster"))

from cluster import Cluster  # noqa: E402 - found by the line above

MODEL = "demo"


def question(text):
    return [{"role": "user", "content": text}]


def tool(name, description, **properties):
    """A function tool as the OpenAI API takes it, every property required."""
    return {"type": "function", "function": {
        "name": name, "description": description,
        "parameters": {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()},
                       "required": list(properties)}}}


GET_WEATHER = tool("get_weather", "Get the weather of a city.", city="string")
MULTIPLY = tool("multiply", "Multiply two numbers.", a="integer", b="integer")


class ClientCase(unittest.TestCase):
    OPTIONS = {"experts": 2}  # of the cluster

    @classmethod
    def setUpClass(cls):
        cls.cluster = Cluster(**cls.OPTIONS)
        cls.addClassCleanup(cls.stop_cluster)
        cls.cluster.__enter__()

    @classmethod
    def stop_cluster(cls):
        codes = cls.cluster.stop()
        bad = {name: code for name, code in codes.items() if code != 0}
        if bad:
            cls.cluster.show_logs()
            raise AssertionError(f"did not drain cleanly: {bad}")

    def tearDown(self):
        self.cluster.expect_nothing_left()
