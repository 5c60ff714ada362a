# SPDX-License-Identifier: Apache-2.0
"""The dashboards as files: what their source writes, and what Grafana's own types accept.

Whether they show anything is monitoring_test.py's. Grafana itself is not run: its licence keeps it out of our tools, and
no package that we may use carries it.
"""
import glob
import json
import os
import subprocess
import sys
import tempfile
import unittest

from chart import CHART, ROOT, TOOLS, main

# tools.sh builds it from tests/helm/dashboards.
GRAFANA_CHECK = os.path.join(TOOLS, "bin/grafana-check")
FILES = sorted(glob.glob(os.path.join(CHART, "files/dashboards/*.json")))


def dashboards():
    for path in FILES:
        with open(path) as source:
            yield os.path.basename(path), json.load(source)


def panels():
    """(dashboard, panel) of every panel that asks something."""
    for name, dashboard in dashboards():
        for panel in dashboard["panels"]:
            if panel["type"] != "row":
                yield name, panel


class Dashboards(unittest.TestCase):
    def test_they_are_what_their_source_writes(self):
        done = subprocess.run([sys.executable, "-B", os.path.join(ROOT, "deploy/grafana/dashboards.py"), "--check"],
                              capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)

    def test_panels_have_a_sentence_and_do_not_overlap(self):
        uids = set()
        for name, dashboard in dashboards():
            with self.subTest(name):
                uids.add(dashboard["uid"])
                cells = set()
                for panel in dashboard["panels"]:
                    place = panel["gridPos"]
                    own = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                           for y in range(place["y"], place["y"] + place["h"])}
                    self.assertFalse(own & cells, panel["title"])
                    self.assertLessEqual(place["x"] + place["w"], 24)
                    cells |= own
                    if panel["type"] != "row":
                        self.assertTrue(panel["description"] and panel["targets"], panel["title"])
                        self.assertIn("unit", panel["fieldConfig"]["defaults"])
        self.assertEqual(len(uids), 5)

    def grafana(self, *paths):
        done = subprocess.run([GRAFANA_CHECK, *paths], capture_output=True, text=True)
        return done.returncode, done.stderr

    def test_grafanas_types_accept_them(self):
        self.assertEqual(self.grafana(*FILES), (0, ""))

    def test_grafanas_types_would_not_accept_a_slip(self):
        # One slip each of the dashboard, a panel's options, what its kind adds, and a query.
        with open(FILES[0]) as source:
            good = source.read()
        for field, word in (("graphTooltip", "graphToolTip"), ("showLegend", "showLegends"), ("lineWidth", "linewidth"),
                            ("legendFormat", "legend")):
            with self.subTest(word), tempfile.NamedTemporaryFile("w", suffix=".json") as bad:
                self.assertIn(f'"{field}"', good)
                bad.write(good.replace(f'"{field}"', f'"{word}"', 1))
                bad.flush()
                status, words = self.grafana(bad.name)
                self.assertEqual(status, 1)
                self.assertIn(f"unexpected field '{word}'", words)


if __name__ == "__main__":
    main("" if os.path.exists(GRAFANA_CHECK) else "grafana-check")
