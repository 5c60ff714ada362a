#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of README.md and docs/benchmarks.md from the recordings beside this file.

A table stands between `<!-- KIND: FILE.csv ... -->` and `<!-- /KIND -->`. `cpu benchmarks`: rows are chosen and put in words
here. `gpu kernels`, of OURS.csv ... and PEER.csv: rows of OURS, the same shape in PEER where it was timed, and the peer's
time over ours. `gpu engine`: steps and prompts of a whole engine. Figures come from the recordings alone. --check fails if a document is not what this script would write.
"""
import csv
import os
import re
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
DOCUMENTS = ["README.md", "docs/benchmarks.md"]
MARKERS = re.compile(r"(<!-- (cpu benchmarks|gpu kernels|gpu engine): ([^>]*?) -->\n).*?(<!-- /\2 -->)", re.S)

# What a row is called, and the goal for a core with AVX-512.
ROWS = [
    ("Decode/batch:1/context:512", "decode, one sequence, 512 tokens before it", "1,000"),
    ("Decode/batch:1/context:14000", "decode, one sequence, 14,000 tokens before it", ""),
    ("Decode/batch:32/context:512", "decode, 32 sequences", "4,000"),
    ("Prefill/tokens:512", "prefill of 512 tokens", "5,000"),
    ("Prefill/tokens:14000", "prefill of 14,000 tokens", ""),
    ("cluster, 1 client, decode", "cluster with two expert workers, one client, decode", "400"),
    ("cluster, 1 client, TTFT p50", "the same, time to first token, 128-token prompt", ""),
    ("cluster, 32 clients, output", "cluster, 32 clients at once, output", ""),
    ("cluster, note of 14,000 tokens, answered in", "cluster, a note of 14,000 tokens answered", "5"),
    ("cluster of 5 processes ready", "cluster of five processes ready", "3"),
]


# Kernels of a GPU recording, and which of the peer's they are compared with.
PEER_OF = {"linear fp8": "fp8 blocks", "linear bf16": "bf16"}


def read(name):
    with open(os.path.join(HERE, name), newline="", encoding="utf-8") as source:
        return list(csv.DictReader(source))


def number(text):
    value = float(text)
    return f"{value:,.0f}" if value >= 100 else text


def cell(row):
    if row is None:
        return ""
    share = f", {float(row['floor_share']):.0%} of floor" if row["floor_share"] else ""
    return f"{number(row['value'])} {row['unit']} ({number(row['low'])} – {number(row['high'])}{share})"


def cpu_table(files):
    recordings = [{row["what"]: row for row in read(name)} for name in files]
    firsts = [next(iter(recording.values())) for recording in recordings]
    lines = ["| | " + " | ".join(f"{f['machine']}, `{f['kernel_set']}`" for f in firsts) + " | goal |",
             "|---|" + "---|" * (len(files) + 1)]
    for what, words, goal in ROWS:
        cells = [cell(recording.get(what)) for recording in recordings]
        if any(cells):
            lines.append(f"| {words} | " + " | ".join(cells) + f" | {goal} |")
    for first, name in zip(firsts, files):
        lines.append(f"\n`{name}`: recorded {first['date']} at {first['commit']}.")
    return "\n".join(lines) + "\n"


def gpu_table(files):
    rows, peer_rows = [row for name in files[:-1] for row in read(name)], read(files[-1])
    peer = {(row["kernel"], row["shape"]): row for row in peer_rows}
    lines = [f"| {rows[0]['machine']} | shape | µs (least – greatest) | GB/s | TFLOP/s | of floor | cuBLASLt µs | ratio |",
             "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        name, _, shape = row["shape"].rpartition(" ") if row["kernel"].startswith("linear") else ("", "", row["shape"])
        us, low, high, rate, flops = (float(row[c]) for c in ("us_median", "us_low", "us_high", "gb_s", "tflop_s"))
        other = peer.get((PEER_OF.get(row["kernel"]), shape))
        theirs = f"{float(other['us_median']):,.1f} | {float(other['us_median']) / us:.2f}" if other else " | "
        kernel = row["kernel"].removeprefix("linear ") + (f", {name}" if name else "")
        lines.append(f"| {kernel} | {shape} | {us:,.1f} ({low:,.1f} – {high:,.1f}) | {rate:,.0f} | {flops:,.0f} | "
                     f"{float(row['share_of_floor']):.0%} | {theirs} |")
    lines.append(f"\nRecorded at {rows[0]['commit']}; `{files[-1]}`: {peer_rows[0]['library']}, the same kind of card.")
    return "\n".join(lines) + "\n"


def engine_table(files):
    rows = read(files[0])
    lines = [f"| {rows[0]['machine']}, {rows[0]['layers']} layers of {rows[0]['model']} | batch | context | µs (least – greatest) | tokens/s |",
             "|---|---|---|---|---|"]
    for row in rows:
        us, low, high = (float(row[c]) for c in ("median_us", "min_us", "max_us"))
        lines.append(f"| {row['what']} | {row['batch']} | {int(row['context']):,} | {us:,.0f} ({low:,.0f} – {high:,.0f}) | "
                     f"{int(row['tokens_per_s']):,} |")
    lines.append(f"\n`{files[0]}`: recorded {rows[0]['date']} at {rows[0]['commit']}.")
    return "\n".join(lines) + "\n"


TABLES = {"cpu benchmarks": cpu_table, "gpu kernels": gpu_table, "gpu engine": engine_table}


def main():
    check = sys.argv[1:] == ["--check"]
    stale = []
    for document in DOCUMENTS:
        path = os.path.join(ROOT, document)
        with open(path, encoding="utf-8") as source:
            before = source.read()
        after = MARKERS.sub(lambda m: m[1] + TABLES[m[2]](m[3].split()) + m[4], before)
        if after != before:
            stale.append(document)
            if not check:
                with open(path, "w", encoding="utf-8") as out:
                    out.write(after)
    if check and stale:
        sys.exit(f"table: {', '.join(stale)} differ from the recordings; run docs/benchmarks/table.py")


if __name__ == "__main__":
    main()
