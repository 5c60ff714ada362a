// SPDX-License-Identifier: Apache-2.0
// Export against a receiver of OpenTelemetry's own service: what arrives, what is dropped, what is never waited for.
#include "services/common/trace_export.h"

#include <grpcpp/server_builder.h>
#include <gtest/gtest.h>

#include <atomic>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "opentelemetry/proto/collector/trace/v1/trace_service.grpc.pb.h"
#include "services/common/clock.h"
#include "services/common/metric_catalogue.h"

namespace millrace {
namespace {

namespace collector = opentelemetry::proto::collector::trace::v1;
using opentelemetry::proto::trace::v1::Span;

class Receiver final : public collector::TraceService::Service {
 public:
  Receiver() {
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port_);
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
  }
  ~Receiver() override { server_->Shutdown(std::chrono::system_clock::now()); }

  grpc::Status Export(grpc::ServerContext*, const collector::ExportTraceServiceRequest* request,
                      collector::ExportTraceServiceResponse* response) override {
    if (hold_.load()) absl::SleepFor(absl::Milliseconds(300));
    response->mutable_partial_success()->set_rejected_spans(reject_.load());
    absl::MutexLock lock(&mutex_);
    for (const auto& resource : request->resource_spans()) {
      service_ = resource.resource().attributes(0).value().string_value();
      for (const auto& scope : resource.scope_spans()) {
        spans_.insert(spans_.end(), scope.spans().begin(), scope.spans().end());
      }
    }
    return grpc::Status::OK;
  }

  std::string address() const { return absl::StrCat("127.0.0.1:", port_); }
  std::vector<Span> spans() {
    absl::MutexLock lock(&mutex_);
    return spans_;
  }
  std::string service() {
    absl::MutexLock lock(&mutex_);
    return service_;
  }
  std::atomic<bool> hold_{false};
  std::atomic<int> reject_{0};

 private:
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
  absl::Mutex mutex_;
  std::vector<Span> spans_;
  std::string service_;
};

TraceExporterOptions Options(const std::string& endpoint) {
  TraceExporterOptions options;
  options.endpoint = endpoint;
  options.role = "router";
  options.instance = "r0";
  options.model = "demo";
  options.max_delay = absl::Milliseconds(10);
  return options;
}

// A request of two spans, ended.
void OneRequest(TraceLog& log, const std::string& parent = "") {
  const auto trace = log.Begin("id-1", "POST /v1/chat/completions", parent, MonotonicNow() - absl::Seconds(2));
  const uint64_t decode = trace->Begin(Phase::kDecode, MonotonicNow(), {.attempt = 1, .worker = "decode-0"});
  trace->End(decode, MonotonicNow(), absl::StatusCode::kUnavailable, {{"tokens", 5}});
  trace->AddNumber(0, "output_tokens", 5);
  trace->Close(MonotonicNow(), absl::StatusCode::kUnavailable, 503);
}

std::string Text(const Span& span, const std::string& key) {
  for (const auto& attribute : span.attributes()) {
    if (attribute.key() != key) continue;
    return attribute.value().has_int_value() ? absl::StrCat(attribute.value().int_value())
                                             : attribute.value().string_value();
  }
  return "";
}

TEST(TraceExporter, SpansArriveAsTheStandardHasThem) {
  Receiver receiver;
  {
    TraceExporter exporter(Options(receiver.address()), nullptr);
    TraceLog log({.on_sampled = [&](const TraceView& view) { exporter.Export(view); }});
    OneRequest(log, "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
    OneRequest(log);  // not sampled
  }
  const std::vector<Span> spans = receiver.spans();
  ASSERT_EQ(spans.size(), 2u);
  EXPECT_EQ(receiver.service(), "millrace-router");
  const Span& root = spans[0];
  EXPECT_EQ(root.trace_id(), std::string("\x0a\xf7\x65\x19\x16\xcd\x43\xdd\x84\x48\xeb\x21\x1c\x80\x31\x9c", 16));
  EXPECT_EQ(root.parent_span_id(), std::string("\xb7\xad\x6b\x71\x69\x20\x33\x31", 8));
  EXPECT_EQ(root.name(), "POST /v1/chat/completions");
  EXPECT_EQ(root.kind(), Span::SPAN_KIND_SERVER);
  EXPECT_EQ(Text(root, "gen_ai.operation.name"), "chat");
  EXPECT_EQ(Text(root, "gen_ai.usage.output_tokens"), "5");
  EXPECT_EQ(Text(root, "http.response.status_code"), "503");
  EXPECT_EQ(Text(root, "http.route"), "/v1/chat/completions");
  const double seconds = static_cast<double>(root.end_time_unix_nano() - root.start_time_unix_nano()) / 1e9;
  EXPECT_NEAR(seconds, 2, 0.5);
  EXPECT_NEAR(static_cast<double>(root.end_time_unix_nano()) / 1e9,
              absl::ToDoubleSeconds(absl::Now() - absl::UnixEpoch()), 60);
  const Span& decode = spans[1];
  EXPECT_EQ(decode.trace_id(), root.trace_id());
  EXPECT_EQ(decode.parent_span_id(), root.span_id());
  EXPECT_EQ(decode.name(), "decode");
  EXPECT_EQ(decode.kind(), Span::SPAN_KIND_CLIENT);
  EXPECT_EQ(Text(decode, "millrace.worker"), "decode-0");
  EXPECT_EQ(Text(decode, "millrace.tokens"), "5");
  EXPECT_EQ(decode.status().message(), "UNAVAILABLE");
}

TEST(TraceExporter, AFullQueueDropsAndNobodyWaits) {
  Receiver receiver;
  receiver.hold_.store(true);
  TraceExporterOptions options = Options(receiver.address());
  options.max_queued_spans = 20;
  prometheus::Registry registry;
  TraceExporter exporter(options, &registry);
  TraceLog log({.sample_ratio = 1, .on_sampled = [&](const TraceView& view) { exporter.Export(view); }});
  const absl::Time began = absl::Now();
  for (int i = 0; i < 1000; ++i) OneRequest(log);
  EXPECT_LT(absl::Now() - began, absl::Seconds(5));  // a thousand calls of 0.3 s would be 300 s
  EXPECT_GT(exporter.dropped(), 1000u);
  EXPECT_EQ(CounterFamily(registry, "millrace_trace_spans_total").Add({{"outcome", "dropped"}}).Value(),
            static_cast<double>(exporter.dropped()));
}

TEST(TraceExporter, WhatTheCollectorRefusesOrMissesIsCounted) {
  Receiver receiver;
  receiver.reject_.store(1);
  TraceExporter refused(Options(receiver.address()), nullptr);
  TraceExporterOptions nowhere = Options("127.0.0.1:1");
  nowhere.max_tries = 1;
  TraceExporter missed(nowhere, nullptr);
  TraceLog log({.sample_ratio = 1, .on_sampled = [&](const TraceView& view) {
                  refused.Export(view);
                  missed.Export(view);
                }});
  OneRequest(log);
  const absl::Time end = absl::Now() + absl::Seconds(20);
  while ((refused.failed() + refused.exported() < 2 || missed.failed() < 2) && absl::Now() < end) {
    absl::SleepFor(absl::Milliseconds(10));
  }
  EXPECT_EQ(refused.failed(), 1u);
  EXPECT_EQ(refused.exported(), 1u);
  EXPECT_EQ(missed.failed(), 2u);
}

}  // namespace
}  // namespace millrace
