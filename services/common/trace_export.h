// SPDX-License-Identifier: Apache-2.0
// Sampled records on their way to a collector: OTLP over gRPC, in OpenTelemetry's own messages.
//
// Serving never waits for it: records go into a bounded queue, and one that finds it full is dropped and counted. A
// thread of its own sends them in batches. A collector that is away is asked again a few times, then its batch is
// counted as failed and forgotten. Why not OpenTelemetry's own library: docs/adr/0014-otlp-export.md.
//
// What is recorded is request_trace.h. Thread: Export and the counts from any; the rest from the owner's.
#pragma once

#include <prometheus/registry.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/time.h"
#include "services/common/request_trace.h"

namespace millrace {

struct TraceExporterOptions {
  std::string endpoint;                                // "host:port" of the collector's gRPC receiver
  size_t max_queued_spans = 4096;                      // in records not yet sent
  std::string role, instance;                          // "decode", "decode-1": who these spans are of
  std::string version;                                 // of this program
  std::string model;                                   // gen_ai.request.model
  size_t max_batch_spans = 512;                        // of one message
  absl::Duration max_delay = absl::Milliseconds(500);  // from the first record of a batch to its sending
  absl::Duration timeout = absl::Seconds(3);           // of one call
  int max_tries = 3;                                   // of one batch; a second apart
};

class TraceExporter {
 public:
  // `registry` may be null; else it must outlive this object.
  TraceExporter(TraceExporterOptions options, prometheus::Registry* registry);
  // Sends what is queued, for two seconds at most.
  ~TraceExporter();

  void Export(const TraceView& view);  // never blocks

  // Spans, since the start.
  uint64_t exported() const;
  uint64_t dropped() const;
  uint64_t failed() const;

 private:
  class Sender;
  void Run();
  void Count(const char* outcome, uint64_t TraceExporter::*count, size_t spans);

  const TraceExporterOptions options_;
  prometheus::Registry* const registry_;
  const std::unique_ptr<Sender> sender_;
  mutable std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<TraceView> queue_;  // guarded by mutex_, as all below
  size_t queued_spans_ = 0;
  uint64_t exported_ = 0, dropped_ = 0, failed_ = 0;
  bool stop_ = false;
  absl::Time stop_by_ = absl::InfiniteFuture();
  std::thread thread_;
};

}  // namespace millrace
