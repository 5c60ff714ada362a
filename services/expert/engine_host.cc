// SPDX-License-Identifier: Apache-2.0
// See engine_host.h.
#include "services/expert/engine_host.h"

#include <xxhash.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/moe/cuda_experts.h"
#include "engine/ops/cuda_kernel_set.h"
#include "engine/ops/vector_cpu.h"
#include "engine/status.h"
#include "spdlog/spdlog.h"

namespace millrace::expert {

namespace {

// In front of a compatibility hash. Two sides of which one seals cannot speak, and shall see why.
absl::string_view SealWord(bool sealed) { return sealed ? "sealed-" : ""; }

}  // namespace

std::string PoolKernelSet(const WorkerConfig& config) {
  return config.pool_on_cuda() ? CudaKernelSet() : vec::KernelSet();
}

absl::StatusOr<std::unique_ptr<ExpertComputer>> LoadExperts(const WorkerConfig& config, const Checkpoint& checkpoint,
                                                            LocalExpertsOptions options) {
  if (!config.pool_on_cuda()) return LocalExperts::Create(checkpoint, std::move(options));
  options.notice = [](const std::string& line) { spdlog::info("{}", line); };
  return CreateCudaExperts(checkpoint, std::move(options));
}

std::string ExpertCompatHash(const Checkpoint& checkpoint, Numerics numerics, const std::string& kernel_set,
                             bool sealed) {
  const std::string text = absl::StrCat(checkpoint.ContentHash(), ";", std::string(NumericsName(numerics)), ";",
                                        kernel_set, ";wire ", kWireVersion);
  return absl::StrCat(SealWord(sealed), absl::Hex(XXH3_64bits(text.data(), text.size()), absl::kZeroPad16));
}

absl::StatusOr<std::unique_ptr<EngineHost>> EngineHost::Create(WorkerCore& core, const EngineHostOptions& options) {
  const WorkerConfig& config = core.config();
  std::unique_ptr<EngineHost> host(new EngineHost);
  ASSIGN_OR_RETURN(host->checkpoint_, core.OpenCheckpoint());
  ASSIGN_OR_RETURN(const Numerics numerics, core.ChooseNumerics(*host->checkpoint_));
  const ModelConfig& model = host->checkpoint_->config();
  const bool sealed = config.cluster.transfer().seal();
  host->expert_compat_hash_ = ExpertCompatHash(*host->checkpoint_, numerics, PoolKernelSet(config), sealed);

  EngineOptions engine_options;
  engine_options.numerics = numerics;
  engine_options.device = config.cluster.model().device() == "cuda" ? DeviceKind::kCuda : DeviceKind::kCpu;
  engine_options.cache_pages = options.cache_pages;
  engine_options.max_sequences = options.max_sequences;
  engine_options.max_batch_tokens = options.max_batch_tokens;
  engine_options.max_context_tokens = static_cast<int64_t>(config.cluster.model().max_context_tokens());
  engine_options.num_threads = static_cast<int>(config.worker().threads());
  engine_options.notice = [](const std::string& line) { spdlog::info("{}", line); };
  engine_options.progress = [&core](int64_t done, int64_t total) { core.ReportProgress(done, total); };

  if (config.has_expert_pool()) {
    RemoteExpertsOptions remote;
    remote.pool.name = config.worker().name();
    remote.pool.incarnation = core.incarnation();
    remote.pool.expert_compat_hash = host->expert_compat_hash_;
    remote.pool.num_experts = model.n_routed_experts;
    remote.pool.over_grpc = config.cluster.transfer().expert_transport() == "grpc";
    remote.pool.on_change = [&core] { core.Nudge(); };
    remote.format = numerics == Numerics::kRelease ? RowFormat::kBf16 : RowFormat::kF32;
    remote.kernel_set = PoolKernelSet(config);
    remote.timeout = Ms(config.cluster.timers().expert_timeout_ms());
    if (!options.local_experts.empty()) {
      auto experts = ParseExpertSet(options.local_experts, model.n_routed_experts);
      if (!experts.ok()) {
        return absl::InvalidArgumentError(
            absl::StrCat(options.section, ".local_experts: ", experts.status().message()));
      }
      remote.pool.local_experts = *experts;
      LocalExpertsOptions local;
      local.numerics = numerics;
      local.experts = *std::move(experts);
      local.num_threads = engine_options.num_threads;
      ASSIGN_OR_RETURN(host->local_, LoadExperts(config, *host->checkpoint_, std::move(local)));
    }
    host->remote_ =
        std::make_unique<RemoteExperts>(std::move(remote), &core.transport(), core.channels(), host->local_.get());
    engine_options.exchange = host->remote_.get();
  }
  if (core.environment().make_engine) {
    ASSIGN_OR_RETURN(host->engine_, core.environment().make_engine(std::move(engine_options)));
  } else {
    ASSIGN_OR_RETURN(host->engine_, Engine::Create(host->checkpoint_, std::move(engine_options)));
  }
  host->compat_hash_ = absl::StrCat("w", kWireVersion, "-", SealWord(sealed), host->engine_->CompatibilityHash());
  return host;
}

void EngineHost::PublishMetrics(WorkerMetrics& metrics) const {
  if (remote_ == nullptr) return;
  const RemoteExpertsStatistics statistics = remote_->statistics();
  metrics.SetExchange({.batches = statistics.batches,
                       .failed_batches = statistics.failed_batches,
                       .messages = statistics.pieces,
                       .dropped_replies = statistics.dropped_replies,
                       .bytes_sent = statistics.bytes_sent,
                       .bytes_received = statistics.bytes_received,
                       .wait_seconds = absl::ToDoubleSeconds(statistics.waited)});
}

RequestLimits EngineHost::limits() const {
  RequestLimits limits;
  limits.vocab_size = engine_->config().vocab_size;
  const int64_t asked = engine_->options().max_context_tokens;
  limits.max_context_tokens = asked > 0 ? asked : engine_->config().max_position_embeddings;
  return limits;
}

v1::WorkerReady EngineHost::Describe() const {
  v1::WorkerReady ready;
  ready.set_compat_hash(compat_hash_);
  ready.set_expert_compat_hash(expert_compat_hash_);
  ready.set_numerics(std::string(NumericsName(engine_->options().numerics)));
  ready.set_kernel_set(engine_->KernelSet());
  const CacheUsage usage = engine_->Usage();
  v1::Capacity& capacity = *ready.mutable_capacity();
  capacity.set_pages_total(static_cast<uint64_t>(usage.pages_total));
  capacity.set_page_tokens(kPageTokens);
  capacity.set_slots_total(static_cast<uint32_t>(usage.slots_total));
  capacity.set_max_context_tokens(static_cast<uint64_t>(limits().max_context_tokens));
  capacity.set_max_batch_tokens(static_cast<uint32_t>(engine_->options().max_batch_tokens));
  capacity.set_page_bytes(static_cast<uint64_t>(engine_->layout().page_bytes));
  capacity.set_slot_bytes(static_cast<uint64_t>(engine_->layout().slot_bytes));
  capacity.set_vocab_size(static_cast<uint32_t>(limits().vocab_size));
  return ready;
}

}  // namespace millrace::expert
