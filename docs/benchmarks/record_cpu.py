#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measures the demo model on this machine's CPU, in one process and through a cluster, and records a CSV.

Every row: what was measured, its median over --repeat runs with the lowest and highest, the share of the stated floor
where there is one, and the command. Run it on a machine that does nothing else, then docs/benchmarks/table.py.

  docs/benchmarks/record_cpu.py docs/benchmarks/cpu-zen1.csv
"""
import argparse
import csv
import datetime
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
FIELDS = ["date", "commit", "machine", "kernel_set", "what", "value", "low", "high", "unit", "floor_share", "command"]
CLUSTER = "deploy/demo/cluster.json"


def output(*command):
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


class Recorder:
    def __init__(self, path, binaries, repeat):
        self.path, self.binaries, self.repeat = path, binaries, repeat
        cpu = re.search(r"Model name:\s*(.*)", output("lscpu")).group(1).strip()
        lines = output(self.binary("millrace"), "version")
        self.common = {
            "date": datetime.date.today().isoformat(),
            "commit": output("git", "rev-parse", "--short", "HEAD").strip(),
            "machine": f"{cpu}, {os.cpu_count()} cores",
            "kernel_set": re.search(r"cpu/\S+", lines).group(0),
        }
        self.rows = []

    def binary(self, name):
        return os.path.join(self.binaries, name)

    def add(self, what, values, unit, command, floor_share=None):
        row = dict(self.common, what=what, unit=unit, command=command, value=f"{statistics.median(values):.4g}",
                   low=f"{min(values):.4g}", high=f"{max(values):.4g}",
                   floor_share="" if floor_share is None else f"{floor_share:.3f}")
        self.rows.append(row)
        print(f"{what:42} {row['value']:>9} {unit:10} ({row['low']} to {row['high']})", file=sys.stderr, flush=True)

    def engine(self):
        """One process, one thread: google-benchmark's own repetitions."""
        command = [self.binary("engine_bench"), f"--benchmark_repetitions={self.repeat}", "--benchmark_format=json"]
        runs = {}
        for run in json.loads(output(*command))["benchmarks"]:
            if run["run_type"] == "iteration":
                runs.setdefault(run["run_name"], []).append(run)
        for name, samples in runs.items():
            what = re.sub(r"^BM_|/iterations:\d+", "", name)
            self.add(what, [run["tok_per_s"] for run in samples], "tok/s", "engine_bench",
                     statistics.median(run["floor_share"] for run in samples))

    def cluster(self):
        """Real processes on loopback: how soon they serve, what one client and many see, what they occupy."""
        ready, bench = [], {}
        loads = {
            "cluster, 1 client": ["--requests", "1", "--prompt-tokens", "128", "--output-tokens", "512"],
            "cluster, 32 clients": ["--requests", "32", "--prompt-tokens", "64", "--output-tokens", "128"],
            "cluster, note of 14,000 tokens": ["--requests", "1", "--prompt-tokens", "14000", "--output-tokens", "8"],
        }
        for _ in range(self.repeat):
            log = tempfile.NamedTemporaryFile(mode="w+", prefix="millrace-up-")
            up = subprocess.Popen([self.binary("millrace"), "up", "--config", CLUSTER], cwd=ROOT, stdin=subprocess.DEVNULL,
                                  stdout=subprocess.DEVNULL, stderr=log)
            try:
                text = ""
                while "Status:" not in text:
                    if up.poll() is not None:
                        sys.exit(f"record_cpu: millrace up ended:\n{text}")
                    time.sleep(0.05)
                    with open(log.name) as lines:
                        text = lines.read()
                ready.append(float(re.search(r"Ready in ([\d.]+) s", text).group(1)))
                memory = re.search(r"Resident memory: (.*)", text).group(1)
                for what, flags in loads.items():
                    bench.setdefault(what, []).append(json.loads(output(self.binary("millrace"), "bench", "--json", *flags)))
            finally:
                up.send_signal(signal.SIGINT)
                up.wait(60)
        self.add("cluster of 5 processes ready", ready, "s", "millrace up")
        for name, size in re.findall(r"(\S+) ([\d.]+) MiB \(own", memory):
            self.add(f"resident memory, {name}", [float(size)], "MiB", "millrace up")
        for what, flags in loads.items():
            command = "millrace bench " + " ".join(flags)
            runs = bench[what]
            if any(run["failed"] for run in runs):
                sys.exit(f"record_cpu: {what}: {runs}")
            if "note" in what:
                self.add(f"{what}, answered in", [run["end_to_end_ms"]["p50"] / 1e3 for run in runs], "s", command)
                continue
            if "1 client" in what:
                self.add(f"{what}, decode", [1e3 / run["tpot_ms"]["p50"] for run in runs], "tok/s", command)
            else:
                self.add(f"{what}, output", [run["output_tokens_per_second"] for run in runs], "tok/s", command)
            self.add(f"{what}, TTFT p50", [run["ttft_ms"]["p50"] for run in runs], "ms", command)
            self.add(f"{what}, ITL p99", [run["itl_ms"]["p99"] for run in runs], "ms", command)

    def save(self):
        with open(self.path, "w", newline="") as out:
            writer = csv.DictWriter(out, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", help="file to write")
    parser.add_argument("--binaries", default=os.path.join(ROOT, "build/release/bin"))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--engine-only", action="store_true", help="no cluster")
    options = parser.parse_args()
    recorder = Recorder(options.csv, options.binaries, options.repeat)
    recorder.engine()
    if not options.engine_only:
        recorder.cluster()
    recorder.save()


if __name__ == "__main__":
    main()
