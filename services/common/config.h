// SPDX-License-Identifier: Apache-2.0
// The configuration document: read, checked, completed; and one worker's part of it.
//
// JSON in, proto/millrace/v1/config.proto out. A key that does not exist, a wrong type, a value out of range or two
// values that contradict each other are InvalidArgument, and the message begins with the path of the field. After Load
// every field has its default filled in, so that nobody else knows what a default is.
//
// Thread: values, no state.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "millrace/v1/config.pb.h"
#include "millrace/v1/types.pb.h"

namespace millrace {

// NotFound: no such file. `model.path` becomes absolute, or relative to the working directory as the file was.
absl::StatusOr<v1::ClusterConfig> LoadClusterConfig(const std::string& path);

// The same from text; `base_dir` is what model.path is relative to.
absl::StatusOr<v1::ClusterConfig> ParseClusterConfig(std::string_view json, const std::string& base_dir);

// "0-7,12" -> ascending ids, each below num_experts. InvalidArgument says what is wrong.
absl::StatusOr<std::vector<int>> ParseExpertSet(std::string_view text, int num_experts);

// What one worker needs: the document and which entry of it is its own.
struct WorkerConfig {
  v1::ClusterConfig cluster;
  v1::Role role = v1::ROLE_UNSPECIFIED;
  int position = 0;  // in the list of its role

  const v1::WorkerSection& worker() const;
  const v1::PrefillSection& prefill() const { return cluster.prefill(position); }
  const v1::DecodeSection& decode() const { return cluster.decode(position); }
  const v1::ExpertSection& expert() const { return cluster.expert(position); }
  bool has_expert_pool() const { return cluster.expert_size() > 0; }
  // Members of a pool are all on one kind of device.
  bool pool_on_cuda() const { return has_expert_pool() && cluster.expert(0).device() == "cuda"; }
  const std::string& device() const { return role == v1::ROLE_EXPERT ? expert().device() : cluster.model().device(); }
  // The experts of an expert worker: what it lists, else an even share by position.
  absl::StatusOr<std::vector<int>> ExpertsOf(int num_experts) const;
};

// The entry called `name`; an empty name means the only entry of that role. NotFound lists the names there are.
absl::StatusOr<WorkerConfig> SelectWorker(const v1::ClusterConfig& cluster, v1::Role role, std::string_view name);

// What others dial, instead of the document's worker.advertise: "host", "host:port", an IPv6 address with or without
// brackets. Without a port it is the one that gets bound. InvalidArgument says what was found.
absl::Status OverrideAdvertise(WorkerConfig& config, std::string_view address);

// The host of "host:port" means this machine alone. A name that is not localhost may be anything.
bool OnLoopback(std::string_view address);

inline absl::Duration Ms(uint64_t milliseconds) { return absl::Milliseconds(static_cast<int64_t>(milliseconds)); }

}  // namespace millrace
