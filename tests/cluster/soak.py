# SPDX-License-Identifier: Apache-2.0
"""A cluster of processes under mixed load for minutes or hours: cancels, deaths, drains, and nothing may be left over.

    tests/run.sh --soak [MINUTES]        or        python3 tests/cluster/soak.py MINUTES [SEED]

Clients ask without pause, leave, and give up; a worker dies or is drained every few seconds. Each answer, whole or cut,
must be a beginning of what one process gives; errors must be of the kinds that say "send it again". Every round ends
with the cluster at rest: no page, slot, lease or stream held; memory, descriptors and threads where they were after the
first round. Exit status: 0, or 1 with what was found. cluster.Leaks is the short version of this without deaths.
"""
import os
import random
import signal
import sys
import threading
import time

from cluster import Cluster, run_alone

CLIENTS = 6
ROUND_SECONDS = 40
WOUND_EVERY_SECONDS = 6
PROMPTS = 12
RETRYABLE = {"worker_lost", "no_capacity", "overloaded", "lease_lost", "handoff_failed", "handoff_late", "experts_late",
             "worker_late", "draining"}
SLACK_BYTES = 16 << 20


def prompt(number):
    draw = random.Random(number)
    return [draw.randrange(10, 1400) for _ in range(draw.choice([1, 5, 127, 128, 129, 400, 900]))]


def request(number):
    return {"model": "demo", "prompt": prompt(number), "max_tokens": 20 + 37 * (number % 5), "temperature": number % 2,
            "seed": number, "ignore_eos": True}


class Soak:
    def __init__(self, cluster, seed):
        self.cluster = cluster
        self.draw = random.Random(seed)
        self.expected = [run_alone(request(number))["message"]["content"] for number in range(PROMPTS)]
        self.failures = []
        self.counts = {"whole": 0, "cut by us": 0, "refused": 0, "broken": 0, "killed": 0, "drained": 0}
        self.lock = threading.Lock()

    def count(self, what):
        with self.lock:
            self.counts[what] += 1

    def fail(self, text):
        with self.lock:
            self.failures.append(text)

    def ask(self, draw):
        number = draw.randrange(PROMPTS)
        leave_after = draw.choice([None, None, 0, 3, 15])
        stream = self.cluster.stream("/v1/completions", request(number))
        try:
            if stream.status != 200:
                code = stream.error_code()
                if code not in RETRYABLE:
                    self.fail(f"request {number}: {stream.status} {code}")
                self.count("refused")
                time.sleep(0.2)
                return
            text, last = "", None
            for events, last in enumerate(stream.events()):
                if isinstance(last, dict) and last.get("choices"):
                    text += last["choices"][0]["text"]
                if leave_after is not None and events >= leave_after:
                    self.count("cut by us")
                    break
            else:
                if last == "[DONE]":
                    if text != self.expected[number]:
                        self.fail(f"request {number}: another answer than one process gives: {text!r}")
                    self.count("whole")
                    return
                code = last.get("error", {}).get("code") if isinstance(last, dict) else None
                if code not in RETRYABLE:
                    self.fail(f"request {number}: the stream ended with {last!r}")
                self.count("broken")
            if not self.expected[number].startswith(text.rstrip("\ufffd")):
                self.fail(f"request {number}: not a beginning of what one process gives: {text!r}")
        finally:
            stream.close()

    def client(self, seed, until):
        draw = random.Random(seed)
        while time.monotonic() < until and not self.failures:
            try:
                self.ask(draw)
            except OSError as error:  # the router never dies here
                self.fail(f"connection: {error!r}")

    def wound(self):
        """One worker dies or drains, and is started again."""
        name = self.draw.choice([name for name, role in self.cluster.roles.items() if role != "router"])
        drained = self.draw.random() < 0.4
        self.cluster.kill(name, signal.SIGTERM if drained else signal.SIGKILL)
        code = self.cluster.processes[name].wait(60)
        if drained and code != 0:
            self.fail(f"{name} drained with {code}")
        self.count("drained" if drained else "killed")
        self.cluster.start(name)
        self.cluster.wait_ready()

    def round(self, number, wounds):
        until = time.monotonic() + ROUND_SECONDS
        clients = [threading.Thread(target=self.client, args=(1000 * number + i, until)) for i in range(CLIENTS)]
        for client in clients:
            client.start()
        while wounds and time.monotonic() + WOUND_EVERY_SECONDS < until and not self.failures:
            time.sleep(self.draw.uniform(1, WOUND_EVERY_SECONDS))
            self.wound()
        for client in clients:
            client.join()
        self.cluster.expect_nothing_left()

    def resident(self, name):
        with open(f"/proc/{self.cluster.processes[name].pid}/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def holdings(self, names):
        return {name: (self.resident(name), self.cluster.descriptors(name), self.cluster.threads(name))
                for name in names}

    def check_growth(self, before):
        time.sleep(5)  # connections and threads that wait for more work go
        for name, (bytes_now, descriptors, threads) in self.holdings(before).items():
            bytes_then, descriptors_then, threads_then = before[name]
            if bytes_now > bytes_then + max(SLACK_BYTES, bytes_then // 50):
                self.fail(f"{name}: {bytes_then >> 20} MiB have become {bytes_now >> 20}")
            if descriptors > descriptors_then + 8 or threads > threads_then + 8:
                self.fail(f"{name}: {descriptors_then} descriptors and {threads_then} threads have become "
                          f"{descriptors} and {threads}")


def main():
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 10
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    print(f"soak: {minutes:g} minutes, seed {seed}", flush=True)
    end = time.monotonic() + 60 * minutes
    with Cluster(prefill=2, decode=2, experts=2) as cluster:
        soak = Soak(cluster, seed)
        # The second round is the yardstick: everything has been used, every worker has died once or been replaced.
        soak.round(0, wounds=True)
        soak.round(1, wounds=False)
        router = soak.holdings(["router"])
        number = 2
        while number == 2 or time.monotonic() < end and not soak.failures:
            everybody = soak.holdings(cluster.roles)
            soak.round(number, wounds=False)
            soak.check_growth(everybody)
            soak.round(number + 1, wounds=True)
            soak.check_growth(router)
            number += 2
            print(f"soak: round {number}, {soak.counts}", flush=True)
        for failure in soak.failures[:20]:
            print("soak: FAILED:", failure, flush=True)
        if soak.failures:
            cluster.show_logs()
        missing = [what for what, count in soak.counts.items() if count == 0 and what != "refused"]
        if missing:
            print("soak: FAILED: never happened:", ", ".join(missing), flush=True)
    return 1 if soak.failures or missing else 0


if __name__ == "__main__":
    sys.exit(main())
