// SPDX-License-Identifier: Apache-2.0
// Where the time of one request went, in one process: the record from which spans are exported, and which `explain`
// reads.
//
// A front makes one RequestTrace per request; everybody who works for the request adds phases to it; the front closes
// it. A phase that runs in another process is told the trace context of the span it belongs to (W3C, one line of text)
// and keeps a record of its own there. A record holds names from closed sets, times, counts and ids: never a prompt, an
// output or a token. What becomes of a closed record is the TraceLog's business: kept for a while, and given to an
// exporter (trace_export.h) if the trace is sampled.
//
// Times are of the process' monotonic clock (clock.h); exporting turns them into wall time. Thread: any.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace millrace {

// W3C trace context, level 1: which trace, which span of it is the parent, and whether somebody wants it recorded.
struct TraceContext {
  uint64_t trace_high = 0, trace_low = 0;
  uint64_t span = 0;
  bool sampled = false;

  bool valid() const { return (trace_high != 0 || trace_low != 0) && span != 0; }
  std::string TraceId() const;      // 32 lower-case hexadecimal digits; empty if not valid
  std::string Traceparent() const;  // "00-<trace>-<span>-<flags>"; empty if not valid
  // Nothing for a header that is malformed, of version ff or of all-zero ids: the request then begins a trace.
  static std::optional<TraceContext> Parse(std::string_view traceparent);
};

// What a piece of time was spent on. The words (PhaseName) are span names and are what `explain` prints.
enum class Phase : uint8_t {
  kRequest,     // the whole, at the process that keeps the record: a front's request, a worker's part of one
  kGeneration,  // router: one choice, from acceptance to its last token
  kQueue,       // router: waiting for a place; prefill: from arrival to the first pass
  kPlacement,   // router: the decision
  kReserve,     // router: the call to the decode worker
  kPrefill,     // router: the call, from its start to the first token; prefill worker: first pass to token 0
  kHandoff,     // router: first token to verified state; prefill worker: token 0 to the decode worker's answer
  kStream,      // prefill worker: extents leave while the prompt is computed
  kTail,        // prefill worker: the rest leaves
  kCommit,      // prefill worker: the call to the decode worker
  kReceive,     // decode worker: lease granted to manifest in hand
  kVerify,      // decode worker: manifest in hand to state accepted
  kDecode,      // router: first token to last; decode worker: state accepted to last token
};
std::string_view PhaseName(Phase phase);

struct PhaseRecord {
  Phase phase = Phase::kRequest;
  uint64_t span = 0, parent = 0;                   // ids within the trace; parent 0: none
  absl::Time begin, end = absl::InfiniteFuture();  // end: infinite while it lasts
  int32_t choice = 0;
  uint32_t attempt = 0;  // 1, 2, ...; 0 where there are none
  std::string worker;    // who does it, if not this process
  absl::StatusCode code = absl::StatusCode::kOk;
  std::vector<std::pair<const char*, int64_t>> numbers;  // "tokens", "bytes", "resent", "queue_us" ...: literals

  bool open() const { return end == absl::InfiniteFuture(); }
};

// A copy of a record, to read at leisure.
struct TraceView {
  std::string request_id;  // as the client knows it
  std::string name;        // of the root: the route of a front, the role of a worker
  TraceContext context;    // of the root's parent: what the client sent; not valid: none was
  uint64_t trace_high = 0, trace_low = 0;
  bool sampled = false;
  bool closed = false;
  int32_t http_status = 0;          // of a front's answer; 0: none yet, or not HTTP
  std::vector<PhaseRecord> phases;  // [0] is the root, kRequest
  int64_t phases_dropped = 0;
};

class TraceLog;

class RequestTrace {
 public:
  // Use TraceLog::Begin.
  RequestTrace(std::string request_id, std::string name, TraceContext parent, TraceContext root, absl::Time begin,
               TraceLog* log);

  struct Where {
    int32_t choice = 0;
    uint32_t attempt = 0;
    std::string worker;
    uint64_t parent = 0;  // a span of this record, or of another process' record of this trace; 0: the root
  };
  // Returns the span's id, never 0. Past kMaxPhases nothing is kept but the count.
  uint64_t Begin(Phase phase, absl::Time at, Where where);
  uint64_t Begin(Phase phase, absl::Time at) { return Begin(phase, at, {}); }
  // Ends a phase, once; later calls and unknown ids do nothing.
  void End(uint64_t span, absl::Time at, absl::StatusCode code = absl::StatusCode::kOk,
           std::vector<std::pair<const char*, int64_t>> numbers = {});
  // Ends a phase and what is still open directly below it.
  void EndWithin(uint64_t span, absl::Time at, absl::StatusCode code,
                 std::vector<std::pair<const char*, int64_t>> numbers = {});
  void AddNumber(uint64_t span, const char* name, int64_t value);  // 0: the root
  // The end of the request: what is open ends with it, by the same code. Once.
  void Close(absl::Time at, absl::StatusCode code, int32_t http_status = 0);

  // For a call made on behalf of `span` (0: the root): what the other process is told.
  TraceContext ContextOf(uint64_t span) const;
  const std::string& request_id() const { return request_id_; }
  const std::string& trace_id() const { return trace_id_; }
  TraceView View() const;

  static constexpr size_t kMaxPhases = 256;

 private:
  PhaseRecord* Find(uint64_t span);  // mutex_ held

  const std::string request_id_, name_;
  const TraceContext parent_, root_;
  const std::string trace_id_;
  TraceLog* const log_;
  mutable std::mutex mutex_;
  std::vector<PhaseRecord> phases_;  // guarded by mutex_, as all below
  int64_t dropped_ = 0;
  bool closed_ = false;
  int32_t http_status_ = 0;
};

struct TraceLogOptions {
  double sample_ratio = 0;  // of traces that begin here; a client's own decision is kept
  size_t max_closed = 512;  // kept for Find; 0 on workers, whom nobody asks
  // Takes a closed record that is sampled. Must not block. Null: nobody wants them.
  std::function<void(const TraceView&)> on_sampled;
};

// The records of one process: those of running requests and the last ones that ended. Must outlive its records' Close.
class TraceLog {
 public:
  explicit TraceLog(TraceLogOptions options) : options_(std::move(options)) {}

  // `traceparent` may be empty or anything a client sent.
  std::shared_ptr<RequestTrace> Begin(std::string request_id, std::string name, std::string_view traceparent,
                                      absl::Time at);
  // The newest record of that id, running ones first.
  std::optional<TraceView> Find(std::string_view request_id) const;
  // Ids of the records there are, newest first.
  std::vector<std::string> RequestIds(size_t max) const;

 private:
  friend class RequestTrace;
  void OnClosed(const TraceView& view);

  const TraceLogOptions options_;
  mutable std::mutex mutex_;
  std::vector<std::weak_ptr<RequestTrace>> running_;  // guarded by mutex_; swept as it grows
  std::deque<TraceView> closed_;                      // guarded by mutex_; newest last
};

}  // namespace millrace
