// SPDX-License-Identifier: Apache-2.0
// One prefill and one decode worker without gRPC, and a request as the router runs it: what the hand-off tests share.
//
// Engines, loops, transfer and receiver are the real ones, on the demo checkpoint; the wire is a loopback transport
// with faults on demand, and commits and aborts are calls. Reference() is the same request in a single engine.
// Header-only, for the two test files beside it. Thread: the test's; loops and transports have their own.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "engine/engine.h"
#include "engine/status.h"
#include "kvtransfer/fault_transport.h"
#include "kvtransfer/loopback_transport.h"
#include "services/common/failpoints.h"
#include "services/common/one_engine_tokens.h"
#include "services/common/test_wait.h"
#include "services/common/worker_metrics.h"
#include "services/decode/decode_loop.h"
#include "services/prefill/prefill_loop.h"

namespace millrace {

inline constexpr absl::Duration kPatience =
    absl::Seconds(60);  // machines that run this may be busy; nothing is that slow

inline std::unique_ptr<Engine> MakeEngine(int64_t pages, int sequences, int batch_tokens) {
  EngineOptions options;
  options.cache_pages = pages;
  options.max_sequences = sequences;
  options.max_batch_tokens = batch_tokens;
  auto engine = Engine::Create(DemoCheckpoint(), options);
  CHECK(engine.ok(), std::string(engine.status().message()));
  return *std::move(engine);
}

inline std::vector<int32_t> MakePrompt(int64_t length, uint32_t salt = 0) {
  return PromptFrom(12345 + 7919 * salt, length);
}

inline v1::GenerationSpec MakeSpec(uint32_t max_tokens) {
  v1::GenerationSpec spec;
  spec.mutable_sampling()->set_temperature(0.8f);
  spec.mutable_sampling()->set_seed(4711);
  spec.set_max_tokens(max_tokens);
  spec.set_num_logprobs(2);
  return spec;
}

struct Outcome {
  std::vector<v1::Token> tokens;
  absl::Status prefill, decode;
  bool committed = false, ended_by_first = false;
  uint32_t resent = 0;
  bool prefill_closed = false, decode_closed = false;
};

// The same request in one engine, unchunked.
inline std::vector<v1::Token> Reference(const std::vector<int32_t>& prompt, const v1::GenerationSpec& spec) {
  static Engine* const engine = MakeEngine(64, 2, 2048).release();
  return OneEngineTokens(*engine, prompt, spec);
}

// Commit and abort without a network.
class DirectClient final : public prefill::HandoffClient {
 public:
  decode::DecodeLoop* loop = nullptr;
  void Commit(const std::string&, v1::CommitRequest request, absl::Duration,
              absl::AnyInvocable<void(absl::StatusOr<v1::CommitResponse>)> done) override {
    loop->Commit(std::move(request), std::move(done));
  }
  void Abort(const std::string&, v1::AbortLeaseRequest request, absl::Duration,
             absl::AnyInvocable<void(absl::StatusOr<v1::AbortLeaseResponse>)> done) override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (hold_aborts_) {
      held_ = [this, request = std::move(request), done = std::move(done)]() mutable {
        loop->Abort(std::move(request), std::move(done));
      };
    } else {
      loop->Abort(std::move(request), std::move(done));
    }
  }

  // Aborts stay on the way until they are let through; one at a time.
  void HoldAborts() {
    std::lock_guard<std::mutex> lock(mutex_);
    hold_aborts_ = true;
  }
  bool Holding() {
    std::lock_guard<std::mutex> lock(mutex_);
    return held_ != nullptr;
  }
  void LetThrough() {
    std::lock_guard<std::mutex> lock(mutex_);
    hold_aborts_ = false;
    if (held_ != nullptr) std::exchange(held_, nullptr)();
  }

 private:
  std::mutex mutex_;
  bool hold_aborts_ = false;         // guarded by mutex_
  absl::AnyInvocable<void()> held_;  // guarded by mutex_
};

// One prefill and one decode worker without gRPC.
class Pair {
 public:
  struct Options {
    int64_t prefill_pages = 64, decode_pages = 64;
    int prefill_sequences = 8, decode_sequences = 16;
    int batch_tokens = 100;  // odd on purpose: chunks end inside compression blocks
    kvtransfer::FaultPlan faults;
    absl::Duration transfer_timeout = absl::Seconds(20);
  };
  Pair() : Pair(Options{}) {}
  explicit Pair(Options options) {
    hub_ = kvtransfer::LoopbackHub::Create();
    auto faulty = kvtransfer::FaultTransport::Wrap(kvtransfer::CreateLoopbackTransport(hub_), options.faults);
    faults = faulty.get();
    prefill_transport = std::move(faulty);
    decode_transport = kvtransfer::CreateLoopbackTransport(hub_);
    prefill_engine = MakeEngine(options.prefill_pages, options.prefill_sequences, options.batch_tokens);
    decode_engine = MakeEngine(options.decode_pages, options.decode_sequences, options.decode_sequences);
    receiver = std::make_unique<kvtransfer::Receiver>(*decode_transport);
    decode::DecodeLoopOptions decode_options;
    decode_options.incarnation = decode_id;
    decode_options.compat_hash = "same";
    decode_options.transfer_address = decode_transport->address();
    decode_loop = std::make_unique<decode::DecodeLoop>(*decode_engine, *receiver, decode_options, &decode_metrics);
    client.loop = decode_loop.get();
    prefill::PrefillLoopOptions prefill_options;
    prefill_options.incarnation = prefill_id;
    prefill_options.compat_hash = "same";
    prefill_options.transfer_timeout = options.transfer_timeout;
    prefill_loop =
        std::make_unique<prefill::PrefillLoop>(*prefill_engine, *prefill_transport, client, prefill_options, nullptr);
  }
  ~Pair() {
    prefill_loop->Stop();
    decode_loop->Stop();
    prefill_transport->Close();
    decode_transport->Close();
  }

  v1::ReserveRequest MakeReserve(const std::string& id, const std::vector<int32_t>& prompt,
                                 const v1::GenerationSpec& spec, uint32_t attempt = 1) const {
    v1::ReserveRequest reserve;
    reserve.set_request_id(id);
    reserve.set_attempt(attempt);
    *reserve.mutable_spec() = spec;
    reserve.set_prompt_tokens(static_cast<uint32_t>(prompt.size()));
    reserve.set_token_hash(TokenHash(prompt));
    reserve.set_compat_hash("same");
    prefill_id.To(reserve.mutable_prefill());
    router_id.To(reserve.mutable_router());
    reserve.set_ttl_ms(60000);
    reserve.set_deadline_ms(600000);
    return reserve;
  }

  absl::StatusOr<v1::ReserveResponse> Reserve(v1::ReserveRequest request) {
    std::mutex mutex;
    std::condition_variable answered;
    std::optional<absl::StatusOr<v1::ReserveResponse>> answer;
    decode_loop->Reserve(std::move(request), [&](absl::StatusOr<v1::ReserveResponse> response) {
      std::lock_guard<std::mutex> lock(mutex);
      answer = std::move(response);
      answered.notify_all();
    });
    std::unique_lock<std::mutex> lock(mutex);
    answered.wait(lock, [&] { return answer.has_value(); });
    return *std::move(answer);
  }

  v1::PrefillRequest MakePrefill(const std::string& id, const std::vector<int32_t>& prompt,
                                 const v1::GenerationSpec& spec, const v1::ReserveResponse& reserved,
                                 uint32_t attempt = 1) const {
    v1::PrefillRequest request;
    request.set_request_id(id);
    request.set_attempt(attempt);
    *request.mutable_spec() = spec;
    request.mutable_prompt_ids()->Add(prompt.begin(), prompt.end());
    *request.mutable_target()->mutable_lease() = reserved.lease();
    request.mutable_target()->set_transfer_address(reserved.transfer_address());
    request.mutable_target()->set_control_address("decode:1");
    request.mutable_target()->set_compat_hash("same");
    request.mutable_target()->set_name("decode-0");
    request.set_deadline_ms(600000);
    return request;
  }

  // Everything back where it was.
  bool Clean() const {
    const CacheUsage p = prefill_engine->Usage(), d = decode_engine->Usage();
    const kvtransfer::ReceiverStatistics r = receiver->statistics();
    return p.pages_free == p.pages_total && p.slots_free == p.slots_total && d.pages_free == d.pages_total &&
           d.slots_free == d.slots_total && r.leases_open == 0 && r.leases_fencing == 0 && prefill_loop->Idle() &&
           decode_loop->Idle();
  }
  bool BecomesClean() const {
    return Eventually([this] { return Clean(); }, absl::ToChronoMilliseconds(kPatience));
  }

  const IncarnationId prefill_id = IncarnationId::Random(), decode_id = IncarnationId::Random(),
                      router_id = IncarnationId::Random();
  std::shared_ptr<kvtransfer::LoopbackHub> hub_;
  kvtransfer::FaultTransport* faults = nullptr;
  std::unique_ptr<kvtransfer::Transport> prefill_transport, decode_transport;
  std::unique_ptr<Engine> prefill_engine, decode_engine;
  std::unique_ptr<kvtransfer::Receiver> receiver;
  prometheus::Registry registry;
  WorkerMetrics decode_metrics{registry, v1::ROLE_DECODE, "decode-0"};
  std::unique_ptr<decode::DecodeLoop> decode_loop;
  DirectClient client;
  std::unique_ptr<prefill::PrefillLoop> prefill_loop;
};

// One request as the router runs it. Kept by both loops through its two sinks.
class Flow : public std::enable_shared_from_this<Flow> {
 public:
  Flow(Pair& pair, std::string id, std::vector<int32_t> prompt, v1::GenerationSpec spec)
      : pair_(pair), id_(std::move(id)), prompt_(std::move(prompt)), spec_(std::move(spec)) {}

  absl::Status Start(uint32_t attempt = 1) {
    auto reserved = pair_.Reserve(pair_.MakeReserve(id_, prompt_, spec_, attempt));
    if (!reserved.ok()) return reserved.status();
    lease_ = reserved->lease();
    decode_sink_ = std::make_shared<DecodeSink>(shared_from_this());
    pair_.decode_loop->Attach(lease_, decode_sink_);
    prefill_sink_ = std::make_shared<PrefillSink>(shared_from_this());
    pair_.prefill_loop->Submit(pair_.MakePrefill(id_, prompt_, spec_, *reserved, attempt), absl::Seconds(600),
                               prefill_sink_);
    return absl::OkStatus();
  }

  // Until both legs have ended.
  Outcome Wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const bool over = changed_.wait_for(lock, absl::ToChronoMilliseconds(kPatience),
                                        [this] { return outcome_.prefill_closed && outcome_.decode_closed; });
    EXPECT_TRUE(over) << "prefill closed " << outcome_.prefill_closed << " decode closed " << outcome_.decode_closed;
    prefill_sink_.reset();
    decode_sink_.reset();
    return outcome_;
  }
  bool WaitForTokens(size_t count) {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, absl::ToChronoMilliseconds(kPatience), [&] {
      return outcome_.tokens.size() >= count || outcome_.decode_closed;
    }) && outcome_.tokens.size() >= count;
  }
  void CancelPrefill() { pair_.prefill_loop->Cancel(prefill_sink_.get()); }
  void CancelDecode() { pair_.decode_loop->Detach(lease_.id(), decode_sink_.get()); }
  void SetCongested(bool congested) {
    congested_.store(congested);
    pair_.decode_loop->Wake();
  }
  const v1::LeaseRef& lease() const { return lease_; }
  Outcome so_far() {
    std::lock_guard<std::mutex> lock(mutex_);
    return outcome_;
  }

 private:
  struct PrefillSink : prefill::PrefillSink {
    explicit PrefillSink(std::shared_ptr<Flow> f) : flow(std::move(f)) {}
    void OnEvent(v1::PrefillEvent event) override { flow->OnPrefillEvent(event); }
    void OnClose(absl::Status status) override {
      flow->Change([&](Outcome& o) {
        EXPECT_FALSE(o.prefill_closed);
        o.prefill_closed = true;
        o.prefill = status;
      });
    }
    const std::shared_ptr<Flow> flow;
  };
  struct DecodeSink : decode::TokenSink {
    explicit DecodeSink(std::shared_ptr<Flow> f) : flow(std::move(f)) {}
    void OnTokens(v1::DecodeTokens tokens) override {
      flow->Change(
          [&](Outcome& o) { o.tokens.insert(o.tokens.end(), tokens.tokens().begin(), tokens.tokens().end()); });
    }
    void OnEnd(v1::FinishReason, uint64_t) override { Close(absl::OkStatus()); }
    void OnError(absl::Status status) override { Close(status); }
    void Close(const absl::Status& status) {
      flow->Change([&](Outcome& o) {
        EXPECT_FALSE(o.decode_closed);
        o.decode_closed = true;
        o.decode = status;
      });
    }
    bool Congested() const override { return flow->congested_.load(); }
    const std::shared_ptr<Flow> flow;
  };

  void OnPrefillEvent(const v1::PrefillEvent& event) {
    Change([&](Outcome& o) {
      if (event.has_first_token()) o.tokens.push_back(event.first_token().token());
      if (event.has_committed()) {
        o.committed = true;
        o.resent = event.committed().resent();
      }
      if (event.has_ended()) o.ended_by_first = true;
    });
  }
  void Change(const std::function<void(Outcome&)>& change) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      change(outcome_);
    }
    changed_.notify_all();
  }

  Pair& pair_;
  const std::string id_;
  const std::vector<int32_t> prompt_;
  const v1::GenerationSpec spec_;
  v1::LeaseRef lease_;
  std::shared_ptr<PrefillSink> prefill_sink_;
  std::shared_ptr<DecodeSink> decode_sink_;
  std::atomic<bool> congested_{false};
  std::mutex mutex_;
  std::condition_variable changed_;
  Outcome outcome_;
};

inline std::shared_ptr<Flow> MakeFlow(Pair& pair, const std::string& id, const std::vector<int32_t>& prompt,
                                      const v1::GenerationSpec& spec) {
  return std::make_shared<Flow>(pair, id, prompt, spec);
}

inline Outcome RunOne(Pair& pair, const std::string& id, const std::vector<int32_t>& prompt,
                      const v1::GenerationSpec& spec) {
  auto flow = MakeFlow(pair, id, prompt, spec);
  const absl::Status started = flow->Start();
  EXPECT_TRUE(started.ok()) << started;
  if (!started.ok()) return {};
  return flow->Wait();
}

class Handoff : public ::testing::Test {
 protected:
  void TearDown() override { ASSERT_TRUE(failpoints::Arm("").ok()); }
};

}  // namespace millrace
