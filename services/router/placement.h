// SPDX-License-Identifier: Apache-2.0
// Which prefill worker computes a prompt and which decode worker continues it.
//
// A pure function of a snapshot and the time: no clock, no randomness, no I/O, so that a test or a simulator can ask it
// anything. It knows capacity, load, health and compatibility; carrying its answer out, and what to do when a worker
// refuses after all, is request_flow.
//
// Only workers whose compatibility hashes are equal pair. Among those the least loaded is taken: prompt tokens waiting
// for prefill, share of pages in use for decode; ties go to the lower name, so equal snapshots give equal answers.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "services/router/cluster_snapshot.h"
#include "services/router/event_loop.h"

namespace millrace::router {

struct PlacementRequest {
  int64_t prompt_tokens = 0;
  int64_t max_tokens = 0;
};

// Indices into ClusterSnapshot::workers, and what spoke for them: for whoever asks later why.
struct Pair {
  size_t prefill = 0;
  size_t decode = 0;
  int prefill_fit = 0, decode_fit = 0;  // workers of the same compatibility hash that had room now
  int64_t prefill_waiting_tokens = 0;   // of the one taken: prompt tokens given to it before, without a first token yet
  double decode_use = 0;                // of the one taken, before this request: share of pages or slots, the larger
};

// Errors, each with an ApiError for the caller:
//   InvalidArgument    context_length_exceeded: no worker that is here could ever hold it
//   Unavailable        no_capacity: no live prefill or decode worker; no_compatible_pair: there are, but none agree
//   ResourceExhausted  overloaded: they exist and are full now; wait and ask again
absl::StatusOr<Pair> ChoosePair(const ClusterSnapshot& snapshot, const PlacementRequest& request, TimePoint now);

// Pages that prompt and output need on a decode worker with pages of `page_tokens`.
int64_t PagesFor(int64_t tokens, int64_t page_tokens);

}  // namespace millrace::router
