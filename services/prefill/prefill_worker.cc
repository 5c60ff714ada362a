// SPDX-License-Identifier: Apache-2.0
// See prefill_worker.h.
#include "services/prefill/prefill_worker.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "spdlog/spdlog.h"

namespace millrace::prefill {

absl::StatusOr<std::unique_ptr<PrefillWorker>> PrefillWorker::Start(const WorkerConfig& config,
                                                                    WorkerEnvironment environment) {
  std::unique_ptr<PrefillWorker> worker(new PrefillWorker(config, std::move(environment)));
  RETURN_IF_ERROR(worker->core_.StartServer({&worker->service_}, {v1::Prefill::service_full_name()}));
  RETURN_IF_ERROR(worker->Load());
  return worker;
}

absl::Status PrefillWorker::Load() {
  const v1::PrefillSection& section = core_.config().prefill();
  const v1::TimerSection& timers = core_.config().cluster.timers();
  RETURN_IF_ERROR(core_.MakeTransport());
  expert::EngineHostOptions host;
  host.cache_pages = static_cast<int64_t>(section.cache_pages());
  host.max_sequences = static_cast<int>(section.max_sequences());
  host.max_batch_tokens = static_cast<int>(section.max_batch_tokens());
  host.local_experts = section.local_experts();
  host.section = absl::StrCat("prefill[", core_.config().position, "]");
  ASSIGN_OR_RETURN(host_, expert::EngineHost::Create(core_, host));

  decode_workers_ = MakeGrpcHandoffClient(core_.channels());
  PrefillLoopOptions options;
  options.max_queue = section.max_queue();
  options.incarnation = core_.incarnation();
  options.compat_hash = host_->compat_hash();
  options.max_inflight_bytes = core_.config().cluster.transfer().max_inflight_bytes();
  options.transfer_timeout = Ms(timers.transfer_timeout_ms());
  options.abort_timeout = Ms(timers.abort_timeout_ms());
  options.ready = [this] { return host_->Ready(); };
  options.traces = &core_.traces();
  loop_ = std::make_unique<PrefillLoop>(host_->engine(), core_.transport(), *decode_workers_, std::move(options),
                                        &core_.metrics());
  service_.Serve(loop_.get(), host_->limits());

  WorkerHooks hooks;
  hooks.fill_status = [this](v1::WorkerStatus& status) {
    loop_->FillStatus(status);
    host_->PublishMetrics(core_.metrics());
  };
  hooks.ready = [this] { return host_->Ready(); };
  hooks.on_peers = [this](const v1::PeerList& peers) { host_->SetPeers(peers); };
  hooks.on_new_router = [this](const IncarnationId&) {
    loop_->CancelAll(absl::AbortedError("stale: another router has taken over"));
  };
  hooks.on_router_lost = [this](const std::string& why) { loop_->CancelAll(absl::UnavailableError(why)); };
  v1::WorkerReady ready = host_->Describe();
  ready.mutable_capacity()->set_max_queue(section.max_queue());
  spdlog::info("prefill {} ready: {} numerics, kernels {}, compat {}", core_.config().worker().name(), ready.numerics(),
               ready.kernel_set(), ready.compat_hash());
  core_.SetReady(std::move(hooks), std::move(ready));
  return absl::OkStatus();
}

PrefillWorker::~PrefillWorker() { Stop(); }

void PrefillWorker::Drain(absl::Duration grace) { core_.Drain(loop_.get(), grace); }

void PrefillWorker::Stop() {
  if (loop_ != nullptr) loop_->Stop();
  core_.Shutdown();
}

}  // namespace millrace::prefill
