// SPDX-License-Identifier: Apache-2.0
// THE boundary of the engine: what services may ask a loaded DeepSeek-V4 model to do.
//
// An Engine owns one model on one device: weights, the paged cache, state slots. A sequence is a reservation of pages
// and one slot; Forward() moves any mix of prefill chunks and decode steps through the model in one pass, and the bits
// a row produces depend on that row's sequence only, never on what shares the pass, how a prompt was chunked or where
// experts ran. A hand-off is a list of extents (views of cache memory) that somebody else carries. The engine knows no
// network: remote experts come in through ExpertExchange.
//
// Thread: one engine thread calls everything; Create and the queries marked so may be called from elsewhere.
// Errors: InvalidArgument (bad request), ResourceExhausted (no pages or slots), FailedPrecondition (wrong state),
// Unavailable / DeadlineExceeded (an expert worker is gone or late; the sequences of that pass are poisoned and can
// only be released).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/cache/cache_layout.h"
#include "engine/model/checkpoint.h"
#include "engine/model/config.h"
#include "engine/moe/expert_exchange.h"
#include "engine/numerics.h"
#include "engine/ops/sampler.h"

namespace millrace {

class Model;

enum class DeviceKind { kCpu, kCuda };

struct EngineOptions {
  Numerics numerics = Numerics::kRelease;
  DeviceKind device = DeviceKind::kCpu;
  int64_t cache_pages = 256;       // pages of 128 tokens, shared by all sequences
  int max_sequences = 16;          // state slots
  int64_t max_context_tokens = 0;  // longest sequence; 0 means the model's max_position_embeddings
  int max_batch_tokens = 512;      // most rows of one Forward; longer prompts are the caller's to cut
  int num_threads = 1;
  bool mtp = false;                  // keep the MTP window and compute MTP logits on request
  std::optional<Rounding> rounding;  // tests only: single rounding points off; Rounding::For(numerics) otherwise
  // Where routed experts run. Null: all experts are loaded and run here. Not owned; must outlive the engine.
  ExpertExchange* exchange = nullptr;
  // Bytes of weights prepared so far and in all; called from Create's thread.
  std::function<void(int64_t, int64_t)> progress;
  // One line on what start-up took of a device, before it is taken; called from Create's thread.
  std::function<void(const std::string&)> notice;
};

// Opaque, never reused within a process.
struct SequenceId {
  uint64_t value = 0;
  bool operator==(const SequenceId&) const = default;
};

// What a tap sees, for `score` and tests. All pointers are valid during the call only.
class ForwardTap {
 public:
  virtual ~ForwardTap() = default;
  // Streams of `num_rows` rows after block `layer`: f32 [rows, hc, D]. row 0 is the first row of the pass.
  virtual void OnStreams(int /*layer*/, const float* /*streams*/, int64_t /*num_rows*/) {}
  // Experts chosen, ascending ids: i32 [rows, top_k].
  virtual void OnExperts(int /*layer*/, const int32_t* /*experts*/, int64_t /*num_rows*/) {}
  // CSA entries selected for one row, ascending.
  virtual void OnSelection(int /*layer*/, int64_t /*row*/, absl::Span<const int32_t> /*entries*/) {}
  // MTP logits of position `position` of the sequence: f32 [V].
  virtual void OnMtpLogits(SequenceId, int64_t /*position*/, const float* /*logits*/) {}
};

// The next tokens of one sequence. A decode step is a chunk of one token.
struct Chunk {
  SequenceId sequence;
  absl::Span<const int32_t> tokens;  // at positions length .. length + size - 1; not empty
  // Rows (indices into `tokens`, ascending) whose logits are wanted; each yields one row of ForwardOutput::logits.
  absl::Span<const int32_t> logit_rows;
  // If set, the last row's logits are sampled too (it need not be in logit_rows).
  const SamplingRequest* sampling = nullptr;
};

struct ChunkOutput {
  std::vector<float> logits;  // [logit_rows, V]
  SampledToken sampled;       // valid if sampling was asked for
};

struct ForwardOptions {
  // Called on the engine thread when `layer` is complete for every row of the pass: pages filled by it may be sent.
  std::function<void(int layer)> on_layer_done;
  ForwardTap* tap = nullptr;
};

// One contiguous piece of a sequence's state. `index` counts extents of the sequence in canonical order, which depends
// only on (layout, num_tokens): pages first (every page, each cut into layout.layer_ranges pieces), the slot last.
struct CacheExtent {
  int64_t index = 0;
  uint8_t* data = nullptr;  // device memory when the engine is on CUDA
  int64_t bytes = 0;
  int64_t page = -1;    // page of the sequence, or -1 for the state slot
  int layer_begin = 0;  // layers whose entries this piece holds
  int layer_end = 0;
};

struct CacheUsage {
  int64_t pages_total = 0, pages_free = 0, pages_owned = 0;
  int slots_total = 0, slots_free = 0;
};

class Engine {
 public:
  // Loads weights and takes all memory. `checkpoint` is kept. Any thread.
  static absl::StatusOr<std::unique_ptr<Engine>> Create(std::shared_ptr<const Checkpoint> checkpoint,
                                                        EngineOptions options);
  virtual ~Engine() = default;

  // Reserves ceil(max_tokens / 128) pages and one zeroed state slot, all or nothing.
  virtual absl::StatusOr<SequenceId> NewSequence(int64_t max_tokens) = 0;
  // Gives everything back. Memory that a transfer may still touch must be fenced by the caller first.
  virtual void Release(SequenceId sequence) = 0;
  virtual int64_t Length(SequenceId sequence) const = 0;  // tokens processed

  // One pass over all chunks (each sequence at most once; rows in all <= max_batch_tokens). On error no sequence of the
  // pass may be used again except for Release.
  virtual absl::StatusOr<std::vector<ChunkOutput>> Forward(absl::Span<const Chunk> chunks,
                                                           const ForwardOptions& options = {}) = 0;

  // The extents that hold the state of `num_tokens` tokens: to be read after Forward reached that length, or to be
  // written into a fresh sequence before CommitImport.
  virtual std::vector<CacheExtent> Extents(SequenceId sequence, int64_t num_tokens) = 0;
  // Declares that a fresh sequence now holds the state of `num_tokens` tokens, its extents having been filled.
  virtual absl::Status CommitImport(SequenceId sequence, int64_t num_tokens) = 0;

  // Any thread.
  virtual const ModelConfig& config() const = 0;
  virtual const EngineOptions& options() const = 0;
  virtual const CacheLayout& layout() const = 0;
  virtual CacheUsage Usage() const = 0;
  virtual int64_t weight_bytes() const = 0;
  // Hex hash over everything two peers must agree on: model content, numerics, cache layout, kernel set.
  virtual std::string CompatibilityHash() const = 0;
  // "cpu/avx2/3": the backend, instruction set and revision that fix the bits.
  virtual std::string KernelSet() const = 0;
};

}  // namespace millrace
