// SPDX-License-Identifier: Apache-2.0
// What `millrace inspect` says about a model: how large it is, what a sequence of it costs, what it needs to run.
//
// Everything follows from config.json, so a model can be judged before its download; with the weights there, their
// actual sizes are reported. Cache sizes come from cache_layout.h, the same that pools are built from. Thread: pure
// functions.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model/checkpoint.h"
#include "engine/model/config.h"
#include "nlohmann/json.hpp"

namespace millrace {

struct TensorKindBytes {
  std::string kind;  // "routed experts", "attention" ...
  int64_t tensors = 0;
  int64_t bytes = 0;
};

// Bytes of one sequence of `tokens` tokens.
struct SequenceBytes {
  int64_t tokens = 0;
  int64_t entries = 0;    // compressed entries and index keys: what grows
  int64_t windows = 0;    // of all layers, with the MTP window: what does not grow
  int64_t allocated = 0;  // whole pages and one state slot, alignment and pending state included
};

struct CacheBytes {
  std::string numerics;      // "release", "exact"
  int64_t entry = 0;         // one KV entry: 584 or 2,048
  int64_t index_key = 0;     // 68 or 512
  double per_token = 0;      // what grows, without alignment
  int64_t page = 0;          // 128 tokens, allocated
  int64_t page_payload = 0;  // the same without alignment
  int64_t windows = 0;       // 128 entries of every backbone layer
  int64_t windows_with_mtp = 0;
  int64_t csa_pending = 0;               // unfinished and previous blocks' rows, FP32, all CSA layers
  int64_t hca_state = 0;                 // online softmax state, FP32, all HCA layers
  int64_t last_streams = 0;              // the residual streams of the last token, for MTP
  int64_t slot = 0;                      // all of the above as allocated, with room for speculation
  std::vector<SequenceBytes> sequences;  // 8K, 128K, 1M tokens, as far as the model goes
};

// How many of one GPU hold the model: experts split evenly, everything else on each.
struct GpuFit {
  std::string gpu;
  int64_t memory = 0;          // bytes
  int gpus = 0;                // 0: not even its unsplit part fits
  int64_t left_for_cache = 0;  // per GPU
  int64_t sequences_128k = 0;  // per GPU, `release` cache, allocated bytes (or the longest the model knows, if shorter)
};

struct ModelReport {
  ModelConfig config;
  bool weights_present = false;
  std::string content_hash;  // only if the weights are there and it was asked for
  int64_t parameters = 0;    // backbone with embedding and head, without hash-routing tables
  int64_t mtp_parameters = 0;
  int64_t active_parameters = 0;  // per token: without embedding, with head
  int64_t tensors = 0;
  int64_t tensor_bytes = 0;
  int64_t expert_bytes = 0;  // routed experts of the backbone and MTP
  std::vector<TensorKindBytes> kinds;
  std::vector<CacheBytes> caches;  // release (if the weights allow it), exact
  std::vector<GpuFit> gpus;        // empty for unquantised weights: they run in `exact`, on the CPU
};

// `checkpoint` may be null; then sizes are those of the released layout (BF16 where config.json is unquantised).
ModelReport MakeModelReport(const ModelConfig& config, const Checkpoint* checkpoint);

// `path` is a model directory, with or without weights, or a config.json. Weights that are there are opened and
// checked; their errors are Checkpoint::Open's. `hash_contents` reads all of them.
absl::StatusOr<ModelReport> InspectModel(const std::string& path, CheckpointOptions options = {},
                                         bool hash_contents = false);

// For a terminal: aligned tables of at most 100 columns, ending in a newline.
std::string ModelReportText(const ModelReport& report);

// The same numbers under stable names, bytes as integers.
nlohmann::ordered_json ModelReportJson(const ModelReport& report);

}  // namespace millrace
