// SPDX-License-Identifier: Apache-2.0
// The number of one element is splitmix64, started from the FNV-1a hash of "seed/tensor name" and asked for its
// index-th output. Uniform tensors take its top `bits` bits u and hold center + (2u + 1 - 2^bits) * 2^(exponent -
// bits): exact in binary floating point, so that C++ and numpy agree to the bit.

#include "tests/golden/random_checkpoint.h"

#include <cmath>
#include <cstring>
#include <deque>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/model/checkpoint.h"
#include "engine/status.h"
#include "nlohmann/json.hpp"

namespace millrace::golden {
namespace {

using nlohmann::json;

class NumberStream {
 public:
  NumberStream(int64_t seed, const std::string& name) {
    for (const char c : absl::StrCat(seed, "/", name)) state_ = (state_ ^ static_cast<uint8_t>(c)) * 0x100000001b3u;
  }
  uint64_t Next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

 private:
  uint64_t state_ = 0xcbf29ce484222325u;
};

void Append(std::vector<uint8_t>& bytes, const void* value, size_t size) {
  const auto* begin = static_cast<const uint8_t*>(value);
  bytes.insert(bytes.end(), begin, begin + size);
}

std::vector<uint8_t> Uniform(const json& tensor, int64_t elements, NumberStream numbers) {
  const int bits = tensor["bits"];
  const double center = tensor["center"], step = std::ldexp(1.0, tensor["exponent"].get<int>() - bits);
  const bool bf16 = tensor["dtype"] == "BF16";
  std::vector<uint8_t> bytes;
  for (int64_t i = 0; i < elements; ++i) {
    const auto u = static_cast<double>(numbers.Next() >> (64 - bits));
    const auto value = static_cast<float>(center + (2 * u + 1 - std::ldexp(1.0, bits)) * step);
    uint32_t word;
    std::memcpy(&word, &value, sizeof(word));
    const auto upper = static_cast<uint16_t>(word >> 16);
    if (bf16) {
      CHECK((word & 0xffff) == 0, tensor["name"].get<std::string>());
      Append(bytes, &upper, sizeof(upper));
    } else {
      Append(bytes, &word, sizeof(word));
    }
  }
  return bytes;
}

// tid2eid: for each token, different experts in no order.
std::vector<uint8_t> ExpertTable(int64_t num_tokens, int64_t top_k, int64_t num_experts, NumberStream numbers) {
  std::vector<uint8_t> bytes;
  for (int64_t token = 0; token < num_tokens; ++token) {
    std::vector<int64_t> pool(num_experts);
    std::iota(pool.begin(), pool.end(), 0);
    for (int64_t j = 0; j < top_k; ++j) {
      const auto pick = static_cast<int64_t>(numbers.Next() % pool.size());
      Append(bytes, &pool[pick], sizeof(int64_t));
      pool.erase(pool.begin() + pick);
    }
  }
  return bytes;
}

json ReadJson(const std::string& path) {
  std::ifstream file(path);
  CHECK(file.good(), path);
  return json::parse(file);
}

}  // namespace

void WriteRandomCheckpoint(const std::string& data_dir, const std::string& model_dir) {
  const json golden = ReadJson(data_dir + "/golden.json");
  const json config = ReadJson(data_dir + "/config.json");
  std::deque<std::vector<uint8_t>> contents;
  std::vector<TensorToWrite> tensors;
  for (const json& tensor : golden["tensors"]) {
    const auto name = tensor["name"].get<std::string>();
    const auto shape = tensor["shape"].get<std::vector<int64_t>>();
    const auto dtype = tensor["dtype"].get<std::string>();
    const NumberStream numbers(golden["seed"], name);
    if (dtype == "I64") {
      contents.push_back(ExpertTable(shape[0], shape[1], config["n_routed_experts"], numbers));
    } else {
      const int64_t elements = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
      contents.push_back(Uniform(tensor, elements, numbers));
    }
    const DType type = dtype == "I64" ? DType::kI64 : dtype == "BF16" ? DType::kBF16 : DType::kF32;
    tensors.push_back({name, type, shape, contents.back().data()});
  }
  std::filesystem::create_directories(model_dir);
  std::filesystem::copy_file(data_dir + "/config.json", model_dir + "/config.json",
                             std::filesystem::copy_options::overwrite_existing);
  const absl::Status written = WriteSafetensors(model_dir + "/model.safetensors", tensors);
  CHECK(written.ok(), written.ToString());
}

}  // namespace millrace::golden
