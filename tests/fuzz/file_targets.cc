// SPDX-License-Identifier: Apache-2.0
// What an operator points the program at: model files and the cluster's document.
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <sstream>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "engine/model/checkpoint.h"
#include "engine/model/config.h"
#include "engine/status.h"
#include "engine/text/tokenizer.h"
#include "services/common/config.h"
#include "tests/fuzz/targets.h"

namespace millrace::fuzz {
namespace {

std::string ReadFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  CHECK(in.good(), path);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

void CheckOneLine(const absl::Status& status) {
  CHECK(absl::StrContains(status.message(), ":") && !absl::StrContains(status.message(), "\n"),
        std::string(status.message()));
}

void Safetensors(std::string_view input) {
  const int fd = memfd_create("fuzz", MFD_CLOEXEC);
  CHECK(fd >= 0 && write(fd, input.data(), input.size()) == static_cast<ssize_t>(input.size()), strerror(errno));
  const auto file = SafetensorsFile::Open(absl::StrCat("/proc/self/fd/", fd));
  if (file.ok()) {
    uint8_t sum = 0;  // what is said to lie in the file does
    for (const std::string& name : (*file)->names()) {
      const HostTensor* tensor = (*file)->Find(name);
      CHECK(tensor != nullptr, name);
      const auto* bytes = static_cast<const uint8_t*>(tensor->data);
      for (int64_t i = 0; i < tensor->bytes; ++i) sum ^= bytes[i];
    }
    volatile uint8_t sink = sum;
    (void)sink;
  } else {
    CheckOneLine(file.status());
  }
  close(fd);
}

std::vector<std::string> SafetensorsSeeds() {
  const auto file = [](const std::string& header, size_t data_bytes) {
    const uint64_t length = header.size();
    std::string bytes(8, '\0');
    std::memcpy(bytes.data(), &length, 8);
    return bytes + header + std::string(data_bytes, '\1');
  };
  return {file(R"({"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}})", 16),
          file(R"({"__metadata__":{"k":"v"},"a":{"dtype":"BF16","shape":[4],"data_offsets":[0,8]},)"
               R"("b":{"dtype":"F8_E4M3","shape":[3],"data_offsets":[8,11]}})",
               11),
          file("{}", 0)};
}

void ConfigJson(std::string_view input) {
  const auto config = ModelConfig::Parse(input);
  if (!config.ok()) return CheckOneLine(config.status());
  CHECK(config->hidden_size > 0 && config->num_hidden_layers > 0 && config->vocab_size > 0);
}
std::vector<std::string> ConfigSeeds() { return {ReadFile("deploy/demo/model/config.json")}; }

void TokenizerJson(std::string_view input) {
  const auto tokenizer = text::Tokenizer::Parse(input, 1536);
  if (!tokenizer.ok()) return CheckOneLine(tokenizer.status());
  const auto ids = (*tokenizer)->Encode("Hello 123 苍鹭", text::SpecialTokens::kMatch);
  if (ids.ok()) {
    for (const int32_t id : *ids) CHECK(id >= 0 && id < (*tokenizer)->size());
  }
}
std::vector<std::string> TokenizerSeeds() { return {ReadFile("deploy/demo/model/tokenizer.json")}; }

void ClusterDocument(std::string_view input) {
  const auto config = ParseClusterConfig(input, "/models");
  if (!config.ok()) return;
  CHECK(!config->model().path().empty() && config->router().max_requests() >= 1);
}
std::vector<std::string> ClusterSeeds() { return {ReadFile("deploy/demo/cluster.json")}; }

}  // namespace

std::vector<Target> FileTargets() {
  return {{"safetensors", Safetensors, SafetensorsSeeds},
          {"config_json", ConfigJson, ConfigSeeds},
          {"tokenizer_json", TokenizerJson, TokenizerSeeds},
          {"cluster_document", ClusterDocument, ClusterSeeds}};
}

}  // namespace millrace::fuzz
