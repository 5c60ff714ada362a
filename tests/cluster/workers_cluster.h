// SPDX-License-Identifier: Apache-2.0
// Prefill, decode and expert workers as they run, in one process, and a router for them: what workers_test.cc drives.
//
// FakeRouter serves Join and hands out peer lists; Cluster starts real workers on the demo checkpoint and calls their
// services over gRPC as request_flow does. Transports meet in one loopback hub; everything else is what the separate
// processes have. Header-only. Thread: the test's; servers and workers have their own.
#pragma once

#include <grpcpp/client_context.h>
#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "kvtransfer/loopback_transport.h"
#include "services/common/failpoints.h"
#include "services/common/one_engine_tokens.h"
#include "services/common/test_wait.h"
#include "services/decode/decode_worker.h"
#include "services/expert/expert_worker.h"
#include "services/prefill/prefill_worker.h"

namespace millrace {

// Machines that run this may be busy: a minute.
inline bool Becomes(const std::function<bool()>& condition) { return Eventually(condition, std::chrono::minutes(1)); }

// The router's Join, one thread per stream.
class FakeRouter final : public v1::Cluster::Service {
 public:
  struct Worker {
    v1::WorkerHello hello;
    v1::WorkerReady ready;
    bool is_ready = false;
    v1::WorkerStatus status;
    grpc::ServerReaderWriter<v1::RouterMessage, v1::WorkerMessage>* stream = nullptr;
  };

  grpc::Status Join(grpc::ServerContext*,
                    grpc::ServerReaderWriter<v1::RouterMessage, v1::WorkerMessage>* stream) override {
    v1::WorkerMessage message;
    if (!stream->Read(&message) || !message.has_hello()) return grpc::Status::CANCELLED;
    const std::string name = message.hello().name();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      Worker& worker = workers_[name];
      worker = Worker();
      worker.hello = message.hello();
      worker.stream = stream;
      v1::RouterMessage welcome;
      id.To(welcome.mutable_welcome()->mutable_router());
      welcome.mutable_welcome()->set_heartbeat_ms(50);
      welcome.mutable_welcome()->set_dead_after_ms(20000);
      stream->Write(welcome);
      TellPeers();
    }
    while (stream->Read(&message)) {
      std::lock_guard<std::mutex> lock(mutex_);
      Worker& worker = workers_[name];
      if (worker.stream != stream) break;
      if (message.has_ready()) {
        worker.ready = message.ready();
        worker.is_ready = true;
        TellPeers();
      }
      if (!message.has_status()) continue;
      worker.status = message.status();
      v1::RouterMessage echo;
      echo.set_echo(message.status().beat());
      stream->Write(echo);
    }
    std::lock_guard<std::mutex> lock(mutex_);
    if (workers_[name].stream == stream) {
      workers_.erase(name);
      TellPeers();
    }
    return grpc::Status::OK;
  }

  bool Serving(const std::string& name) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto it = workers_.find(name);
    return it != workers_.end() && it->second.is_ready && it->second.status.state() == v1::WORKER_STATE_READY;
  }
  Worker Get(const std::string& name) {
    std::lock_guard<std::mutex> lock(mutex_);
    return workers_[name];
  }

  const IncarnationId id = IncarnationId::Random();

 private:
  void TellPeers() {  // mutex_ held
    v1::RouterMessage message;
    message.mutable_peers()->set_version(++version_);
    for (const auto& [name, worker] : workers_) {
      if (worker.hello.role() != v1::ROLE_EXPERT || !worker.is_ready) continue;
      v1::ExpertPeer& peer = *message.mutable_peers()->add_experts();
      peer.set_name(name);
      *peer.mutable_incarnation() = worker.hello.incarnation();
      peer.set_control_address(worker.hello.control_address());
      peer.set_transfer_address(worker.ready.transfer_address());
      peer.set_expert_compat_hash(worker.ready.expert_compat_hash());
      *peer.mutable_share() = worker.ready.experts();
    }
    for (const auto& [name, worker] : workers_) {
      if (worker.hello.role() != v1::ROLE_EXPERT) worker.stream->Write(message);
    }
  }

  std::mutex mutex_;
  std::map<std::string, Worker> workers_;
  uint64_t version_ = 0;
};

inline std::vector<int32_t> MakePrompt(int64_t length) { return PromptFrom(99, length); }

inline v1::GenerationSpec MakeSpec(uint32_t max_tokens) {
  v1::GenerationSpec spec;
  spec.mutable_sampling()->set_temperature(0.7f);
  spec.mutable_sampling()->set_seed(42);
  spec.set_max_tokens(max_tokens);
  spec.set_num_logprobs(0);
  return spec;
}

inline std::string Reference(const std::vector<int32_t>& prompt, const v1::GenerationSpec& spec) {
  static Engine* const engine = [] {
    EngineOptions options;
    options.max_batch_tokens = 1024;
    auto made = Engine::Create(DemoCheckpoint(), options);
    CHECK(made.ok(), std::string(made.status().message()));
    return made->release();
  }();
  return DescribeTokens(OneEngineTokens(*engine, prompt, spec));
}

struct Answer {
  std::vector<v1::Token> tokens;
  grpc::Status reserve, prefill, decode;
};

class Cluster {
 public:
  explicit Cluster(const std::string& expert_transport = "kvtransfer", int num_experts = 2) {
    hub_ = kvtransfer::LoopbackHub::Create();
    auto started = RpcServer::Start({"127.0.0.1:0"}, {&router});
    CHECK(started.ok(), std::string(started.status().message()));
    router_server_ = *std::move(started);
    std::string pool;
    for (int i = 0; i < num_experts; ++i) absl::StrAppend(&pool, i > 0 ? "," : "", "{}");
    auto config = ParseClusterConfig(
        absl::StrCat(R"({"model":{"path":"deploy/demo/model"},"router":{"control_listen":")", router_server_->address(),
                     R"("},"prefill":[{"max_batch_tokens":100,"cache_pages":32}],"decode":[{"cache_pages":32}],)",
                     R"("expert":[)", pool, R"(],"transfer":{"expert_transport":")", expert_transport,
                     R"("},"timers":{"expert_timeout_ms":20000,"transfer_timeout_ms":20000}})"),
        ".");
    CHECK(config.ok(), std::string(config.status().message()));
    config_ = *std::move(config);
    for (int i = 0; i < num_experts; ++i) StartExpert(i);
    prefill = Made(prefill::PrefillWorker::Start(Config(v1::ROLE_PREFILL, "prefill-0"), Environment()));
    decode = Made(decode::DecodeWorker::Start(Config(v1::ROLE_DECODE, "decode-0"), Environment()));
  }
  ~Cluster() {
    prefill->Stop();
    decode->Stop();
    experts.clear();
    router_server_->Shutdown(absl::ZeroDuration());
  }

  void StartExpert(int i) {
    const std::string name = absl::StrCat("expert-", i);
    experts[i] = Made(expert::ExpertWorker::Start(Config(v1::ROLE_EXPERT, name), Environment()));
  }
  bool BecomesReady() {
    return Becomes([this] { return router.Serving("prefill-0") && router.Serving("decode-0"); });
  }
  bool BecomesClean() {
    return Becomes([this] {
      const CacheUsage p = prefill->engine().Usage(), d = decode->engine().Usage();
      return p.pages_free == p.pages_total && p.slots_free == p.slots_total && d.pages_free == d.pages_total &&
             d.slots_free == d.slots_total && decode->receiver().statistics().leases_open == 0;
    });
  }

  v1::ReserveRequest MakeReserve(const std::string& id, const std::vector<int32_t>& prompt,
                                 const v1::GenerationSpec& spec) {
    v1::ReserveRequest request;
    request.set_request_id(id);
    request.set_attempt(1);
    *request.mutable_spec() = spec;
    request.set_prompt_tokens(static_cast<uint32_t>(prompt.size()));
    request.set_token_hash(TokenHash(prompt));
    request.set_compat_hash(prefill->host().compat_hash());
    prefill->core().incarnation().To(request.mutable_prefill());
    router.id.To(request.mutable_router());
    request.set_ttl_ms(60000);
    request.set_deadline_ms(600000);
    return request;
  }
  grpc::Status Reserve(const v1::ReserveRequest& request, v1::ReserveResponse* response) {
    grpc::ClientContext context;
    return v1::Handoff::NewStub(channels.Get(decode->address(), PeerRole::kDecode))
        ->Reserve(&context, request, response);
  }
  v1::PrefillRequest MakePrefill(const std::string& id, const std::vector<int32_t>& prompt,
                                 const v1::GenerationSpec& spec, const v1::ReserveResponse& reserved) {
    v1::PrefillRequest request;
    request.set_request_id(id);
    request.set_attempt(1);
    *request.mutable_spec() = spec;
    request.mutable_prompt_ids()->Add(prompt.begin(), prompt.end());
    *request.mutable_target()->mutable_lease() = reserved.lease();
    request.mutable_target()->set_transfer_address(reserved.transfer_address());
    request.mutable_target()->set_control_address(decode->address());
    request.mutable_target()->set_compat_hash(decode->host().compat_hash());
    request.mutable_target()->set_name("decode-0");
    request.set_deadline_ms(600000);
    return request;
  }
  grpc::Status Prefill(const v1::PrefillRequest& request, std::vector<v1::Token>* tokens) {
    grpc::ClientContext context;
    const auto stub = v1::Prefill::NewStub(channels.Get(prefill->address(), PeerRole::kPrefill));
    const auto stream = stub->Prefill(&context, request);
    v1::PrefillEvent event;
    while (stream->Read(&event)) {
      if (event.has_first_token()) tokens->push_back(event.first_token().token());
    }
    return stream->Finish();
  }

  // `on_token` runs for each token of the decode worker, with the call's context.
  Answer Run(const std::string& id, const std::vector<int32_t>& prompt, const v1::GenerationSpec& spec,
             const std::function<void(size_t, grpc::ClientContext&)>& on_token = nullptr) {
    Answer answer;
    v1::ReserveResponse reserved;
    answer.reserve = Reserve(MakeReserve(id, prompt, spec), &reserved);
    if (!answer.reserve.ok()) return answer;
    std::vector<v1::Token> decoded;
    std::thread decoding([&] {
      grpc::ClientContext context;
      v1::DecodeRequest request;
      *request.mutable_lease() = reserved.lease();
      const auto stub = v1::Decode::NewStub(channels.Get(decode->address(), PeerRole::kDecode));
      const auto stream = stub->Decode(&context, request);
      v1::DecodeEvent event;
      while (stream->Read(&event)) {
        for (const v1::Token& token : event.tokens().tokens()) {
          decoded.push_back(token);
          if (on_token) on_token(decoded.size(), context);
        }
      }
      answer.decode = stream->Finish();
    });
    answer.prefill = Prefill(MakePrefill(id, prompt, spec, reserved), &answer.tokens);
    decoding.join();
    answer.tokens.insert(answer.tokens.end(), decoded.begin(), decoded.end());
    return answer;
  }

  FakeRouter router;
  ChannelPool channels;
  std::map<int, std::unique_ptr<expert::ExpertWorker>> experts;
  std::unique_ptr<prefill::PrefillWorker> prefill;
  std::unique_ptr<decode::DecodeWorker> decode;

 private:
  template <typename Worker>
  static std::unique_ptr<Worker> Made(absl::StatusOr<std::unique_ptr<Worker>> worker) {
    CHECK(worker.ok(), std::string(worker.status().message()));
    return *std::move(worker);
  }
  WorkerConfig Config(v1::Role role, const std::string& name) {
    auto config = SelectWorker(config_, role, name);
    CHECK(config.ok(), std::string(config.status().message()));
    return *std::move(config);
  }
  WorkerEnvironment Environment() {
    WorkerEnvironment environment;
    environment.checkpoint = DemoCheckpoint();
    environment.make_transport = [this] { return kvtransfer::CreateLoopbackTransport(hub_); };
    return environment;
  }

  std::shared_ptr<kvtransfer::LoopbackHub> hub_;
  std::unique_ptr<RpcServer> router_server_;
  v1::ClusterConfig config_;
};

class Workers : public ::testing::Test {
 protected:
  void TearDown() override { ASSERT_TRUE(failpoints::Arm("").ok()); }
};

}  // namespace millrace
