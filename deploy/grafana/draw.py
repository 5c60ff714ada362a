#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draws the dashboards as pictures from a Prometheus, for pages and for eyes: it is not Grafana and does not look like it.

    deploy/grafana/draw.py http://127.0.0.1:9090 OUT [--minutes 5] [--end SECONDS-SINCE-EPOCH]

One SVG per dashboard of helm/millrace/files/dashboards: each panel's queries over the last minutes, or over as much of
them as there is data for. Lines, stacks, thresholds and numbers are the panel's own; colours and ticks are ours.
Python's standard library only. tests/helm/monitoring_test.py draws what it saw where MILLRACE_PICTURES names a folder.
"""
import argparse
import glob
import json
import math
import os
import time
import urllib.parse
import urllib.request
from xml.sax.saxutils import escape

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
COLORS = ["#3366cc", "#dc3912", "#109618", "#ff9900", "#990099", "#0099c6", "#dd4477", "#66aa00", "#b82e2e", "#316395"]
CELL_W, CELL_H, MARGIN = 400, 214, 8
LETTER = 5.4  # width of a letter of the legend, about
LEGEND_LINES = 3
POINTS = 150
# What follows a number, and what its thousands are called.
UNITS = {"s": ("s", None), "bytes": ("B", 1024), "Bps": ("B/s", 1000), "reqps": ("/s", 1000), "cps": ("/s", 1000),
         "short": ("", 1000), "percentunit": ("%", None)}


class Window:
    """The time that a picture shows."""

    def __init__(self, server, minutes, end):
        self.server, self.end, self.step = server, end, max(1, minutes * 60 / POINTS)
        self.begin = end - 60 * minutes

    def shrink(self):
        """To what has been scraped; a query may have values before that, such as a constant."""
        self.begin = min((float(result["values"][0][0]) for result in self.query("up")), default=self.begin)

    def query(self, expression):
        arguments = {"query": expression, "start": self.begin, "end": self.end, "step": self.step}
        address = f"{self.server}/api/v1/query_range?{urllib.parse.urlencode(arguments)}"
        with urllib.request.urlopen(address, timeout=20) as reply:
            return json.load(reply)["data"]["result"]


def spoken(value, unit):
    suffix, thousand = UNITS[unit]
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s" and value:
        for limit, factor, word in ((1e-3, 1e6, "µs"), (1, 1e3, "ms"), (math.inf, 1, "s")):
            if abs(value) < limit:
                return f"{value * factor:.3g} {word}"
    if thousand:
        for power, word in ((3, "G"), (2, "M"), (1, "k")):
            if abs(value) >= thousand ** power:
                binary = "i" if thousand == 1024 else ""
                return f"{value / thousand ** power:.3g} {word}{binary}{suffix}"
    return f"{value:.3g} {suffix}".strip()


def legend(pattern, labels):
    for name, value in labels.items():
        pattern = pattern.replace("{{" + name + "}}", value)
    # As in Grafana, a label that a series lacks is empty.
    return " ".join(word for word in pattern.split() if not word.startswith("{{"))


def series_of(window, panel):
    lines = []
    for target in panel["targets"]:
        expression = target["expr"].replace("$__rate_interval", "15s").replace('"$namespace"', '".*"')
        for result in window.query(expression):
            points = [(float(at), float(value)) for at, value in result["values"] if math.isfinite(float(value))]
            if points:
                lines.append((legend(target["legendFormat"], result["metric"]), points))
    return lines


def stacked(lines):
    """(name, points, floor): each line on those below it. Without a stack the floor is 0."""
    below, result = {}, []
    for name, points in lines:
        floor = [(at, below.get(at, 0.0)) for at, _ in points]
        raised = [(at, value + low) for (at, value), (_, low) in zip(points, floor)]
        below.update(raised)
        result.append((name, raised, floor))
    return result


def ticks(high, unit):
    """Round numbers up to at least `high`, about four of them."""
    base = 1024 ** math.floor(math.log(high, 1024)) if unit == "bytes" and high >= 1024 else 1
    magnitude = 10 ** math.floor(math.log10(high / base)) * base
    step = next(part * magnitude for part in (0.2, 0.25, 0.5, 1, 2, 2.5, 5, 10) if high / (part * magnitude) <= 4.2)
    return [step * index for index in range(math.ceil(high / step - 1e-9) + 1)]


def text(x, y, words, **attributes):
    written = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in attributes.items())
    return f'<text x="{x:.0f}" y="{y:.0f}"{written}>{escape(words)}</text>'


def draw_stat(lines, unit, x, y, width):
    out = []
    cell = (width - 16) / max(1, len(lines))
    for index, (name, points) in enumerate(lines):
        middle = x + 8 + cell * (index + 0.5)
        out += [text(middle, y + 120, spoken(points[-1][1], unit), text_anchor="middle", font_size=36, fill="#333"),
                text(middle, y + 146, name, text_anchor="middle", font_size=12, fill="#666")]
    return out


def draw_axes(levels, unit, place, window, box):
    left, top, right, bottom = box
    out = []
    for level in levels:
        out += [f'<line x1="{left}" x2="{right}" y1="{place(0, level)[1]:.1f}" y2="{place(0, level)[1]:.1f}" '
                'stroke="#eee"/>', text(left - 5, place(0, level)[1] + 4, spoken(level, unit), text_anchor="end",
                                        fill="#666")]
    for part in (0, 0.5, 1):
        at = window.begin + part * (window.end - window.begin)
        out.append(text(left + part * (right - left), bottom + 13, time.strftime("%H:%M:%S", time.gmtime(at)),
                        fill="#666", text_anchor=("start", "middle", "end")[int(part * 2)]))
    return out


def draw_legend(lines, unit, x, y, width):
    out, at, row = [], x + 8, 0
    for index, (name, points) in enumerate(lines):
        words = f"{name}: {spoken(points[-1][1], unit)}"
        if at > x + 8 and at + 14 + LETTER * len(words) > x + width - 8:
            at, row = x + 8, row + 1
        if row == LEGEND_LINES - 1 and index < len(lines) - 1 and at + 28 + LETTER * (len(words) + 10) > x + width:
            out.append(text(at, y + 13 * row, f"and {len(lines) - index} more", fill="#666"))
            break
        out += [f'<rect x="{at:.0f}" y="{y + 13 * row - 4}" width="9" height="3" fill="{COLORS[index % len(COLORS)]}"/>',
                text(at + 12, y + 13 * row, words, fill="#333")]
        at += 24 + LETTER * len(words)
    return out


def draw_timeseries(panel, lines, window, x, y, width):
    defaults = panel["fieldConfig"]["defaults"]
    unit, stack = defaults["unit"], defaults["custom"]["stacking"]["mode"] == "normal"
    curves = stacked(lines) if stack else [(name, points, None) for name, points in lines]
    box = left, top, right, bottom = x + 62, y + 46, x + width - 12, y + CELL_H - 16 - 13 * (LEGEND_LINES + 1)
    bounds = [step for step in defaults.get("thresholds", {}).get("steps", []) if step["value"] is not None]
    most = max((value for _, points, _ in curves for _, value in points), default=0)
    # A threshold that is near is worth its room; one far above would press the lines to the floor.
    most = max([most] + [step["value"] for step in bounds if step["value"] <= 2 * most])
    levels = ticks(most or 1, unit)

    def place(at, value):
        return (left + (at - window.begin) / max(1, window.end - window.begin) * (right - left),
                bottom - value / levels[-1] * (bottom - top))

    def path(points):
        places = ["{:.0f},{:.1f}".format(*place(*point)) for point in points]
        # Of a level stretch its ends are enough.
        kept = [at for index, at in enumerate(places) if index in (0, len(places) - 1)
                or len({other.split(",")[1] for other in places[index - 1:index + 2]}) > 1]
        return " ".join(kept)
    out = draw_axes(levels, unit, place, window, box)
    for index, (_, points, floor) in enumerate(curves):
        color = COLORS[index % len(COLORS)]
        if floor:
            out.append(f'<polygon points="{path(points)} {path(floor[::-1])}" fill="{color}" fill-opacity="0.25"/>')
        out.append(f'<polyline points="{path(points)}" fill="none" stroke="{color}" stroke-width="1.4"/>')
        if len(points) == 1:
            out.append('<circle cx="{:.1f}" cy="{:.1f}" r="1.5" fill="{}"/>'.format(*place(*points[0]), color))
    for step in bounds:
        if step["value"] <= levels[-1]:
            level = place(0, step["value"])[1]
            out.append(f'<line x1="{left}" x2="{right}" y1="{level:.1f}" y2="{level:.1f}" stroke="{step["color"]}" '
                       'stroke-dasharray="5 4"/>')
    return out + draw_legend(lines, unit, x, bottom + 30, width)


def draw_panel(panel, lines, window, x, y, width):
    out = [f'<rect x="{x}" y="{y}" width="{width}" height="{CELL_H}" fill="#fff" stroke="#ccc"/>',
           text(x + 8, y + 18, panel["title"], font_weight="bold", font_size=12),
           text(x + 8, y + 32, panel["description"], fill="#666")]
    if not lines:
        return [*out, text(x + width / 2, y + 110, "no data", text_anchor="middle", fill="#999")]
    if panel["type"] == "stat":
        return out + draw_stat(lines, panel["fieldConfig"]["defaults"]["unit"], x, y, width)
    return out + draw_timeseries(panel, lines, window, x, y, width)


def draw(dashboard, window):
    window.shrink()
    out, x, y, at_row = [], MARGIN, 40, 0
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            y += at_row + (24 if at_row else 0)
            out.append(text(MARGIN, y + 4, panel["title"], font_size=15))
            x, y, at_row = MARGIN, y + 12, 0
            continue
        width = panel["gridPos"]["w"] // 8 * CELL_W - MARGIN
        if x + width > 3 * CELL_W:
            x, y = MARGIN, y + CELL_H + MARGIN
        out += draw_panel(panel, series_of(window, panel), window, x, y, width)
        x, at_row = x + width + MARGIN, CELL_H + MARGIN
    title = f"{dashboard['title']}: drawn by deploy/grafana/draw.py from a Prometheus's data, not by Grafana (UTC)"
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{3 * CELL_W + MARGIN}" height="{y + at_row}" '
        'font-family="sans-serif" font-size="10"><rect width="100%" height="100%" fill="#f6f6f6"/>',
        text(MARGIN, 18, title, font_size=16), *out, "</svg>\n"])


def draw_all(server, folder, minutes, end=None):
    os.makedirs(folder, exist_ok=True)
    end = end or time.time()
    for path in sorted(glob.glob(os.path.join(ROOT, "helm/millrace/files/dashboards/*.json"))):
        with open(path) as source:
            dashboard = json.load(source)
        with open(os.path.join(folder, os.path.basename(path).replace(".json", ".svg")), "w") as out:
            out.write(draw(dashboard, Window(server, minutes, end)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server")
    parser.add_argument("out")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--end", type=float)
    arguments = parser.parse_args()
    draw_all(arguments.server.rstrip("/"), arguments.out, arguments.minutes, arguments.end)


if __name__ == "__main__":
    main()
