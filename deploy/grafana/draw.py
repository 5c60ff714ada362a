#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draws the dashboards as pictures from a Prometheus, for pages and for eyes: it is not Grafana and does not look like it.

    deploy/grafana/draw.py http://127.0.0.1:9090 OUT [--minutes 5]

One SVG per dashboard of helm/millrace/files/dashboards: each panel's queries over the last minutes, as lines with their
last values. Python's standard library only. tests/helm/monitoring_test.py draws what it saw where MILLRACE_PICTURES
names a folder.
"""
import glob
import json
import math
import os
import sys
import time
import urllib.parse
import urllib.request
from xml.sax.saxutils import escape

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
COLORS = ["#3366cc", "#dc3912", "#109618", "#ff9900", "#990099", "#0099c6", "#dd4477", "#66aa00", "#b82e2e", "#316395"]
CELL_W, CELL_H, MARGIN = 400, 210, 8


def query_range(server, expression, minutes):
    end = time.time()
    arguments = {"query": expression, "start": end - 60 * minutes, "end": end, "step": max(1, minutes * 60 / 200)}
    with urllib.request.urlopen(f"{server}/api/v1/query_range?{urllib.parse.urlencode(arguments)}", timeout=20) as reply:
        return json.load(reply)["data"]["result"]


def spoken(value, unit):
    if unit == "s":
        for limit, factor, word in ((1e-3, 1e6, "µs"), (1, 1e3, "ms"), (math.inf, 1, "s")):
            if abs(value) < limit:
                return f"{value * factor:.3g} {word}"
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    for factor, word in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {word}{'B' if unit in ('bytes', 'Bps') else ''}"
    return f"{value:.3g}"


def legend(pattern, labels):
    for name, value in labels.items():
        pattern = pattern.replace("{{" + name + "}}", value)
    return pattern.replace("{{", "").replace("}}", "")


def series_of(server, panel, minutes):
    lines = []
    for target in panel["targets"]:
        expression = target["expr"].replace("$__rate_interval", "15s").replace('"$namespace"', '".*"')
        for result in query_range(server, expression, minutes):
            points = [(float(at), float(value)) for at, value in result["values"] if math.isfinite(float(value))]
            if points:
                lines.append((legend(target["legendFormat"], result["metric"]), points))
    return lines


def draw_panel(panel, lines, x, y, width, minutes):
    unit = panel["fieldConfig"]["defaults"]["unit"]
    out = [f'<rect x="{x}" y="{y}" width="{width}" height="{CELL_H}" fill="#fff" stroke="#ccc"/>',
           f'<text x="{x + 8}" y="{y + 18}" font-weight="bold">{escape(panel["title"])}</text>']
    left, top, right, bottom = x + 54, y + 28, x + width - 10, y + CELL_H - 62
    high = max((value for _, points in lines for _, value in points), default=0) or 1
    for part in (0, 0.5, 1):
        level = bottom - part * (bottom - top)
        out.append(f'<line x1="{left}" x2="{right}" y1="{level}" y2="{level}" stroke="#eee"/>'
                   f'<text x="{left - 4}" y="{level + 4}" text-anchor="end" fill="#666">{spoken(part * high, unit)}</text>')
    now = time.time()
    for index, (_, points) in enumerate(lines):
        path = " ".join(f"{right - (now - at) / (60 * minutes) * (right - left):.1f},"
                        f"{bottom - value / high * (bottom - top):.1f}" for at, value in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{COLORS[index % len(COLORS)]}" stroke-width="1.3"/>')
    for index, (name, points) in enumerate(lines[:9]):
        at_x, at_y = x + 8 + index % 3 * (width - 16) / 3, bottom + 18 + index // 3 * 13
        text = f"{name}: {spoken(points[-1][1], unit)}"
        out.append(f'<text x="{at_x:.0f}" y="{at_y:.0f}" fill="{COLORS[index % len(COLORS)]}">{escape(text[:26])}</text>')
    if not lines:
        out.append(f'<text x="{left + 40}" y="{(top + bottom) / 2}" fill="#999">nothing</text>')
    return out


def draw(server, dashboard, minutes):
    out, x, y, at_row = [], MARGIN, 40, 0
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            y += at_row + (24 if at_row else 0)
            out.append(f'<text x="{MARGIN}" y="{y + 4}" font-size="15">{escape(panel["title"])}</text>')
            x, y, at_row = MARGIN, y + 12, 0
            continue
        width = panel["gridPos"]["w"] // 8 * CELL_W - MARGIN
        if x + width > 3 * CELL_W:
            x, y = MARGIN, y + CELL_H + MARGIN
        out += draw_panel(panel, series_of(server, panel, minutes), x, y, width, minutes)
        x, at_row = x + width + MARGIN, CELL_H + MARGIN
    height = y + at_row + 20
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" width="{3 * CELL_W + MARGIN}" height="{height}" '
            'font-family="sans-serif" font-size="10"><rect width="100%" height="100%" fill="#f6f6f6"/>'
            f'<text x="{MARGIN}" y="18" font-size="16">{escape(dashboard["title"])}: drawn by deploy/grafana/draw.py from '
            'a Prometheus, not by Grafana</text>')
    return head + "\n".join(out) + "</svg>\n"


def draw_all(server, folder, minutes):
    os.makedirs(folder, exist_ok=True)
    for path in sorted(glob.glob(os.path.join(ROOT, "helm/millrace/files/dashboards/*.json"))):
        with open(path) as source:
            dashboard = json.load(source)
        with open(os.path.join(folder, os.path.basename(path).replace(".json", ".svg")), "w") as out:
            out.write(draw(server, dashboard, minutes))


def main():
    arguments = sys.argv[1:]
    if len(arguments) not in (2, 4) or (len(arguments) == 4 and arguments[2] != "--minutes"):
        sys.exit(__doc__)
    draw_all(arguments[0].rstrip("/"), arguments[1], float(arguments[3]) if len(arguments) == 4 else 5.0)


if __name__ == "__main__":
    main()
