// SPDX-License-Identifier: Apache-2.0
// A hand-off as a whole: prefill loop, transport, decode loop, on the demo checkpoint, against one process.
//
// The test plays the router. Tokens and log-probabilities must be the bits of a single engine, whatever the length, the
// chunks, the company and the faults; and whatever happens, every page and slot comes back.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/engine.h"
#include "engine/status.h"
#include "kvtransfer/fault_transport.h"
#include "kvtransfer/loopback_transport.h"
#include "services/common/clock.h"
#include "services/common/error.h"
#include "services/common/failpoints.h"
#include "services/common/metrics.h"
#include "services/common/one_engine_tokens.h"
#include "services/common/worker_metrics.h"
#include "services/decode/decode_loop.h"
#include "services/prefill/prefill_loop.h"

namespace millrace {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kModel[] = "deploy/demo/model";
constexpr absl::Duration kPatience = absl::Seconds(60);  // machines that run this may be busy; nothing is that slow

std::shared_ptr<const Checkpoint> DemoCheckpoint() {
  static const auto* checkpoint = [] {
    auto opened = Checkpoint::Open(kModel);
    CHECK(opened.ok(), std::string(opened.status().message()));
    return new std::shared_ptr<const Checkpoint>(*std::move(opened));
  }();
  return *checkpoint;
}

std::unique_ptr<Engine> MakeEngine(int64_t pages, int sequences, int batch_tokens) {
  EngineOptions options;
  options.cache_pages = pages;
  options.max_sequences = sequences;
  options.max_batch_tokens = batch_tokens;
  auto engine = Engine::Create(DemoCheckpoint(), options);
  CHECK(engine.ok(), std::string(engine.status().message()));
  return *std::move(engine);
}

std::vector<int32_t> MakePrompt(int64_t length, uint32_t salt = 0) {
  std::vector<int32_t> ids(length);
  uint32_t x = 12345 + 7919 * salt;
  for (int32_t& id : ids) {
    x = x * 1664525 + 1013904223;
    id = static_cast<int32_t>(3 + (x >> 8) % 1200);
  }
  return ids;
}

v1::GenerationSpec MakeSpec(uint32_t max_tokens) {
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
std::vector<v1::Token> Reference(const std::vector<int32_t>& prompt, const v1::GenerationSpec& spec) {
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
    for (const absl::Time end = MonotonicNow() + kPatience; MonotonicNow() < end;) {
      if (Clean()) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return false;
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

std::shared_ptr<Flow> MakeFlow(Pair& pair, const std::string& id, const std::vector<int32_t>& prompt,
                               const v1::GenerationSpec& spec) {
  return std::make_shared<Flow>(pair, id, prompt, spec);
}

Outcome RunOne(Pair& pair, const std::string& id, const std::vector<int32_t>& prompt, const v1::GenerationSpec& spec) {
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

TEST_F(Handoff, EveryLengthGivesTheBitsOfOneProcess) {
  Pair pair;
  for (int64_t length : {1, 2, 3, 4, 5, 6, 127, 128, 129, 130, 131, 132, 133, 255, 256, 257, 258, 384, 513}) {
    const auto prompt = MakePrompt(length);
    const auto spec = MakeSpec(12);
    const Outcome outcome = RunOne(pair, absl::StrCat("length-", length), prompt, spec);
    EXPECT_TRUE(outcome.prefill.ok()) << outcome.prefill;
    EXPECT_TRUE(outcome.decode.ok()) << outcome.decode;
    EXPECT_EQ(DescribeTokens(outcome.tokens), DescribeTokens(Reference(prompt, spec))) << "length " << length;
  }
  EXPECT_TRUE(pair.BecomesClean());
}

TEST_F(Handoff, DecodeCrossesCompressionBoundariesAsOneProcessDoes) {
  Pair pair;
  const auto prompt = MakePrompt(126);
  const auto spec = MakeSpec(140);
  EXPECT_EQ(DescribeTokens(RunOne(pair, "long", prompt, spec).tokens), DescribeTokens(Reference(prompt, spec)));
  EXPECT_TRUE(pair.BecomesClean());
}

TEST_F(Handoff, CompanyChangesNothing) {
  Pair pair;
  std::vector<std::shared_ptr<Flow>> flows;
  std::vector<std::string> expected;
  for (int i = 0; i < 10; ++i) {
    const auto prompt = MakePrompt(1 + 37 * i, static_cast<uint32_t>(i));
    const auto spec = MakeSpec(static_cast<uint32_t>(3 + i));
    expected.push_back(DescribeTokens(Reference(prompt, spec)));
    flows.push_back(MakeFlow(pair, absl::StrCat("together-", i), prompt, spec));
    ASSERT_TRUE(flows.back()->Start().ok());
  }
  for (size_t i = 0; i < flows.size(); ++i) EXPECT_EQ(DescribeTokens(flows[i]->Wait().tokens), expected[i]) << i;
  EXPECT_TRUE(pair.BecomesClean());
}

TEST_F(Handoff, ARequestThatEndsWithItsFirstTokenAbortsItsLease) {
  Pair pair;
  const Outcome outcome = RunOne(pair, "one", MakePrompt(20), MakeSpec(1));
  EXPECT_EQ(outcome.tokens.size(), 1u);
  EXPECT_TRUE(outcome.ended_by_first);
  EXPECT_FALSE(outcome.committed);
  EXPECT_EQ(outcome.decode.code(), absl::StatusCode::kAborted);
  EXPECT_TRUE(pair.BecomesClean());
}

TEST_F(Handoff, EndedIsSaidWhenTheAbortOfTheLeaseWasAnswered) {
  Pair pair;
  pair.client.HoldAborts();
  auto flow = MakeFlow(pair, "one", MakePrompt(20), MakeSpec(1));
  ASSERT_TRUE(flow->Start().ok());
  ASSERT_TRUE(flow->WaitForTokens(1));
  for (const absl::Time end = MonotonicNow() + kPatience; !pair.client.Holding() && MonotonicNow() < end;) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  // The lease lives: a router that was told "ended" now would book its pages as free.
  EXPECT_FALSE(flow->so_far().ended_by_first);
  EXPECT_FALSE(flow->so_far().prefill_closed);
  pair.client.LetThrough();
  const Outcome outcome = flow->Wait();
  EXPECT_TRUE(outcome.ended_by_first);
  EXPECT_TRUE(outcome.prefill.ok()) << outcome.prefill;
  EXPECT_TRUE(pair.BecomesClean());
}

TEST_F(Handoff, ALateHandoffIsNotTheRequestsDeadline) {
  Pair::Options options;
  options.faults.drop = 1;
  options.transfer_timeout = absl::Milliseconds(200);
  Pair pair(options);
  const Outcome outcome = RunOne(pair, "late", MakePrompt(300), MakeSpec(4));
  EXPECT_EQ(outcome.prefill.code(), absl::StatusCode::kUnavailable) << outcome.prefill;
  ASSERT_TRUE(GetApiError(outcome.prefill).has_value()) << outcome.prefill;
  EXPECT_EQ(GetApiError(outcome.prefill)->code, "handoff_late");
  EXPECT_TRUE(pair.BecomesClean());
}

TEST_F(Handoff, DamagedAndLostBlocksAreSentAgainAndOnlyThose) {
  Pair::Options options;
  options.faults.seed = 7;
  options.faults.flip_payload = 0.3;
  options.faults.drop = 0.2;
  options.faults.max_faults = 3;
  Pair pair(options);
  for (uint32_t i = 0; i < 4; ++i) {
    const auto prompt = MakePrompt(500, i);
    pair.faults->SetPlan(options.faults);
    const Outcome outcome = RunOne(pair, absl::StrCat("damaged-", i), prompt, MakeSpec(5));
    EXPECT_TRUE(outcome.committed) << outcome.prefill;
    EXPECT_EQ(DescribeTokens(outcome.tokens), DescribeTokens(Reference(prompt, MakeSpec(5))));
    if (pair.faults->counts().total() > 0) {
      EXPECT_GT(outcome.resent, 0u);
    }
  }
  EXPECT_TRUE(pair.BecomesClean());
}

TEST_F(Handoff, WhatCannotBeRepairedNeverDecodes) {
  Pair::Options options;
  options.faults.flip_payload = 1;
  Pair pair(options);
  const Outcome outcome = RunOne(pair, "hopeless", MakePrompt(200), MakeSpec(5));
  EXPECT_EQ(outcome.prefill.code(), absl::StatusCode::kDataLoss) << outcome.prefill;
  EXPECT_THAT(std::string(outcome.prefill.message()), HasSubstr("decode-0"));
  EXPECT_EQ(outcome.tokens.size(), 1u);  // prefill's own; it was never wrong
  EXPECT_TRUE(pair.BecomesClean());
}

TEST_F(Handoff, CancelAtAnyPointGivesEverythingBack) {
  Pair pair;
  for (int point = 0; point < 4; ++point) {
    auto flow = MakeFlow(pair, absl::StrCat("cancel-", point), MakePrompt(400), MakeSpec(200));
    ASSERT_TRUE(flow->Start().ok());
    if (point > 0) {
      ASSERT_TRUE(flow->WaitForTokens(point == 1 ? 1 : 10));
    }
    flow->CancelPrefill();  // at 2 and 3 it has long ended, and the hand-off stands
    if (point >= 2) flow->CancelDecode();
    const Outcome outcome = flow->Wait();
    // A cancel of prefill can come when the hand-off already stands; then decode goes on to its end.
    EXPECT_TRUE(!outcome.decode.ok() || (point == 1 && outcome.committed)) << point;
    EXPECT_TRUE(pair.BecomesClean()) << point;
  }
}

TEST_F(Handoff, AbortIsAnsweredWhenTheMemoryIsBack) {
  Pair pair;
  auto flow = MakeFlow(pair, "abort", MakePrompt(300), MakeSpec(200));
  ASSERT_TRUE(flow->Start().ok());
  ASSERT_TRUE(flow->WaitForTokens(5));
  v1::AbortLeaseRequest request;
  *request.mutable_lease() = flow->lease();
  std::atomic<int> answer{0};
  pair.decode_loop->Abort(request, [&](absl::StatusOr<v1::AbortLeaseResponse> response) {
    const CacheUsage usage = pair.decode_engine->Usage();
    answer.store(response->was_live() && usage.pages_free == usage.pages_total ? 1 : 2);
  });
  flow->Wait();
  EXPECT_TRUE(pair.BecomesClean());
  EXPECT_EQ(answer.load(), 1);
}

TEST_F(Handoff, ALeaseThatIsNotRenewedEnds) {
  Pair pair;
  auto reserve = pair.MakeReserve("forgotten", MakePrompt(100), MakeSpec(5));
  reserve.set_ttl_ms(1000);
  ASSERT_TRUE(pair.Reserve(reserve).ok());
  EXPECT_FALSE(pair.Clean());
  EXPECT_TRUE(pair.BecomesClean());
}

TEST_F(Handoff, AFullDecodeWorkerRefusesAndSaysWhatIsMissing) {
  Pair::Options options;
  options.decode_pages = 4;
  Pair pair(options);
  ASSERT_TRUE(pair.Reserve(pair.MakeReserve("first", MakePrompt(300), MakeSpec(5))).ok());
  const auto second = pair.Reserve(pair.MakeReserve("second", MakePrompt(300), MakeSpec(5)));
  EXPECT_EQ(second.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(second.status().message()), HasSubstr("pages"));
}

TEST_F(Handoff, AnotherCompatibilityHashIsRefusedOnBothSides) {
  Pair pair;
  auto reserve = pair.MakeReserve("other", MakePrompt(10), MakeSpec(5));
  reserve.set_compat_hash("different");
  EXPECT_EQ(pair.Reserve(reserve).status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(Handoff, AnOlderAttemptIsStale) {
  Pair pair;
  const auto prompt = MakePrompt(50);
  ASSERT_TRUE(pair.Reserve(pair.MakeReserve("again", prompt, MakeSpec(5), 2)).ok());
  EXPECT_EQ(pair.Reserve(pair.MakeReserve("again", prompt, MakeSpec(5), 1)).status().code(),
            absl::StatusCode::kAlreadyExists);
  ASSERT_TRUE(pair.Reserve(pair.MakeReserve("again", prompt, MakeSpec(5), 3)).ok());
  pair.decode_loop->KeepOnlyRouter({}, "test");
  ASSERT_TRUE(pair.BecomesClean());
  EXPECT_EQ(pair.Reserve(pair.MakeReserve("again", prompt, MakeSpec(5), 3)).status().code(),
            absl::StatusCode::kAborted);
}

// Whoever knows an epoch may write into its lease: what anybody can scrape must not say it.
TEST_F(Handoff, AGuessedEpochIsRefusedAndCountedAndMetricsDoNotTellIt) {
  Pair pair;
  const auto reserved = pair.Reserve(pair.MakeReserve("guessed", MakePrompt(50), MakeSpec(5)));
  ASSERT_TRUE(reserved.ok());
  v1::RenewRequest guess;
  *guess.mutable_lease() = reserved->lease();
  guess.mutable_lease()->set_epoch(reserved->lease().epoch() ^ 1);
  std::promise<absl::Status> answer;
  pair.decode_loop->Renew(guess,
                          [&](absl::StatusOr<v1::RenewResponse> response) { answer.set_value(response.status()); });
  EXPECT_EQ(answer.get_future().get().code(), absl::StatusCode::kAborted);
  const std::string text = RenderMetrics(pair.registry);
  EXPECT_THAT(text, HasSubstr("millrace_lease_epoch_mismatches_total{role=\"decode\",worker=\"decode-0\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("millrace_leases_granted_total{role=\"decode\",worker=\"decode-0\"} 1\n"));
  // As an integer, and as a gauge would print it.
  const uint64_t epoch = reserved->lease().epoch();
  EXPECT_THAT(text, Not(HasSubstr(absl::StrCat(epoch).substr(0, 10))));
  EXPECT_THAT(text, Not(HasSubstr(absl::StrFormat("%.15e", static_cast<double>(epoch)).substr(0, 10))));
}

TEST_F(Handoff, ASlowReaderHoldsBackOnlyItsOwnSequence) {
  Pair pair;
  auto slow = MakeFlow(pair, "slow", MakePrompt(30), MakeSpec(300));
  ASSERT_TRUE(slow->Start().ok());
  ASSERT_TRUE(slow->WaitForTokens(3));
  slow->SetCongested(true);
  EXPECT_EQ(RunOne(pair, "quick", MakePrompt(40), MakeSpec(20)).tokens.size(), 20u);
  slow->SetCongested(false);
  const Outcome outcome = slow->Wait();
  EXPECT_EQ(DescribeTokens(outcome.tokens), DescribeTokens(Reference(MakePrompt(30), MakeSpec(300))));
}

TEST_F(Handoff, MigrationContinuesTheSequenceOfOneProcess) {
  Pair pair;
  const auto prompt = MakePrompt(120);
  const auto whole = Reference(prompt, MakeSpec(20));
  // Seven tokens were delivered when the decode worker was lost; a second attempt goes on from there.
  auto longer = prompt;
  for (int i = 0; i < 7; ++i) longer.push_back(static_cast<int32_t>(whole[i].id()));
  auto spec = MakeSpec(20);
  spec.set_prior_tokens(7);
  const Outcome outcome = RunOne(pair, "migrated", longer, spec);
  EXPECT_EQ(DescribeTokens(outcome.tokens), DescribeTokens({whole.begin() + 7, whole.end()}));
}

TEST_F(Handoff, AnErrorAtAnyNamedPointEndsTheRequestAndLeaksNothing) {
  Pair pair;
  for (const char* place : {"p.before_prefill", "p.during_prefill", "p.after_prefill", "p.before_transfer",
                            "p.during_transfer", "p.after_transfer", "p.before_commit", "p.after_commit",
                            "d.before_commit", "d.after_commit", "d.before_step", "d.after_step", "d.before_send"}) {
    ASSERT_TRUE(failpoints::Arm(absl::StrCat(place, "=error(UNAVAILABLE)")).ok());
    const Outcome outcome = RunOne(pair, absl::StrCat("at-", place), MakePrompt(300), MakeSpec(6));
    EXPECT_GE(failpoints::Hits(place), 1u) << place;
    EXPECT_FALSE(outcome.prefill.ok() && outcome.decode.ok()) << place;
    ASSERT_TRUE(failpoints::Arm("").ok());
    EXPECT_TRUE(pair.BecomesClean()) << place;
  }
}

// The oracle's own test: a suite that misses one of these proves nothing.
TEST_F(Handoff, EverySeededBugIsCaught) {
  const auto prompt = MakePrompt(391);
  auto spec = MakeSpec(40);
  spec.mutable_sampling()->set_temperature(0);
  const std::string expected = DescribeTokens(Reference(prompt, spec));
  Pair pair;
  for (const char* bug : {"bug.drop_frontier", "bug.off_by_one_row", "bug.swap_two_blocks", "bug.n_minus_1",
                          "bug.rope_position", "bug.double_token"}) {
    ASSERT_TRUE(failpoints::Arm(absl::StrCat(bug, "=on")).ok());
    const Outcome outcome = RunOne(pair, absl::StrCat("with-", bug), prompt, spec);
    EXPECT_GE(failpoints::Hits(bug), 1u) << bug;
    EXPECT_NE(DescribeTokens(outcome.tokens), expected) << bug;
    ASSERT_TRUE(failpoints::Arm("").ok());
    EXPECT_TRUE(pair.BecomesClean()) << bug;
  }
  EXPECT_EQ(DescribeTokens(RunOne(pair, "without", prompt, spec).tokens), expected);
}

TEST_F(Handoff, ASeededStaleAttemptWouldBeSeen) {
  Pair pair;
  ASSERT_TRUE(failpoints::Arm("bug.stale_attempt=on").ok());
  ASSERT_TRUE(pair.Reserve(pair.MakeReserve("again", MakePrompt(50), MakeSpec(5), 2)).ok());
  // What AnOlderAttemptIsStale insists on does not hold with the bug.
  EXPECT_TRUE(pair.Reserve(pair.MakeReserve("again", MakePrompt(50), MakeSpec(5), 1)).ok());
}

TEST_F(Handoff, PagesAreKeptUntilTheAnswerAndReusingThemEarlierIsCaught) {
  for (bool bug : {false, true}) {
    Pair::Options options;
    options.prefill_sequences = 1;  // whoever comes next gets the very same memory
    options.faults.drop = 1;
    options.faults.max_faults = 3;  // two pages and the slot: everything has to be sent again
    Pair pair(options);
    ASSERT_TRUE(failpoints::Arm(bug ? "bug.reuse_before_ack=on@1" : "").ok());
    auto first = MakeFlow(pair, "first", MakePrompt(200), MakeSpec(4));
    auto next = MakeFlow(pair, "next", MakePrompt(210, 9), MakeSpec(4));
    ASSERT_TRUE(first->Start().ok());
    ASSERT_TRUE(next->Start().ok());
    const Outcome outcome = first->Wait();
    EXPECT_EQ(DescribeTokens(next->Wait().tokens), DescribeTokens(Reference(MakePrompt(210, 9), MakeSpec(4))));
    if (bug) {
      EXPECT_FALSE(outcome.committed);
    } else {
      EXPECT_EQ(DescribeTokens(outcome.tokens), DescribeTokens(Reference(MakePrompt(200), MakeSpec(4))))
          << outcome.prefill;
    }
    ASSERT_TRUE(failpoints::Arm("").ok());
    EXPECT_TRUE(pair.BecomesClean());
  }
}

TEST_F(Handoff, TheDecodeWorkerDyingMidTransferEndsTheRequestAtOnce) {
  Pair pair;
  ASSERT_TRUE(failpoints::Arm("p.before_transfer=sleep(50)").ok());
  auto flow = MakeFlow(pair, "dying", MakePrompt(300), MakeSpec(6));
  ASSERT_TRUE(flow->Start().ok());
  ASSERT_TRUE(flow->WaitForTokens(1));
  pair.hub_->Fail(pair.decode_transport->address());
  pair.decode_loop->KeepOnlyRouter({}, "its router is gone");
  const Outcome outcome = flow->Wait();
  EXPECT_FALSE(outcome.prefill.ok());
  EXPECT_LE(outcome.tokens.size(), 1u);
  EXPECT_TRUE(pair.BecomesClean());
}

}  // namespace
}  // namespace millrace
