// SPDX-License-Identifier: Apache-2.0
// The life of a request against fake workers over real gRPC: every way it can end, and that nothing is left behind.
#include "services/router/request_flow.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <prometheus/registry.h>

#include <chrono>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "services/common/error.h"
#include "services/common/metric_catalogue.h"
#include "services/common/rpc.h"
#include "services/router/fake_workers.h"

namespace millrace::router {
namespace {

using ::testing::ElementsAre;

// What a client would have seen.
class RecordingSink final : public GenerationSink {
 public:
  void OnAdmitted(GenerationAdmission) override {
    absl::MutexLock lock(&mutex_);
    ++admitted_;
  }
  void OnToken(GeneratedToken token) override {
    absl::MutexLock lock(&mutex_);
    if (ended_ > 0) ++after_end_;
    if (token.index != static_cast<int64_t>(ids_.size())) ++disorder_;
    ids_.push_back(token.id);
  }
  void OnFinish(GenerationEnd end, GenerationUsage usage) override {
    absl::MutexLock lock(&mutex_);
    ++ended_;
    end_ = end;
    usage_ = usage;
  }
  void OnError(absl::Status status) override {
    absl::MutexLock lock(&mutex_);
    ++ended_;
    error_ = std::move(status);
  }

  bool WaitEnd(absl::Duration limit = absl::Seconds(10)) {
    absl::MutexLock lock(&mutex_);
    const auto ended = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return ended_ > 0; };
    return mutex_.AwaitWithTimeout(absl::Condition(&ended), limit);
  }
  bool WaitTokens(size_t count) {
    absl::MutexLock lock(&mutex_);
    const auto there = [&]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return ids_.size() >= count || ended_ > 0; };
    return mutex_.AwaitWithTimeout(absl::Condition(&there), absl::Seconds(10)) && ids_.size() >= count;
  }
  std::vector<int32_t> ids() {
    absl::MutexLock lock(&mutex_);
    return ids_;
  }
  absl::Status error() {
    absl::MutexLock lock(&mutex_);
    return error_;
  }
  std::string code() { return error().ok() ? "" : ToPublicError(error()).error.code; }
  GenerationEnd end() {
    absl::MutexLock lock(&mutex_);
    return end_;
  }
  GenerationUsage usage() {
    absl::MutexLock lock(&mutex_);
    return usage_;
  }
  // The contract of every sink, whatever happened.
  void CheckContract() {
    absl::MutexLock lock(&mutex_);
    EXPECT_EQ(ended_, 1);
    EXPECT_EQ(after_end_, 0);
    EXPECT_EQ(disorder_, 0);
    EXPECT_LE(admitted_, 1);
    for (size_t i = 0; i < ids_.size(); ++i) EXPECT_EQ(ids_[i], static_cast<int32_t>(100 + i));
  }

 private:
  absl::Mutex mutex_;
  std::vector<int32_t> ids_;
  absl::Status error_;
  GenerationEnd end_ = GenerationEnd::kEndOfSequence;
  GenerationUsage usage_;
  int admitted_ = 0, ended_ = 0, after_end_ = 0, disorder_ = 0;
};

class NullConnection final : public WorkerConnection {
 public:
  void Send(v1::RouterMessage) override {}
  void Close(absl::Status) override {}
};

class RequestFlowTest : public ::testing::Test {
 protected:
  RequestFlowTest() : registry_({.router = {9, 9}, .heartbeat = milliseconds(500), .dead_after = milliseconds(60000)}) {
    decode_ = std::make_unique<FakeDecode>(script_, kDecode);
    prefill_ = std::make_unique<FakePrefill>(script_, *decode_);
    decode_server_ = *RpcServer::Start({.listen = "127.0.0.1:0"}, {static_cast<v1::Handoff::Service*>(decode_.get()),
                                                                   static_cast<v1::Decode::Service*>(decode_.get())});
    prefill_server_ = *RpcServer::Start({.listen = "127.0.0.1:0"}, {prefill_.get()});
  }
  ~RequestFlowTest() override {
    stop_beats_ = true;
    if (beats_.joinable()) beats_.join();
    flow_.reset();
    prefill_server_->Shutdown(absl::ZeroDuration());
    decode_server_->Shutdown(absl::ZeroDuration());
  }

  void Open(FlowOptions options = {}) {
    options.router = {9, 9};
    options.end_ids = {1};
    flow_ = std::make_unique<RequestFlow>(loop_, registry_, options, metrics_);
    // Heartbeats, so that nobody falls under suspicion however slow the machine is.
    beats_ = std::thread([this] {
      while (!stop_beats_) {
        Beat(prefill_connection_);
        Beat(decode_connection_);
        std::this_thread::sleep_for(milliseconds(100));
      }
    });
  }
  void Beat(const std::shared_ptr<NullConnection>& connection) {
    loop_.Call([&](TimePoint now) {
      if (!joined_.count(connection.get())) return;
      v1::WorkerMessage message;
      message.mutable_status()->set_state(v1::WORKER_STATE_READY);
      (void)registry_.OnMessage(connection, message, now);
    });
  }
  void JoinOne(v1::Role role, const std::string& name, IncarnationId incarnation, const std::string& address,
               const std::shared_ptr<NullConnection>& connection) {
    loop_.Call([&](TimePoint now) {
      v1::WorkerMessage hello;
      hello.mutable_hello()->set_role(role);
      hello.mutable_hello()->set_name(name);
      *hello.mutable_hello()->mutable_incarnation() = incarnation.ToProto();
      hello.mutable_hello()->set_wire_version(1);
      hello.mutable_hello()->set_control_address(address);
      ASSERT_TRUE(registry_.OnMessage(connection, hello, now).ok());
      v1::WorkerMessage ready;
      ready.mutable_ready()->set_compat_hash("h");
      ready.mutable_ready()->set_expert_compat_hash("e");
      v1::Capacity* capacity = ready.mutable_ready()->mutable_capacity();
      capacity->set_pages_total(64);
      capacity->set_page_tokens(128);
      capacity->set_slots_total(8);
      capacity->set_max_context_tokens(4096);
      capacity->set_max_queue(8);
      ASSERT_TRUE(registry_.OnMessage(connection, ready, now).ok());
      joined_.insert(connection.get());
    });
    Beat(connection);
  }
  void Join() {
    JoinOne(v1::ROLE_PREFILL, "p0", kPrefill, prefill_server_->address(), prefill_connection_);
    JoinOne(v1::ROLE_DECODE, "d0", kDecode, decode_server_->address(), decode_connection_);
  }
  void Die(const std::shared_ptr<NullConnection>& connection) {
    loop_.Call([&](TimePoint now) {
      joined_.erase(connection.get());
      registry_.OnDisconnected(connection, now);
    });
  }

  GenerationRequest Request(int max_tokens = 5) {
    GenerationRequest request;
    request.request_id = "r" + std::to_string(next_id_++);
    request.prompt_ids = {3, 4, 5};
    request.max_tokens = max_tokens;
    return request;
  }
  struct Running {
    std::shared_ptr<RecordingSink> sink = std::make_shared<RecordingSink>();
    std::unique_ptr<Generation> generation;
  };
  Running Start(GenerationRequest request) {
    Running running;
    auto started = flow_->Start(std::move(request), running.sink);
    EXPECT_TRUE(started.ok()) << started.status();
    if (started.ok()) running.generation = *std::move(started);
    return running;
  }
  void Set(const std::function<void(Script&)>& change) {
    absl::MutexLock lock(&script_.mutex);
    change(script_);
  }
  static bool Becomes(const std::function<bool()>& condition) {
    for (int i = 0; i < 1000 && !condition(); ++i) std::this_thread::sleep_for(milliseconds(10));
    return condition();
  }
  // Everything the router and the workers held for requests is gone.
  void ExpectNothingLeft() {
    for (int i = 0; i < 1000; ++i) {
      if (flow_->open_generations() == 0 && flow_->open_attempts() == 0 && decode_->live_leases() == 0 &&
          prefill_->live_prompts() == 0) {
        break;
      }
      std::this_thread::sleep_for(milliseconds(10));
    }
    EXPECT_EQ(flow_->open_generations(), 0);
    EXPECT_EQ(flow_->open_attempts(), 0);
    EXPECT_EQ(decode_->live_leases(), 0);
    EXPECT_EQ(prefill_->live_prompts(), 0);
    loop_.Call([](TimePoint) {});
    std::this_thread::sleep_for(milliseconds(120));  // one sweep, so that the snapshot is of after the end
    for (const WorkerView& worker : flow_->snapshot()->workers) {
      EXPECT_EQ(worker.assigned.requests, 0) << worker.name;
      EXPECT_EQ(worker.assigned.pages, 0) << worker.name;
      EXPECT_EQ(worker.assigned.prompt_tokens, 0) << worker.name;
    }
  }

  static constexpr IncarnationId kPrefill{1, 1}, kDecode{2, 2};
  Script script_;
  std::unique_ptr<FakeDecode> decode_;
  std::unique_ptr<FakePrefill> prefill_;
  std::unique_ptr<RpcServer> decode_server_, prefill_server_;
  std::shared_ptr<NullConnection> prefill_connection_ = std::make_shared<NullConnection>();
  std::shared_ptr<NullConnection> decode_connection_ = std::make_shared<NullConnection>();
  std::set<const NullConnection*> joined_;  // loop thread
  prometheus::Registry prometheus_;
  FlowMetrics metrics_{prometheus_};
  EventLoop loop_{"test-loop"};
  WorkerRegistry registry_;
  std::unique_ptr<RequestFlow> flow_;
  std::thread beats_;
  std::atomic<bool> stop_beats_{false};
  int next_id_ = 0;
};

TEST_F(RequestFlowTest, TokensArriveOnceInOrderAndEverythingIsGivenBack) {
  Open();
  Join();
  auto running = Start(Request(5));
  ASSERT_TRUE(running.sink->WaitEnd());
  EXPECT_THAT(running.sink->ids(), ElementsAre(100, 101, 102, 103, 104));
  EXPECT_EQ(running.sink->end(), GenerationEnd::kLength);
  EXPECT_EQ(running.sink->usage().completion_tokens, 5);
  EXPECT_EQ(running.sink->usage().prompt_tokens, 3);
  running.sink->CheckContract();
  ExpectNothingLeft();
}

TEST_F(RequestFlowTest, TheRecordSaysWhereTheTimeWent) {
  Open();
  Join();
  TraceLog log({});
  GenerationRequest request = Request(5);
  request.trace = log.Begin("mine", "test", "", absl::UnixEpoch());
  const auto trace = request.trace;
  auto running = Start(std::move(request));
  ASSERT_TRUE(running.sink->WaitEnd());
  ExpectNothingLeft();
  std::map<Phase, PhaseRecord> phases;
  for (const PhaseRecord& phase : trace->View().phases) {
    EXPECT_TRUE(phases.emplace(phase.phase, phase).second) << PhaseName(phase.phase) << " twice";
  }
  const uint64_t whole = phases[Phase::kGeneration].span;
  for (const Phase phase :
       {Phase::kQueue, Phase::kPlacement, Phase::kReserve, Phase::kPrefill, Phase::kHandoff, Phase::kDecode}) {
    SCOPED_TRACE(PhaseName(phase));
    ASSERT_TRUE(phases.contains(phase));
    EXPECT_FALSE(phases[phase].open());
    EXPECT_EQ(phases[phase].parent, whole);
    EXPECT_EQ(phases[phase].code, absl::StatusCode::kOk);
  }
  EXPECT_EQ(phases[Phase::kReserve].worker, "d0");
  EXPECT_EQ(phases[Phase::kPrefill].worker, "p0");
  EXPECT_LE(phases[Phase::kQueue].end, phases[Phase::kReserve].end);
  EXPECT_LE(phases[Phase::kReserve].end, phases[Phase::kPrefill].begin);
  EXPECT_LE(phases[Phase::kPrefill].end, phases[Phase::kDecode].begin);
}

TEST_F(RequestFlowTest, AFailureIsInTheRecordByItsStatus) {
  Set([](Script& s) { s.hold_commit = true; });
  Open();
  Join();
  TraceLog log({});
  GenerationRequest request = Request(5);
  request.trace = log.Begin("mine", "test", "", absl::UnixEpoch());
  const auto trace = request.trace;
  auto running = Start(std::move(request));
  ASSERT_TRUE(running.sink->WaitTokens(1));
  Die(decode_connection_);
  ASSERT_TRUE(running.sink->WaitEnd());
  for (const PhaseRecord& phase : trace->View().phases) {
    if (phase.phase == Phase::kRequest) continue;  // the front's to close
    EXPECT_FALSE(phase.open()) << PhaseName(phase.phase);
    const bool failed = phase.phase == Phase::kGeneration || phase.phase == Phase::kDecode;
    EXPECT_EQ(phase.code, failed ? absl::StatusCode::kUnavailable : phase.code) << PhaseName(phase.phase);
  }
}

TEST_F(RequestFlowTest, JoinsAreCounted) {
  Open();
  Join();
  std::this_thread::sleep_for(milliseconds(250));  // two sweeps
  EXPECT_EQ(CounterFamily(prometheus_, "millrace_router_worker_joins_total").Add({}).Value(), 2);
}

TEST_F(RequestFlowTest, FirstTokenDoesNotWaitForTheHandoff) {
  Set([](Script& s) { s.hold_commit = true; });
  Open();
  Join();
  auto running = Start(Request());
  ASSERT_TRUE(running.sink->WaitTokens(1));
  EXPECT_THAT(running.sink->ids(), ElementsAre(100));
  Set([](Script& s) { s.hold_commit = false; });
  ASSERT_TRUE(running.sink->WaitEnd());
  EXPECT_EQ(running.sink->ids().size(), 5u);
  ExpectNothingLeft();
}

TEST_F(RequestFlowTest, FirstTokenMayBeTheLast) {
  Set([](Script& s) { s.ends_at_prefill = true; });
  Open();
  Join();
  auto running = Start(Request());
  ASSERT_TRUE(running.sink->WaitEnd());
  EXPECT_THAT(running.sink->ids(), ElementsAre(100));
  EXPECT_EQ(running.sink->end(), GenerationEnd::kEndOfSequence);
  ExpectNothingLeft();
}

TEST_F(RequestFlowTest, ARepeatedTokenIsForwardedOnce) {
  Set([](Script& s) { s.repeat_index = 2; });
  Open();
  Join();
  auto running = Start(Request());
  ASSERT_TRUE(running.sink->WaitEnd());
  EXPECT_THAT(running.sink->ids(), ElementsAre(100, 101, 102, 103, 104));
  running.sink->CheckContract();
}

TEST_F(RequestFlowTest, AGapEndsTheRequestInsteadOfBeingForwarded) {
  Set([](Script& s) { s.skip_index = 2; });
  Open();
  Join();
  auto running = Start(Request());
  ASSERT_TRUE(running.sink->WaitEnd());
  EXPECT_THAT(running.sink->ids(), ElementsAre(100, 101));
  EXPECT_EQ(running.sink->error().code(), absl::StatusCode::kInternal);
  ExpectNothingLeft();
}

TEST_F(RequestFlowTest, CancelReachesBothWorkersInEveryPhase) {
  Open();
  Join();
  const std::vector<std::function<void(Script&)>> phases = {
      [](Script& s) { s.hold_prefill = true; }, [](Script& s) { s.hold_commit = true; },
      [](Script& s) { s.hold_decode = true, s.decode_error_at = 3; }};
  for (size_t phase = 0; phase < phases.size(); ++phase) {
    Set(phases[phase]);
    auto running = Start(Request(8));
    if (phase > 0) {
      ASSERT_TRUE(running.sink->WaitTokens(phase == 1 ? 1 : 3));
    } else {
      std::this_thread::sleep_for(milliseconds(50));
    }
    running.generation->Cancel();
    ASSERT_TRUE(running.sink->WaitEnd());
    EXPECT_EQ(running.sink->error().code(), absl::StatusCode::kCancelled);
    running.sink->CheckContract();
    ExpectNothingLeft();
    Set([](Script& s) { s.hold_prefill = s.hold_commit = s.hold_decode = false, s.decode_error_at = 0; });
  }
}

TEST_F(RequestFlowTest, DroppingTheGenerationCancelsIt) {
  Set([](Script& s) { s.hold_commit = true; });
  Open();
  Join();
  auto running = Start(Request());
  ASSERT_TRUE(running.sink->WaitTokens(1));
  running.generation.reset();
  ASSERT_TRUE(running.sink->WaitEnd());
  ExpectNothingLeft();
}

TEST_F(RequestFlowTest, ADeadDecodeWorkerEndsItsRequestsAtOnceAndAbortsPrefill) {
  Set([](Script& s) { s.hold_commit = true; });
  Open();
  Join();
  auto running = Start(Request());
  ASSERT_TRUE(running.sink->WaitTokens(1));
  Die(decode_connection_);
  ASSERT_TRUE(running.sink->WaitEnd(absl::Seconds(1)));
  EXPECT_EQ(running.sink->code(), "worker_lost");
  EXPECT_TRUE(ToPublicError(running.sink->error()).error.retry_after_s.has_value());
  for (int i = 0; i < 500 && (prefill_->live_prompts() > 0 || flow_->open_attempts() > 0); ++i) {
    std::this_thread::sleep_for(milliseconds(10));
  }
  EXPECT_EQ(prefill_->live_prompts(), 0);
  EXPECT_EQ(flow_->open_attempts(), 0);
}

TEST_F(RequestFlowTest, BeforeItsFirstTokenARequestOutlivesItsPrefillWorker) {
  Set([](Script& s) { s.hold_prefill = true; });
  Open();
  Join();
  auto running = Start(Request());
  ASSERT_TRUE(Becomes([&] { return prefill_->live_prompts() == 1; }));
  Die(prefill_connection_);
  ASSERT_TRUE(Becomes([&] { return decode_->live_leases() == 0; }));  // of the attempt that is over
  Set([](Script& s) { s.hold_prefill = false; });
  JoinOne(v1::ROLE_PREFILL, "p1", {1, 7}, prefill_server_->address(), prefill_connection_);
  ASSERT_TRUE(running.sink->WaitEnd());
  EXPECT_TRUE(running.sink->error().ok()) << running.sink->error();
  EXPECT_THAT(running.sink->ids(), ElementsAre(100, 101, 102, 103, 104));
  running.sink->CheckContract();
  ExpectNothingLeft();
}

TEST_F(RequestFlowTest, ARequestThatTwoWorkersDiedOfIsNotGivenToAThird) {
  Set([](Script& s) { s.hold_prefill = true; });
  Open();
  Join();
  auto running = Start(Request());
  ASSERT_TRUE(Becomes([&] { return prefill_->live_prompts() == 1; }));
  Die(prefill_connection_);
  ASSERT_TRUE(Becomes([&] { return prefill_->live_prompts() == 0; }));
  JoinOne(v1::ROLE_PREFILL, "p1", {1, 7}, prefill_server_->address(), prefill_connection_);
  ASSERT_TRUE(Becomes([&] { return prefill_->live_prompts() == 1; }));
  Die(prefill_connection_);
  ASSERT_TRUE(running.sink->WaitEnd(absl::Seconds(1)));
  EXPECT_EQ(running.sink->code(), "worker_lost");
  ExpectNothingLeft();
}

TEST_F(RequestFlowTest, WhenNobodyComesItsPatienceEndsWithTheReason) {
  Set([](Script& s) { s.hold_prefill = true; });
  Open({.queue_timeout = milliseconds(300)});
  Join();
  auto running = Start(Request());
  ASSERT_TRUE(Becomes([&] { return prefill_->live_prompts() == 1; }));
  Die(prefill_connection_);
  ASSERT_TRUE(running.sink->WaitEnd(absl::Seconds(5)));
  EXPECT_EQ(running.sink->code(), "worker_lost");
  ExpectNothingLeft();
}

TEST_F(RequestFlowTest, ADrainingPrefillWorkersRefusalIsTriedElsewhere) {
  Set([](Script& s) { s.prefill_refusal = absl::UnavailableError("draining"); });
  Open();
  Join();
  auto running = Start(Request());
  ASSERT_TRUE(Becomes([&] { return metrics_.requeues.Value() >= 1; }));
  Set([](Script& s) { s.prefill_refusal = absl::OkStatus(); });
  ASSERT_TRUE(running.sink->WaitEnd());
  EXPECT_TRUE(running.sink->error().ok()) << running.sink->error();
  running.sink->CheckContract();
  ExpectNothingLeft();
}

TEST_F(RequestFlowTest, ADrainedWorkersLastWordsAreHeardAfterItHasLeft) {
  Set([](Script& s) { s.hold_decode = true, s.decode_error_at = 2; });
  Open();
  Join();
  auto running = Start(Request());
  ASSERT_TRUE(running.sink->WaitTokens(2));
  loop_.Call([&](TimePoint now) {
    v1::WorkerMessage message;
    message.mutable_status()->set_state(v1::WORKER_STATE_DRAINING);
    ASSERT_TRUE(registry_.OnMessage(decode_connection_, message, now).ok());
    joined_.erase(decode_connection_.get());
    registry_.OnDisconnected(decode_connection_, now);  // its other streams still have something in them
  });
  Set([](Script& s) { s.hold_decode = false; });
  ASSERT_TRUE(running.sink->WaitEnd());
  EXPECT_TRUE(running.sink->error().ok()) << running.sink->error();
  EXPECT_EQ(running.sink->ids().size(), 5u);
  ExpectNothingLeft();
}

TEST_F(RequestFlowTest, PrefillsDeathAfterTheHandoffCostsNothing) {
  Set([](Script& s) { s.hold_decode = true, s.decode_error_at = 2; });
  Open();
  Join();
  auto running = Start(Request());
  ASSERT_TRUE(running.sink->WaitTokens(2));
  Die(prefill_connection_);
  Set([](Script& s) { s.hold_decode = false; });
  ASSERT_TRUE(running.sink->WaitEnd());
  EXPECT_EQ(running.sink->ids().size(), 5u);
  EXPECT_TRUE(running.sink->error().ok());
}

TEST_F(RequestFlowTest, WorkersErrorsBecomeTheClientsWithoutTheirWords) {
  Open();
  Join();
  const struct {
    absl::Status error;
    const char* code;
  } kCases[] = {
      {absl::UnavailableError("expert-1 at 10.0.0.7:99"), "worker_lost"},
      {absl::DataLossError("extent 7 of lease 12"), "handoff_failed"},
      {absl::InternalError("logits of /models/x"), "internal_error"},
      {absl::AbortedError("stale epoch"), "lease_lost"},
      // Late without the request's deadline having passed: a stage of ours, which is named and not its fault.
      {absl::DeadlineExceededError("Commit to 10.0.0.7"), "worker_late"},
      {MakeError(absl::StatusCode::kUnavailable, "expert-1, layer 3", {.code = "experts_late"}), "experts_late"},
      {MakeError(absl::StatusCode::kUnavailable, "decode-0", {.code = "handoff_late"}), "handoff_late"}};
  for (const auto& c : kCases) {
    Set([&](Script& s) { s.prefill_error_after_first = c.error; });
    auto running = Start(Request());
    ASSERT_TRUE(running.sink->WaitEnd());
    EXPECT_EQ(running.sink->code(), c.code);
    EXPECT_EQ(running.sink->error().message().find(c.error.message()), absl::string_view::npos);
    if (c.error.code() != absl::StatusCode::kInternal) {
      EXPECT_EQ(running.sink->error().code(), absl::StatusCode::kUnavailable) << c.code;
    }
    ExpectNothingLeft();
  }
}

TEST_F(RequestFlowTest, ADecodeErrorMidStreamEndsTheRequestAfterItsTokens) {
  Set([](Script& s) { s.decode_error = absl::UnavailableError("gone"), s.decode_error_at = 3; });
  Open();
  Join();
  auto running = Start(Request());
  ASSERT_TRUE(running.sink->WaitEnd());
  EXPECT_THAT(running.sink->ids(), ElementsAre(100, 101, 102));
  EXPECT_EQ(running.sink->code(), "worker_lost");
  ExpectNothingLeft();
}

TEST_F(RequestFlowTest, ARefusedReservationWaitsItsTurnAndIsServed) {
  Set([](Script& s) {
    s.reserve_refusals = {absl::ResourceExhaustedError("full"), absl::ResourceExhaustedError("full")};
  });
  Open();
  Join();
  auto running = Start(Request());
  ASSERT_TRUE(running.sink->WaitEnd());
  EXPECT_TRUE(running.sink->error().ok()) << running.sink->error();
  ExpectNothingLeft();
}

TEST_F(RequestFlowTest, AFullClusterIs429AfterTheQueuesPatience) {
  Set([](Script& s) { s.hold_decode = true, s.decode_error_at = 2; });
  Open({.queue_timeout = milliseconds(200)});
  Join();
  std::vector<Running> all;
  for (int i = 0; i < 8; ++i) all.push_back(Start(Request()));  // every slot of the decode worker
  for (auto& one : all) ASSERT_TRUE(one.sink->WaitTokens(2));
  auto late = Start(Request());
  ASSERT_TRUE(late.sink->WaitEnd());
  EXPECT_EQ(late.sink->code(), "overloaded");
  EXPECT_EQ(late.sink->error().code(), absl::StatusCode::kResourceExhausted);
  auto patient = Start(Request());
  Set([](Script& s) { s.hold_decode = false; });
  for (auto& one : all) ASSERT_TRUE(one.sink->WaitEnd());
  ASSERT_TRUE(patient.sink->WaitEnd());
  EXPECT_TRUE(patient.sink->error().ok());
  ExpectNothingLeft();
}

TEST_F(RequestFlowTest, WhatIsKnownAtOnceIsRefusedAtOnce) {
  Open({.max_requests = 1});
  auto sink = std::make_shared<RecordingSink>();
  EXPECT_EQ(ToPublicError(flow_->Start(Request(), sink).status()).error.code, "no_capacity");
  EXPECT_FALSE(flow_->Ready().ok());
  Join();
  EXPECT_TRUE(flow_->Ready().ok());
  EXPECT_EQ(ToPublicError(flow_->Start(Request(5000), sink).status()).error.code, "context_length_exceeded");
  GenerationRequest late = Request();
  late.deadline = std::chrono::steady_clock::now() - milliseconds(1);
  EXPECT_EQ(ToPublicError(flow_->Start(std::move(late), sink).status()).error.code, "deadline_unreachable");
  Set([](Script& s) { s.hold_prefill = true; });
  auto first = Start(Request());
  EXPECT_EQ(ToPublicError(flow_->Start(Request(), sink).status()).error.code, "overloaded");
  flow_->StopAccepting();
  EXPECT_EQ(ToPublicError(flow_->Start(Request(), sink).status()).error.code, "draining");
  EXPECT_FALSE(flow_->Ready().ok());
  first.generation->Cancel();
  ASSERT_TRUE(first.sink->WaitEnd());
}

TEST_F(RequestFlowTest, TheDeadlineEndsItWhereverItIs) {
  Set([](Script& s) { s.hold_prefill = true; });
  Open();
  Join();
  GenerationRequest request = Request();
  request.deadline = std::chrono::steady_clock::now() + milliseconds(200);
  auto running = Start(std::move(request));
  ASSERT_TRUE(running.sink->WaitEnd());
  EXPECT_EQ(running.sink->code(), "deadline_exceeded");
  ExpectNothingLeft();
}

TEST_F(RequestFlowTest, AnAbortIsRepeatedUntilItIsAnswered) {
  Set([](Script& s) { s.hold_commit = true, s.abort_failures = 3; });
  Open();
  Join();
  auto running = Start(Request());
  ASSERT_TRUE(running.sink->WaitTokens(1));
  running.generation->Cancel();
  ASSERT_TRUE(running.sink->WaitEnd());
  EXPECT_GT(flow_->open_attempts(), 0);  // the client has its answer; the workers have not given theirs
  ExpectNothingLeft();
}

TEST_F(RequestFlowTest, ALeaseIsRenewedWhileItLives) {
  Set([](Script& s) { s.hold_commit = true; });
  Open({.lease_ttl = milliseconds(300)});
  Join();
  auto running = Start(Request());
  ASSERT_TRUE(running.sink->WaitTokens(1));
  for (int i = 0; i < 500 && decode_->renewals() < 3; ++i) std::this_thread::sleep_for(milliseconds(10));
  EXPECT_GE(decode_->renewals(), 3);
  Set([](Script& s) { s.hold_commit = false; });
  ASSERT_TRUE(running.sink->WaitEnd());
  ExpectNothingLeft();
}

TEST_F(RequestFlowTest, AWorkerThatCameBackIsUsedWithoutRestartingAnything) {
  Open();
  Join();
  auto before = Start(Request());
  ASSERT_TRUE(before.sink->WaitEnd());
  ExpectNothingLeft();  // the fake keeps its leases over its death
  Die(decode_connection_);
  EXPECT_FALSE(flow_->Ready().ok());
  JoinOne(v1::ROLE_DECODE, "d0", kDecode, decode_server_->address(), decode_connection_);
  auto after = Start(Request());
  ASSERT_TRUE(after.sink->WaitEnd());
  EXPECT_TRUE(after.sink->error().ok());
  ExpectNothingLeft();
}

TEST_F(RequestFlowTest, ManyMixedEndsLeaveNothing) {
  Open();
  Join();
  std::mt19937 random(4711);
  std::vector<Running> all;
  for (int i = 0; i < 300; ++i) {
    Set([&](Script& s) {
      s.hold_prefill = random() % 8 == 0;
      s.hold_commit = random() % 8 == 0;
      s.ends_at_prefill = random() % 8 == 0;
      s.abort_failures = random() % 4 == 0 ? 1 : 0;
      s.prefill_error_after_first = random() % 10 == 0 ? absl::DataLossError("x") : absl::OkStatus();
      if (random() % 10 == 0) s.reserve_refusals.push_back(absl::ResourceExhaustedError("full"));
    });
    auto sink = std::make_shared<RecordingSink>();
    auto started = flow_->Start(Request(1 + random() % 20), sink);
    if (started.ok()) all.push_back({sink, *std::move(started)});
    if (!all.empty() && random() % 3 == 0) all[random() % all.size()].generation->Cancel();
    if (random() % 4 == 0) std::this_thread::sleep_for(milliseconds(random() % 10));
  }
  Set([](Script& s) {
    s.hold_prefill = s.hold_commit = s.ends_at_prefill = false;
    s.prefill_error_after_first = absl::OkStatus();
    s.reserve_refusals.clear();
  });
  for (auto& one : all) {
    ASSERT_TRUE(one.sink->WaitEnd(absl::Seconds(30)));
    one.sink->CheckContract();
  }
  ExpectNothingLeft();
}

}  // namespace
}  // namespace millrace::router
