// SPDX-License-Identifier: Apache-2.0
// Pages and slots share one table: a unit's state follows from three counts (owners, leases, transfers), so that no
// order of events can leave it in a state its counts do not say. Free units are kept twice, by place (to merge
// neighbours) and by length (to find the best fit).
#include "engine/cache/cache_pool.h"

#include <iterator>
#include <limits>

#include "absl/strings/str_cat.h"
#include "engine/status.h"

namespace millrace {

std::vector<PageRange> ContiguousRuns(absl::Span<const int32_t> block_table) {
  std::vector<PageRange> runs;
  for (int32_t page : block_table) {
    if (!runs.empty() && page == runs.back().first + runs.back().count) {
      ++runs.back().count;
    } else {
      runs.push_back({page, 1});
    }
  }
  return runs;
}

// ---- Handles ----

PageRun::PageRun(PageRun&& other) noexcept
    : pool_(std::exchange(other.pool_, nullptr)), range_(std::exchange(other.range_, {})) {}

PageRun& PageRun::operator=(PageRun&& other) noexcept {
  if (this != &other) {
    Release();
    pool_ = std::exchange(other.pool_, nullptr);
    range_ = std::exchange(other.range_, {});
  }
  return *this;
}

void PageRun::Release() {
  if (pool_ == nullptr) return;
  for (int32_t i = 0; i < range_.count; ++i) pool_->pages_.Drop(range_.first + i, Claim::kOwned);
  pool_ = nullptr;
  range_ = {};
}

SequenceReservation::SequenceReservation(SequenceReservation&& other) noexcept
    : pool_(std::exchange(other.pool_, nullptr)),
      claim_(other.claim_),
      block_table_(std::exchange(other.block_table_, {})),
      slot_(std::exchange(other.slot_, -1)) {}

SequenceReservation& SequenceReservation::operator=(SequenceReservation&& other) noexcept {
  if (this != &other) {
    Release();
    pool_ = std::exchange(other.pool_, nullptr);
    claim_ = other.claim_;
    block_table_ = std::exchange(other.block_table_, {});
    slot_ = std::exchange(other.slot_, -1);
  }
  return *this;
}

void SequenceReservation::Commit() {
  CHECK(pool_ != nullptr && claim_ == Claim::kLeased, "only a lease can be committed");
  for (int32_t page : block_table_) pool_->pages_.Commit(page);
  pool_->slots_.Commit(slot_);
  claim_ = Claim::kOwned;
}

absl::Status SequenceReservation::Grow(int64_t num_pages) {
  CHECK(pool_ != nullptr, "an empty reservation has nothing to grow");
  CHECK(num_pages >= 0);
  if (num_pages > pool_->free_pages()) {
    return absl::ResourceExhaustedError(absl::StrCat("cache: a sequence of ", block_table_.size(), " pages needs ",
                                                     num_pages, " more, ", pool_->free_pages(), " of ",
                                                     pool_->num_pages(), " are free"));
  }
  const int32_t hint = block_table_.empty() ? -1 : block_table_.back() + 1;
  const std::vector<int32_t> pages = pool_->pages_.Take(num_pages, claim_, hint);
  block_table_.insert(block_table_.end(), pages.begin(), pages.end());
  return absl::OkStatus();
}

void SequenceReservation::Truncate(int64_t num_pages) {
  CHECK(num_pages >= 0);
  while (static_cast<int64_t>(block_table_.size()) > num_pages) {
    pool_->pages_.Drop(block_table_.back(), claim_);
    block_table_.pop_back();
  }
}

void SequenceReservation::Release() {
  if (pool_ == nullptr) return;
  Truncate(0);
  pool_->slots_.Drop(slot_, claim_);
  slot_ = -1;
  pool_ = nullptr;
}

// ---- Units ----

UnitState UnitTable::Unit::state() const {
  if (owners > 0) return UnitState::kOwned;
  if (leases > 0) return UnitState::kLeased;
  return transfers > 0 ? UnitState::kQuarantined : UnitState::kFree;
}

UnitTable::UnitTable(std::string name, int64_t size) : name_(std::move(name)) {
  CHECK(size >= 0 && size <= std::numeric_limits<int32_t>::max(), absl::StrCat(name_, "s: ", size));
  units_.resize(size);
  counts_[static_cast<int>(UnitState::kFree)] = size;
  if (size > 0) AddRun(0, static_cast<int32_t>(size));
}

std::vector<int32_t> UnitTable::Take(int64_t count, Claim claim, int32_t hint) {
  CHECK(count >= 0 && count <= this->count(UnitState::kFree), absl::StrCat(name_, "s wanted: ", count));
  std::vector<int32_t> taken;
  taken.reserve(count);
  while (static_cast<int64_t>(taken.size()) < count) {
    const int32_t wanted = static_cast<int32_t>(count - static_cast<int64_t>(taken.size()));
    // The run at the hint if it has room for all; else the shortest that has; else the longest, whole.
    auto hinted = runs_.find(hint);
    auto fit = runs_by_length_.lower_bound({wanted, -1});
    int32_t first, length;
    if (hinted != runs_.end() && hinted->second >= wanted) {
      first = hinted->first;
      length = wanted;
    } else if (fit != runs_by_length_.end()) {
      first = fit->second;
      length = wanted;
    } else {
      // Of the longest runs the first: a big sequence should not be scattered over the pool's end.
      const int32_t longest = runs_by_length_.rbegin()->first;
      first = runs_by_length_.lower_bound({longest, -1})->second;
      length = longest;
    }
    const int32_t run_length = runs_.at(first);
    EraseRun(first, run_length);
    if (length < run_length) AddRun(first + length, run_length - length);
    for (int32_t unit = first; unit < first + length; ++unit) {
      CHECK(units_[unit] == Unit{}, absl::StrCat("free ", name_, " ", unit, " has claims"));
      (claim == Claim::kOwned ? units_[unit].owners : units_[unit].leases) = 1;
      Move(UnitState::kFree, units_[unit].state());
      taken.push_back(unit);
    }
    hint = first + length;
  }
  CheckCounts();
  return taken;
}

void UnitTable::Share(int32_t unit, Claim claim) {
  CHECK(state(unit) == UnitState::kOwned, absl::StrCat(name_, " ", unit, " has no owner to share it"));
  Change(unit, claim == Claim::kOwned ? 1 : 0, claim == Claim::kLeased ? 1 : 0, 0);
}

void UnitTable::Drop(int32_t unit, Claim claim) {
  Change(unit, claim == Claim::kOwned ? -1 : 0, claim == Claim::kLeased ? -1 : 0, 0);
}

void UnitTable::Commit(int32_t unit) { Change(unit, 1, -1, 0); }

void UnitTable::AddTransfer(int32_t unit) {
  const UnitState s = state(unit);
  CHECK(s == UnitState::kOwned || s == UnitState::kLeased, absl::StrCat(name_, " ", unit, " is nobody's to transfer"));
  Change(unit, 0, 0, 1);
}

void UnitTable::DropTransfer(int32_t unit) { Change(unit, 0, 0, -1); }

UnitState UnitTable::state(int32_t unit) const {
  CHECK(unit >= 0 && unit < size(), absl::StrCat(name_, " ", unit, " of ", size()));
  return units_[unit].state();
}

int64_t UnitTable::longest_free_run() const { return runs_by_length_.empty() ? 0 : runs_by_length_.rbegin()->first; }

void UnitTable::Change(int32_t unit, int owners, int leases, int transfers) {
  const UnitState before = state(unit);
  CHECK(before != UnitState::kFree, absl::StrCat(name_, " ", unit, " is free: given back twice?"));
  Unit& u = units_[unit];
  u.owners += owners;
  u.leases += leases;
  u.transfers += transfers;
  CHECK(u.owners >= 0 && u.leases >= 0 && u.transfers >= 0,
        absl::StrCat(name_, " ", unit, ": owners ", u.owners, " leases ", u.leases, " transfers ", u.transfers));
  const UnitState after = u.state();
  if (after != before) {
    Move(before, after);
    if (after == UnitState::kFree) InsertFree(unit);
  }
  CheckCounts();
}

void UnitTable::Move(UnitState from, UnitState to) {
  counts_[static_cast<int>(from)].fetch_sub(1, std::memory_order_relaxed);
  counts_[static_cast<int>(to)].fetch_add(1, std::memory_order_relaxed);
}

void UnitTable::InsertFree(int32_t unit) {
  int32_t first = unit, count = 1;
  auto next = runs_.lower_bound(unit);
  CHECK(next == runs_.end() || next->first > unit, absl::StrCat(name_, " ", unit, " is in a free run already"));
  if (next != runs_.begin()) {
    const auto [before, length] = *std::prev(next);
    CHECK(before + length <= unit, absl::StrCat(name_, " ", unit, " is in a free run already"));
    if (before + length == unit) {
      first = before;
      count += length;
    }
  }
  if (next != runs_.end() && next->first == unit + 1) {
    const auto [after, length] = *next;
    count += length;
    EraseRun(after, length);
  }
  if (first < unit) EraseRun(first, unit - first);
  AddRun(first, count);
}

void UnitTable::AddRun(int32_t first, int32_t count) {
  runs_[first] = count;
  runs_by_length_.insert({count, first});
  free_in_runs_ += count;
}

void UnitTable::EraseRun(int32_t first, int32_t count) {
  CHECK(runs_.erase(first) == 1 && runs_by_length_.erase({count, first}) == 1);
  free_in_runs_ -= count;
}

void UnitTable::CheckCounts() const {
  int64_t sum = 0;
  for (const std::atomic<int64_t>& c : counts_) {
    const int64_t value = c.load(std::memory_order_relaxed);
    CHECK(value >= 0);
    sum += value;
  }
  CHECK(sum == size(), absl::StrCat(name_, "s: states hold ", sum, " of ", size()));
  CHECK(free_in_runs_ == count(UnitState::kFree),
        absl::StrCat(name_, "s: runs hold ", free_in_runs_, " of ", count(UnitState::kFree), " free"));
}

void UnitTable::CheckConsistency() const {
  CheckCounts();
  std::array<int64_t, 4> counts = {};
  std::map<int32_t, int32_t> runs;
  bool last_free = false;
  int32_t first = 0;
  for (int32_t unit = 0; unit < size(); ++unit) {
    const bool free = state(unit) == UnitState::kFree;
    ++counts[static_cast<int>(state(unit))];
    if (free && !last_free) first = unit;
    if (free) ++runs[first];
    last_free = free;
  }
  for (int s = 0; s < 4; ++s) {
    CHECK(
        counts[s] == count(static_cast<UnitState>(s)),
        absl::StrCat(name_, "s in state ", s, ": ", counts[s], " found, ", count(static_cast<UnitState>(s)), " kept"));
  }
  CHECK(runs == runs_, absl::StrCat(name_, "s: the free runs are not those of the states"));
  CHECK(runs_by_length_.size() == runs_.size());
  for (const auto& [run, length] : runs_) CHECK(runs_by_length_.count({length, run}) == 1);
}

// ---- Pool ----

CachePool::CachePool(int64_t num_pages, int64_t num_slots) : pages_("page", num_pages), slots_("slot", num_slots) {}

CachePool::~CachePool() {
  CHECK(owned_pages() + leased_pages() + owned_slots() + leased_slots() == 0,
        absl::StrCat("handles outlive their pool: pages ", owned_pages(), " + ", leased_pages(), ", slots ",
                     owned_slots(), " + ", leased_slots()));
}

absl::StatusOr<SequenceReservation> CachePool::Reserve(int64_t num_pages, Claim claim,
                                                       absl::Span<const int32_t> prefix) {
  CHECK(num_pages >= 0);
  if (num_pages > free_pages() || free_slots() == 0) {
    return absl::ResourceExhaustedError(absl::StrCat("cache: a sequence needs ", num_pages, " pages and a slot, ",
                                                     free_pages(), " of ", this->num_pages(), " pages and ",
                                                     free_slots(), " of ", num_slots(), " slots are free"));
  }
  // A lease's reference to a shared page is a lease too: its owners keep it owned, and Commit treats all pages alike.
  SequenceReservation r;
  r.pool_ = this;
  r.claim_ = claim;
  for (int32_t page : prefix) pages_.Share(page, claim);
  r.block_table_.assign(prefix.begin(), prefix.end());
  const std::vector<int32_t> pages = pages_.Take(num_pages, claim, prefix.empty() ? -1 : prefix.back() + 1);
  r.block_table_.insert(r.block_table_.end(), pages.begin(), pages.end());
  r.slot_ = slots_.Take(1, claim).front();
  return r;
}

PageRun CachePool::Share(PageRange range) {
  CHECK(range.count > 0);
  for (int32_t i = 0; i < range.count; ++i) pages_.Share(range.first + i, Claim::kOwned);
  return PageRun(this, range);
}

TransferId CachePool::BeginTransfer(PeerId peer, absl::Span<const int32_t> pages, int32_t slot) {
  for (int32_t page : pages) pages_.AddTransfer(page);
  if (slot >= 0) slots_.AddTransfer(slot);
  const TransferId id{next_transfer_++};
  transfers_.emplace(id, Transfer{peer, {pages.begin(), pages.end()}, slot});
  return id;
}

bool CachePool::EndTransfer(TransferId transfer) {
  CHECK(static_cast<uint64_t>(transfer) < next_transfer_, "a transfer that never began");
  auto it = transfers_.find(transfer);
  if (it == transfers_.end()) return false;
  Finish(it->second);
  transfers_.erase(it);
  return true;
}

TransferId CachePool::Quarantine(SequenceReservation reservation, PeerId peer) {
  CHECK(!reservation.empty(), "an empty reservation has nothing to quarantine");
  const TransferId transfer = BeginTransfer(peer, reservation.block_table(), reservation.slot());
  reservation.Release();
  return transfer;
}

int64_t CachePool::Fence(PeerId peer) {
  return static_cast<int64_t>(std::erase_if(transfers_, [&](const auto& entry) {
    if (entry.second.peer != peer) return false;
    Finish(entry.second);
    return true;
  }));
}

void CachePool::CheckConsistency() const {
  pages_.CheckConsistency();
  slots_.CheckConsistency();
}

void CachePool::Finish(const Transfer& transfer) {
  for (int32_t page : transfer.pages) pages_.DropTransfer(page);
  if (transfer.slot >= 0) slots_.DropTransfer(transfer.slot);
}

}  // namespace millrace
