#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes the table of docs/benchmarks.md's "GPU kernels" from the recordings beside this file.

It stands between `<!-- gpu kernels: OURS.csv PEER.csv -->` and `<!-- /gpu kernels -->`: a row of OURS, the same shape in
PEER where it was timed, and the peer's time over ours. --check fails if the document is not what this would write.
"""
import csv
import os
import re
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
DOCUMENT = os.path.join(os.path.dirname(HERE), "benchmarks.md")
MARKERS = re.compile(r"(<!-- gpu kernels: (\S+) (\S+) -->\n).*?(<!-- /gpu kernels -->)", re.S)
PEER_OF = {"linear fp8": "fp8 blocks", "linear bf16": "bf16"}


def read(name):
    with open(os.path.join(HERE, name), newline="") as source:
        return list(csv.DictReader(source))


def table(ours, peers):
    rows, peer_rows = read(ours), read(peers)
    peer = {(row["kernel"], row["shape"]): row for row in peer_rows}
    lines = [f"| {rows[0]['machine']} | rows x outputs x K | µs (least – greatest) | GB/s | TFLOP/s | cuBLASLt µs | ratio |",
             "|---|---|---|---|---|---|---|"]
    for row in rows:
        name, shape = row["shape"].rsplit(" ", 1)
        us, low, high, rate, flops = (float(row[c]) for c in ("us_median", "us_low", "us_high", "gb_s", "tflop_s"))
        other = peer.get((PEER_OF.get(row["kernel"]), shape))
        theirs = f"{float(other['us_median']):,.1f} | {float(other['us_median']) / us:.2f}" if other else " | "
        lines.append(f"| {row['kernel'].removeprefix('linear ')}, {name} | {shape} | {us:,.1f} ({low:,.1f} – {high:,.1f}) | "
                     f"{rate:,.0f} | {flops:,.0f} | {theirs} |")
    lines.append(f"\n`{ours}`: recorded 2026-11-24, commit: {rows[0]['commit']}. `{peers}`: {peer_rows[0]['library']}, the same kind of card.")
    return "\n".join(lines) + "\n"


def main():
    with open(DOCUMENT, encoding="utf-8") as source:
        text = source.read()
    written = MARKERS.sub(lambda m: m.group(1) + table(m.group(2), m.group(3)) + m.group(4), text)
    if "--check" in sys.argv[1:]:
        sys.exit(0 if written == text else f"{DOCUMENT} is not what {os.path.basename(__file__)} writes")
    with open(DOCUMENT, "w", encoding="utf-8") as target:
        target.write(written)


if __name__ == "__main__":
    main()
