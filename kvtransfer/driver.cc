// SPDX-License-Identifier: Apache-2.0
// Spinning, sleeping and taking turns; the contract is in driver.h.
//
// No wake-up is lost: a sleeper counts itself in asleep_ before it looks at the queue for the last time, a poster looks
// at asleep_ after it has queued. The engine's own events cannot be lost either, because Arm says whether any are left.
#include "kvtransfer/driver.h"

#include <poll.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "kvtransfer/status.h"

namespace millrace::kvtransfer::internal {
namespace {

// The own thread looks around this often even if nothing wakes it: keepalive and the like happen inside progress.
constexpr auto kLongestSleep = std::chrono::milliseconds(100);
// A waiter's condition may be made true by a thread that does not know us.
constexpr auto kWaiterSlice = std::chrono::milliseconds(1);

// Spinning gives way now and then: on a small machine whoever we wait for may need this very core.
class Spinner {
 public:
  void Once() {
    if ((++count_ & 15) == 0) sched_yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

 private:
  unsigned count_ = 0;
};

// The driver whose turn was the last on this thread: two of one process may need different things of it.
thread_local uint64_t driven_here = 0;
std::atomic<uint64_t> last_id{0};

std::chrono::steady_clock::duration ToChrono(absl::Duration d) {
  return d >= absl::Hours(24) ? std::chrono::hours(24) : absl::ToChronoNanoseconds(d);
}

}  // namespace

Driver::Driver(Engine& engine, absl::Duration spin, absl::Duration linger)
    : engine_(engine), id_(++last_id), spin_(ToChrono(spin)), linger_(ToChrono(linger)) {
  event_fd_ = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  epoll_fd_ = epoll_create1(EPOLL_CLOEXEC);
  CHECK(event_fd_ >= 0 && epoll_fd_ >= 0, "out of file descriptors");
}

Driver::~Driver() {
  Stop();
  close(epoll_fd_);
  close(event_fd_);
}

void Driver::Start() {
  epoll_event event{};
  event.events = EPOLLIN;
  for (int fd : {event_fd_, engine_.fd()}) CHECK(epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, fd, &event) == 0);
  thread_ = std::thread([this] { Run(); });
}

std::vector<Driver::Task> Driver::Stop() {
  if (!thread_.joinable()) return {};
  stopping_ = true;
  Wake();
  thread_.join();
  std::vector<Task> tasks;
  std::multimap<Clock::time_point, Task> timers;
  {
    std::lock_guard lock(queue_mu_);
    tasks.swap(tasks_);
    timers.swap(timers_);
  }
  return tasks;
}

void Driver::Post(Task task) {
  {
    std::lock_guard lock(queue_mu_);
    tasks_.push_back(std::move(task));
  }
  if (asleep_.load() != 0 && !IsLingeringDriver()) Wake();
}

void Driver::RunAfter(absl::Duration delay, Task task) {
  if (delay <= absl::ZeroDuration()) return Post(std::move(task));
  {
    std::lock_guard lock(queue_mu_);
    timers_.emplace(Clock::now() + ToChrono(delay), std::move(task));
  }
  if (asleep_.load() != 0) Wake();  // a sleeper may have meant to sleep longer
}

void Driver::Exclusively(absl::FunctionRef<void()> action) {
  std::lock_guard lock(drive_mu_);
  action();
}

bool Driver::WaitFor(absl::FunctionRef<bool()> done, absl::Duration timeout) {
  if (done()) return true;
  const auto deadline = Clock::now() + ToChrono(timeout);
  last_waiter_ = std::this_thread::get_id();
  ++waiting_;
  Spinner spinner;
  bool result = false;
  const auto began = Clock::now();
  auto last_event = began;
  // A wait much longer than a spin will be again: the core is better left to whoever computes what is waited for.
  const bool spin = Clock::duration(last_wait_.load()) <= 2 * spin_;
  while (!(result = done())) {
    bool busy = false;
    {
      std::lock_guard lock(drive_mu_);
      // Another waiter, driving until now, may have run the callback that we wait for.
      if ((result = done())) break;
      busy = DriveLocked();
    }
    const auto now = Clock::now();
    if (now >= deadline && !(result = done())) break;
    if (busy) {
      last_event = now;
    } else if (spin && now - last_event < spin_) {
      spinner.Once();
    } else {
      SleepUntil(std::min<Clock::time_point>(deadline, now + kWaiterSlice));
    }
  }
  const auto ended = Clock::now();
  last_wait_ = (ended - began).count();
  linger_until_ = (ended + linger_).time_since_epoch().count();
  --waiting_;
  return result;
}

void Driver::PostAtOnce(absl::FunctionRef<void()> post) {
  last_waiter_ = std::this_thread::get_id();
  ++waiting_;  // the own thread stays parked, or asleep
  post();
  {
    std::lock_guard lock(drive_mu_);
    (void)DriveLocked();
  }
  linger_until_ = (Clock::now() + linger_).time_since_epoch().count();
  --waiting_;
}

void Driver::Run() {
  Spinner spinner;
  auto last_event = Clock::now();
  while (!stopping_) {
    if (Parked()) {
      Park(kWaiterSlice);
      last_event = {};  // whoever drove has seen what there was: no reason to spin
      continue;
    }
    bool busy = false;
    {
      std::lock_guard lock(drive_mu_);
      busy = DriveLocked();
    }
    const auto now = Clock::now();
    if (busy) {
      last_event = now;
    } else if (now - last_event < spin_) {
      spinner.Once();
    } else {
      SleepUntil(now + kLongestSleep);
    }
  }
}

// Tasks first, in order, then timers, then the wire. What callbacks post meanwhile is for the next round.
bool Driver::DriveLocked() {
  if (std::exchange(driven_here, id_) != id_) engine_.EnterThread();
  std::vector<Task> run;
  {
    std::lock_guard lock(queue_mu_);
    run.swap(tasks_);
    if (!timers_.empty()) {
      const auto due = timers_.upper_bound(Clock::now());
      for (auto it = timers_.begin(); it != due; ++it) run.push_back(std::move(it->second));
      timers_.erase(timers_.begin(), due);
    }
  }
  for (Task& task : run) task();
  return engine_.Progress() || !run.empty();
}

void Driver::SleepUntil(Clock::time_point deadline) {
  ++asleep_;
  bool sleep = false;
  {
    std::lock_guard lock(drive_mu_);
    std::lock_guard queue(queue_mu_);
    if (!timers_.empty()) deadline = std::min(deadline, timers_.begin()->first);
    sleep = tasks_.empty() && !stopping_ && engine_.Arm();
  }
  if (sleep) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now()).count();
    epoll_event events[2];
    if (left > 0) epoll_wait(epoll_fd_, events, 2, static_cast<int>(left));
  }
  --asleep_;
  uint64_t count;
  (void)!read(event_fd_, &count, sizeof(count));
}

bool Driver::Parked() const {
  if (stopping_) return false;
  if (waiting_.load() != 0) return true;
  return Clock::now().time_since_epoch().count() < linger_until_.load();
}

// Waits without looking at the wire, which is somebody else's for now. A post by another thread ends the park at once
// if nobody drives; a post by the lingering driver waits for it to come back, at most until the linger is over.
void Driver::Park(Clock::duration at_most) {
  ++asleep_;
  if (waiting_.load() == 0) {
    const Clock::duration left = Clock::duration(linger_until_.load()) - Clock::now().time_since_epoch();
    at_most = std::clamp(left, Clock::duration(0), at_most);
  }
  pollfd descriptor{event_fd_, POLLIN, 0};
  const timespec wait{0, std::chrono::duration_cast<std::chrono::nanoseconds>(at_most).count()};
  ppoll(&descriptor, 1, &wait, nullptr);
  --asleep_;
  uint64_t count;
  const bool posted = read(event_fd_, &count, sizeof(count)) == sizeof(count);
  if (posted && waiting_.load() == 0) linger_until_ = 0;
}

bool Driver::IsLingeringDriver() const {
  if (last_waiter_.load() != std::this_thread::get_id()) return false;
  return waiting_.load() != 0 || Clock::now().time_since_epoch().count() < linger_until_.load();
}

void Driver::Wake() {
  const uint64_t one = 1;
  (void)!write(event_fd_, &one, sizeof(one));
}

}  // namespace millrace::kvtransfer::internal
