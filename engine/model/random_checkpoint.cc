// SPDX-License-Identifier: Apache-2.0
// Random weights in the released format: see random_checkpoint.h.
//
// Each tensor is drawn from a table of 4,096 encoded samples of its distribution, four draws per 64 random bits: fast
// enough to fill 160 GB in minutes, and without transcendental functions, so the bytes are the same on every machine.
#include "engine/model/random_checkpoint.h"

#include <sys/statvfs.h>
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/model/checkpoint.h"
#include "engine/model/mapped_file.h"
#include "engine/model/safetensors_writer.h"
#include "engine/model/shard_index.h"
#include "engine/status.h"
#include "nlohmann/json.hpp"

namespace millrace {
namespace {

constexpr int64_t kChunkBytes = int64_t{4} << 20;  // a multiple of every element size
constexpr int kTableSize = 4096;

class SplitMix64 {
 public:
  explicit SplitMix64(uint64_t seed) : state_(seed) {}
  uint64_t Next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  uint64_t Below(uint64_t n) { return Next() % n; }

 private:
  uint64_t state_;
};

// Standard normal to the eye: twelve uniforms less six, by additions alone.
const std::array<float, kTableSize>& NormalSamples() {
  static const std::array<float, kTableSize> samples = [] {
    std::array<float, kTableSize> out;
    SplitMix64 random(20260424);
    for (float& sample : out) {
      double sum = -6;
      for (int i = 0; i < 12; ++i) sum += static_cast<double>(random.Next() >> 40) / (1 << 24);
      sample = static_cast<float>(sum);
    }
    return out;
  }();
  return samples;
}

uint16_t ToBf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// The nearest of the format's magnitudes; ties and all that do not matter for random weights.
template <size_t N>
uint8_t NearestCode(const std::array<float, N>& magnitudes, float value, uint8_t sign_bit) {
  const float magnitude = std::fabs(value);
  size_t best = 0;
  for (size_t i = 1; i < N; ++i) {
    if (std::fabs(magnitudes[i] - magnitude) < std::fabs(magnitudes[best] - magnitude)) best = i;
  }
  return static_cast<uint8_t>(best | (value < 0 ? sign_bit : 0));
}

uint8_t ToE4m3(float value) {
  static const std::array<float, 127> magnitudes = [] {
    std::array<float, 127> out;
    for (int code = 0; code < 127; ++code) {
      const int exponent = code >> 3, mantissa = code & 7;
      out[static_cast<size_t>(code)] = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                                     : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
    }
    return out;
  }();
  return NearestCode(magnitudes, value, 0x80);
}

uint8_t ToE2m1(float value) {
  static constexpr std::array<float, 8> magnitudes = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
  return NearestCode(magnitudes, value, 0x8);
}

// What a tensor's values look like: `mean` + `std` * normal.
struct Distribution {
  double mean = 0;
  double std = 1;
};

Distribution DistributionOf(const std::string& name, int64_t fan_in) {
  const auto ends = [&](const char* suffix) { return absl::EndsWith(name, suffix); };
  if (ends("embed.weight")) return {0, 1};
  if (ends("norm.weight")) return {1, 0.05};
  if (ends("attn_sink")) return {0, 1};
  if (ends(".ape")) return {0, 0.3};
  if (ends("gate.bias")) return {0, 0.05};
  if (ends("_base")) return {0, 0.5};
  if (absl::StrContains(name, "hc_") && ends("_scale")) return {0.3, 0};
  return {0, 1 / std::sqrt(static_cast<double>(fan_in))};
}

// A scaled format holds std = sigma * 2^exponent with sigma in [low, 2 * low), where its codes are densest.
struct ScaledStd {
  double sigma;
  int exponent;
};
ScaledStd SplitStd(double std, double low) {
  const int exponent = static_cast<int>(std::floor(std::log2(std / low)));
  return {std::ldexp(std, -exponent), exponent};
}
constexpr double kE4m3Sigma = 32;  // 448 is seven to fourteen sigma away
constexpr double kE2m1Sigma = 1;   // 6 is three to six sigma away

template <typename Word, typename Encode>
std::vector<Word> MakeTable(Encode encode) {
  std::vector<Word> table;
  for (int i = 0; i < kTableSize; ++i) table.push_back(encode(i));
  return table;
}

// Where a tensor's bytes go, in order: a file or memory.
using Sink = std::function<absl::Status(const void* data, int64_t bytes)>;

// Sends `elements` draws of `table` to the sink, a chunk at a time.
template <typename Word>
absl::Status AppendDraws(const Sink& sink, const std::vector<Word>& table, int64_t elements, SplitMix64& random) {
  std::vector<Word> chunk(
      static_cast<size_t>(std::min<int64_t>(elements, kChunkBytes / static_cast<int64_t>(sizeof(Word)))));
  while (elements > 0) {
    const size_t n = static_cast<size_t>(std::min<int64_t>(elements, static_cast<int64_t>(chunk.size())));
    for (size_t i = 0; i < n; i += 4) {
      const uint64_t bits = random.Next();
      for (size_t j = 0; j < 4 && i + j < n; ++j) chunk[i + j] = table[(bits >> (16 * j)) % kTableSize];
    }
    RETURN_IF_ERROR(sink(chunk.data(), static_cast<int64_t>(n * sizeof(Word))));
    elements -= static_cast<int64_t>(n);
  }
  return absl::OkStatus();
}

absl::Status AppendExpertIds(const Sink& sink, const TensorSpec& spec, int64_t num_experts, SplitMix64& random) {
  std::vector<int64_t> ids;
  for (int64_t token = 0; token < spec.shape[0]; ++token) {
    const size_t row = ids.size();
    while (ids.size() < row + static_cast<size_t>(spec.shape[1])) {
      const auto id = static_cast<int64_t>(random.Below(static_cast<uint64_t>(num_experts)));
      if (std::find(ids.begin() + static_cast<int64_t>(row), ids.end(), id) == ids.end()) ids.push_back(id);
    }
  }
  return sink(ids.data(), static_cast<int64_t>(ids.size() * sizeof(int64_t)));
}

// `weight` is the tensor itself, or for a scale tensor the weight that it scales.
absl::Status AppendTensor(const Sink& sink, const TensorSpec& spec, const TensorSpec& weight, DType dtype,
                          int64_t num_experts, uint64_t seed) {
  SplitMix64 random(XXH3_64bits_withSeed(spec.name.data(), spec.name.size(), seed));
  if (dtype == DType::kI64) return AppendExpertIds(sink, spec, num_experts, random);
  const bool fp4 = weight.dtype == DType::kI8;
  const bool packed = fp4 && (dtype == DType::kI8 || dtype == DType::kF8E8M0);
  const int64_t fan_in = weight.shape.back() * (packed ? 2 : 1);
  const Distribution d = DistributionOf(weight.name, fan_in);
  const ScaledStd scaled = SplitStd(d.std > 0 ? d.std : 1, fp4 ? kE2m1Sigma : kE4m3Sigma);
  const std::array<float, kTableSize>& normal = NormalSamples();
  int64_t elements = 1;
  for (const int64_t dim : spec.shape) elements *= dim;
  const auto value = [&](int i) {
    return static_cast<float>(d.mean + d.std * static_cast<double>(normal[static_cast<size_t>(i)]));
  };
  const auto code = [&](int i) { return static_cast<float>(scaled.sigma) * normal[static_cast<size_t>(i)]; };
  switch (dtype) {
    case DType::kF32:
      return AppendDraws(sink, MakeTable<float>(value), elements, random);
    case DType::kBF16:
      return AppendDraws(sink, MakeTable<uint16_t>([&](int i) { return ToBf16(value(i)); }), elements, random);
    case DType::kF8E4M3:
      return AppendDraws(sink, MakeTable<uint8_t>([&](int i) { return ToE4m3(code(i)); }), elements, random);
    case DType::kI8: {  // two values a byte, the even one in the low nibble; 1,597 is coprime to the table's size
      const auto pair = [&](int i) {
        return static_cast<uint8_t>(ToE2m1(code(i)) | ToE2m1(code(i * 1597 % kTableSize)) << 4);
      };
      return AppendDraws(sink, MakeTable<uint8_t>(pair), elements, random);
    }
    case DType::kF8E8M0: {  // one block in four twice as large, one half: scales must matter
      const auto scale = [&](int i) {
        const int shift = i % 4 == 0 ? -1 : i % 4 == 1 ? 1 : 0;
        return static_cast<uint8_t>(127 + scaled.exponent + shift);
      };
      return AppendDraws(sink, MakeTable<uint8_t>(scale), elements, random);
    }
    default:
      CHECK(false, absl::StrCat(spec.name, " has an unexpected dtype"));
  }
}

absl::Status CheckRoom(const std::string& out_dir, int64_t bytes) {
  struct statvfs info;
  if (statvfs(out_dir.c_str(), &info) != 0) return ErrnoStatus(errno, out_dir, "statvfs");
  const auto free_bytes = static_cast<double>(info.f_bavail) * static_cast<double>(info.f_frsize);
  if (free_bytes < static_cast<double>(bytes)) {
    return absl::ResourceExhaustedError(absl::StrFormat("%s: free space: found %.1f GB, expected at least %.1f GB",
                                                        out_dir, free_bytes / 1e9, static_cast<double>(bytes) / 1e9));
  }
  return absl::OkStatus();
}

absl::Status PrepareDirectory(const std::string& out_dir) {
  std::error_code error;
  std::filesystem::create_directories(out_dir, error);
  if (error) return ErrnoStatus(error.value(), out_dir, "create directory");
  for (const auto& entry : std::filesystem::directory_iterator(out_dir, error)) {
    const std::string name = entry.path().filename().string();
    if (name != "config.json" && name != kIndexFile && !absl::EndsWith(name, ".safetensors")) continue;
    return absl::AlreadyExistsError(absl::StrCat(out_dir, ": found ", name, ", expected a directory without a model"));
  }
  if (error) return ErrnoStatus(error.value(), out_dir, "list directory");
  return absl::OkStatus();
}

// What goes where, before a byte is written.
struct Plan {
  std::vector<TensorSpec> inventory;
  std::vector<TensorToWrite> table;  // [inventory], data unset
  std::vector<int64_t> bytes;        // [inventory]
  std::vector<std::vector<size_t>> shards;
  int64_t all = 0;
};

Plan MakePlan(const ModelConfig& config, int64_t max_shard_bytes) {
  Plan plan{.inventory = TensorInventory(config), .shards = {{}}};
  int64_t in_shard = 0;
  for (const TensorSpec& spec : plan.inventory) {
    const DType dtype = config.weight_format == WeightFormat::kPlain && spec.quantised ? DType::kBF16 : spec.dtype;
    int64_t bytes = DTypeSize(dtype);
    for (const int64_t dim : spec.shape) bytes *= dim;
    if (in_shard > 0 && in_shard + bytes > max_shard_bytes) {
      plan.shards.emplace_back();
      in_shard = 0;
    }
    in_shard += bytes;
    plan.all += bytes;
    plan.shards.back().push_back(plan.table.size());
    plan.table.push_back({spec.name, dtype, spec.shape, nullptr});
    plan.bytes.push_back(bytes);
  }
  return plan;
}

absl::Status AppendTensor(const Sink& sink, const Plan& plan, size_t i, const ModelConfig& config, uint64_t seed) {
  const TensorSpec& spec = plan.inventory[i];
  // The inventory lists a scale right after its weight.
  const TensorSpec& weight = spec.dtype == DType::kF8E8M0 ? plan.inventory[i - 1] : spec;
  return AppendTensor(sink, spec, weight, plan.table[i].dtype, config.n_routed_experts, seed);
}

// Writes everything but config.json. `written` names each file that exists, for the caller to remove after an error.
absl::Status WriteShardsAndIndex(const ModelConfig& config, const Plan& plan, const std::string& out_dir,
                                 const RandomCheckpointOptions& options, std::vector<std::string>& written) {
  int64_t done = 0;
  nlohmann::json weight_map = nlohmann::json::object();
  for (size_t s = 0; s < plan.shards.size(); ++s) {
    const std::string file = absl::StrFormat("model-%05d-of-%05d.safetensors", s + 1, plan.shards.size());
    std::vector<TensorToWrite> shard_table;
    for (const size_t i : plan.shards[s]) shard_table.push_back(plan.table[i]);
    ASSIGN_OR_RETURN(const std::unique_ptr<SafetensorsWriter> writer,
                     SafetensorsWriter::Create(absl::StrCat(out_dir, "/", file), shard_table));
    for (const size_t i : plan.shards[s]) {
      const auto to_file = [&writer](const void* data, int64_t bytes) { return writer->Append(data, bytes); };
      RETURN_IF_ERROR(AppendTensor(to_file, plan, i, config, options.seed));
      weight_map[plan.inventory[i].name] = file;
      done += plan.bytes[i];
      if (options.progress) options.progress(done, plan.all);
    }
    RETURN_IF_ERROR(writer->Finish());
    written.push_back(file);
  }
  const nlohmann::json index = {{"metadata", {{"total_size", plan.all}}}, {"weight_map", std::move(weight_map)}};
  RETURN_IF_ERROR(WriteFileAtomically(absl::StrCat(out_dir, "/", kIndexFile), index.dump(2) + "\n"));
  written.push_back(kIndexFile);
  return absl::OkStatus();
}

}  // namespace

absl::Status MakeRandomCheckpoint(const std::string& config_json, const std::string& out_dir,
                                  const RandomCheckpointOptions& options) {
  ASSIGN_OR_RETURN(const ModelConfig config, ModelConfig::Parse(config_json));
  const Plan plan = MakePlan(config, options.max_shard_bytes);
  RETURN_IF_ERROR(PrepareDirectory(out_dir));
  RETURN_IF_ERROR(CheckRoom(out_dir, plan.all));
  std::vector<std::string> written;
  absl::Status status = WriteShardsAndIndex(config, plan, out_dir, options, written);
  // config.json last: without it the directory is no model, so a run cut short cannot be mistaken for one.
  if (status.ok()) status = WriteFileAtomically(absl::StrCat(out_dir, "/config.json"), config_json);
  if (status.ok()) return status;
  std::error_code ignored;
  for (const std::string& file : written) std::filesystem::remove(absl::StrCat(out_dir, "/", file), ignored);
  return status;
}

absl::StatusOr<std::unique_ptr<Checkpoint>> RandomCheckpointInMemory(const std::string& config_json,
                                                                     const RandomCheckpointOptions& options) {
  ASSIGN_OR_RETURN(const ModelConfig config, ModelConfig::Parse(config_json));
  const Plan plan = MakePlan(config, options.max_shard_bytes);
  std::vector<Checkpoint::OwnedTensor> tensors(plan.inventory.size());
  std::atomic<size_t> next{0};
  const auto fill = [&] {
    for (size_t i; (i = next.fetch_add(1)) < tensors.size();) {
      Checkpoint::OwnedTensor& t = tensors[i];
      // Not value-initialised: every byte is drawn.
      t.memory.reset(new uint8_t[static_cast<size_t>(plan.bytes[i])]);
      t.name = plan.inventory[i].name;
      t.tensor = {plan.table[i].dtype, plan.table[i].shape, t.memory.get(), plan.bytes[i]};
      uint8_t* to = t.memory.get();
      const absl::Status filled = AppendTensor(
          [&to](const void* data, int64_t bytes) {
            std::memcpy(to, data, static_cast<size_t>(bytes));
            to += bytes;
            return absl::OkStatus();
          },
          plan, i, config, options.seed);
      CHECK(filled.ok() && to == t.memory.get() + plan.bytes[i], t.name);
    }
  };
  std::vector<std::thread> threads(std::clamp<size_t>(std::thread::hardware_concurrency(), 1, 16));
  for (std::thread& thread : threads) thread = std::thread(fill);
  for (std::thread& thread : threads) thread.join();
  return Checkpoint::FromMemory(config, std::move(tensors));
}

absl::Status MakeRandomCheckpoint(ModelPreset preset, PresetChanges changes, const std::string& out_dir,
                                  const RandomCheckpointOptions& options) {
  return MakeRandomCheckpoint(PresetConfigJson(preset, changes), out_dir, options);
}

}  // namespace millrace
