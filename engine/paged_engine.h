// SPDX-License-Identifier: Apache-2.0
// What both backends do alike: sequences as reservations of pages and a slot, checks of a pass, extents of a hand-off.
//
// A backend owns the memory that pages and slots lie in, in its own kind, and computes; this class only ever does
// arithmetic on those addresses. Thread: as engine.h says.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine/cache/cache_pool.h"
#include "engine/engine.h"
#include "engine/ops/ops.h"

namespace millrace {

class PagedEngine : public Engine {
 public:
  absl::StatusOr<SequenceId> NewSequence(int64_t max_tokens) final;
  void Release(SequenceId id) final;
  int64_t Length(SequenceId id) const final { return Get(id).length; }
  std::vector<CacheExtent> Extents(SequenceId id, int64_t num_tokens) final;
  absl::Status CommitImport(SequenceId id, int64_t num_tokens) final;

  const ModelConfig& config() const final { return checkpoint_->config(); }
  const EngineOptions& options() const final { return options_; }
  const CacheLayout& layout() const final { return layout_; }
  CacheUsage Usage() const final;
  int64_t weight_bytes() const final { return weight_bytes_; }
  std::string CompatibilityHash() const final;

 protected:
  struct Sequence {
    SequenceReservation reservation;
    std::vector<uint8_t*> pages;
    uint8_t* slot = nullptr;
    int64_t length = 0;
    int64_t max_tokens = 0;
    bool poisoned = false;  // a pass failed halfway: only Release is left
  };

  // Positions and ids of a pass, row by row.
  struct PassRows {
    std::vector<SequenceRows> sequences;
    std::vector<int64_t> positions;
    std::vector<int32_t> ids;
  };

  PagedEngine(std::shared_ptr<const Checkpoint> checkpoint, EngineOptions options, CacheLayout layout);

  // Zeroes a new sequence's memory before it is written or named to anybody: nothing of the last owner is readable.
  virtual void Prepare(const Sequence& sequence) = 0;
  // What besides the options fixes the bits, for the compatibility hash.
  virtual std::string HashDetail() const = 0;

  absl::Status CheckChunks(absl::Span<const Chunk> chunks) const;
  PassRows MakePass(absl::Span<const Chunk> chunks);
  // The draft module's rows: position i needs token i + 1, so they lag the backbone's by one. `owners` gets the index
  // of each row's chunk.
  PassRows MakeMtpPass(const PassRows& backbone, std::vector<int32_t>& owners) const;
  // Ends a pass: lengths grow, or on error its sequences are poisoned.
  void Finish(absl::Span<const Chunk> chunks, bool ok);

  Sequence& Get(SequenceId id);
  const Sequence& Get(SequenceId id) const { return const_cast<PagedEngine*>(this)->Get(id); }

  const std::shared_ptr<const Checkpoint> checkpoint_;
  const EngineOptions options_;
  const CacheLayout layout_;
  CachePool cache_;
  uint8_t* pages_base_ = nullptr;  // set by the backend before the first sequence
  uint8_t* slots_base_ = nullptr;
  int64_t weight_bytes_ = 0;

 private:
  std::map<uint64_t, Sequence> sequences_;  // after cache_: reservations give back to it
  uint64_t last_id_ = 0;
};

}  // namespace millrace
