// SPDX-License-Identifier: Apache-2.0
// Why a request went where it went, and where its time went: a record of services/common/request_trace as JSON.
//
// `millrace explain`, the status page and scripts read it. It holds what the record does: names of workers, times,
// counts; never a prompt or an output. Sentences are for people and may change; keys are stable. Thread: pure
// functions.
#pragma once

#include "absl/time/time.h"
#include "services/common/request_trace.h"
#include "services/router/json_reader.h"

namespace millrace::router {

// {"request_id", "route", "trace_id", "state": "running" | "ended", "http_status", "outcome", "total_ms", "age_ms"
// (since it began), "input_tokens", "output_tokens", "attempts": most of any choice, "bytes_moved", "extents_resent",
// "phases":
// [{"name", "choice", "attempt", "worker", "start_ms", "ms", "outcome", "detail"}]}. Phases are in order of their
// start; one that lasts has the time so far.
Json ExplanationJson(const TraceView& trace, absl::Time now);

// The same without phases: a line of a list.
Json ExplanationSummaryJson(const TraceView& trace, absl::Time now);

}  // namespace millrace::router
