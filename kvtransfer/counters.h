// SPDX-License-Identifier: Apache-2.0
// The statistics that every transport keeps, behind one lock. Internal to kvtransfer.
//
// Thread: any. A lock costs about 20 ns a message, a message costs microseconds.
#pragma once

#include <algorithm>
#include <mutex>
#include <string>
#include <utility>

#include "kvtransfer/transport.h"

namespace millrace::kvtransfer::internal {

class Counters {
 public:
  void Queued() {
    Locked([](auto& s) { ++s.messages_queued; });
  }
  void Unqueued() {
    Locked([](auto& s) { --s.messages_queued; });
  }
  void Launched(size_t bytes) {
    Locked([&](auto& s) { --s.messages_queued, ++s.messages_in_flight, s.bytes_in_flight += bytes; });
  }
  void Landed(size_t bytes) {
    Locked([&](auto& s) { --s.messages_in_flight, s.bytes_in_flight -= bytes; });
  }
  void Sent(size_t bytes, const absl::Status& status) {
    Locked([&](auto& s) {
      if (status.ok())
        ++s.messages_sent, s.bytes_sent += bytes;
      else
        ++s.errors[absl::StatusCodeToString(status.code())];
    });
  }
  void ArrivalBegan() {
    Locked([](auto& s) { ++s.arrivals_in_flight; });
  }
  void ArrivalEnded() {
    Locked([](auto& s) { --s.arrivals_in_flight; });
  }
  void Received(size_t bytes, const absl::Status& status) {
    Locked([&](auto& s) {
      if (status.ok())
        ++s.messages_received, s.bytes_received += bytes;
      else
        ++s.errors[absl::StatusCodeToString(status.code())];
    });
  }
  void Dropped(const char* reason) {
    Locked([&](auto& s) { ++s.drops[reason]; });
  }
  void PeerConnected() {
    Locked([](auto& s) { ++s.peers_connected; });
  }
  void PeerGone(bool was_connected) {
    Locked([&](auto& s) { s.peers_connected -= was_connected ? 1 : 0, ++s.peers_failed; });
  }
  void Lane(std::string line) {
    constexpr size_t kMaxLines = 64;  // the oldest go: connections come and go, memory must not grow with them
    Locked([&](auto& s) {
      if (s.lanes.size() == kMaxLines) s.lanes.erase(s.lanes.begin());
      s.lanes.push_back(std::move(line));
    });
  }
  TransportStatistics snapshot() const {
    std::lock_guard lock(mu_);
    return statistics_;
  }

 private:
  template <typename F>
  void Locked(F&& f) {
    std::lock_guard lock(mu_);
    f(statistics_);
  }
  mutable std::mutex mu_;
  TransportStatistics statistics_;
};

}  // namespace millrace::kvtransfer::internal
