// SPDX-License-Identifier: Apache-2.0
// See expert_loop.h.
#include "services/expert/expert_loop.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "services/common/clock.h"
#include "services/common/failpoints.h"

namespace millrace::expert {
namespace {

constexpr absl::Duration kIdleWait = absl::Milliseconds(100);  // only how soon Stop is noticed without a wake-up

}  // namespace

ExpertLoop::ExpertLoop(ExpertComputer& experts, kvtransfer::Transport* transport, ExpertLoopOptions options,
                       WorkerMetrics* metrics)
    : experts_(experts), transport_(transport), options_(options), metrics_(metrics), last_arrival_(MonotonicNow()) {
  if (transport_ != nullptr) transport_->SetHandler(kRequestChannel, this);
  thread_ = std::thread([this] { Run(); });
}

ExpertLoop::~ExpertLoop() { Stop(); }

void ExpertLoop::Attach(IncarnationId caller) {
  std::lock_guard<std::mutex> lock(mutex_);
  callers_[caller] = ++attachments_;
  if (callers_.size() <= options_.max_callers) return;
  const auto oldest = std::min_element(callers_.begin(), callers_.end(),
                                       [](const auto& a, const auto& b) { return a.second < b.second; });
  callers_.erase(oldest);
}

void ExpertLoop::Detach(IncarnationId caller) {
  std::lock_guard<std::mutex> lock(mutex_);
  callers_.erase(caller);
}

bool ExpertLoop::LetGo(absl::Time now, absl::Duration silence) const {
  std::lock_guard<std::mutex> lock(mutex_);
  return Idle() && (callers_.empty() || now - last_arrival_ > silence);
}

bool ExpertLoop::attached(IncarnationId caller) const {
  std::lock_guard<std::mutex> lock(mutex_);
  return callers_.contains(caller);
}

// --- Arrival ---

absl::Status ExpertLoop::CheckHeader(const ExpertHeader& header) const {
  if (stop_.load()) return absl::UnavailableError("the expert worker is stopping");
  if (header.kind != MessageKind::kRequest) return absl::InvalidArgumentError("expert message: not a request");
  if (!attached(header.caller())) {
    return absl::FailedPreconditionError(absl::StrCat("caller ", header.caller().ToString(), " is not attached"));
  }
  if (header.hidden != static_cast<uint64_t>(options_.hidden) || header.format != options_.format) {
    return absl::InvalidArgumentError(absl::StrCat("tensor_size_mismatch: rows of ", header.hidden, " values, format ",
                                                   static_cast<int>(header.format), "; expected ", options_.hidden,
                                                   ", ", static_cast<int>(options_.format)));
  }
  if (header.layer >= static_cast<uint32_t>(options_.num_layers)) {
    return absl::InvalidArgumentError(
        absl::StrCat("layer: found ", header.layer, ", allowed 0 to ", options_.num_layers - 1));
  }
  if (uint64_t{header.num_pairs} * RowBytes(header.format, header.hidden) > kMaxPayloadBytes) {
    return absl::InvalidArgumentError("num_pairs: the reply would be larger than a message may be");
  }
  if (arriving_or_queued_.load() >= options_.max_queue) {
    return absl::ResourceExhaustedError(absl::StrCat("the queue holds ", options_.max_queue, " messages, its limit"));
  }
  return absl::OkStatus();
}

kvtransfer::Placement ExpertLoop::OnMessage(const kvtransfer::IncomingMessage& message) {
  const auto header = DecodeHeader(message.header);
  if (!header.ok()) return kvtransfer::Placement::Drop("bad_header");
  if (message.payload_bytes != header->payload_bytes) return kvtransfer::Placement::Drop("wrong_length");
  Reply reply = ReplyTo(message.from);
  if (const absl::Status refused = CheckHeader(*header); !refused.ok()) {
    if (metrics_ != nullptr) metrics_->CountRejected(absl::StatusCodeToString(refused.code()));
    ReplyError(*header, reply, refused);
    return kvtransfer::Placement::Drop("refused");
  }
  arriving_or_queued_.fetch_add(1);
  waiting_.fetch_add(1);
  auto payload = std::make_shared<std::vector<uint8_t>>(header->payload_bytes);
  if (message.payload.size() == message.payload_bytes) {
    std::memcpy(payload->data(), message.payload.data(), payload->size());
    Enqueue({*header, std::move(payload), std::move(reply)});
    return kvtransfer::Placement::Consumed();
  }
  const kvtransfer::Memory destination{payload->data(), payload->size()};
  return kvtransfer::Placement::Into(destination,
                                     [this, header = *header, payload, reply = std::move(reply)](absl::Status arrived) {
                                       if (arrived.ok()) return Enqueue({header, payload, reply});
                                       arriving_or_queued_.fetch_sub(1);
                                       waiting_.fetch_sub(1);
                                       // Its seal was broken: like a wrong digest, worth an answer instead of a wait.
                                       if (absl::IsDataLoss(arrived)) ReplyError(header, reply, arrived);
                                     });
}

void ExpertLoop::Submit(ExpertHeader header, Payload payload, Reply reply) {
  if (const absl::Status refused = CheckHeader(header); !refused.ok()) {
    if (metrics_ != nullptr) metrics_->CountRejected(absl::StatusCodeToString(refused.code()));
    return ReplyError(header, reply, refused);
  }
  arriving_or_queued_.fetch_add(1);
  waiting_.fetch_add(1);
  Enqueue({header, std::move(payload), std::move(reply)});
  if (transport_ != nullptr) transport_->RunAfter(absl::ZeroDuration(), [] {});  // wakes the thread inside WaitFor
}

void ExpertLoop::Enqueue(Request request) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    queue_.push_back(std::move(request));
    last_arrival_ = MonotonicNow();
    queued_.store(queue_.size());
    PublishQueue(queue_.size());
  }
  ready_.notify_one();
}

void ExpertLoop::PublishQueue(size_t queued) {
  if (metrics_ == nullptr) return;
  metrics_->queued().Set(static_cast<double>(queued));
  std::array<int, kWaitReasons> waiting{};
  waiting[static_cast<size_t>(WaitReason::kTurn)] = static_cast<int>(queued);
  metrics_->SetWaiting(waiting);
}

// --- The engine thread ---

void ExpertLoop::Run() {
  while (!stop_.load()) {
    if (transport_ != nullptr) {
      transport_->WaitFor([this] { return queued_.load() > 0 || stop_.load(); }, kIdleWait);
    } else {
      std::unique_lock<std::mutex> lock(mutex_);
      ready_.wait_for(lock, absl::ToChronoMilliseconds(kIdleWait), [this] { return !queue_.empty() || stop_.load(); });
    }
    for (;;) {
      Request request;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        if (queue_.empty()) break;
        request = std::move(queue_.front());
        queue_.pop_front();
        queued_.store(queue_.size());
        PublishQueue(queue_.size());
      }
      if (metrics_ != nullptr) metrics_->running().Set(1);
      Serve(request);
      if (metrics_ != nullptr) metrics_->running().Set(0);
      arriving_or_queued_.fetch_sub(1);
      waiting_.fetch_sub(1);
    }
  }
}

void ExpertLoop::Serve(Request& request) {
  const absl::Time began = MonotonicNow();
  auto out = std::make_shared<std::vector<uint8_t>>();
  absl::Status status =
      stop_.load() ? absl::UnavailableError("the expert worker is stopping") : failpoints::Hit("e.before_compute");
  if (status.ok()) status = Compute(request, *out);
  if (status.ok()) status = failpoints::Hit("e.after_compute");
  if (metrics_ != nullptr) metrics_->CountOutcome(status.code());
  if (!status.ok()) return ReplyError(request.header, request.reply, status);
  const absl::Duration took = MonotonicNow() - began;
  steps_.fetch_add(1);
  pairs_.fetch_add(request.header.num_pairs);
  last_step_us_.store(static_cast<uint32_t>(absl::ToInt64Microseconds(took)));
  if (metrics_ != nullptr) {
    metrics_->ObserveStep(absl::ToDoubleSeconds(took), request.header.num_pairs);
    metrics_->CountTokens(request.header.num_pairs);
    metrics_->CountWave(request.header.wave);
  }
  ExpertHeader header = request.header;
  header.kind = MessageKind::kReply;
  SealHeader(header, *out);
  request.reply(header, std::move(out));
}

absl::Status ExpertLoop::Compute(const Request& request, std::vector<uint8_t>& out) {
  const ExpertHeader& header = request.header;
  ASSIGN_OR_RETURN(const RequestView view, ParseRequest(header, *request.payload, options_.num_experts));
  const int64_t hidden = options_.hidden, row_bytes = RowBytes(header.format, hidden);
  for (uint32_t row = 0; row < header.num_rows; ++row) {
    if (!RowIsFinite(view.data + row * row_bytes, header.format, hidden)) {
      return absl::InvalidArgumentError(absl::StrCat("rows[", row, "] is not finite"));
    }
  }
  out.resize(static_cast<size_t>(header.num_pairs * row_bytes));
  RETURN_IF_ERROR(experts_.Compute(
      {static_cast<int>(header.layer), header.format, view.data, view.experts, view.rows, view.weights}, out.data()));
  if (metrics_ == nullptr) return absl::OkStatus();
  for (const ExpertGroup& group : view.experts) metrics_->CountExpert(static_cast<int>(group.expert), group.count);
  return absl::OkStatus();
}

// --- Replies ---

void ExpertLoop::ReplyError(const ExpertHeader& request, const Reply& reply, const absl::Status& status) {
  ExpertHeader header = request;
  header.kind = MessageKind::kError;
  header.code = static_cast<uint32_t>(status.code());
  const absl::string_view text = status.message().substr(0, 512);
  auto payload = std::make_shared<std::vector<uint8_t>>(text.begin(), text.end());
  SealHeader(header, *payload);
  reply(header, std::move(payload));
}

Reply ExpertLoop::ReplyTo(kvtransfer::PeerId peer) {
  return [transport = transport_, peer](const ExpertHeader& header, const Payload& payload) {
    // A caller that is gone has its own bound; nothing is owed to it.
    (void)transport->SendMessage(peer, kReplyChannel, HeaderBytes(header), {payload->data(), payload->size()},
                                 [payload](const absl::Status&) {});
  };
}

void ExpertLoop::Stop() {
  if (!thread_.joinable()) return;
  stop_.store(true);
  ready_.notify_all();
  if (transport_ != nullptr) transport_->RunAfter(absl::ZeroDuration(), [] {});
  thread_.join();
  if (transport_ != nullptr) transport_->SetHandler(kRequestChannel, nullptr);
  std::deque<Request> left;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    left.swap(queue_);
  }
  for (Request& request : left) {
    ReplyError(request.header, request.reply, absl::UnavailableError("the expert worker is stopping"));
  }
}

void ExpertLoop::FillStatus(v1::WorkerStatus& status) const {
  status.set_queued(static_cast<uint32_t>(queued_.load()));
  status.set_steps(steps_.load());
  status.set_last_step_us(last_step_us_.load());
  status.set_tokens_total(pairs_.load());
  status.set_work_pending(waiting_.load() > 0);
}

}  // namespace millrace::expert
