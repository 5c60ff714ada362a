// SPDX-License-Identifier: Apache-2.0
// See trace_export.h. Order: a record becomes spans, spans are sent, the thread.
#include "services/common/trace_export.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "opentelemetry/proto/collector/trace/v1/trace_service.grpc.pb.h"
#include "services/common/clock.h"
#include "services/common/metric_catalogue.h"
#include "spdlog/spdlog.h"

namespace millrace {
namespace {

namespace otlp = opentelemetry::proto;
using otlp::collector::trace::v1::ExportTraceServiceRequest;
using otlp::collector::trace::v1::ExportTraceServiceResponse;
using otlp::collector::trace::v1::TraceService;
using otlp::trace::v1::Span;

constexpr absl::Duration kRetryAfter = absl::Seconds(1);
constexpr absl::Duration kLastWords = absl::Seconds(2);

// Ids are big-endian bytes on the wire.
void AppendBytes(uint64_t value, std::string& out) {
  for (int shift = 56; shift >= 0; shift -= 8) out.push_back(static_cast<char>(value >> shift & 0xff));
}

template <typename Message>
void AddText(Message& message, const char* key, const std::string& value) {
  if (value.empty()) return;
  auto* attribute = message.add_attributes();
  attribute->set_key(key);
  attribute->mutable_value()->set_string_value(value);
}

void AddNumber(Span& span, const std::string& key, int64_t value) {
  auto* attribute = span.add_attributes();
  attribute->set_key(key);
  attribute->mutable_value()->set_int_value(value);
}

// Numbers that the semantic conventions have a name for.
std::string NumberKey(std::string_view name, bool is_root) {
  if (is_root && name == "input_tokens") return "gen_ai.usage.input_tokens";
  if (is_root && name == "output_tokens") return "gen_ai.usage.output_tokens";
  return absl::StrCat("millrace.", absl::string_view(name.data(), name.size()));
}

void FillRoot(const TraceView& view, const TraceExporterOptions& options, Span& span) {
  span.set_name(view.name);
  span.set_kind(Span::SPAN_KIND_SERVER);
  AddText(span, "millrace.request_id", view.request_id);
  if (options.role != "router") return;
  AddText(span, "gen_ai.provider.name", "deepseek");
  AddText(span, "gen_ai.request.model", options.model);
  const bool chat = absl::StrContains(absl::AsciiStrToLower(view.name), "chat");
  AddText(span, "gen_ai.operation.name", chat ? "chat" : "text_completion");
  if (view.http_status == 0) return;
  AddNumber(span, "http.response.status_code", view.http_status);
  AddText(span, "http.request.method", "POST");
  AddText(span, "http.route", view.name.substr(view.name.find(' ') + 1));
}

// `offset` turns this process' monotonic times into wall time.
void FillSpan(const TraceView& view, const PhaseRecord& phase, absl::Duration offset,
              const TraceExporterOptions& options, Span& span) {
  AppendBytes(view.trace_high, *span.mutable_trace_id());
  AppendBytes(view.trace_low, *span.mutable_trace_id());
  AppendBytes(phase.span, *span.mutable_span_id());
  if (phase.parent != 0) AppendBytes(phase.parent, *span.mutable_parent_span_id());
  span.set_start_time_unix_nano(static_cast<uint64_t>(absl::ToUnixNanos(phase.begin + offset)));
  span.set_end_time_unix_nano(static_cast<uint64_t>(absl::ToUnixNanos(phase.end + offset)));
  const bool is_root = phase.phase == Phase::kRequest;
  if (is_root) {
    FillRoot(view, options, span);
  } else {
    span.set_name(std::string(PhaseName(phase.phase)));
    span.set_kind(phase.worker.empty() ? Span::SPAN_KIND_INTERNAL : Span::SPAN_KIND_CLIENT);
    AddText(span, "millrace.worker", phase.worker);
    if (phase.attempt != 0) AddNumber(span, "millrace.attempt", phase.attempt);
    if (phase.phase == Phase::kGeneration) AddNumber(span, "millrace.choice", phase.choice);
  }
  for (const auto& [name, value] : phase.numbers) AddNumber(span, NumberKey(name, is_root), value);
  if (phase.code == absl::StatusCode::kOk) return;
  span.mutable_status()->set_code(otlp::trace::v1::Status::STATUS_CODE_ERROR);
  span.mutable_status()->set_message(absl::StatusCodeToString(phase.code));
}

}  // namespace

class TraceExporter::Sender {
 public:
  explicit Sender(const TraceExporterOptions& options) : options_(options) {
    grpc::ChannelArguments arguments;
    // A proxy that the environment names is for the world outside, as with our other channels.
    arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
    stub_ = TraceService::NewStub(
        grpc::CreateCustomChannel(options.endpoint, grpc::InsecureChannelCredentials(), arguments));
  }

  ExportTraceServiceRequest Pack(const std::vector<TraceView>& views) const {
    ExportTraceServiceRequest request;
    auto& spans = *request.add_resource_spans();
    otlp::resource::v1::Resource& resource = *spans.mutable_resource();
    AddText(resource, "service.name", absl::StrCat("millrace-", options_.role));
    AddText(resource, "service.instance.id", options_.instance);
    AddText(resource, "service.version", options_.version);
    auto& scope = *spans.add_scope_spans();
    scope.mutable_scope()->set_name("millrace");
    scope.mutable_scope()->set_version(options_.version);
    const absl::Duration offset = absl::Now() - MonotonicNow();
    for (const TraceView& view : views) {
      for (const PhaseRecord& phase : view.phases) FillSpan(view, phase, offset, options_, *scope.add_spans());
    }
    return request;
  }

  // How many spans the collector refused.
  absl::StatusOr<uint64_t> Send(const ExportTraceServiceRequest& request) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + absl::ToChronoMicroseconds(options_.timeout));
    ExportTraceServiceResponse response;
    const grpc::Status status = stub_->Export(&context, request, &response);
    if (!status.ok()) {
      return absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
    }
    return static_cast<uint64_t>(std::max<int64_t>(0, response.partial_success().rejected_spans()));
  }

 private:
  const TraceExporterOptions& options_;
  std::unique_ptr<TraceService::Stub> stub_;
};

TraceExporter::TraceExporter(TraceExporterOptions options, prometheus::Registry* registry)
    : options_(std::move(options)), registry_(registry), sender_(std::make_unique<Sender>(options_)) {
  for (const char* outcome : {"exported", "dropped", "failed"}) Count(outcome, &TraceExporter::exported_, 0);
  thread_ = std::thread([this] { Run(); });
}

TraceExporter::~TraceExporter() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    stop_by_ = MonotonicNow() + kLastWords;
  }
  wake_.notify_all();
  thread_.join();
}

void TraceExporter::Export(const TraceView& view) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (queued_spans_ + view.phases.size() <= options_.max_queued_spans && !stop_) {
      queued_spans_ += view.phases.size();
      queue_.push_back(view);
      wake_.notify_one();
      return;
    }
  }
  Count("dropped", &TraceExporter::dropped_, view.phases.size());
}

void TraceExporter::Count(const char* outcome, uint64_t TraceExporter::*count, size_t spans) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    this->*count += spans;
  }
  if (registry_ == nullptr) return;
  CounterFamily(*registry_, "millrace_trace_spans_total")
      .Add({{"outcome", outcome}})
      .Increment(static_cast<double>(spans));
}

void TraceExporter::Run() {
  bool collector_away = false;
  for (;;) {
    std::vector<TraceView> batch;
    size_t spans = 0;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [this] { return stop_ || !queue_.empty(); });
      if (queue_.empty()) return;
      // A batch fills up for a moment; when it ends there is nothing to wait for.
      wake_.wait_for(lock, absl::ToChronoMilliseconds(options_.max_delay),
                     [this] { return stop_ || queued_spans_ >= options_.max_batch_spans; });
      while (!queue_.empty() && (spans == 0 || spans + queue_.front().phases.size() <= options_.max_batch_spans)) {
        spans += queue_.front().phases.size();
        batch.push_back(std::move(queue_.front()));
        queue_.pop_front();
      }
      queued_spans_ -= spans;
    }
    const ExportTraceServiceRequest request = sender_->Pack(batch);
    absl::StatusOr<uint64_t> rejected = absl::UnavailableError("not sent");
    for (int tried = 1;; ++tried) {
      rejected = sender_->Send(request);
      const bool again = absl::IsUnavailable(rejected.status()) || absl::IsDeadlineExceeded(rejected.status());
      if (rejected.ok() || !again || tried >= options_.max_tries) break;
      std::unique_lock<std::mutex> lock(mutex_);
      if (stop_ && MonotonicNow() + kRetryAfter > stop_by_) break;
      wake_.wait_for(lock, absl::ToChronoMilliseconds(kRetryAfter), [this] { return stop_; });
      if (stop_ && MonotonicNow() > stop_by_) break;
    }
    if (!rejected.ok() && !std::exchange(collector_away, true)) {  // once, not per batch
      spdlog::warn("traces: the collector at {} does not take spans: {}", options_.endpoint,
                   rejected.status().ToString());
    }
    if (rejected.ok() && std::exchange(collector_away, false)) {
      spdlog::info("traces: the collector at {} takes spans again", options_.endpoint);
    }
    const size_t failed = rejected.ok() ? std::min<size_t>(*rejected, spans) : spans;
    Count("failed", &TraceExporter::failed_, failed);
    Count("exported", &TraceExporter::exported_, spans - failed);
  }
}

uint64_t TraceExporter::exported() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return exported_;
}
uint64_t TraceExporter::dropped() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return dropped_;
}
uint64_t TraceExporter::failed() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return failed_;
}

}  // namespace millrace
