// SPDX-License-Identifier: Apache-2.0
// See expert_worker.h.
#include "services/expert/expert_worker.h"

#include <utility>

#include "absl/strings/str_join.h"
#include "engine/status.h"
#include "services/common/clock.h"
#include "services/expert/engine_host.h"
#include "spdlog/spdlog.h"

namespace millrace::expert {

absl::StatusOr<std::unique_ptr<ExpertWorker>> ExpertWorker::Start(const WorkerConfig& config,
                                                                  WorkerEnvironment environment) {
  std::unique_ptr<ExpertWorker> worker(new ExpertWorker(config, std::move(environment)));
  RETURN_IF_ERROR(worker->core_.StartServer({&worker->service_}, {v1::Expert::service_full_name()}));
  RETURN_IF_ERROR(worker->Load());
  return worker;
}

absl::Status ExpertWorker::Load() {
  const WorkerConfig& config = core_.config();
  RETURN_IF_ERROR(core_.MakeTransport());
  ASSIGN_OR_RETURN(const std::shared_ptr<const Checkpoint> checkpoint, core_.OpenCheckpoint());
  ASSIGN_OR_RETURN(const Numerics numerics, core_.ChooseNumerics(*checkpoint));
  const ModelConfig& model = checkpoint->config();
  ASSIGN_OR_RETURN(const std::vector<int> experts, config.ExpertsOf(model.n_routed_experts));

  LocalExpertsOptions local;
  local.numerics = numerics;
  local.experts = experts;
  local.num_threads = static_cast<int>(config.worker().threads());
  local.progress = [this](int64_t done, int64_t total) { core_.ReportProgress(done, total); };
  ASSIGN_OR_RETURN(experts_, LoadExperts(config, *checkpoint, std::move(local)));

  ExpertLoopOptions options;
  options.max_queue = config.expert().max_queue();
  options.num_experts = model.n_routed_experts;
  options.num_layers = model.num_hidden_layers;
  options.hidden = model.hidden_size;
  options.format = numerics == Numerics::kRelease ? RowFormat::kBf16 : RowFormat::kF32;
  loop_ = std::make_unique<ExpertLoop>(*experts_, &core_.transport(), options, &core_.metrics());

  v1::WorkerReady ready;
  ready.set_expert_compat_hash(
      ExpertCompatHash(*checkpoint, numerics, experts_->KernelSet(), config.cluster.transfer().seal()));
  ready.set_numerics(std::string(NumericsName(numerics)));
  ready.set_kernel_set(experts_->KernelSet());
  ready.mutable_capacity()->set_max_queue(config.expert().max_queue());
  ready.mutable_capacity()->set_vocab_size(static_cast<uint32_t>(model.vocab_size));
  ready.mutable_experts()->mutable_experts()->Add(experts.begin(), experts.end());
  ready.mutable_experts()->set_waves(config.expert().waves());
  ready.mutable_experts()->set_num_experts(static_cast<uint32_t>(model.n_routed_experts));

  v1::DescribeExpertsResponse description;
  description.set_name(config.worker().name());
  core_.incarnation().To(description.mutable_incarnation());
  *description.mutable_share() = ready.experts();
  description.set_num_layers(static_cast<uint32_t>(options.num_layers));
  description.set_hidden(static_cast<uint32_t>(options.hidden));
  description.set_numerics(ready.numerics());
  description.set_expert_compat_hash(ready.expert_compat_hash());
  description.set_transfer_address(core_.transport().address());
  description.set_weight_bytes(static_cast<uint64_t>(experts_->weight_bytes()));
  service_.Serve(loop_.get(), std::move(description));

  WorkerHooks hooks;
  hooks.fill_status = [this](v1::WorkerStatus& status) { loop_->FillStatus(status); };
  core_.SetReady(std::move(hooks), std::move(ready));
  spdlog::info("expert {} ready: experts {} in {} waves, {} weight bytes, kernels {}", config.worker().name(),
               absl::StrJoin(experts, ","), config.expert().waves(), experts_->weight_bytes(), experts_->KernelSet());
  return absl::OkStatus();
}

ExpertWorker::~ExpertWorker() { Stop(); }

// Takes work to the end: who asks has been told to go elsewhere, and lets go when what it has sent is answered.
void ExpertWorker::Drain(absl::Duration grace) {
  const absl::Duration silence = Ms(core_.config().cluster.timers().dead_after_ms());
  core_.Drain([] {}, [&] { return loop_ == nullptr || loop_->LetGo(MonotonicNow(), silence); }, grace);
}

void ExpertWorker::Stop() {
  if (loop_ != nullptr) loop_->Stop();
  service_.Stop();
  core_.Shutdown();
}

}  // namespace millrace::expert
