// SPDX-License-Identifier: Apache-2.0
// See engine_loop.h.
#include "services/common/engine_loop.h"

#include <deque>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "services/common/clock.h"

namespace millrace {
namespace {

constexpr absl::Duration kStopPatience = absl::Seconds(5);  // for peers at the end; each wait is bounded by itself

}  // namespace

EngineLoop::EngineLoop(std::string name, Engine& engine, size_t max_commands, WorkerMetrics* metrics)
    : engine_(engine),
      metrics_(metrics),
      commands_(std::make_shared<BoundedQueue<Command>>(max_commands)),
      name_(std::move(name)) {}

EngineLoop::~EngineLoop() { CHECK(!thread_.joinable(), "a role stops its loop before it goes"); }

void EngineLoop::Start() {
  Publish();
  thread_ = std::thread([this] { Run(); });
}

void EngineLoop::Drain() {
  commands_->Post([this](absl::Time) { draining_ = true; });
}

void EngineLoop::Stop() {
  if (!thread_.joinable()) return;
  commands_->Post([this](absl::Time) {
    stopping_ = draining_ = true;
    EndAll(absl::UnavailableError(absl::StrCat("the ", name_, " is stopping")));
  });
  thread_.join();
}

void EngineLoop::FillStatus(v1::WorkerStatus& status) const {
  std::lock_guard<std::mutex> lock(status_mutex_);
  status.MergeFrom(published_);
}

void EngineLoop::Run() {
  absl::Duration wait = absl::ZeroDuration();
  absl::Time stop_by = absl::InfiniteFuture();
  for (;;) {
    std::deque<Command> commands = commands_->DrainFor(wait);
    const absl::Time now = MonotonicNow();
    for (Command& command : commands) command(now);
    if (stopping_) {
      if (stop_by == absl::InfiniteFuture()) stop_by = now + kStopPatience;
      if (Idle() || now > stop_by) break;
    }
    wait = Round(now);
    Publish();
  }
  CHECK(Idle(), absl::StrCat(live_.load(), " requests of the ", name_, " could not be ended"));
  commands_->Close();
  for (Command& command : commands_->DrainFor(absl::ZeroDuration())) command(MonotonicNow());
}

absl::Status EngineLoop::Behind() const {
  return absl::ResourceExhaustedError(absl::StrCat("the ", name_, "'s command queue is full or closed"));
}

absl::Time EngineLoop::RecordStep(absl::Time began, int64_t rows, bool ok) {
  const absl::Time now = MonotonicNow();
  {
    std::lock_guard<std::mutex> lock(status_mutex_);
    published_.set_steps(published_.steps() + 1);
    published_.set_last_step_us(static_cast<uint32_t>(absl::ToInt64Microseconds(now - began)));
    if (ok) published_.set_tokens_total(published_.tokens_total() + static_cast<uint64_t>(rows));
  }
  if (metrics_ != nullptr) {
    metrics_->ObserveStep(absl::ToDoubleSeconds(now - began), rows);
    if (ok) metrics_->CountTokens(rows);
  }
  return now;
}

void EngineLoop::PublishLoad(const Load& load, const CacheUsage& usage,
                             absl::FunctionRef<void(v1::WorkerStatus& status)> more) {
  std::lock_guard<std::mutex> lock(status_mutex_);
  published_.set_running(load.running);
  published_.set_pages_free(usage.pages_free);
  published_.set_slots_free(usage.slots_free);
  published_.set_work_pending(load.work_pending);
  more(published_);
  if (metrics_ == nullptr) return;
  metrics_->queued().Set(load.queued);
  metrics_->running().Set(load.running);
  metrics_->SetWaiting(load.waiting);
  metrics_->SetPages(usage.pages_free, usage.pages_owned);
  metrics_->SetSlots(usage.slots_free, usage.slots_total);
}

}  // namespace millrace
