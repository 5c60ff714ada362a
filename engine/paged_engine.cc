// SPDX-License-Identifier: Apache-2.0
// See paged_engine.h.
#include "engine/paged_engine.h"

#include <xxhash.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/status.h"

namespace millrace {

PagedEngine::PagedEngine(std::shared_ptr<const Checkpoint> checkpoint, EngineOptions options, CacheLayout layout)
    : checkpoint_(std::move(checkpoint)),
      options_(std::move(options)),
      layout_(std::move(layout)),
      cache_(options_.cache_pages, options_.max_sequences) {}

absl::StatusOr<SequenceId> PagedEngine::NewSequence(int64_t max_tokens) {
  if (max_tokens < 1 || max_tokens > options_.max_context_tokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_tokens: found ", max_tokens, ", allowed 1 to ", options_.max_context_tokens));
  }
  Sequence s;
  ASSIGN_OR_RETURN(s.reservation, cache_.Reserve((max_tokens + kPageTokens - 1) / kPageTokens));
  for (int32_t page : s.reservation.block_table()) s.pages.push_back(pages_base_ + page * layout_.page_bytes);
  s.slot = slots_base_ + s.reservation.slot() * layout_.slot_bytes;
  s.max_tokens = max_tokens;
  Prepare(s);
  const SequenceId id{++last_id_};
  sequences_.emplace(id.value, std::move(s));
  return id;
}

void PagedEngine::Release(SequenceId id) {
  CHECK(sequences_.erase(id.value) == 1, absl::StrCat("sequence ", id.value));
}

std::vector<CacheExtent> PagedEngine::Extents(SequenceId id, int64_t num_tokens) {
  Sequence& s = Get(id);
  const int64_t pages = (num_tokens + kPageTokens - 1) / kPageTokens;
  CHECK(pages <= static_cast<int64_t>(s.pages.size()), absl::StrCat(num_tokens, " tokens need ", pages, " pages"));
  std::vector<CacheExtent> extents;
  const std::vector<int>& cuts = layout_.layer_ranges;
  for (int64_t page = 0; page < pages; ++page) {
    for (size_t r = 0; r + 1 < cuts.size(); ++r) {
      const int64_t begin = layout_.page_layers[cuts[r]].begin;
      const int64_t end = r + 2 < cuts.size() ? layout_.page_layers[cuts[r + 1]].begin : layout_.page_bytes;
      extents.push_back(
          {static_cast<int64_t>(extents.size()), s.pages[page] + begin, end - begin, page, cuts[r], cuts[r + 1]});
    }
  }
  extents.push_back(
      {static_cast<int64_t>(extents.size()), s.slot, layout_.slot_bytes, -1, 0, config().num_hidden_layers});
  return extents;
}

absl::Status PagedEngine::CommitImport(SequenceId id, int64_t num_tokens) {
  Sequence& s = Get(id);
  if (s.length != 0 || s.poisoned) {
    return absl::FailedPreconditionError("sequence: found one in use, expected a fresh one");
  }
  if (num_tokens < 1 || num_tokens > s.max_tokens) {
    return absl::InvalidArgumentError(absl::StrCat("num_tokens: found ", num_tokens, ", allowed 1 to ", s.max_tokens));
  }
  s.length = num_tokens;
  return absl::OkStatus();
}

CacheUsage PagedEngine::Usage() const {
  return {cache_.num_pages(), cache_.free_pages(), cache_.owned_pages(), static_cast<int>(cache_.num_slots()),
          static_cast<int>(cache_.free_slots())};
}

std::string PagedEngine::CompatibilityHash() const {
  const std::string text = absl::StrCat(checkpoint_->ContentHash(), ";", NumericsName(options_.numerics), ";",
                                        layout_.Id(), ";", KernelSet(), ";", HashDetail());
  return absl::StrCat(absl::Hex(XXH3_64bits(text.data(), text.size()), absl::kZeroPad16));
}

PagedEngine::Sequence& PagedEngine::Get(SequenceId id) {
  const auto it = sequences_.find(id.value);
  CHECK(it != sequences_.end(), absl::StrCat("sequence ", id.value, " does not exist"));
  return it->second;
}

absl::Status PagedEngine::CheckChunks(absl::Span<const Chunk> chunks) const {
  int64_t rows = 0;
  for (const Chunk& chunk : chunks) {
    const Sequence& s = Get(chunk.sequence);
    if (s.poisoned) return absl::FailedPreconditionError("sequence: an earlier pass of it failed");
    if (chunk.tokens.empty()) return absl::InvalidArgumentError("tokens: found none, expected at least one");
    rows += static_cast<int64_t>(chunk.tokens.size());
    if (s.length + static_cast<int64_t>(chunk.tokens.size()) > s.max_tokens) {
      return absl::InvalidArgumentError(absl::StrCat("tokens: found ", s.length + chunk.tokens.size(),
                                                     " in all, the sequence was reserved for ", s.max_tokens));
    }
    for (size_t i = 0; i < chunk.tokens.size(); ++i) {
      if (chunk.tokens[i] < 0 || chunk.tokens[i] >= config().vocab_size) {
        return absl::InvalidArgumentError(
            absl::StrCat("tokens[", i, "]: found ", chunk.tokens[i], ", allowed 0 to ", config().vocab_size - 1));
      }
    }
  }
  if (rows > options_.max_batch_tokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("rows: found ", rows, ", allowed ", options_.max_batch_tokens, " a pass"));
  }
  return absl::OkStatus();
}

PagedEngine::PassRows PagedEngine::MakePass(absl::Span<const Chunk> chunks) {
  PassRows pass;
  for (const Chunk& chunk : chunks) {
    Sequence& s = Get(chunk.sequence);
    pass.sequences.push_back(
        {static_cast<int64_t>(pass.ids.size()), static_cast<int64_t>(chunk.tokens.size()), s.length, s.slot, &s.pages});
    for (size_t i = 0; i < chunk.tokens.size(); ++i) {
      pass.ids.push_back(chunk.tokens[i]);
      pass.positions.push_back(s.length + static_cast<int64_t>(i));
    }
  }
  return pass;
}

PagedEngine::PassRows PagedEngine::MakeMtpPass(const PassRows& backbone, std::vector<int32_t>& owners) const {
  PassRows pass;
  for (size_t i = 0; i < backbone.sequences.size(); ++i) {
    const SequenceRows& s = backbone.sequences[i];
    const int64_t lag = s.start > 0 ? 1 : 0;
    if (s.count - 1 + lag == 0) continue;
    pass.sequences.push_back(
        {static_cast<int64_t>(pass.ids.size()), s.count - 1 + lag, s.start - lag, s.slot, s.pages});
    for (int64_t r = -lag; r + 1 < s.count; ++r) {
      pass.ids.push_back(backbone.ids[s.row + r + 1]);
      pass.positions.push_back(s.start + r);
      owners.push_back(static_cast<int32_t>(i));
    }
  }
  return pass;
}

void PagedEngine::Finish(absl::Span<const Chunk> chunks, bool ok) {
  for (const Chunk& chunk : chunks) {
    Sequence& s = Get(chunk.sequence);
    if (ok) {
      s.length += static_cast<int64_t>(chunk.tokens.size());
    } else {
      s.poisoned = true;
    }
  }
}

}  // namespace millrace
