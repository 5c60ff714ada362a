// SPDX-License-Identifier: Apache-2.0
// What the tests of kvtransfer share: kinds of transport, patterns, waiting with a bound, counting what a process
// holds.
#pragma once

#include <dirent.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kvtransfer/loopback_transport.h"
#include "kvtransfer/sealed_transport.h"
#include "kvtransfer/transport.h"
#include "kvtransfer/ucx_transport.h"

namespace millrace::kvtransfer::testing {

// A bound for what should take milliseconds, wide enough for a busy two-core machine under a sanitizer.
inline constexpr absl::Duration kSoon = absl::Seconds(20);
// What the product promises for peer failures.
inline constexpr absl::Duration kFailureBound = absl::Seconds(3);

enum class TransportKind { kLoopback, kUcxTcpSelf, kUcxDefault, kSealedLoopback, kSealedUcx };

inline bool IsLoopback(TransportKind kind) {
  return kind == TransportKind::kLoopback || kind == TransportKind::kSealedLoopback;
}
inline bool IsSealed(TransportKind kind) {
  return kind == TransportKind::kSealedLoopback || kind == TransportKind::kSealedUcx;
}

inline std::string KindName(TransportKind kind) {
  switch (kind) {
    case TransportKind::kLoopback:
      return "Loopback";
    case TransportKind::kUcxTcpSelf:
      return "UcxTcpSelf";
    case TransportKind::kUcxDefault:
      return "UcxDefault";
    case TransportKind::kSealedLoopback:
      return "SealedLoopback";
    case TransportKind::kSealedUcx:
      return "SealedUcx";
  }
  return "";
}

// Transports of one kind that can reach each other.
class TransportFactory {
 public:
  explicit TransportFactory(TransportKind kind) : kind_(kind), hub_(LoopbackHub::Create()) {}

  std::unique_ptr<Transport> Make(TransportOptions options = {}) const {
    std::unique_ptr<Transport> transport = MakePlain(std::move(options));
    if (transport == nullptr || !IsSealed(kind_)) return transport;
    return SealTransport(std::move(transport), HostMemoryFunctions());
  }

  // What lies under the seal, if there is one.
  std::unique_ptr<Transport> MakePlain(TransportOptions options = {}) const {
    if (!options.log) options.log = [](absl::string_view) {};
    // A machine that runs tests may stand still for seconds. A connection that is given up while the other side has
    // just accepted it fails there too, and that is not what the tests are about.
    options.connect_timeout = std::max(options.connect_timeout, kSoon);
    if (IsLoopback(kind_)) return CreateLoopbackTransport(hub_, std::move(options));
    if (kind_ == TransportKind::kUcxDefault)
      unsetenv("UCX_TLS");
    else
      setenv("UCX_TLS", "tcp,self", 1);
    auto transport = CreateUcxTransport(std::move(options));
    EXPECT_TRUE(transport.ok()) << transport.status();
    return transport.ok() ? std::move(*transport) : nullptr;
  }

 private:
  const TransportKind kind_;
  const std::shared_ptr<LoopbackHub> hub_;
};

inline std::vector<TransportKind> AllKinds() {
  std::vector<TransportKind> kinds = {TransportKind::kLoopback, TransportKind::kSealedLoopback};
  if (UcxAvailable()) {
    kinds.insert(kinds.end(), {TransportKind::kUcxTcpSelf, TransportKind::kUcxDefault, TransportKind::kSealedUcx});
  }
  return kinds;
}

inline std::vector<uint8_t> Pattern(size_t bytes, uint64_t seed) {
  std::vector<uint8_t> pattern(bytes);
  uint64_t x = seed * 0x9e3779b97f4a7c15ull + 1;
  for (size_t i = 0; i < bytes; ++i) {
    x = x * 6364136223846793005ull + 1442695040888963407ull;
    pattern[i] = static_cast<uint8_t>(x >> 56);
  }
  return pattern;
}

inline bool Eventually(const std::function<bool()>& condition, absl::Duration bound = kSoon) {
  const absl::Time deadline = absl::Now() + bound;
  while (!condition()) {
    if (absl::Now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

// One outcome, set once by a callback.
class Outcome {
 public:
  SendDone Callback() {
    return [state = state_](absl::Status status) {
      std::lock_guard lock(state->mu);
      ++state->times;
      state->status = std::move(status);
      state->cv.notify_all();
    };
  }
  bool Wait(absl::Duration bound = kSoon) const {
    std::unique_lock lock(state_->mu);
    return state_->cv.wait_for(lock, absl::ToChronoNanoseconds(bound), [&] { return state_->times != 0; });
  }
  absl::Status Get(absl::Duration bound = kSoon) const {
    if (!Wait(bound)) return absl::DeadlineExceededError("test: no outcome in time");
    std::lock_guard lock(state_->mu);
    return state_->status;
  }
  int times() const {
    std::lock_guard lock(state_->mu);
    return state_->times;
  }

 private:
  struct State {
    std::mutex mu;
    std::condition_variable cv;
    int times = 0;
    absl::Status status;
  };
  std::shared_ptr<State> state_ = std::make_shared<State>();
};

// A door that callbacks wait at: holds up a transport thread for as long as a test wants, and may be destroyed while
// that thread is still leaving.
class Gate {
 public:
  void WaitHere() {
    const std::shared_ptr<State> state = state_;
    std::unique_lock lock(state->mu);
    state->waiting = true;
    state->cv.notify_all();
    state->cv.wait(lock, [&] { return state->open; });
  }
  void AwaitSomebody() {
    std::unique_lock lock(state_->mu);
    state_->cv.wait(lock, [&] { return state_->waiting || state_->open; });
  }
  void Open() {
    std::lock_guard lock(state_->mu);
    state_->open = true;
    state_->cv.notify_all();
  }

 private:
  struct State {
    std::mutex mu;
    std::condition_variable cv;
    bool open = false, waiting = false;
  };
  const std::shared_ptr<State> state_ = std::make_shared<State>();
};

class FunctionHandler : public MessageHandler {
 public:
  explicit FunctionHandler(std::function<Placement(const IncomingMessage&)> f) : f_(std::move(f)) {}
  Placement OnMessage(const IncomingMessage& message) override { return f_(message); }

 private:
  std::function<Placement(const IncomingMessage&)> f_;
};

inline size_t CountEntries(const char* directory) {
  size_t count = 0;
  DIR* handle = opendir(directory);
  while (readdir(handle) != nullptr) ++count;
  closedir(handle);
  return count;
}
inline size_t OpenFiles() { return CountEntries("/proc/self/fd"); }
inline size_t Threads() { return CountEntries("/proc/self/task"); }

inline absl::Span<const uint8_t> Bytes(const std::string& s) {
  return {reinterpret_cast<const uint8_t*>(s.data()), s.size()};
}

}  // namespace millrace::kvtransfer::testing
