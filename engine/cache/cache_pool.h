// SPDX-License-Identifier: Apache-2.0
// Bookkeeping of cache pages and state slots: who has which, and which somebody may still write.
//
// Every page and every slot is in one of four states: free, owned (by sequences or a prefix cache, by reference),
// leased (set aside for a peer's hand-off that has not been committed) or quarantined (nobody's, but a transfer may
// still touch it). A page has two lifetimes, its owners' and its transfers'; it is free when both have ended, and time
// alone ends neither: a transfer ends when its completion or abort was seen (EndTransfer), or when nothing can come
// from that peer any more because its endpoint is closed (Fence). free + owned + leased + quarantined = total, checked
// on every call.
//
// Pages are handed out in contiguous runs where the pool allows it, since one long message beats many short ones. The
// pool never touches page contents: layout is cache_layout.h, memory is the engine's, moving is kvtransfer/.
//
// Thread: engine thread only, except the counts, which any thread may read. The pool outlives its handles.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace millrace {

class CachePool;

enum class UnitState { kFree, kOwned, kLeased, kQuarantined };

// What a new reservation is for: kLeased until Commit(), if a peer is to fill it.
enum class Claim { kOwned, kLeased };

// Who is at the other end of a transfer: the caller's number for one incarnation of one peer.
enum class PeerId : uint64_t {};
enum class TransferId : uint64_t {};

// `count` pages from `first` on.
struct PageRange {
  int32_t first = 0;
  int32_t count = 0;
  bool operator==(const PageRange&) const = default;
};

// The maximal contiguous pieces of a block table, in its order: what a sender can send, or an allocator gave, as one.
std::vector<PageRange> ContiguousRuns(absl::Span<const int32_t> block_table);

// One reference to each page of a contiguous run; gives them back when it goes. Movable, empty by default.
class PageRun {
 public:
  PageRun() = default;
  PageRun(PageRun&& other) noexcept;
  PageRun& operator=(PageRun&& other) noexcept;
  ~PageRun() { Release(); }

  void Release();

  PageRange range() const { return range_; }
  bool empty() const { return range_.count == 0; }

 private:
  friend class CachePool;
  PageRun(CachePool* pool, PageRange range) : pool_(pool), range_(range) {}

  CachePool* pool_ = nullptr;
  PageRange range_;
};

// The pages and the state slot of one sequence; gives them back when it goes. Movable, empty by default.
class SequenceReservation {
 public:
  SequenceReservation() = default;
  SequenceReservation(SequenceReservation&& other) noexcept;
  SequenceReservation& operator=(SequenceReservation&& other) noexcept;
  ~SequenceReservation() { Release(); }

  // Turns a lease into ownership: the peer's manifest was verified. CHECKs that it was one.
  void Commit();
  // `num_pages` more pages at the end, all or nothing, next to the last one if possible. ResourceExhausted.
  absl::Status Grow(int64_t num_pages);
  // Gives back all pages after the first `num_pages`.
  void Truncate(int64_t num_pages);
  // Gives back everything. Units with transfers under way are quarantined until these end.
  void Release();

  bool empty() const { return slot_ < 0; }
  Claim claim() const { return claim_; }
  absl::Span<const int32_t> block_table() const { return block_table_; }
  int32_t slot() const { return slot_; }  // -1 when empty

 private:
  friend class CachePool;
  CachePool* pool_ = nullptr;
  Claim claim_ = Claim::kOwned;
  std::vector<int32_t> block_table_;
  int32_t slot_ = -1;
};

// Reference counts and states of numbered units, and the free ones as runs. Pages are one of these, slots another.
class UnitTable {
 public:
  UnitTable(std::string name, int64_t size);

  // Takes `count` free units and gives each its first claim: from `hint` on if that many are free right there; else
  // from the smallest run they fit in (of equals the first); else from as few runs as there are. CHECKs that enough are
  // free.
  std::vector<int32_t> Take(int64_t count, Claim claim, int32_t hint = -1);
  void Share(int32_t unit, Claim claim);  // one more claim to a unit that has an owner
  void Drop(int32_t unit, Claim claim);
  void Commit(int32_t unit);  // a lease becomes an owner
  void AddTransfer(int32_t unit);
  void DropTransfer(int32_t unit);

  const std::string& name() const { return name_; }
  int64_t size() const { return static_cast<int64_t>(units_.size()); }
  UnitState state(int32_t unit) const;
  int64_t count(UnitState state) const { return counts_[static_cast<int>(state)].load(std::memory_order_relaxed); }
  int64_t longest_free_run() const;

  // Recounts everything, O(size); CHECK-fails on any disagreement. The O(1) part of it runs on every call.
  void CheckConsistency() const;

 private:
  struct Unit {
    int32_t owners = 0, leases = 0, transfers = 0;
    UnitState state() const;
    bool operator==(const Unit&) const = default;
  };

  // Applies a change that must not make a free unit anything else; only Take does that.
  void Change(int32_t unit, int owners, int leases, int transfers);
  void Move(UnitState from, UnitState to);
  void InsertFree(int32_t unit);
  void AddRun(int32_t first, int32_t count);
  void EraseRun(int32_t first, int32_t count);
  void CheckCounts() const;

  const std::string name_;
  std::vector<Unit> units_;
  std::array<std::atomic<int64_t>, 4> counts_ = {};
  std::map<int32_t, int32_t> runs_;                       // first -> length; never adjacent to each other
  std::set<std::pair<int32_t, int32_t>> runs_by_length_;  // (length, first)
  int64_t free_in_runs_ = 0;
};

class CachePool {
 public:
  CachePool(int64_t num_pages, int64_t num_slots);
  ~CachePool();  // CHECKs that no handle is left; transfers may be
  CachePool(const CachePool&) = delete;
  CachePool& operator=(const CachePool&) = delete;

  // A slot and `num_pages` new pages, all or nothing; `prefix` names owned pages that the sequence begins with and
  // shares. ResourceExhausted says what was wanted and what is free.
  absl::StatusOr<SequenceReservation> Reserve(int64_t num_pages, Claim claim = Claim::kOwned,
                                              absl::Span<const int32_t> prefix = {});
  // One more reference to pages that have an owner: a prefix cache's, or a sender's that outlives the sequence.
  PageRun Share(PageRange range);

  // Says that memory of these pages (and of `slot`, if not -1) may be read or written on behalf of `peer` from now on.
  // They must be owned or leased. Covers copies by the transport thread as well as a peer's own access.
  TransferId BeginTransfer(PeerId peer, absl::Span<const int32_t> pages, int32_t slot = -1);
  // The completion was seen, or the abort was answered. False if a fence had ended it: an answer may be late.
  bool EndTransfer(TransferId transfer);
  // For a lease that ends without a word from its peer: gives the reservation back, but all of it stays quarantined
  // until the returned transfer ends or the peer is fenced.
  TransferId Quarantine(SequenceReservation reservation, PeerId peer);
  // Nothing can come from this peer any more (endpoint closed by force, nothing of it queued): ends all its transfers
  // and returns how many those were.
  int64_t Fence(PeerId peer);

  // Any thread. Each count is right by itself; several read while the engine works need not add up.
  int64_t num_pages() const { return pages_.size(); }
  int64_t free_pages() const { return pages_.count(UnitState::kFree); }
  int64_t owned_pages() const { return pages_.count(UnitState::kOwned); }
  int64_t leased_pages() const { return pages_.count(UnitState::kLeased); }
  int64_t quarantined_pages() const { return pages_.count(UnitState::kQuarantined); }
  int64_t num_slots() const { return slots_.size(); }
  int64_t free_slots() const { return slots_.count(UnitState::kFree); }
  int64_t owned_slots() const { return slots_.count(UnitState::kOwned); }
  int64_t leased_slots() const { return slots_.count(UnitState::kLeased); }
  int64_t quarantined_slots() const { return slots_.count(UnitState::kQuarantined); }

  // Engine thread.
  UnitState page_state(int32_t page) const { return pages_.state(page); }
  UnitState slot_state(int32_t slot) const { return slots_.state(slot); }
  int64_t longest_free_run() const { return pages_.longest_free_run(); }
  int64_t num_transfers() const { return static_cast<int64_t>(transfers_.size()); }
  // Full recount, for tests and once a second in production.
  void CheckConsistency() const;

 private:
  friend class PageRun;
  friend class SequenceReservation;

  struct Transfer {
    PeerId peer;
    std::vector<int32_t> pages;
    int32_t slot;
  };
  void Finish(const Transfer& transfer);

  UnitTable pages_, slots_;
  std::map<TransferId, Transfer> transfers_;
  uint64_t next_transfer_ = 1;
};

}  // namespace millrace
