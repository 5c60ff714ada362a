// SPDX-License-Identifier: Apache-2.0
// See request_trace.h.
#include "services/common/request_trace.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "absl/strings/str_format.h"

namespace millrace {
namespace {

// Ids only have to differ; a thread's own generator costs no lock.
uint64_t RandomId() {
  thread_local std::mt19937_64 generator = [] {
    std::random_device device;
    std::seed_seq seed{device(), device(), device(), device()};
    return std::mt19937_64(seed);
  }();
  for (;;) {
    if (const uint64_t id = generator(); id != 0) return id;
  }
}

// Lower-case hexadecimal digits only, as the standard has them.
std::optional<uint64_t> Hex(std::string_view text) {
  uint64_t value = 0;
  for (const char c : text) {
    const int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
    if (digit < 0) return std::nullopt;
    value = value << 4 | static_cast<uint64_t>(digit);
  }
  return value;
}

}  // namespace

std::string TraceContext::TraceId() const {
  return valid() ? absl::StrFormat("%016x%016x", trace_high, trace_low) : "";
}

std::string TraceContext::Traceparent() const {
  return valid() ? absl::StrFormat("00-%016x%016x-%016x-%02x", trace_high, trace_low, span, sampled ? 1 : 0) : "";
}

std::optional<TraceContext> TraceContext::Parse(std::string_view text) {
  // version-trace-span-flags; later versions may add fields behind, version 00 may not.
  if (text.size() < 55 || text[2] != '-' || text[35] != '-' || text[52] != '-') return std::nullopt;
  const auto version = Hex(text.substr(0, 2)), flags = Hex(text.substr(53, 2));
  const auto high = Hex(text.substr(3, 16)), low = Hex(text.substr(19, 16)), span = Hex(text.substr(36, 16));
  if (!version || !flags || !high || !low || !span || *version == 0xff) return std::nullopt;
  if (text.size() > 55 && (*version == 0 || text[55] != '-')) return std::nullopt;
  const TraceContext context{*high, *low, *span, (*flags & 1) != 0};
  if (!context.valid()) return std::nullopt;
  return context;
}

std::string_view PhaseName(Phase phase) {
  switch (phase) {
    case Phase::kRequest:
      return "request";
    case Phase::kGeneration:
      return "generation";
    case Phase::kQueue:
      return "queue";
    case Phase::kPlacement:
      return "placement";
    case Phase::kReserve:
      return "reserve";
    case Phase::kPrefill:
      return "prefill";
    case Phase::kHandoff:
      return "handoff";
    case Phase::kStream:
      return "stream";
    case Phase::kTail:
      return "tail";
    case Phase::kCommit:
      return "commit";
    case Phase::kReceive:
      return "receive";
    case Phase::kVerify:
      return "verify";
    case Phase::kDecode:
      return "decode";
  }
  return "unknown";
}

RequestTrace::RequestTrace(std::string request_id, std::string name, TraceContext parent, TraceContext root,
                           absl::Time begin, TraceLog* log)
    : request_id_(std::move(request_id)),
      name_(std::move(name)),
      parent_(parent),
      root_(root),
      trace_id_(root.TraceId()),
      log_(log) {
  PhaseRecord whole;
  whole.span = root_.span;
  whole.parent = parent_.span;
  whole.begin = begin;
  phases_.push_back(std::move(whole));
}

PhaseRecord* RequestTrace::Find(uint64_t span) {
  if (span == 0) return &phases_.front();
  const auto found =
      std::find_if(phases_.begin(), phases_.end(), [&](const PhaseRecord& record) { return record.span == span; });
  return found == phases_.end() ? nullptr : &*found;
}

uint64_t RequestTrace::Begin(Phase phase, absl::Time at, Where where) {
  const uint64_t span = RandomId();
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_ || phases_.size() >= kMaxPhases) {
    ++dropped_;
    return span;
  }
  PhaseRecord record;
  record.phase = phase;
  record.span = span;
  record.parent = where.parent == 0 ? root_.span : where.parent;
  record.begin = at;
  record.choice = where.choice;
  record.attempt = where.attempt;
  record.worker = std::move(where.worker);
  phases_.push_back(std::move(record));
  return span;
}

void RequestTrace::End(uint64_t span, absl::Time at, absl::StatusCode code,
                       std::vector<std::pair<const char*, int64_t>> numbers) {
  if (span == 0) return;
  std::lock_guard<std::mutex> lock(mutex_);
  PhaseRecord* const record = Find(span);
  if (closed_ || record == nullptr || !record->open()) return;
  record->end = std::max(at, record->begin);
  record->code = code;
  record->numbers.insert(record->numbers.end(), numbers.begin(), numbers.end());
}

void RequestTrace::EndWithin(uint64_t span, absl::Time at, absl::StatusCode code,
                             std::vector<std::pair<const char*, int64_t>> numbers) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (PhaseRecord& record : phases_) {
      if (closed_ || record.parent != span || !record.open()) continue;
      record.end = std::max(at, record.begin);
      record.code = code;
    }
  }
  End(span, at, code, std::move(numbers));
}

void RequestTrace::AddNumber(uint64_t span, const char* name, int64_t value) {
  std::lock_guard<std::mutex> lock(mutex_);
  PhaseRecord* const record = Find(span);
  if (!closed_ && record != nullptr) record->numbers.emplace_back(name, value);
}

void RequestTrace::Close(absl::Time at, absl::StatusCode code, int32_t http_status) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) return;
    closed_ = true;
    http_status_ = http_status;
    for (PhaseRecord& record : phases_) {
      if (!record.open()) continue;
      record.end = std::max(at, record.begin);
      record.code = code;
    }
  }
  if (log_ != nullptr) log_->OnClosed(View());
}

TraceContext RequestTrace::ContextOf(uint64_t span) const {
  TraceContext context = root_;
  if (span != 0) context.span = span;
  return context;
}

TraceView RequestTrace::View() const {
  std::lock_guard<std::mutex> lock(mutex_);
  TraceView view;
  view.request_id = request_id_;
  view.name = name_;
  view.context = parent_;
  view.trace_high = root_.trace_high;
  view.trace_low = root_.trace_low;
  view.sampled = root_.sampled;
  view.closed = closed_;
  view.http_status = http_status_;
  view.phases = phases_;
  view.phases_dropped = dropped_;
  return view;
}

std::shared_ptr<RequestTrace> TraceLog::Begin(std::string request_id, std::string name, std::string_view traceparent,
                                              absl::Time at) {
  const std::optional<TraceContext> parent = TraceContext::Parse(traceparent);
  TraceContext root = parent.value_or(TraceContext{RandomId(), RandomId(), 0, false});
  root.span = RandomId();
  if (!parent) {
    // By the trace's own random bits, so that every process that is asked decides alike.
    root.sampled = static_cast<double>(root.trace_low >> 11) < std::ldexp(options_.sample_ratio, 53);
  }
  auto trace = std::make_shared<RequestTrace>(std::move(request_id), std::move(name), parent.value_or(TraceContext{}),
                                              root, at, this);
  std::lock_guard<std::mutex> lock(mutex_);
  if (running_.size() == running_.capacity()) {
    std::erase_if(running_, [](const std::weak_ptr<RequestTrace>& one) { return one.expired(); });
  }
  running_.push_back(trace);
  return trace;
}

void TraceLog::OnClosed(const TraceView& view) {
  if (view.sampled && options_.on_sampled) options_.on_sampled(view);
  if (options_.max_closed == 0) return;
  std::lock_guard<std::mutex> lock(mutex_);
  closed_.push_back(view);
  if (closed_.size() > options_.max_closed) closed_.pop_front();
}

std::optional<TraceView> TraceLog::Find(std::string_view request_id) const {
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto one = running_.rbegin(); one != running_.rend(); ++one) {
    const std::shared_ptr<RequestTrace> trace = one->lock();
    if (trace == nullptr || trace->request_id() != request_id) continue;
    TraceView view = trace->View();
    if (!view.closed) return view;
  }
  const auto found = std::find_if(closed_.rbegin(), closed_.rend(),
                                  [&](const TraceView& view) { return view.request_id == request_id; });
  if (found == closed_.rend()) return std::nullopt;
  return *found;
}

std::vector<std::string> TraceLog::RequestIds(size_t max) const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<std::string> ids;
  for (auto one = running_.rbegin(); one != running_.rend() && ids.size() < max; ++one) {
    const std::shared_ptr<RequestTrace> trace = one->lock();
    if (trace != nullptr && !trace->View().closed) ids.push_back(trace->request_id());
  }
  for (auto one = closed_.rbegin(); one != closed_.rend() && ids.size() < max; ++one) ids.push_back(one->request_id);
  return ids;
}

}  // namespace millrace
