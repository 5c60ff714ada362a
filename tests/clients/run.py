# SPDX-License-Identifier: Apache-2.0
"""Runs one suite of the client tests: run.py python|node|grpcurl|browser [ARGUMENTS of the suite].

Installs the client if it is not there (install.sh) and starts its suite where it finds it. Exit status: the suite's; 77
when the client cannot be had, which ctest reports as skipped.
"""
import os
import signal
import subprocess
import sys
import threading

from case import CACHE, HERE, MODEL, Cluster

MAX_REQUESTS = 4


def run_node(arguments):
    """The suite is JavaScript: the cluster is ours and it hears of it by its environment."""
    with Cluster(experts=2, router_section={"max_requests": MAX_REQUESTS}) as cluster:
        environment = dict(os.environ,
                           MILLRACE_NODE_SDK=os.path.join(CACHE, "node"),
                           MILLRACE_MODEL=MODEL,
                           MILLRACE_MAX_REQUESTS=str(MAX_REQUESTS),
                           MILLRACE_URL=f"http://127.0.0.1:{cluster.http_port}/v1",
                           MILLRACE_OPERATOR_URL=f"http://127.0.0.1:{cluster.operator_port}/")
        status = subprocess.call(["node", os.path.join(HERE, "node_test.mjs"), *arguments], env=environment)
        if status == 0:
            cluster.expect_nothing_left()
        else:
            cluster.show_logs()
    return status


def turn_router(cluster, words):
    """Ends the router at "off", starts it again at "on", until the suite has closed its end."""
    for word in words:
        if word.strip() == "off":
            cluster.kill("router", signal.SIGTERM)
            cluster.processes["router"].wait(40)
        else:
            cluster.start("router")


def run_browser(arguments):
    """The status page in Chromium. Two workers of each role, since one will be drained."""
    with Cluster(prefill=2, decode=2, experts=2) as cluster:
        read_end, write_end = os.pipe()
        threading.Thread(target=turn_router, args=(cluster, os.fdopen(read_end)), daemon=True).start()
        environment = dict(os.environ,
                           MILLRACE_BROWSER=os.path.join(CACHE, "browser"),
                           MILLRACE_URL=f"http://127.0.0.1:{cluster.http_port}/",
                           MILLRACE_OPERATOR_URL=f"http://127.0.0.1:{cluster.operator_port}/",
                           MILLRACE_ROUTER_SWITCH=str(write_end))
        status = subprocess.call(["node", os.path.join(HERE, "browser_test.mjs"), *arguments], env=environment,
                                 pass_fds=[write_end])
        os.close(write_end)
        if status == 0:
            cluster.expect_nothing_left()
        else:
            cluster.show_logs()
    return status


def main():
    suite, *arguments = sys.argv[1:] or [""]
    installed = subprocess.call([os.path.join(HERE, "install.sh"), suite])
    if installed != 0:
        return installed
    if suite == "node":
        return run_node(arguments)
    if suite == "browser":
        return run_browser(arguments)
    interpreter = os.path.join(CACHE, "python/bin/python") if suite == "python" else sys.executable
    return subprocess.call([interpreter, "-B", os.path.join(HERE, f"{suite}_test.py"), *arguments])


if __name__ == "__main__":
    sys.exit(main())
