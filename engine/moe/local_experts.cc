// SPDX-License-Identifier: Apache-2.0
// Routed experts in this process: rows grouped by expert, three linears and a SwiGLU each.
#include "engine/moe/local_experts.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "engine/cache/cache_layout.h"
#include "engine/model/weights.h"
#include "engine/ops/cpu_ops.h"
#include "engine/ops/vector_cpu.h"
#include "engine/status.h"

namespace millrace {

struct LocalExperts::Impl {
  struct Expert {
    PackedLinear w1, w2, w3;
  };

  Impl(const ModelConfig& model, const LocalExpertsOptions& options)
      : config(model),
        pool(options.num_threads),
        ops(config, layout, options.rounding.value_or(Rounding::For(options.numerics)), pool) {}

  const ModelConfig config;
  CacheLayout layout;  // unused by the operations called here
  ThreadPool pool;
  CpuOps ops;
  std::vector<std::vector<Expert>> experts;  // [layer][expert], empty weights where not loaded
  int64_t bytes = 0;
  ExpertBatch batch;
  std::vector<float> rows, gate, up, out, weights;
};

absl::Status CompleteExpertIds(const ModelConfig& config, std::vector<int>& experts) {
  if (experts.empty()) {
    for (int e = 0; e < config.n_routed_experts; ++e) experts.push_back(e);
  }
  for (int e : experts) {
    if (e < 0 || e >= config.n_routed_experts) {
      return absl::InvalidArgumentError(
          absl::StrCat("experts: found ", e, ", allowed 0 to ", config.n_routed_experts - 1));
    }
  }
  return absl::OkStatus();
}

LocalExperts::LocalExperts(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
LocalExperts::~LocalExperts() = default;

absl::StatusOr<std::unique_ptr<LocalExperts>> LocalExperts::Create(const Checkpoint& checkpoint,
                                                                   LocalExpertsOptions options) {
  const ModelConfig& config = checkpoint.config();
  RETURN_IF_ERROR(CompleteExpertIds(config, options.experts));
  auto impl = std::make_unique<Impl>(config, options);
  const int layers = config.num_hidden_layers + (options.mtp && config.has_mtp() ? 1 : 0);
  for (int layer = 0; layer < layers; ++layer) {
    std::vector<Impl::Expert>& experts = impl->experts.emplace_back(config.n_routed_experts);
    const std::string prefix =
        layer < config.num_hidden_layers ? absl::StrCat("layers.", layer, ".ffn.experts.") : "mtp.0.ffn.experts.";
    for (int e : options.experts) {
      Impl::Expert& x = experts[e];
      x.w1 = LoadLinear(checkpoint, absl::StrCat(prefix, e, ".w1.weight"), options.numerics);
      x.w2 = LoadLinear(checkpoint, absl::StrCat(prefix, e, ".w2.weight"), options.numerics);
      x.w3 = LoadLinear(checkpoint, absl::StrCat(prefix, e, ".w3.weight"), options.numerics);
      impl->bytes += x.w1.bytes() + x.w2.bytes() + x.w3.bytes();
    }
    if (options.progress) options.progress(impl->bytes, impl->bytes * layers / (layer + 1));
  }
  return std::unique_ptr<LocalExperts>(new LocalExperts(std::move(impl)));
}

bool LocalExperts::Has(int layer, int expert) const {
  return layer >= 0 && layer < static_cast<int>(impl_->experts.size()) && expert >= 0 &&
         expert < impl_->config.n_routed_experts && !impl_->experts[layer][expert].w1.empty();
}

int64_t LocalExperts::weight_bytes() const { return impl_->bytes; }

std::string LocalExperts::KernelSet() const { return vec::KernelSet(); }

absl::Status LocalExperts::ComputeOne(int layer, int expert, const float* rows, const float* weights, int64_t num_rows,
                                      float* out) {
  if (!Has(layer, expert)) {
    return absl::NotFoundError(absl::StrCat("layer ", layer, " expert ", expert, " is not loaded here"));
  }
  Impl& m = *impl_;
  const Impl::Expert& x = m.experts[layer][expert];
  const int64_t width = m.config.moe_intermediate_size;
  m.gate.resize(std::max<size_t>(m.gate.size(), num_rows * width));
  m.up.resize(std::max<size_t>(m.up.size(), num_rows * width));
  m.ops.Linear(rows, m.config.hidden_size, num_rows, {{&x.w1, m.gate.data()}, {&x.w3, m.up.data()}});
  m.ops.SwiGlu(m.gate.data(), m.up.data(), weights, num_rows, width, static_cast<float>(m.config.swiglu_limit),
               m.gate.data());
  m.ops.Linear(m.gate.data(), width, num_rows, {{&x.w2, out}});
  return absl::OkStatus();
}

absl::Status LocalExperts::Compute(const ExpertPairs& pairs, void* out) {
  Impl& m = *impl_;
  const int64_t hidden = m.config.hidden_size, row_bytes = RowBytes(pairs.format, hidden);
  const auto* rows = static_cast<const uint8_t*>(pairs.rows);
  auto* to = static_cast<uint8_t*>(out);
  size_t pair = 0;
  for (const ExpertGroup& group : pairs.groups) {
    m.rows.resize(std::max<size_t>(m.rows.size(), group.count * hidden));
    m.out.resize(std::max<size_t>(m.out.size(), group.count * hidden));
    for (int64_t i = 0; i < group.count; ++i) {
      ConvertRow(rows + pairs.pair_rows[pair + i] * row_bytes, pairs.format, hidden, RowFormat::kF32,
                 m.rows.data() + i * hidden);
    }
    RETURN_IF_ERROR(ComputeOne(pairs.layer, static_cast<int>(group.expert), m.rows.data(), &pairs.weights[pair],
                               group.count, m.out.data()));
    for (int64_t i = 0; i < group.count; ++i, to += row_bytes) {
      ConvertRow(m.out.data() + i * hidden, RowFormat::kF32, hidden, pairs.format, to);
    }
    pair += group.count;
  }
  return absl::OkStatus();
}

absl::Status LocalExperts::Dispatch(const ExpertBatch& batch) {
  CHECK(batch.format == RowFormat::kF32, "the engine that owns these experts has F32 rows");
  impl_->batch = batch;
  return absl::OkStatus();
}

absl::Status LocalExperts::Combine(void* expert_rows) {
  Impl& m = *impl_;
  const ExpertBatch& b = m.batch;
  const int64_t pairs = b.num_tokens * b.top_k;
  const auto* batch_rows = static_cast<const float*>(b.rows);
  auto* to = static_cast<float*>(expert_rows);
  // Pairs by expert: each expert runs once over all its rows.
  std::vector<std::vector<int64_t>> by_expert(m.config.n_routed_experts);
  for (int64_t i = 0; i < pairs; ++i) by_expert[b.experts[i]].push_back(i);
  for (int e = 0; e < m.config.n_routed_experts; ++e) {
    const std::vector<int64_t>& mine = by_expert[e];
    if (mine.empty()) continue;
    const int64_t n = static_cast<int64_t>(mine.size());
    m.rows.resize(std::max<size_t>(m.rows.size(), n * b.hidden));
    m.out.resize(std::max<size_t>(m.out.size(), n * b.hidden));
    m.weights.resize(std::max<size_t>(m.weights.size(), n));
    for (int64_t i = 0; i < n; ++i) {
      std::copy_n(batch_rows + mine[i] / b.top_k * b.hidden, b.hidden, m.rows.data() + i * b.hidden);
      m.weights[i] = b.weights[mine[i]];
    }
    RETURN_IF_ERROR(ComputeOne(b.layer, e, m.rows.data(), m.weights.data(), n, m.out.data()));
    for (int64_t i = 0; i < n; ++i) std::copy_n(m.out.data() + i * b.hidden, b.hidden, to + mine[i] * b.hidden);
  }
  return absl::OkStatus();
}

}  // namespace millrace
