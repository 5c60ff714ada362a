#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes the Grafana dashboards into the chart: helm/millrace/files/dashboards/*.json.

    deploy/grafana/dashboards.py            write them
    deploy/grafana/dashboards.py --check    say which differ from what would be written; exit 1 if any does

The JSON is committed, so that nobody needs this script to install anything, and is never edited by hand. A panel is a
title, a sentence that says what to look for, queries, and a unit; where it lies follows from its place in the list.
A query is made by rate(), gauge(), quantiles() and their like, which know the dashboard's variables. Metrics that do
not exist, panels that show nothing and fields that Grafana's types do not have make tests/helm/monitoring_test.py fail.
"""
import json
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
OUTPUT = os.path.join(ROOT, "helm/millrace/files/dashboards")
WIDTH, HEIGHT = 24, 8
NAMESPACE = 'namespace=~"$namespace"'
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


# Queries: lists of (expression, legend), so that a panel's can be added up. `where` narrows to labels; `by` keeps some,
# and they become the legend unless one is given.

def selected(metric, where="", window=""):
    return f"{metric}{{{','.join(filter(None, (NAMESPACE, where)))}}}{window}"


def increase_of(metric, where="", function="rate"):
    return f"{function}({selected(metric, where, '[$__rate_interval]')})"


def total(expression, by="", legend=""):
    labels = " ".join("{{%s}}" % label for label in by.split(", "))
    return [(f"sum by ({by}) ({expression})" if by else f"sum({expression})", legend or labels)]


def rate(metric, by="", legend="", where=""):
    """A counter, a second."""
    return total(increase_of(metric, where), by, legend)


def increase(metric, legend):
    """A counter that seldom moves: events in a step of the graph."""
    return total(increase_of(metric, function="increase"), "", legend)


def gauge(metric, by="", legend="", where=""):
    return total(selected(metric, where), by, legend)


def count(metric, by, where=""):
    return [(f"count by ({by}) ({selected(metric, where)})", legend) for _, legend in total("", by)]


def busy(role):
    """Share of the time that an engine spends inside its passes."""
    return [(increase_of("millrace_engine_step_seconds_sum", f'role="{role}"'), "{{worker}}")]


def quantile(share, metric, by="", legend="", where=""):
    group = ", ".join(filter(None, ("le", by)))
    expression = f"histogram_quantile({share}, sum by ({group}) ({increase_of(metric + '_bucket', where)}))"
    return [(expression, legend or "{{%s}}" % by)]


def quantiles(metric, where=""):
    """p50, p95 and p99 of a histogram."""
    return [query for share in (0.5, 0.95, 0.99)
            for query in quantile(share, metric, legend=f"p{int(share * 100)}", where=where)]


def above_zero(queries):
    """Of many states only those that somebody is in."""
    return [(f"{expression} > 0", legend) for expression, legend in queries]


def or_none(queries, label):
    """What is often absent because nothing of it happened: a 0 called none instead of a hole."""
    return [(f'{expression} or on () label_replace(vector(0), "{label}", "none", "", "")', legend)
            for expression, legend in queries]


def panel(title, why, queries, unit="short", kind="timeseries", width=8, stack=False, bounds=None):
    return {"title": title, "why": why, "queries": queries, "unit": unit, "kind": kind, "width": width, "stack": stack,
            "bounds": bounds}


OVERVIEW = ("Overview", "millrace-overview", "Whether users are served, and by whom.", [
    ("Promises", [
        panel("Requests a second", "By HTTP status; 499 is a client that left.",
              rate("millrace_http_requests_total", "code", where='route=~"/v1/.*"'), "reqps", stack=True),
        panel("Time to first token", "Objective: 95 % within 2.5 s.", quantiles("millrace_time_to_first_token_seconds"),
              "s", bounds=(2.5,)),
        panel("Time between tokens", "Objective: 99 % below 100 ms.", quantiles("millrace_inter_token_seconds"), "s",
              bounds=(0.1,)),
        panel("Budget burnt, 1 h", "1 is what the objective allows for ever; 14.4 wakes somebody.",
              [(selected("namespace:millrace_first_token_late:ratio_rate1h") + " / 0.05", "late first tokens"),
               (selected("namespace:millrace_token_late:ratio_rate1h") + " / 0.01", "late tokens"),
               (selected("namespace:millrace_generations_failed:ratio_rate1h") + " / 0.01", "failed generations")],
              bounds=(1, 14.4)),
        panel("Generations ended", "stop and length are well; the rest is named by its status.",
              rate("millrace_router_generations_total", "outcome"), "reqps", stack=True),
        panel("Refused", "Before any work, by code: by the flow, and 429s of the HTTP front.",
              rate("millrace_router_refusals_total", "code"), "reqps"),
    ]),
    ("Cluster", [
        panel("Ready workers", "By role; 0 of prefill or decode serves nobody.",
              gauge("millrace_router_workers", "role", where='state="ready"'), kind="stat"),
        panel("Scraped processes", "Whose /metrics answers.",
              [('sum(up{job="millrace"})', "answer")], kind="stat"),
        panel("What runs", "More than one version or model is an upgrade under way.",
              count("millrace_build_info", "version") + count("millrace_model_info", "model, numerics", 'role!="router"'),
              kind="stat"),
        panel("Where requests wait", "By stage and by what for; the thickest band is what to add.",
              gauge("millrace_queue_requests", "stage, reason", "{{stage}}: {{reason}}"), stack=True, width=16),
        panel("Workers that do not serve", "loading is normal after a start; waiting and suspect are not.",
              or_none(above_zero(gauge("millrace_router_workers", "role, state", where='state!="ready"')), "state")),
        panel("Tokens a second", "Prompt tokens accepted, tokens generated.",
              rate("millrace_prompt_tokens_total", legend="prompt")
              + rate("millrace_generation_tokens_total", legend="generated")),
        panel("Busy share of engines", "Time inside passes; near 1 a role is the bottleneck.",
              [(selected("namespace_role:millrace_engine_busy:ratio_rate5m"), "{{role}}")], "percentunit",
              bounds=(0.9,)),
        panel("Weights loaded", "Of the bytes to prepare, by worker.",
              [(f"{selected('millrace_load_bytes')} / {selected('millrace_load_target_bytes')}", "{{worker}}")],
              "percentunit"),
    ]),
    ("Processes", [
        panel("Resident memory", "Mapped checkpoint pages included; a line that only rises is a leak.",
              [('process_resident_memory_bytes{job="millrace"}', "{{instance}}")], "bytes"),
        panel("Processor time", "Cores in use.",
              [('rate(process_cpu_seconds_total{job="millrace"}[$__rate_interval])', "{{instance}}")]),
        panel("File descriptors", "Connections, mostly.",
              [('process_open_fds{job="millrace"}', "{{instance}}")]),
    ]),
])

ROUTER = ("Router", "millrace-router", "Admission, queue, placement, and the HTTP front.", [
    ("Requests", [
        panel("In flight", "What runs and does not wait is decoding.",
              gauge("millrace_requests_running", legend="running")
              + gauge("millrace_requests_waiting", legend="without a first token")),
        panel("Generations", "queued: no place yet. attempts: not yet gone at both workers.",
              gauge("millrace_router_generations_open", legend="open")
              + gauge("millrace_router_generations_queued", legend="queued")
              + gauge("millrace_router_attempts_open", legend="attempts")),
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
              rate("millrace_router_requeues_total", legend="requeued"), "reqps"),
        panel("Prompt length", "Tokens.", quantiles("millrace_prompt_tokens")),
        panel("Output length", "Tokens of a choice.", quantiles("millrace_generation_tokens")),
        panel("Tokens forwarded", "A second. repeated: dropped because they had been forwarded before.",
              rate("millrace_router_tokens_total", legend="forwarded")
              + rate("millrace_router_tokens_repeated_total", legend="repeated")),
    ]),
    ("Front and members", [
        panel("HTTP connections", "Open now.", gauge("millrace_http_connections", legend="open")),
        panel("Connections refused", "At accept, by reason.",
              rate("millrace_http_connections_refused_total", "reason"), "cps"),
        panel("Slow consumers", "Clients that read too slowly; tool calls that could not be parsed.",
              rate("millrace_slow_consumers_total", legend="slow consumers")
              + rate("millrace_unreadable_tool_calls_total", legend="unreadable tool calls"), "reqps"),
        panel("Workers by state", "As the router hears them.",
              above_zero(gauge("millrace_router_workers", "role, state")), stack=True, width=16),
        panel("Workers that came and left", "Or fell silent.",
              increase("millrace_router_worker_joins_total", "joined")
              + increase("millrace_router_worker_deaths_total", "left")),
        panel("Room of the cluster", "Cache pages of serving workers.",
              gauge("millrace_router_cache_pages", "role, state"), stack=True, width=16),
        panel("Spans of traces", "A second; dropped: the queue was full, failed: the collector was away.",
              or_none(rate("millrace_trace_spans_total", "outcome"), "outcome")),
    ]),
])

PREFILL = ("Prefill and hand-off", "millrace-prefill", "Prompts computed, and their state on its way to decode.", [
    ("Prefill", [
        panel("Queue", "Accepted and not started; running: prompts that a pass may move.",
              gauge("millrace_worker_queued", "worker", "queued {{worker}}", 'role="prefill"')
              + gauge("millrace_worker_running", "worker", "running {{worker}}", 'role="prefill"')),
        panel("Wait for the first pass", "Acceptance by the worker to its first pass.",
              quantiles("millrace_worker_queue_seconds", 'role="prefill"'), "s"),
        panel("Prompt tokens a second", "By worker.",
              rate("millrace_worker_tokens_total", "worker", where='role="prefill"'), stack=True),
        panel("Duration of a pass", "Grows with its rows.",
              quantiles("millrace_engine_step_seconds", 'role="prefill"'), "s"),
        panel("Rows of a pass", "Up to max_batch_tokens.", quantiles("millrace_engine_step_rows", 'role="prefill"')),
        panel("Busy share", "Time inside passes, by worker.", busy("prefill"), "percentunit", bounds=(0.9,)),
        panel("Pages owned", "Of prompts being computed or handed off.",
              gauge("millrace_cache_pages", "worker", where='role="prefill",state="owned"')),
        panel("Ended, by status", "OK is a prompt whose state was taken over.",
              rate("millrace_worker_requests_total", "code", where='role="prefill"'), "reqps", stack=True),
        panel("Refused", "Before any work.",
              rate("millrace_worker_rejected_total", "reason", where='role="prefill"'), "reqps"),
    ]),
    ("Hand-off", [
        panel("First token to verified state", "As the router sees it.",
              quantiles("millrace_router_handoff_seconds"), "s"),
        panel("The same at the workers", "Of all prefill workers.",
              quantiles("millrace_handoff_seconds", 'role="prefill"'), "s"),
        panel("In flight", "Prompts whose state is leaving, by phase.",
              gauge("millrace_handoffs_in_flight", "phase"), stack=True),
        panel("Phases, p95", "reserve at the router; stream, tail and commit at prefill; verify at decode.",
              quantile(0.95, "millrace_handoff_phase_seconds", "phase"), "s"),
        panel("Bytes a second", "Of verified hand-offs; all: as the router counts them.",
              rate("millrace_transfer_bytes_total", "worker", where='role="prefill"')
              + rate("millrace_router_handoff_bytes_total", legend="all"), "Bps"),
        panel("Failed", "By reason; each is a request that ends with handoff_failed.",
              rate("millrace_transfer_failures_total", "reason"), "reqps"),
        panel("Blocks sent again", "Repaired after a failed proof. Not 0: look at the network.",
              rate("millrace_router_handoff_resent_extents_total", legend="all")
              + rate("millrace_transfer_resent_extents_total", "worker", where='role="prefill"')),
        panel("Transport", "Connections that broke, messages dropped on arrival; a second.",
              rate("millrace_transport_peers_failed_total", legend="connections broken")
              + or_none(rate("millrace_transport_drops_total", "reason", "dropped: {{reason}}"), "reason")),
        panel("Carried by the transport", "Blocks and rows, sent.",
              rate("millrace_transport_bytes_total", "role", where='direction="sent"'), "Bps", stack=True),
        panel("Aborts without an answer", "Given up; something may be held.",
              increase("millrace_router_aborts_unanswered_total", "unanswered"), width=16),
        panel("Stale epochs", "Calls of attempts that have been replaced; a few after a fault are normal.",
              rate("millrace_lease_epoch_mismatches_total", "worker")),
    ]),
])

DECODE = ("Decode and cache", "millrace-decode", "Sequences, pages and slots.", [
    ("Decode", [
        panel("Sequences", "What a pass moves.", gauge("millrace_worker_running", "worker", where='role="decode"')),
        panel("Tokens a second", "By worker.",
              rate("millrace_worker_tokens_total", "worker", where='role="decode"'), stack=True),
        panel("Duration of a pass", "The floor of the time between tokens.",
              quantiles("millrace_engine_step_seconds", 'role="decode"'), "s"),
        panel("Sequences of a pass", "Up to max_batch.", quantiles("millrace_engine_step_rows", 'role="decode"')),
        panel("Passes a second", "0 with running sequences is a stuck engine.",
              rate("millrace_engine_steps_total", "worker", where='role="decode"')),
        panel("Leases", "receiving: state under way; committed: no pass yet; ending: not given back.",
              gauge("millrace_leases", "state"), stack=True),
        panel("Leases granted", "A second.", rate("millrace_leases_granted_total", "worker"), "reqps"),
        panel("Leases ended, by status", "OK is a sequence that came to its end.",
              rate("millrace_worker_requests_total", "code", where='role="decode"'), "reqps", stack=True),
        panel("Busy share", "Time inside passes, by worker.", busy("decode"), "percentunit", bounds=(0.9,)),
    ]),
    ("Cache", [
        panel("Pages owned, share", "Above 95 % new requests wait.",
              [(f"""{gauge("millrace_cache_pages", "worker", where='role="decode",state="owned"')[0][0]} / """
                f"""{gauge("millrace_cache_pages", "worker", where='role="decode"')[0][0]}""", "{{worker}}")],
              "percentunit", bounds=(0.95,)),
        panel("Pages", "128 tokens each; prompt and max_tokens are reserved in full.",
              gauge("millrace_cache_pages", "state", where='role="decode"'), stack=True),
        panel("Slots", "One a sequence.", gauge("millrace_state_slots", "state", where='role="decode"'), stack=True),
        panel("Reserve refused", "No page, no slot, draining.",
              rate("millrace_worker_rejected_total", "reason", where='role="decode"'), "reqps"),
        panel("Bytes received", "Of verified hand-offs.",
              rate("millrace_transfer_bytes_total", "worker", where='role="decode"'), "Bps", width=16),
    ]),
])

EXPERTS = ("Experts", "millrace-experts", "The pool: who computes how much, and who is behind.", [
    ("Pool", [
        panel("Members", "waiting elsewhere means that an expert has no member.",
              above_zero(gauge("millrace_router_workers", "state", where='role="expert"')), stack=True),
        panel("Rows times experts a second", "By member: uneven lines are uneven experts.",
              rate("millrace_worker_tokens_total", "worker", where='role="expert"')),
        panel("Imbalance", "Busiest member over the mean; 1 is even.",
              [(" / ".join(f"""{how}({increase_of("millrace_worker_tokens_total", 'role="expert"')})"""
                           for how in ("max", "avg")), "max / mean")], bounds=(2,)),
        panel("Busiest experts", "Rows a second of the ten busiest; far apart is uneven routing.",
              [(f"topk(10, {expression})", legend)
               for expression, legend in rate("millrace_expert_tokens_total", "expert", "expert {{expert}}")]),
        panel("Waves", "Messages of each wave, a second.",
              rate("millrace_expert_wave_messages_total", "wave", "wave {{wave}}"), "reqps", stack=True),
        panel("Passes stand still", "Share of time in which a pass waits for the pool's rows.",
              [(increase_of("millrace_expert_exchange_wait_seconds_total"), "{{worker}}")], "percentunit"),
        panel("Failed batches", "A second. A member lost or late: the pass ends, and its requests with it.",
              rate("millrace_expert_exchange_failed_batches_total", "worker")),
        panel("Messages refused", "The queue of a member is full; each refusal ends a pass.",
              rate("millrace_worker_rejected_total", "worker", where='role="expert"'), "reqps"),
        panel("Messages, by status", "OK is a reply that was sent.",
              rate("millrace_worker_requests_total", "code", where='role="expert"'), "reqps"),
        panel("Duration of a batch", "One wave of one layer.",
              quantiles("millrace_engine_step_seconds", 'role="expert"'), "s"),
        panel("Median duration by member", "One line above the rest is a slow machine.",
              quantile(0.5, "millrace_engine_step_seconds", "worker", where='role="expert"'), "s"),
        panel("Rows of a batch", "Small ones cost as much as larger ones.",
              quantiles("millrace_engine_step_rows", 'role="expert"')),
        panel("Busy share", "Time inside batches.", busy("expert"), "percentunit", bounds=(0.9,)),
    ]),
])

DASHBOARDS = (OVERVIEW, ROUTER, PREFILL, DECODE, EXPERTS)


def variables():
    return [
        {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
        {"name": "namespace", "label": "Namespace", "type": "query", "datasource": DATASOURCE,
         "query": {"query": "label_values(millrace_router_generations_open, namespace)", "refId": "namespaces"},
         # Outside Kubernetes there is no such label; ".*" matches its absence.
         "includeAll": True, "allValue": ".*", "multi": True, "refresh": 2, "sort": 1,
         "current": {"text": "All", "value": "$__all"}},
    ]


def timeseries(spec, defaults):
    defaults["custom"] = {"fillOpacity": 20 if spec["stack"] else 5, "lineWidth": 1,
                          "stacking": {"mode": "normal" if spec["stack"] else "none", "group": "A"}}
    if spec["bounds"]:
        defaults["custom"]["thresholdsStyle"] = {"mode": "dashed"}
    return {"legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
            "tooltip": {"mode": "multi", "sort": "desc"}}


def stat(_, defaults):
    # A number that is well whatever it is; which ones are not, the alerts say.
    defaults["color"] = {"mode": "fixed", "fixedColor": "text"}
    return {"reduceOptions": {"calcs": ["lastNotNull"]}, "textMode": "value_and_name", "graphMode": "none",
            "colorMode": "value", "justifyMode": "auto", "orientation": "auto", "wideLayout": True,
            "showPercentChange": False, "percentChangeColorMode": "standard"}


def render_panel(spec, identity, x, y):
    defaults = {"unit": spec["unit"], "min": 0}
    options = {"timeseries": timeseries, "stat": stat}[spec["kind"]](spec, defaults)
    if spec["bounds"]:
        steps = [{"color": "green", "value": None}]
        steps += [{"color": color, "value": bound} for color, bound in zip(("orange", "red"), spec["bounds"])]
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
    return {
        "id": identity, "type": spec["kind"], "title": spec["title"], "description": spec["why"],
        "datasource": DATASOURCE, "gridPos": {"x": x, "y": y, "w": spec["width"], "h": HEIGHT},
        "fieldConfig": {"defaults": defaults, "overrides": []}, "options": options,
        "targets": [{"refId": chr(ord("A") + i), "expr": expression, "legendFormat": legend, "datasource": DATASOURCE}
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
                   "keepTime": True, "asDropdown": True, "targetBlank": False, "icon": "external link",
                   "tooltip": ""}],
        "annotations": {"list": [{
            "name": "Alerts", "enable": True, "iconColor": "red",
            "datasource": DATASOURCE,
            "expr": selected("ALERTS", 'alertname=~"Millrace.*",alertstate="firing"'),
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
