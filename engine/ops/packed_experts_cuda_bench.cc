// SPDX-License-Identifier: Apache-2.0
// Times one layer's routed experts as Flash has them, all on the card, and checks that a token's rows are the bits it
// has alone.
//
//   packed_experts_cuda_bench [CSV] [COMMIT]
//
// Routing is balanced: consecutive pairs take consecutive experts, so B tokens touch min(6 B, 256) of them, as in the
// published tables this is compared with. Successive launches start at other experts, so weights come from memory.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/device/cuda_bench.h"
#include "engine/ops/cuda_packed_experts.h"
#include "engine/ops/cuda_quantise.h"
#include "engine/ops/packed_experts_kernels.h"
#include "engine/ops/packed_experts_plan.h"

namespace millrace::cuda {
namespace {

constexpr int kExperts = 256, kTopK = 6;
constexpr int64_t kHidden = 4096, kWidth = 2048, kMostTokens = 4096;
constexpr float kLimit = 10.0f;

struct Layer {
  Layer()
      : gate_up(Take(kExperts * PackedGateUpBytes(kHidden, kWidth))),
        down(Take(kExperts * PackedDownBytes(kHidden, kWidth))),
        x(Take(kMostTokens * kHidden * 2)),
        rounded(Take(kMostTokens * kHidden * 2)),
        workspace(Take(ExpertWorkspaceBytes(kExperts, kHidden, kWidth, kTopK, kMostTokens))),
        out(Take(kMostTokens * kTopK * kHidden * 2)) {
    constexpr int64_t kCodes = kHidden * kWidth / 2, kScales = kHidden * kWidth / 32;
    const DeviceBuffer raw = Take(3 * (kCodes + kScales));
    for (int e = 0; e < kExperts; ++e) {
      FillRandom(raw.data(), 3 * kCodes, 1000 + e, 0xff, 0, nullptr);
      FillRandom(raw.data() + 3 * kCodes, 3 * kScales, 5000 + e, 0x03, 116, nullptr);
      const uint8_t *c = raw.data(), *s = c + 3 * kCodes;
      PackExpert({c, c + kCodes, c + 2 * kCodes, s, s + kScales, s + 2 * kScales}, kHidden, kWidth,
                 gate_up.data() + e * PackedGateUpBytes(kHidden, kWidth),
                 down.data() + e * PackedDownBytes(kHidden, kWidth), nullptr, nullptr);
    }
    FillRandomBf16(x.data(), kMostTokens * kHidden, 1, nullptr);
    RoundRows({reinterpret_cast<const Bf16*>(x.data()), kHidden}, kMostTokens, kHidden,
              reinterpret_cast<Bf16*>(rounded.data()), nullptr);
    CUDA_CHECK(cudaDeviceSynchronize());
    weights = {kExperts, kHidden, kWidth, gate_up.data(), down.data()};
  }
  RoundedRows X(int64_t first = 0) const {
    return {reinterpret_cast<const Bf16*>(rounded.data()) + first * kHidden, kHidden};
  }
  Bf16* Out() const { return reinterpret_cast<Bf16*>(out.data()); }
  DeviceBuffer gate_up, down, x, rounded, workspace, out;
  ExpertWeights weights;
};

// Balanced routing of `tokens` tokens, starting at another expert for each set.
struct Routing {
  Routing(int64_t tokens, int sets_)
      : sets(sets_), pairs(tokens * kTopK), experts(Take(sets * pairs * 4)), weights(Take(sets * pairs * 4)) {
    std::vector<int32_t> e;
    for (int s = 0; s < sets; ++s) {
      for (int64_t t = 0; t < tokens; ++t) {
        std::vector<int32_t> chosen;
        for (int k = 0; k < kTopK; ++k)
          chosen.push_back(static_cast<int32_t>((s * pairs * 5 + t * kTopK + k) % kExperts));
        std::sort(chosen.begin(), chosen.end());
        e.insert(e.end(), chosen.begin(), chosen.end());
      }
    }
    const std::vector<float> w(e.size(), 0.25f);
    CUDA_CHECK(cudaMemcpy(experts.data(), e.data(), e.size() * 4, cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(weights.data(), w.data(), w.size() * 4, cudaMemcpyHostToDevice));
  }
  const int32_t* Experts(int set) const { return reinterpret_cast<const int32_t*>(experts.data()) + set * pairs; }
  const float* Weights(int set) const { return reinterpret_cast<const float*>(weights.data()) + set * pairs; }
  int sets;
  int64_t pairs;
  DeviceBuffer experts, weights;
};

std::vector<uint16_t> Rows(const Layer& layer, int64_t first, int64_t count) {
  std::vector<uint16_t> host(count * kHidden);
  CUDA_CHECK(cudaDeviceSynchronize());
  CUDA_CHECK(cudaMemcpy(host.data(), layer.Out() + first * kHidden, host.size() * 2, cudaMemcpyDeviceToHost));
  return host;
}

int Run(const Layer& layer, int64_t tokens, BenchReport& report) {
  const int sets = tokens >= 256 ? 1 : 8;
  const Routing routing(tokens, sets);
  const auto launch = [&](int set, cudaStream_t stream) {
    RoutedExperts(layer.weights, layer.X(), routing.Experts(set), routing.Weights(set), tokens, kTopK, kLimit,
                  layer.workspace.data(), layer.Out(), stream);
  };
  // The last token among all, then alone.
  CUDA_CHECK(cudaMemset(layer.out.data(), 0xff, layer.out.bytes()));
  launch(0, nullptr);
  const std::vector<uint16_t> among = Rows(layer, (tokens - 1) * kTopK, kTopK), all = Rows(layer, 0, tokens * kTopK);
  RoutedExperts(layer.weights, layer.X(tokens - 1), routing.Experts(0) + (tokens - 1) * kTopK,
                routing.Weights(0) + (tokens - 1) * kTopK, 1, kTopK, kLimit, layer.workspace.data(), layer.Out(),
                nullptr);
  const std::vector<uint16_t> alone = Rows(layer, 0, kTopK);
  const bool written = std::none_of(all.begin(), all.end(), [](uint16_t y) { return (y & 0x7f80) == 0x7f80; });
  const bool good = written && std::memcmp(among.data(), alone.data(), alone.size() * 2) == 0;

  const int64_t touched = std::min<int64_t>(tokens * kTopK, kExperts);
  const double weight_bytes =
      static_cast<double>(touched) * (PackedGateUpBytes(kHidden, kWidth) + PackedDownBytes(kHidden, kWidth));
  const double bytes = weight_bytes + tokens * kHidden * 2.0 + tokens * kTopK * kHidden * 2.0;
  const double flops = 6.0 * tokens * kTopK * kHidden * kWidth;
  const int launches = static_cast<int>(std::clamp(6000.0 / (bytes / 3e6 + flops / 1e9), 4.0, 64.0));
  report.Add({"moe fp4 routed", absl::StrCat("Flash B ", tokens), TimeLaunches(launches, sets, 7, launch), bytes, flops,
              good      ? "bits equal alone"
              : written ? "BITS DIFFER"
                        : "NOT WRITTEN"});

  // The halves, over one grouping.
  const ExpertPath path = ChooseExpertPath(routing.pairs, kExperts);
  const ExpertWorkspace w = ExpertWorkspaceAt(layer.weights, routing.pairs, layer.workspace.data());
  launch(0, nullptr);
  const double share = static_cast<double>(PackedGateUpBytes(kHidden, kWidth)) /
                       (PackedGateUpBytes(kHidden, kWidth) + PackedDownBytes(kHidden, kWidth));
  report.Add({"moe fp4 gate and up", absl::StrCat("Flash B ", tokens),
              TimeLaunches(launches, 1, 5,
                           [&](int, cudaStream_t stream) {
                             ExpertGateUp(path, layer.weights, layer.X(), tokens, routing.Weights(0), kTopK, kLimit, w,
                                          132, stream);
                           }),
              weight_bytes * share, flops * 2 / 3, "same weights again: warm if few"});
  report.Add({"moe fp4 down", absl::StrCat("Flash B ", tokens),
              TimeLaunches(launches, 1, 5,
                           [&](int, cudaStream_t stream) {
                             ExpertDown(path, layer.weights, routing.pairs, w, layer.Out(), 132, stream);
                           }),
              weight_bytes * (1 - share), flops / 3, "same weights again: warm if few"});
  return good ? 0 : 1;
}

int RunAll(BenchReport& report) {
  const Layer layer;
  int wrong = 0;
  for (const int64_t tokens : {1, 4, 16, 64, 128, 256, 1024, 4096}) wrong += Run(layer, tokens, report);
  return wrong;
}

}  // namespace
}  // namespace millrace::cuda

int main(int argc, char** argv) { return millrace::cuda::BenchMain(argc, argv, millrace::cuda::RunAll); }
