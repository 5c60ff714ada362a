// SPDX-License-Identifier: Apache-2.0
// See decode_worker.h.
#include "services/decode/decode_worker.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "services/common/cache_extents.h"
#include "spdlog/spdlog.h"

namespace millrace::decode {

absl::StatusOr<std::unique_ptr<DecodeWorker>> DecodeWorker::Start(const WorkerConfig& config,
                                                                  WorkerEnvironment environment) {
  std::unique_ptr<DecodeWorker> worker(new DecodeWorker(config, std::move(environment)));
  RETURN_IF_ERROR(worker->core_.StartServer({&worker->handoff_service_, &worker->decode_service_},
                                            {v1::Handoff::service_full_name(), v1::Decode::service_full_name()}));
  RETURN_IF_ERROR(worker->Load());
  return worker;
}

absl::Status DecodeWorker::Load() {
  const v1::DecodeSection& section = core_.config().decode();
  RETURN_IF_ERROR(core_.MakeTransport());
  expert::EngineHostOptions host;
  host.cache_pages = static_cast<int64_t>(section.cache_pages());
  host.max_sequences = static_cast<int>(section.max_sequences());
  host.max_batch_tokens = static_cast<int>(section.max_batch());  // one row for each sequence of a step
  host.local_experts = section.local_experts();
  host.section = absl::StrCat("decode[", core_.config().position, "]");
  ASSIGN_OR_RETURN(host_, expert::EngineHost::Create(core_, host));
  receiver_ = std::make_unique<kvtransfer::Receiver>(core_.transport(),
                                                     kvtransfer::ReceiverOptions{.memory = CacheMemoryFunctions()});

  DecodeLoopOptions options;
  options.max_batch = static_cast<int>(section.max_batch());
  options.incarnation = core_.incarnation();
  options.compat_hash = host_->compat_hash();
  options.transfer_address = core_.transport().address();
  options.ready = [this] { return host_->Ready(); };
  options.traces = &core_.traces();
  loop_ = std::make_unique<DecodeLoop>(host_->engine(), *receiver_, std::move(options), &core_.metrics());
  handoff_service_.Serve(loop_.get(), host_->limits(), core_.incarnation());
  decode_service_.Serve(loop_.get(), core_.incarnation());

  WorkerHooks hooks;
  hooks.fill_status = [this](v1::WorkerStatus& status) {
    loop_->FillStatus(status);
    host_->PublishMetrics(core_.metrics());
    core_.metrics().SetReceiver(receiver_->statistics());
  };
  hooks.ready = [this] { return host_->Ready(); };
  hooks.on_peers = [this](const v1::PeerList& peers) { host_->SetPeers(peers); };
  hooks.on_new_router = [this](const IncarnationId& router) {
    loop_->KeepOnlyRouter(router, "stale: another router has taken over");
  };
  hooks.on_router_lost = [this](const std::string& why) { loop_->KeepOnlyRouter({}, why); };
  v1::WorkerReady ready = host_->Describe();
  spdlog::info("decode {} ready: {} numerics, kernels {}, compat {}, {} pages of {} bytes, {} slots of {}",
               core_.config().worker().name(), ready.numerics(), ready.kernel_set(), ready.compat_hash(),
               ready.capacity().pages_total(), ready.capacity().page_bytes(), ready.capacity().slots_total(),
               ready.capacity().slot_bytes());
  core_.SetReady(std::move(hooks), std::move(ready));
  return absl::OkStatus();
}

DecodeWorker::~DecodeWorker() { Stop(); }

void DecodeWorker::Drain(absl::Duration grace) { core_.Drain(loop_.get(), grace); }

void DecodeWorker::Stop() {
  if (loop_ != nullptr) loop_->Stop();
  core_.Shutdown();
}

}  // namespace millrace::decode
