// SPDX-License-Identifier: Apache-2.0
// The pool by its promises, and then by random histories against a model that keeps, per page, plain sets of who holds
// it.
#include "engine/cache/cache_pool.h"

#include <algorithm>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace millrace {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr PeerId kPeer{7};
constexpr PeerId kOtherPeer{8};

SequenceReservation MustReserve(CachePool& pool, int64_t pages, Claim claim = Claim::kOwned,
                                absl::Span<const int32_t> prefix = {}) {
  auto r = pool.Reserve(pages, claim, prefix);
  EXPECT_TRUE(r.ok()) << r.status();
  return *std::move(r);
}

TEST(CachePool, HandlesGiveEverythingBack) {
  CachePool pool(10, 2);
  {
    SequenceReservation a = MustReserve(pool, 4);
    EXPECT_THAT(a.block_table(), ElementsAre(0, 1, 2, 3));
    EXPECT_EQ(a.slot(), 0);
    EXPECT_EQ(pool.owned_pages(), 4);
    SequenceReservation b = std::move(a);
    EXPECT_TRUE(a.empty());  // NOLINT(bugprone-use-after-move): moved-from handles are empty, on purpose
    EXPECT_EQ(pool.owned_pages(), 4);
    b = MustReserve(pool, 1);
    EXPECT_EQ(pool.owned_pages(), 1);
    EXPECT_EQ(pool.owned_slots(), 1);
  }
  EXPECT_EQ(pool.free_pages(), 10);
  EXPECT_EQ(pool.free_slots(), 2);
  EXPECT_EQ(pool.longest_free_run(), 10);
}

TEST(CachePool, ReservationIsAllOrNothing) {
  CachePool pool(4, 2);
  SequenceReservation a = MustReserve(pool, 3);
  const auto too_many = pool.Reserve(2);
  EXPECT_EQ(too_many.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(too_many.status().message(), HasSubstr("2 pages"));
  EXPECT_EQ(pool.free_pages(), 1);
  EXPECT_EQ(pool.free_slots(), 1);

  SequenceReservation b = MustReserve(pool, 0);
  EXPECT_EQ(pool.Reserve(1).status().code(), absl::StatusCode::kResourceExhausted) << "no slot is left";
  EXPECT_EQ(b.Grow(2).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(b.block_table().empty());
  EXPECT_EQ(pool.free_pages(), 1);
}

TEST(CachePool, NewPagesComeFromTheSmallestRunTheyFitIn) {
  CachePool pool(20, 8);
  SequenceReservation a = MustReserve(pool, 5), wall1 = MustReserve(pool, 1), b = MustReserve(pool, 3),
                      wall2 = MustReserve(pool, 1);
  a.Release();  // free: 0-4, 6-8, 10-19
  b.Release();
  EXPECT_THAT(MustReserve(pool, 3).block_table(), ElementsAre(6, 7, 8));
  EXPECT_THAT(MustReserve(pool, 4).block_table(), ElementsAre(0, 1, 2, 3));
  EXPECT_EQ(ContiguousRuns(MustReserve(pool, 10).block_table()), (std::vector<PageRange>{{10, 10}}));
  // Nothing holds 12: the longest run whole, the rest where it fits best.
  EXPECT_EQ(ContiguousRuns(MustReserve(pool, 12).block_table()), (std::vector<PageRange>{{10, 10}, {6, 2}}));
}

TEST(CachePool, GrowthContinuesTheLastRunIfItCan) {
  CachePool pool(20, 4);
  SequenceReservation a = MustReserve(pool, 2), gap = MustReserve(pool, 3), b = MustReserve(pool, 1);
  gap.Release();
  ASSERT_TRUE(b.Grow(3).ok());
  EXPECT_THAT(b.block_table(), ElementsAre(5, 6, 7, 8)) << "although 2-4 would fit better";
  ASSERT_TRUE(a.Grow(4).ok());
  EXPECT_EQ(ContiguousRuns(a.block_table()), (std::vector<PageRange>{{0, 2}, {9, 4}}));
  a.Truncate(1);
  EXPECT_THAT(a.block_table(), ElementsAre(0));
  EXPECT_EQ(pool.owned_pages(), 5);
}

TEST(CachePool, SharedPagesStayUntilTheLastOwnerGoes) {
  CachePool pool(8, 3);
  SequenceReservation a = MustReserve(pool, 3);
  PageRun cached = pool.Share({0, 2});
  const std::vector<int32_t> prefix = {0, 1};
  SequenceReservation b = MustReserve(pool, 1, Claim::kOwned, prefix);
  EXPECT_THAT(b.block_table(), ElementsAre(0, 1, 3));
  a.Release();
  EXPECT_EQ(pool.owned_pages(), 3);  // 0, 1, 3
  b.Release();
  EXPECT_EQ(pool.owned_pages(), 2);
  cached.Release();
  EXPECT_EQ(pool.free_pages(), 8);
}

TEST(CachePool, LeaseBecomesOwnershipByCommitAlone) {
  CachePool pool(8, 2);
  SequenceReservation cache_owner = MustReserve(pool, 1);
  SequenceReservation lease = MustReserve(pool, 2, Claim::kLeased, cache_owner.block_table());
  EXPECT_EQ(pool.leased_pages(), 2);  // the shared page has an owner
  EXPECT_EQ(pool.owned_pages(), 1);
  EXPECT_EQ(pool.slot_state(lease.slot()), UnitState::kLeased);
  cache_owner.Release();
  EXPECT_EQ(pool.leased_pages(), 3);
  lease.Commit();
  EXPECT_EQ(pool.owned_pages(), 3);
  EXPECT_EQ(pool.slot_state(lease.slot()), UnitState::kOwned);
}

// A decode abort must not free pages that the prefill side may still fill: the next owner would read foreign rows. The
// pool is tiny, so that reuse is forced.
TEST(CachePool, PageIsNotReusedWhileATransferMayStillWriteIt) {
  CachePool pool(2, 2);
  SequenceReservation victim = MustReserve(pool, 2, Claim::kLeased);
  const int32_t slot = victim.slot();
  const TransferId transfer = pool.BeginTransfer(kPeer, victim.block_table(), slot);
  victim.Release();
  EXPECT_EQ(pool.quarantined_pages(), 2);
  EXPECT_EQ(pool.slot_state(slot), UnitState::kQuarantined);
  EXPECT_FALSE(pool.Reserve(1).ok());
  EXPECT_TRUE(pool.EndTransfer(transfer));
  EXPECT_TRUE(pool.Reserve(2).ok());
  EXPECT_FALSE(pool.EndTransfer(transfer)) << "ending twice changes nothing";
  EXPECT_EQ(pool.free_pages(), 2);
}

TEST(CachePool, PageStaysOwnedWhenItsTransferEndsFirst) {
  CachePool pool(2, 1);
  SequenceReservation a = MustReserve(pool, 2);
  const TransferId transfer = pool.BeginTransfer(kPeer, a.block_table());
  EXPECT_TRUE(pool.EndTransfer(transfer));
  EXPECT_EQ(pool.owned_pages(), 2);
}

TEST(CachePool, QuarantineEndsWithTheFenceOfItsPeerOnly) {
  CachePool pool(6, 3);
  const TransferId silent = pool.Quarantine(MustReserve(pool, 3, Claim::kLeased), kPeer);
  EXPECT_EQ(pool.quarantined_pages(), 3);
  EXPECT_EQ(pool.quarantined_slots(), 1);
  SequenceReservation other = MustReserve(pool, 2);
  pool.BeginTransfer(kOtherPeer, other.block_table());
  pool.BeginTransfer(kPeer, other.block_table());
  other.Release();
  EXPECT_EQ(pool.Fence(kPeer), 2);
  EXPECT_EQ(pool.quarantined_pages(), 2) << "the other peer may still touch these";
  EXPECT_EQ(pool.free_slots(), 3);
  EXPECT_FALSE(pool.EndTransfer(silent)) << "the late answer";
  EXPECT_EQ(pool.Fence(kPeer), 0);
  EXPECT_EQ(pool.Fence(kOtherPeer), 1);
  EXPECT_EQ(pool.free_pages(), 6);
}

TEST(CachePoolDeathTest, OurOwnBugsStopTheProcess) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  CachePool pool(4, 2);
  EXPECT_DEATH(pool.Share({0, 1}), "page 0 has no owner");
  EXPECT_DEATH(pool.Share({4, 1}), "page 4 of 4");
  EXPECT_DEATH(pool.BeginTransfer(kPeer, {0}), "page 0 is nobody's");
  EXPECT_DEATH(pool.EndTransfer(TransferId{99}), "never began");
  EXPECT_DEATH(MustReserve(pool, 1).Commit(), "only a lease");
  EXPECT_DEATH(
      {
        CachePool inner(1, 1);
        new SequenceReservation(MustReserve(inner, 1));
      },
      "handles outlive their pool");
}

// The model: per page who holds it, as sets of handle and transfer numbers. Free is what no set mentions.
struct Model {
  struct Page {
    std::multiset<int> owners, leases;
    std::set<uint64_t> transfers;
    UnitState State() const {
      if (!owners.empty()) return UnitState::kOwned;
      if (!leases.empty()) return UnitState::kLeased;
      return transfers.empty() ? UnitState::kFree : UnitState::kQuarantined;
    }
  };
  std::vector<Page> pages, slots;
  std::map<uint64_t, PeerId> transfers;

  void End(uint64_t transfer) {
    for (Page& p : pages) p.transfers.erase(transfer);
    for (Page& p : slots) p.transfers.erase(transfer);
    transfers.erase(transfer);
  }
  void DropHandle(int handle) {
    for (std::vector<Page>* units : {&pages, &slots}) {
      for (Page& p : *units) p.owners.erase(handle), p.leases.erase(handle);
    }
  }
  int LongestFree() const {
    int longest = 0, run = 0;
    for (const Page& p : pages) longest = std::max(longest, run = p.State() == UnitState::kFree ? run + 1 : 0);
    return longest;
  }
};

class RandomHistory {
 public:
  RandomHistory(uint32_t seed, int num_pages, int num_slots) : random_(seed), pool_(num_pages, num_slots) {
    model_.pages.resize(num_pages);
    model_.slots.resize(num_slots);
  }

  void Step() {
    switch (random_() % 10) {
      case 0:
      case 1:
        Reserve();
        break;
      case 2:
        Grow();
        break;
      case 3:
        Truncate();
        break;
      case 4:
        Commit();
        break;
      case 5:
        Share();
        break;
      case 6:
        Begin();
        break;
      case 7:
        End();
        break;
      case 8:
        random_() % 4 == 0 ? Fence() : Quarantine();
        break;
      case 9:
        Release();
        break;
    }
    Compare();
  }

 private:
  int Pick(size_t n) { return static_cast<int>(random_() % n); }
  std::map<int, SequenceReservation>::iterator PickReservation() {
    return std::next(reservations_.begin(), Pick(reservations_.size()));
  }
  auto& Claims(std::vector<Model::Page>& units, int32_t unit, Claim claim) {
    return claim == Claim::kOwned ? units.at(unit).owners : units.at(unit).leases;
  }

  // New pages must have been free, and in one run whenever a run could hold them.
  void Added(int handle, const SequenceReservation& r, size_t begin) {
    const absl::Span<const int32_t> added = r.block_table().subspan(begin);
    if (static_cast<int>(added.size()) <= model_.LongestFree() && !added.empty()) {
      EXPECT_EQ(ContiguousRuns(added).size(), 1u);
    }
    for (int32_t page : added) {
      EXPECT_EQ(model_.pages.at(page).State(), UnitState::kFree) << "page " << page << " handed out twice";
      Claims(model_.pages, page, r.claim()).insert(handle);
    }
  }

  int64_t ModelFree(const std::vector<Model::Page>& units) {
    return std::count_if(units.begin(), units.end(), [](const auto& u) { return u.State() == UnitState::kFree; });
  }

  void Reserve() {
    const Claim claim = random_() % 2 == 0 ? Claim::kOwned : Claim::kLeased;
    const int64_t wanted = Pick(model_.pages.size() / 3);
    std::vector<int32_t> prefix;
    if (!reservations_.empty() && random_() % 2 == 0) {
      for (int32_t page : PickReservation()->second.block_table()) {
        if (model_.pages[page].State() != UnitState::kOwned) break;
        prefix.push_back(page);
      }
    }
    const bool fits = wanted <= ModelFree(model_.pages) && ModelFree(model_.slots) > 0;
    auto r = pool_.Reserve(wanted, claim, prefix);
    ASSERT_EQ(r.ok(), fits) << r.status();
    if (!fits) return;
    const int handle = next_handle_++;
    for (int32_t page : prefix) Claims(model_.pages, page, claim).insert(handle);
    ASSERT_EQ(r->block_table().size(), prefix.size() + wanted);
    Added(handle, *r, prefix.size());
    EXPECT_EQ(model_.slots.at(r->slot()).State(), UnitState::kFree);
    Claims(model_.slots, r->slot(), claim).insert(handle);
    reservations_.emplace(handle, *std::move(r));
  }

  void Grow() {
    if (reservations_.empty()) return;
    auto& [handle, r] = *PickReservation();
    const int64_t wanted = Pick(6);
    const size_t before = r.block_table().size();
    const bool fits = wanted <= ModelFree(model_.pages);
    ASSERT_EQ(r.Grow(wanted).ok(), fits);
    ASSERT_EQ(r.block_table().size(), before + (fits ? wanted : 0));
    Added(handle, r, before);
  }

  void Truncate() {
    if (reservations_.empty()) return;
    auto& [handle, r] = *PickReservation();
    const size_t keep = Pick(r.block_table().size() + 1);
    for (int32_t page : r.block_table().subspan(keep)) Claims(model_.pages, page, r.claim()).erase(handle);
    r.Truncate(keep);
  }

  void Commit() {
    if (reservations_.empty()) return;
    auto& [handle, r] = *PickReservation();
    if (r.claim() != Claim::kLeased) return;
    r.Commit();
    for (std::vector<Model::Page>* units : {&model_.pages, &model_.slots}) {
      for (Model::Page& p : *units) {
        if (p.leases.erase(handle) > 0) p.owners.insert(handle);
      }
    }
  }

  void Share() {
    const int32_t first = Pick(model_.pages.size());
    int32_t count = 0;
    while (first + count < static_cast<int32_t>(model_.pages.size()) && count < 4 &&
           model_.pages[first + count].State() == UnitState::kOwned) {
      ++count;
    }
    if (count == 0) return;
    const int handle = next_handle_++;
    for (int32_t i = 0; i < count; ++i) model_.pages[first + i].owners.insert(handle);
    runs_.emplace(handle, pool_.Share({first, count}));
  }

  void Begin() {
    if (reservations_.empty()) return;
    const SequenceReservation& r = PickReservation()->second;
    const auto pages = r.block_table().subspan(Pick(r.block_table().size() + 1));
    const int32_t slot = random_() % 2 == 0 ? r.slot() : -1;
    const PeerId peer{random_() % 3};
    Began(pool_.BeginTransfer(peer, pages, slot), peer, {pages.begin(), pages.end()}, slot);
  }

  void Began(TransferId id, PeerId peer, const std::vector<int32_t>& pages, int32_t slot) {
    const uint64_t number = static_cast<uint64_t>(id);
    EXPECT_TRUE(model_.transfers.emplace(number, peer).second);
    ids_.push_back(number);
    for (int32_t page : pages) model_.pages[page].transfers.insert(number);
    if (slot >= 0) model_.slots[slot].transfers.insert(number);
  }

  void End() {
    if (ids_.empty()) return;
    const uint64_t id = ids_[Pick(ids_.size())];  // ended ones too: late answers
    EXPECT_EQ(pool_.EndTransfer(TransferId{id}), model_.transfers.count(id) == 1);
    model_.End(id);
  }

  void Fence() {
    const PeerId peer{random_() % 3};
    std::vector<uint64_t> ended;
    for (const auto& [id, of] : model_.transfers) {
      if (of == peer) ended.push_back(id);
    }
    EXPECT_EQ(pool_.Fence(peer), static_cast<int64_t>(ended.size()));
    for (uint64_t id : ended) model_.End(id);
  }

  void Quarantine() {
    if (reservations_.empty()) return;
    auto it = PickReservation();
    const std::vector<int32_t> pages(it->second.block_table().begin(), it->second.block_table().end());
    const int32_t slot = it->second.slot();
    const PeerId peer{random_() % 3};
    Began(pool_.Quarantine(std::move(it->second), peer), peer, pages, slot);
    model_.DropHandle(it->first);
    reservations_.erase(it);
  }

  void Release() {
    if (!runs_.empty() && random_() % 2 == 0) {
      auto it = std::next(runs_.begin(), Pick(runs_.size()));
      model_.DropHandle(it->first);
      runs_.erase(it);
    } else if (!reservations_.empty()) {
      auto it = PickReservation();
      model_.DropHandle(it->first);
      reservations_.erase(it);
    }
  }

  void Compare() {
    pool_.CheckConsistency();
    for (size_t i = 0; i < model_.pages.size(); ++i) {
      ASSERT_EQ(pool_.page_state(static_cast<int32_t>(i)), model_.pages[i].State()) << "page " << i;
    }
    for (size_t i = 0; i < model_.slots.size(); ++i) {
      ASSERT_EQ(pool_.slot_state(static_cast<int32_t>(i)), model_.slots[i].State()) << "slot " << i;
    }
    ASSERT_EQ(pool_.longest_free_run(), model_.LongestFree());
    ASSERT_EQ(pool_.num_transfers(), static_cast<int64_t>(model_.transfers.size()));
    ASSERT_EQ(pool_.free_pages() + pool_.owned_pages() + pool_.leased_pages() + pool_.quarantined_pages(),
              pool_.num_pages());
  }

  std::mt19937 random_;
  Model model_;
  CachePool pool_;
  std::map<int, SequenceReservation> reservations_;  // after pool_: they give back to it
  std::map<int, PageRun> runs_;
  std::vector<uint64_t> ids_;
  int next_handle_ = 0;
};

TEST(CachePool, RandomHistoriesAgreeWithTheModel) {
  for (uint32_t seed = 0; seed < 40; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    RandomHistory history(seed, 1 + static_cast<int>(seed) * 2 + 3, 1 + static_cast<int>(seed % 7));
    for (int step = 0; step < 1500 && !testing::Test::HasFailure(); ++step) history.Step();
  }
}

}  // namespace
}  // namespace millrace
