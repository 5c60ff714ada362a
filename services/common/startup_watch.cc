// SPDX-License-Identifier: Apache-2.0
// See startup_watch.h.
#include "services/common/startup_watch.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "services/common/clock.h"
#include "spdlog/spdlog.h"

namespace millrace {
namespace {

// Less of a processor than this is what heartbeats and an idle transport take: it is no sign of work.
constexpr double kIdleShare = 0.05;

struct Activity {
  int64_t reads = 0;  // page faults and reads that a device answered
  absl::Duration cpu;

  static Activity Now() {
    rusage usage = {};
    getrusage(RUSAGE_SELF, &usage);
    return {usage.ru_majflt + usage.ru_inblock,
            absl::DurationFromTimeval(usage.ru_utime) + absl::DurationFromTimeval(usage.ru_stime)};
  }
};

void LogAndExit(const std::string& why) {
  spdlog::critical("{}", why);
  spdlog::default_logger()->flush();
  _exit(kExitStartupStuck);
}

}  // namespace

StartupWatch::StartupWatch(std::string who, absl::Duration limit, std::function<void(const std::string&)> expired)
    : who_(std::move(who)), limit_(limit), expired_(expired ? std::move(expired) : LogAndExit) {
  if (limit_ > absl::ZeroDuration()) thread_ = std::thread([this] { Run(); });
}

StartupWatch::~StartupWatch() {
  Done();
  if (thread_.joinable()) thread_.join();
}

void StartupWatch::Waiting(std::string for_what) {
  absl::MutexLock lock(&mutex_);
  stage_ = std::move(for_what);
  done_ = total_ = 0;
  ++moves_;
}

void StartupWatch::Moved(int64_t done, int64_t total) {
  absl::MutexLock lock(&mutex_);
  if (done == done_ && total == total_) return;
  done_ = done;
  total_ = total;
  ++moves_;
}

void StartupWatch::Done() {
  absl::MutexLock lock(&mutex_);
  over_ = true;
}

void StartupWatch::Run() {
  const absl::Duration interval = std::min(limit_ / 4, absl::Seconds(5));
  absl::Time moved_at = MonotonicNow(), looked_at = moved_at;
  Activity seen = Activity::Now();
  uint64_t moves = 0;
  absl::MutexLock lock(&mutex_);
  while (!mutex_.AwaitWithTimeout(absl::Condition(&over_), interval)) {
    const absl::Time now = MonotonicNow();
    const Activity activity = Activity::Now();
    const bool worked = activity.reads != seen.reads || activity.cpu - seen.cpu > kIdleShare * (now - looked_at);
    if (worked || moves != moves_) moved_at = now;
    moves = moves_;
    seen = activity;
    looked_at = now;
    if (now - moved_at < limit_) continue;
    const std::string why = Sentence(now - moved_at);
    mutex_.Unlock();
    expired_(why);
    mutex_.Lock();
    return;
  }
}

std::string StartupWatch::Sentence(absl::Duration still) const {
  std::string progress;
  if (total_ > 0) progress = absl::StrCat(", ", done_, " of ", total_, " bytes done");
  return absl::StrCat(who_, ": start-up waits for ", stage_, progress, ", and nothing has moved for ",
                      absl::ToInt64Seconds(still), " s (timers.startup_timeout_ms)");
}

}  // namespace millrace
