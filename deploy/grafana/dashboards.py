#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes the Grafana dashboards into the chart: helm/millrace/files/dashboards/*.json.

    deploy/grafana/dashboards.py            write them
    deploy/grafana/dashboards.py --check    say which differ from what would be written; exit 1 if any does

The JSON is committed, so that nobody needs this script to install anything, and is never edited by hand. A panel is a
title, a sentence that says what to look for, queries, and a unit; where it lies follows from its place in the list.
Selectors are written $sel and become the dashboard's variables. Metrics that do not exist make
tests/helm/monitoring_test.py fail.
"""
import json
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
OUTPUT = os.path.join(ROOT, "helm/millrace/files/dashboards")
SELECTOR = 'namespace=~"$namespace"'
WIDTH, HEIGHT = 24, 8


def quantiles(metric, by="", selector="", labels=""):
    """p50, p95 and p99 of a histogram."""
    group = f"le, {by}" if by else "le"
    inside = ",".join(part for part in ("$sel", selector) if part)
    return [(f"histogram_quantile({q}, sum by ({group}) (rate({metric}_bucket{{{inside}}}[$__rate_interval])))",
             f"p{int(q * 100)}{labels}") for q in (0.5, 0.95, 0.99)]


def panel(title, why, queries, unit="short", kind="timeseries", width=8, stack=False, bounds=None):
    return {"title": title, "why": why, "queries": queries, "unit": unit, "kind": kind, "width": width, "stack": stack,
            "bounds": bounds}


OVERVIEW = ("Overview", "millrace-overview", "Whether users are served, and by whom.", [
    ("Promises", [
        panel("Requests a second", "By HTTP status; 499 is a client that left.",
              [('sum by (code) (rate(millrace_http_requests_total{$sel,route=~"/v1/.*"}[$__rate_interval]))',
                "{{code}}")],
              "reqps", stack=True),
        panel("Time to first token", "Objective: 95 % within 2.5 s.", quantiles("millrace_time_to_first_token_seconds"),
              "s", bounds=(2.5,)),
        panel("Time between tokens", "Objective: 99 % below 100 ms.", quantiles("millrace_inter_token_seconds"), "s",
              bounds=(0.1,)),
        panel("Budget burnt, 1 h", "1 is what the objective allows for ever; 14.4 wakes somebody.",
              [('namespace:millrace_first_token_late:ratio_rate1h{$sel} / 0.05', "late first tokens"),
               ('namespace:millrace_token_late:ratio_rate1h{$sel} / 0.01', "late tokens"),
               ('namespace:millrace_generations_failed:ratio_rate1h{$sel} / 0.01', "failed generations")],
              bounds=(1, 14.4)),
        panel("Generations ended", "stop and length are well; the rest is named by its status.",
              [("sum by (outcome) (rate(millrace_router_generations_total{$sel}[$__rate_interval]))", "{{outcome}}")],
              "reqps", stack=True),
        panel("Refused", "Before any work, by code: by the flow, and 429s of the HTTP front.",
              [("sum by (code) (rate(millrace_router_refusals_total{$sel}[$__rate_interval]))", "{{code}}")], "reqps"),
    ]),
    ("Processes", [
        panel("Resident memory", "Mapped checkpoint pages included; a line that only rises is a leak.",
              [("process_resident_memory_bytes{job=\"millrace\"}", "{{instance}}")], "bytes"),
        panel("Processor time", "Cores in use.",
              [("rate(process_cpu_seconds_total{job=\"millrace\"}[$__rate_interval])", "{{instance}}")]),
        panel("File descriptors", "Connections, mostly.",
              [("process_open_fds{job=\"millrace\"}", "{{instance}}")]),
    ]),
    ("Cluster", [
        panel("Ready workers", "By role; 0 of prefill or decode serves nobody.",
              [('sum by (role) (millrace_router_workers{$sel,state="ready"})', "{{role}}")], kind="stat"),
        panel("Workers that do not serve", "loading is normal after a start; waiting and suspect are not.",
              [('sum by (role, state) (millrace_router_workers{$sel,state!="ready"}) > 0 or on () vector(0)',
                "{{role}} {{state}}")]),
        panel("Tokens a second", "Prompt tokens computed, tokens generated.",
              [("sum(rate(millrace_prompt_tokens_total{$sel}[$__rate_interval]))", "prompt"),
               ("sum(rate(millrace_generation_tokens_total{$sel}[$__rate_interval]))", "generated")], "short"),
        panel("Busy share of engines", "Time inside passes; near 1 a role is the bottleneck.",
              [("namespace_role:millrace_engine_busy:ratio_rate5m{$sel}", "{{role}}")], "percentunit", bounds=(0.9,)),
        panel("Weights loaded", "Of the bytes to prepare, by worker.",
              [("millrace_load_bytes{$sel} / millrace_load_target_bytes{$sel}", "{{worker}}")], "percentunit"),
        panel("Scraped processes", "Whose /metrics answers.", [('sum(up{job="millrace"})', "answer")], kind="stat"),
        panel("Where requests wait", "By stage and by what for; the longest line is what to add.",
              [('sum by (role, stage, reason) (millrace_queue_requests{$sel})', "{{role}} {{stage}} {{reason}}")],
              stack=True, width=16),
        panel("What runs", "Versions and models; more than one of either is an upgrade under way.",
              [('count by (version) (millrace_build_info{$sel})', "{{version}}"),
               ('count by (model, numerics) (millrace_model_info{$sel,role!="router"})', "{{model}} {{numerics}}")],
              kind="stat"),
    ]),
])

ROUTER = ("Router", "millrace-router", "Admission, queue, placement, and the HTTP front.", [
    ("Requests", [
        panel("In flight", "running without waiting is decoding.",
              [("sum(millrace_requests_running{$sel})", "running"), ("sum(millrace_requests_waiting{$sel})",
                                                                     "without a first token")]),
        panel("Generations", "queued: no place yet. attempts: not yet confirmed gone at both workers.",
              [("sum(millrace_router_generations_open{$sel})", "open"),
               ("sum(millrace_router_generations_queued{$sel})", "queued"),
               ("sum(millrace_router_attempts_open{$sel})", "attempts")]),
        panel("Duration", "Last byte of the request to last byte queued.",
              quantiles("millrace_request_duration_seconds"), "s"),
        panel("Generations, end to end", "Those that ended well, through any front.",
              quantiles("millrace_router_generation_seconds"), "s"),
        panel("Time per output token", "Of a choice, first token to last.",
              quantiles("millrace_time_per_output_token_seconds"), "s", bounds=(0.1,)),
        panel("Decision", "How long placement thinks.", quantiles("millrace_router_decision_seconds"), "s"),
        panel("Waiting for a place", "Acceptance to placement.", quantiles("millrace_router_queue_seconds"), "s"),
        panel("Placement to first token", "Prefill, with its queue.",
              quantiles("millrace_router_prefill_seconds"), "s"),
        panel("Placements refused by a worker", "The router's picture was older than the worker's.",
              [("sum(rate(millrace_router_requeues_total{$sel}[$__rate_interval]))", "requeued")], "reqps"),
        panel("Prompt length", "Tokens.", quantiles("millrace_prompt_tokens")),
        panel("Output length", "Tokens of a choice.", quantiles("millrace_generation_tokens")),
        panel("Tokens forwarded", "repeated: dropped because they had been forwarded before.",
              [("sum(rate(millrace_router_tokens_total{$sel}[$__rate_interval]))", "forwarded"),
               ("sum(rate(millrace_router_tokens_repeated_total{$sel}[$__rate_interval]))", "repeated")]),
    ]),
    ("Front and members", [
        panel("HTTP connections", "Open now.", [("sum(millrace_http_connections{$sel})", "open")]),
        panel("Connections refused", "At accept, by reason.",
              [("sum by (reason) (rate(millrace_http_connections_refused_total{$sel}[$__rate_interval]))",
                "{{reason}}")], "cps"),
        panel("Slow consumers", "Streams of clients that read too slowly; tool calls that could not be parsed.",
              [("sum(rate(millrace_slow_consumers_total{$sel}[$__rate_interval]))", "slow consumers"),
               ("sum(rate(millrace_unreadable_tool_calls_total{$sel}[$__rate_interval]))", "unreadable tool calls")]),
        panel("Workers by state", "As the router hears them.",
              [("sum by (role, state) (millrace_router_workers{$sel})", "{{role}} {{state}}")], stack=True, width=16),
        panel("Workers that came and left", "Or fell silent.",
              [("sum(increase(millrace_router_worker_joins_total{$sel}[$__rate_interval]))", "joined"),
               ("sum(increase(millrace_router_worker_deaths_total{$sel}[$__rate_interval]))", "left")]),
        panel("Room of the cluster", "Cache pages of serving workers.",
              [('sum by (role, state) (millrace_router_cache_pages{$sel})', "{{role}} {{state}}")], stack=True),
    ]),
])

PREFILL = ("Prefill and hand-off", "millrace-prefill", "Prompts computed, and their state on its way to decode.", [
    ("Prefill", [
        panel("Queue", "Accepted and not started; running: prompts that a pass may move.",
              [('sum by (worker) (millrace_worker_queued{$sel,role="prefill"})', "queued {{worker}}"),
               ('sum by (worker) (millrace_worker_running{$sel,role="prefill"})', "running {{worker}}")]),
        panel("Wait for the first pass", "Acceptance by the worker to its first pass.",
              quantiles("millrace_worker_queue_seconds", selector='role="prefill"'), "s"),
        panel("Prompt tokens a second", "By worker.",
              [('sum by (worker) (rate(millrace_worker_tokens_total{$sel,role="prefill"}[$__rate_interval]))',
                "{{worker}}")], stack=True),
        panel("Duration of a pass", "Grows with its rows.",
              quantiles("millrace_engine_step_seconds", selector='role="prefill"'), "s"),
        panel("Rows of a pass", "Up to max_batch_tokens.",
              quantiles("millrace_engine_step_rows", selector='role="prefill"')),
        panel("Busy share", "Time inside passes, by worker.",
              [('rate(millrace_engine_step_seconds_sum{$sel,role="prefill"}[$__rate_interval])', "{{worker}}")],
              "percentunit", bounds=(0.9,)),
        panel("Pages owned", "Of prompts being computed or handed off.",
              [('sum by (worker) (millrace_cache_pages{$sel,role="prefill",state="owned"})', "{{worker}}")]),
        panel("Ended, by status", "OK is a prompt whose state was taken over.",
              [('sum by (code) (rate(millrace_worker_requests_total{$sel,role="prefill"}[$__rate_interval]))',
                "{{code}}")],
              "reqps", stack=True),
        panel("Refused", "Before any work.",
              [('sum by (reason) (rate(millrace_worker_rejected_total{$sel,role="prefill"}[$__rate_interval]))',
                "{{reason}}")], "reqps"),
    ]),
    ("Hand-off", [
        panel("First token to verified state", "As the router sees it.",
              quantiles("millrace_router_handoff_seconds"), "s"),
        panel("The same at the workers", "By prefill worker.",
              quantiles("millrace_handoff_seconds", selector='role="prefill"'), "s"),
        panel("In flight", "Prompts whose state is leaving, by phase.",
              [('sum by (phase) (millrace_handoffs_in_flight{$sel})', "{{phase}}")], stack=True),
        panel("Phases, p95", "reserve at the router, stream, tail and commit at prefill, verify at decode.",
              [('histogram_quantile(0.95, sum by (le, phase) '
                '(rate(millrace_handoff_phase_seconds_bucket{$sel}[$__rate_interval])))', "{{phase}}")], "s"),
        panel("Bytes a second", "Of verified hand-offs.",
              [('sum by (worker) (rate(millrace_transfer_bytes_total{$sel,role="prefill"}[$__rate_interval]))',
                "{{worker}}"),
               ("sum(rate(millrace_router_handoff_bytes_total{$sel}[$__rate_interval]))", "all")], "Bps"),
        panel("Failed", "By reason; each is a request that ends with handoff_failed.",
              [("sum by (reason) (rate(millrace_transfer_failures_total{$sel}[$__rate_interval]))", "{{reason}}")],
              "reqps"),
        panel("Blocks sent again", "Repaired after a failed proof. Not 0: look at the network.",
              [("sum(rate(millrace_router_handoff_resent_extents_total{$sel}[$__rate_interval]))", "all"),
               ('sum by (worker) (rate(millrace_transfer_resent_extents_total{$sel,role="prefill"}[$__rate_interval]))',
                "{{worker}}")]),
        panel("Transport", "Connections that broke, sends that failed, messages dropped on arrival.",
              [("sum(rate(millrace_transport_peers_failed_total{$sel}[$__rate_interval]))", "connections broken"),
               ("sum(rate(millrace_transport_errors_total{$sel}[$__rate_interval])) or vector(0)", "failed"),
               ("sum by (reason) (rate(millrace_transport_drops_total{$sel}[$__rate_interval])) or vector(0)",
                "dropped {{reason}}")]),
        panel("Carried by the transport", "Blocks and rows, sent.",
              [('sum by (role) (rate(millrace_transport_bytes_total{$sel,direction="sent"}[$__rate_interval]))',
                "{{role}}")], "Bps", stack=True),
        panel("Aborts without an answer", "Given up; something may be held.",
              [("sum(increase(millrace_router_aborts_unanswered_total{$sel}[$__rate_interval]))", "unanswered")]),
    ]),
])

DECODE = ("Decode and cache", "millrace-decode", "Sequences, pages and slots.", [
    ("Decode", [
        panel("Sequences", "What a pass moves.",
              [('sum by (worker) (millrace_worker_running{$sel,role="decode"})', "{{worker}}")]),
        panel("Tokens a second", "By worker.",
              [('sum by (worker) (rate(millrace_worker_tokens_total{$sel,role="decode"}[$__rate_interval]))',
                "{{worker}}")], stack=True),
        panel("Duration of a pass", "The floor of the time between tokens.",
              quantiles("millrace_engine_step_seconds", selector='role="decode"'), "s"),
        panel("Sequences of a pass", "Up to max_batch.",
              quantiles("millrace_engine_step_rows", selector='role="decode"')),
        panel("Passes a second", "0 with running sequences is a stuck engine.",
              [('sum by (worker) (rate(millrace_engine_steps_total{$sel,role="decode"}[$__rate_interval]))',
                "{{worker}}")]),
        panel("Leases", "receiving: the state is on its way; committed: no pass yet; ending: not yet given back.",
              [('sum by (state) (millrace_leases{$sel})', "{{state}}")], stack=True),
        panel("Leases granted", "A second.",
              [('sum by (worker) (rate(millrace_leases_granted_total{$sel}[$__rate_interval]))', "{{worker}}")], "reqps"),
        panel("Leases ended, by status", "OK is a sequence that came to its end.",
              [('sum by (code) (rate(millrace_worker_requests_total{$sel,role="decode"}[$__rate_interval]))',
                "{{code}}")],
              "reqps", stack=True),
    ]),
    ("Cache", [
        panel("Pages owned, share", "Above 95 % new requests wait.",
              [('sum by (worker) (millrace_cache_pages{$sel,role="decode",state="owned"})'
                ' / sum by (worker) (millrace_cache_pages{$sel,role="decode"})', "{{worker}}")],
              "percentunit", bounds=(0.95,)),
        panel("Pages", "128 tokens each; prompt and max_tokens of every lease are reserved in full.",
              [('sum by (state) (millrace_cache_pages{$sel,role="decode"})', "{{state}}")], stack=True),
        panel("Slots", "One a sequence.",
              [('sum by (state) (millrace_state_slots{$sel,role="decode"})', "{{state}}")], stack=True),
        panel("Reserve refused", "No page, no slot, draining.",
              [('sum by (reason) (rate(millrace_worker_rejected_total{$sel,role="decode"}[$__rate_interval]))',
                "{{reason}}")], "reqps"),
        panel("Bytes received", "Of verified hand-offs.",
              [('sum by (worker) (rate(millrace_transfer_bytes_total{$sel,role="decode"}[$__rate_interval]))',
                "{{worker}}")], "Bps", width=16),
    ]),
])

EXPERTS = ("Experts", "millrace-experts", "The pool: who computes how much, and who is behind.", [
    ("Pool", [
        panel("Members", "waiting elsewhere means that an expert has no member.",
              [('sum by (state) (millrace_router_workers{$sel,role="expert"})', "{{state}}")], stack=True),
        panel("Rows times experts a second", "By member: uneven lines are uneven experts.",
              [('sum by (worker) (rate(millrace_worker_tokens_total{$sel,role="expert"}[$__rate_interval]))',
                "{{worker}}")]),
        panel("Imbalance", "Busiest member over the mean; 1 is even.",
              [('max(rate(millrace_worker_tokens_total{$sel,role="expert"}[$__rate_interval]))'
                ' / avg(rate(millrace_worker_tokens_total{$sel,role="expert"}[$__rate_interval]))', "max / mean")],
              bounds=(2,)),
        panel("Busiest experts", "Rows a second of the ten busiest; far apart is uneven routing.",
              [('topk(10, sum by (expert) (rate(millrace_expert_tokens_total{$sel}[$__rate_interval])))',
                "expert {{expert}}")]),
        panel("Waves", "Messages of each wave.",
              [('sum by (wave) (rate(millrace_expert_wave_messages_total{$sel}[$__rate_interval]))', "wave {{wave}}")],
              stack=True),
        panel("Passes stand still", "Share of time in which a pass waits for the pool's rows.",
              [('rate(millrace_expert_exchange_wait_seconds_total{$sel}[$__rate_interval])', "{{worker}}")],
              "percentunit"),
        panel("Failed batches", "A member lost or late: the pass ends, and its requests with it.",
              [('sum by (worker) (rate(millrace_expert_exchange_failed_batches_total{$sel}[$__rate_interval]))',
                "{{worker}}")]),
        panel("Messages refused", "The queue of a member is full; each refusal ends a pass.",
              [('sum by (worker) (rate(millrace_worker_rejected_total{$sel,role="expert"}[$__rate_interval]))',
                "{{worker}}")], "reqps"),
        panel("Duration of a batch", "One wave of one layer.",
              quantiles("millrace_engine_step_seconds", selector='role="expert"'), "s"),
        panel("Rows of a batch", "Small ones cost as much as larger ones.",
              quantiles("millrace_engine_step_rows", selector='role="expert"')),
        panel("Busy share", "Time inside batches.",
              [('rate(millrace_engine_step_seconds_sum{$sel,role="expert"}[$__rate_interval])', "{{worker}}")],
              "percentunit", bounds=(0.9,)),
        panel("Messages, by status", "OK is a reply that was sent.",
              [('sum by (code) (rate(millrace_worker_requests_total{$sel,role="expert"}[$__rate_interval]))',
                "{{code}}")],
              "reqps"),
        panel("Median duration by member", "One line above the rest is a slow machine.",
              [('histogram_quantile(0.5, sum by (le, worker) '
                '(rate(millrace_engine_step_seconds_bucket{$sel,role="expert"}[$__rate_interval])))', "{{worker}}")],
              "s"),
    ]),
])

DASHBOARDS = (OVERVIEW, ROUTER, PREFILL, DECODE, EXPERTS)


def variables():
    return [
        {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
        {"name": "namespace", "label": "Namespace", "type": "query", "datasource": {"type": "prometheus",
                                                                                    "uid": "${datasource}"},
         "query": {"query": "label_values(millrace_router_generations_open, namespace)", "refId": "namespaces"},
         # Outside Kubernetes there is no such label; ".*" matches its absence.
         "includeAll": True, "allValue": ".*", "multi": True, "refresh": 2, "sort": 1,
         "current": {"text": "All", "value": "$__all"}},
    ]


def render_panel(spec, identity, x, y):
    defaults = {"unit": spec["unit"], "min": 0, "custom": {"fillOpacity": 20 if spec["stack"] else 5, "lineWidth": 1,
                                                         "stacking": {"mode": "normal" if spec["stack"] else "none"}}}
    if spec["bounds"]:
        steps = [{"color": "green", "value": None}]
        steps += [{"color": color, "value": bound} for color, bound in zip(("orange", "red"), spec["bounds"])]
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
        defaults["custom"]["thresholdsStyle"] = {"mode": "dashed"}
    if spec["kind"] == "stat":
        defaults.pop("custom")
    return {
        "id": identity, "type": spec["kind"], "title": spec["title"], "description": spec["why"],
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "gridPos": {"x": x, "y": y, "w": spec["width"], "h": HEIGHT},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
        if spec["kind"] == "timeseries" else {"reduceOptions": {"calcs": ["lastNotNull"]}},
        "targets": [{"refId": chr(ord("A") + i), "expr": expression.replace("$sel", SELECTOR), "legendFormat": legend,
                     "datasource": {"type": "prometheus", "uid": "${datasource}"}}
                    for i, (expression, legend) in enumerate(spec["queries"])],
    }


def render(dashboard):
    title, uid, why, rows = dashboard
    panels, identity, y = [], 0, 0
    for row, specs in rows:
        identity += 1
        panels.append({"id": identity, "type": "row", "title": row, "collapsed": False, "panels": [],
                       "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1}})
        x, y = 0, y + 1
        for spec in specs:
            if x + spec["width"] > WIDTH:
                x, y = 0, y + HEIGHT
            identity += 1
            panels.append(render_panel(spec, identity, x, y))
            x += spec["width"]
        y += HEIGHT
    return {
        "uid": uid, "title": f"Millrace / {title}", "description": why, "tags": ["millrace"], "schemaVersion": 39,
        "version": 1, "editable": False, "timezone": "browser", "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"}, "graphTooltip": 1, "templating": {"list": variables()},
        "links": [{"type": "dashboards", "title": "Millrace", "tags": ["millrace"], "includeVars": True,
                   "keepTime": True}],
        "annotations": {"list": [{
            "name": "Alerts", "enable": True, "iconColor": "red",
            "datasource": {"type": "prometheus", "uid": "${datasource}"},
            "expr": 'ALERTS{alertname=~"Millrace.*",alertstate="firing",' + SELECTOR + "}",
            "titleFormat": "{{alertname}}", "textFormat": "{{severity}} {{role}} {{worker}}"}]},
        "panels": panels,
    }


def main():
    check = sys.argv[1:] == ["--check"]
    if sys.argv[1:] and not check:
        sys.exit(__doc__)
    different = []
    for dashboard in DASHBOARDS:
        path = os.path.join(OUTPUT, dashboard[1].removeprefix("millrace-") + ".json")
        text = json.dumps(render(dashboard), indent=1) + "\n"
        if check:
            with open(path) as source:
                if source.read() != text:
                    different.append(os.path.relpath(path, ROOT))
        else:
            with open(path, "w") as out:
                out.write(text)
    if different:
        sys.exit("differ from deploy/grafana/dashboards.py: " + ", ".join(different))


if __name__ == "__main__":
    main()
