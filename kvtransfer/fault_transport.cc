// SPDX-License-Identifier: Apache-2.0
// Draws faults for each message and lets the transport beneath carry what is left; the contract is in
// fault_transport.h.
//
// A message that a fault touches is first copied, because what the caller lent must not be changed and may have to
// leave later than the caller's `done`. Late messages are held by the transport's own timers.
#include "kvtransfer/fault_transport.h"

#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <utility>

#include "kvtransfer/forwarding_transport.h"
#include "kvtransfer/status.h"

namespace millrace::kvtransfer {
namespace {

// A message of our own, alive until the last of its sends completed.
struct Copy {
  PeerId peer;
  uint16_t channel = 0;
  std::string header;
  std::string payload;
};

class FaultTransportImpl final : public ForwardingTransport<FaultTransport> {
 public:
  FaultTransportImpl(std::unique_ptr<Transport> inner, FaultPlan plan) : ForwardingTransport(std::move(inner)) {
    SetPlan(plan);
  }
  ~FaultTransportImpl() override { inner()->Close(); }

  bool Supports(MemoryKind kind) const override { return kind == MemoryKind::kHost && inner()->Supports(kind); }
  std::string Describe() const override { return "with faults: " + inner()->Describe(); }

  void SetPlan(FaultPlan plan) override {
    std::lock_guard lock(mu_);
    plan_ = plan;
    random_.seed(plan.seed);
    faults_left_ = plan.max_faults;
  }
  FaultCounts counts() const override {
    std::lock_guard lock(mu_);
    return counts_;
  }

  absl::StatusOr<SendId> SendMessage(PeerId peer, uint16_t channel, absl::Span<const uint8_t> header,
                                     ConstMemory payload, SendDone done) override {
    CHECK(payload.kind == MemoryKind::kHost, "faults are made in host memory");
    const Faults faults = Draw(header.size(), payload.bytes);
    absl::StatusOr<SendId> result;
    if (!faults.any) {
      result = inner()->SendMessage(peer, channel, header, payload, std::move(done));
    } else {
      result = SendWithFaults(faults, peer, channel, header, payload, std::move(done));
    }
    ReleaseHeld();  // whatever a reorder held back leaves after this one
    if (faults.any && faults.reorder) HoldUntilNext();
    return result;
  }

 private:
  struct Faults {
    bool any = false, drop = false, fail = false, duplicate = false, reorder = false;
    size_t cut_bytes = 0;
    int64_t payload_bit = -1, header_bit = -1;
    absl::Duration delay;
  };

  Faults Draw(size_t header_bytes, size_t payload_bytes) {
    std::lock_guard lock(mu_);
    Faults faults;
    auto draw = [&](double probability, uint64_t& count) {
      if (probability <= 0 || faults_left_ == 0 || std::uniform_real_distribution<>()(random_) >= probability)
        return false;
      --faults_left_, ++count;
      return faults.any = true;
    };
    auto below = [&](uint64_t n) { return std::uniform_int_distribution<uint64_t>(0, n - 1)(random_); };
    if ((faults.drop = draw(plan_.drop, counts_.dropped))) return faults;
    if ((faults.fail = draw(plan_.fail, counts_.failed))) return faults;
    if (payload_bytes > 0 && draw(plan_.truncate, counts_.truncated)) faults.cut_bytes = 1 + below(payload_bytes);
    const size_t left = payload_bytes - faults.cut_bytes;
    if (left > 0 && draw(plan_.flip_payload, counts_.payload_flipped)) faults.payload_bit = below(left * 8);
    if (header_bytes > 0 && draw(plan_.flip_header, counts_.header_flipped))
      faults.header_bit = below(header_bytes * 8);
    faults.duplicate = draw(plan_.duplicate, counts_.duplicated);
    faults.reorder = draw(plan_.reorder, counts_.reordered);
    if (draw(plan_.delay, counts_.delayed))
      faults.delay = plan_.delay_up_to * std::uniform_real_distribution<>()(random_);
    return faults;
  }

  absl::StatusOr<SendId> SendWithFaults(const Faults& faults, PeerId peer, uint16_t channel,
                                        absl::Span<const uint8_t> header, ConstMemory payload, SendDone done) {
    if (faults.drop || faults.fail) {
      const absl::Status outcome = faults.fail ? absl::UnavailableError("failed on purpose") : absl::OkStatus();
      inner()->RunAfter(absl::ZeroDuration(), [outcome, done = std::move(done)]() mutable { done(outcome); });
      return SendId{};
    }
    auto copy = std::make_shared<Copy>();
    copy->peer = peer;
    copy->channel = channel;
    copy->header.assign(reinterpret_cast<const char*>(header.data()), header.size());
    copy->payload.assign(static_cast<const char*>(payload.data), payload.bytes - faults.cut_bytes);
    if (faults.payload_bit >= 0)
      copy->payload[faults.payload_bit / 8] ^= static_cast<char>(1 << (faults.payload_bit % 8));
    if (faults.header_bit >= 0) copy->header[faults.header_bit / 8] ^= static_cast<char>(1 << (faults.header_bit % 8));
    auto outcome = std::make_shared<SendDone>(std::move(done));
    auto leave = [this, copy, outcome, twice = faults.duplicate] {
      const absl::Status sent = Leave(copy, outcome);
      if (!sent.ok()) (*outcome)(absl::UnavailableError(sent.message()));
      if (sent.ok() && twice) (void)Leave(copy, std::make_shared<SendDone>([](absl::Status) {}));
    };
    if (faults.reorder) {
      std::lock_guard lock(mu_);
      pending_ = std::move(leave);
    } else {
      inner()->RunAfter(faults.delay, std::move(leave));
    }
    return SendId{};
  }

  absl::Status Leave(const std::shared_ptr<Copy>& copy, const std::shared_ptr<SendDone>& outcome) {
    const absl::Span<const uint8_t> header(reinterpret_cast<const uint8_t*>(copy->header.data()), copy->header.size());
    return inner()
        ->SendMessage(copy->peer, copy->channel, header, {copy->payload.data(), copy->payload.size()},
                      [copy, outcome](absl::Status status) { (*outcome)(status); })
        .status();
  }

  void ReleaseHeld() {
    std::map<uint64_t, absl::AnyInvocable<void()>> held;
    {
      std::lock_guard lock(mu_);
      held = std::exchange(held_, {});
    }
    for (auto& [id, leave] : held) inner()->RunAfter(absl::ZeroDuration(), std::move(leave));
  }

  void HoldUntilNext() {
    uint64_t id = 0;
    absl::Duration at_most;
    {
      std::lock_guard lock(mu_);
      if (!pending_) return;
      id = ++next_held_;
      held_[id] = std::exchange(pending_, nullptr);
      at_most = plan_.delay_up_to;
    }
    inner()->RunAfter(at_most, [this, id] {
      absl::AnyInvocable<void()> leave;
      {
        std::lock_guard lock(mu_);
        auto it = held_.find(id);
        if (it == held_.end()) return;
        leave = std::move(it->second);
        held_.erase(it);
      }
      leave();
    });
  }

  mutable std::mutex mu_;
  FaultPlan plan_;
  std::mt19937_64 random_;
  uint64_t faults_left_ = 0;
  FaultCounts counts_;
  absl::AnyInvocable<void()> pending_;  // drawn to be reordered, not yet held
  std::map<uint64_t, absl::AnyInvocable<void()>> held_;
  uint64_t next_held_ = 0;
};

}  // namespace

std::unique_ptr<FaultTransport> FaultTransport::Wrap(std::unique_ptr<Transport> inner, FaultPlan plan) {
  return std::make_unique<FaultTransportImpl>(std::move(inner), plan);
}

}  // namespace millrace::kvtransfer
