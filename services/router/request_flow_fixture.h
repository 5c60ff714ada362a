// SPDX-License-Identifier: Apache-2.0
// A request flow between recording clients and fake workers over real gRPC, for its tests.
#pragma once

#include <gtest/gtest.h>
#include <prometheus/registry.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "services/common/error.h"
#include "services/common/rpc.h"
#include "services/common/test_wait.h"
#include "services/router/fake_workers.h"
#include "services/router/request_flow.h"

namespace millrace::router {

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
  struct Running {
    std::shared_ptr<RecordingSink> sink = std::make_shared<RecordingSink>();
    std::unique_ptr<Generation> generation;
  };

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

  // A flow without workers.
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
  // A flow with both workers.
  void OpenWithWorkers(FlowOptions options = {}) {
    Open(options);
    Join();
  }
  // And a request under way at workers that do what `change` says.
  Running OpenAndStart(const std::function<void(Script&)>& change, FlowOptions options = {}) {
    Set(change);
    OpenWithWorkers(options);
    return Start(Request());
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
  // Everything the router and the workers held for requests is gone.
  void ExpectNothingLeft() {
    (void)Eventually([this] {
      return flow_->open_generations() == 0 && flow_->open_attempts() == 0 && decode_->live_leases() == 0 &&
             prefill_->live_prompts() == 0;
    });
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

}  // namespace millrace::router
