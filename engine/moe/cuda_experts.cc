// SPDX-License-Identifier: Apache-2.0
// See cuda_experts.h. A call is cut into slices of bounded size: one copy up, the quantiser and the grouped products of
// cuda_packed_experts.h over pairs as if each were a token with one expert, one copy back.
#include "engine/moe/cuda_experts.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/device/cuda_device.h"
#include "engine/model/cuda_limits.h"
#include "engine/model/cuda_weights.h"
#include "engine/ops/cuda_kernel_set.h"
#include "engine/ops/cuda_packed_experts.h"
#include "engine/ops/cuda_quantise.h"
#include "engine/status.h"

namespace millrace {
namespace {

using cuda::Bf16;
using cuda::Bump;

// Pairs on the card at a time: enough that the weights are read for many, and 16 MiB of rows of Flash each way.
constexpr int64_t kSlicePairs = 2048;

// What goes up for `n` pairs, laid out alike over page-locked and device memory, so that it is one copy.
struct Slice {
  int32_t* experts = nullptr;  // places among those loaded
  float* weights = nullptr;
  Bf16* rows = nullptr;
  int64_t bytes = 0;

  static Slice LayOut(uint8_t* base, int64_t n, int64_t hidden) {
    Bump bump(base);
    Slice s;
    s.experts = bump.Take<int32_t>(n);
    s.weights = bump.Take<float>(n);
    s.rows = bump.Take<Bf16>(n * hidden);
    s.bytes = bump.used();
    return s;
  }
};

class CudaExperts final : public ExpertComputer {
 public:
  CudaExperts(const ModelConfig& config, std::vector<int> ids)
      : hidden_(config.hidden_size),
        limit_(static_cast<float>(config.swiglu_limit)),
        ids_(std::move(ids)),
        place_(static_cast<size_t>(config.n_routed_experts), -1) {
    for (size_t i = 0; i < ids_.size(); ++i) place_[static_cast<size_t>(ids_[i])] = static_cast<int32_t>(i);
  }

  absl::Status Init(const Checkpoint& checkpoint, const LocalExpertsOptions& options) {
    const ModelConfig& config = checkpoint.config();
    RETURN_IF_ERROR(cuda::CheckShapes(config));
    ASSIGN_OR_RETURN(const cuda::DeviceInfo device, cuda::OpenDevice(0));
    const bool mtp = options.mtp && config.has_mtp();
    const int64_t width = config.moe_intermediate_size, row_bytes = kSlicePairs * hidden_ * 2;
    weight_bytes_ = cuda::RoutedExpertBytes(checkpoint, ids_, mtp);
    const int64_t up = Slice::LayOut(nullptr, kSlicePairs, hidden_).bytes;
    const int64_t scratch =
        cuda::ExpertWorkspaceBytes(static_cast<int>(ids_.size()), hidden_, width, /*k=*/1, kSlicePairs);
    ASSIGN_OR_RETURN(const std::string budget,
                     cuda::MemoryBudget(device, {{absl::StrCat(ids_.size(), " experts a layer"), weight_bytes_},
                                                 {"workspace", up + 2 * row_bytes + scratch}}));
    if (options.notice) options.notice(budget);
    ASSIGN_OR_RETURN(weights_memory_, cuda::DeviceBuffer::Take(weight_bytes_, "experts"));
    ASSIGN_OR_RETURN(up_memory_, cuda::DeviceBuffer::Take(up, "rows of experts"));
    ASSIGN_OR_RETURN(rounded_memory_, cuda::DeviceBuffer::Take(row_bytes, "rounded rows of experts"));
    ASSIGN_OR_RETURN(out_memory_, cuda::DeviceBuffer::Take(row_bytes, "results of experts"));
    ASSIGN_OR_RETURN(scratch_memory_, cuda::DeviceBuffer::Take(scratch, "workspace of experts"));
    ASSIGN_OR_RETURN(up_staging_, cuda::PinnedBuffer::Take(up, "rows of experts"));
    ASSIGN_OR_RETURN(out_staging_, cuda::PinnedBuffer::Take(row_bytes, "results of experts"));
    Bump bump(weights_memory_.data());
    ASSIGN_OR_RETURN(layers_, cuda::LoadRoutedExperts(checkpoint, ids_, mtp, bump, options.progress));
    stream_ = std::make_unique<cuda::Stream>();
    return absl::OkStatus();
  }

  bool Has(int layer, int expert) const override {
    return layer >= 0 && layer < static_cast<int>(layers_.size()) && expert >= 0 &&
           expert < static_cast<int>(place_.size()) && place_[static_cast<size_t>(expert)] >= 0;
  }
  int64_t weight_bytes() const override { return weight_bytes_; }
  std::string KernelSet() const override { return CudaKernelSet(); }

  absl::Status Compute(const ExpertPairs& pairs, void* out) override {
    places_.clear();
    for (const ExpertGroup& group : pairs.groups) {
      if (!Has(pairs.layer, static_cast<int>(group.expert))) {
        return absl::NotFoundError(
            absl::StrCat("layer ", pairs.layer, " expert ", group.expert, " is not loaded here"));
      }
      places_.insert(places_.end(), group.count, place_[group.expert]);
    }
    CHECK(places_.size() == pairs.pair_rows.size() && places_.size() == pairs.weights.size(), "counts add up");
    const auto num_pairs = static_cast<int64_t>(places_.size());
    for (int64_t first = 0; first < num_pairs; first += kSlicePairs) {
      ComputeSlice(pairs, first, std::min(kSlicePairs, num_pairs - first),
                   static_cast<uint8_t*>(out) + first * RowBytes(pairs.format, hidden_));
    }
    return absl::OkStatus();
  }

 private:
  void ComputeSlice(const ExpertPairs& pairs, int64_t first, int64_t n, uint8_t* out) {
    const Slice host = Slice::LayOut(up_staging_.data(), n, hidden_);
    const Slice device = Slice::LayOut(up_memory_.data(), n, hidden_);
    const int64_t row_bytes = RowBytes(pairs.format, hidden_);
    std::copy_n(places_.begin() + first, n, host.experts);
    std::copy_n(pairs.weights.begin() + first, n, host.weights);
    for (int64_t i = 0; i < n; ++i) {
      ConvertRow(static_cast<const uint8_t*>(pairs.rows) + pairs.pair_rows[first + i] * row_bytes, pairs.format,
                 hidden_, RowFormat::kBf16, host.rows + i * hidden_);
    }
    cudaStream_t s = stream_->get();
    CUDA_CHECK(cudaMemcpyAsync(up_memory_.data(), up_staging_.data(), host.bytes, cudaMemcpyHostToDevice, s));
    auto* rounded = reinterpret_cast<Bf16*>(rounded_memory_.data());
    auto* results = reinterpret_cast<Bf16*>(out_memory_.data());
    cuda::RoundRows({device.rows, hidden_}, n, hidden_, rounded, s);
    cuda::RoutedExperts(layers_[pairs.layer], {rounded, hidden_}, device.experts, device.weights, n, /*k=*/1, limit_,
                        scratch_memory_.data(), results, s);
    CUDA_CHECK(cudaMemcpyAsync(out_staging_.data(), results, n * hidden_ * 2, cudaMemcpyDeviceToHost, s));
    stream_->Wait();
    for (int64_t i = 0; i < n; ++i) {
      ConvertRow(out_staging_.data() + i * hidden_ * 2, RowFormat::kBf16, hidden_, pairs.format, out + i * row_bytes);
    }
  }

  const int64_t hidden_;
  const float limit_;
  const std::vector<int> ids_;
  std::vector<int32_t> place_;   // by expert; -1: not here
  std::vector<int32_t> places_;  // of the call's pairs
  int64_t weight_bytes_ = 0;
  cuda::DeviceBuffer weights_memory_, up_memory_, rounded_memory_, out_memory_, scratch_memory_;
  cuda::PinnedBuffer up_staging_, out_staging_;
  std::vector<cuda::ExpertWeights> layers_;
  std::unique_ptr<cuda::Stream> stream_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<ExpertComputer>> CreateCudaExperts(const Checkpoint& checkpoint,
                                                                  LocalExpertsOptions options) {
  RETURN_IF_ERROR(cuda::CheckNumerics(options.numerics));
  RETURN_IF_ERROR(CompleteExpertIds(checkpoint.config(), options.experts));
  auto experts = std::make_unique<CudaExperts>(checkpoint.config(), options.experts);
  RETURN_IF_ERROR(experts->Init(checkpoint, options));
  return std::unique_ptr<ExpertComputer>(std::move(experts));
}

}  // namespace millrace
