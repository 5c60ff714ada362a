// SPDX-License-Identifier: Apache-2.0
// Whole hand-offs: sender, receiver and manifest over a transport that lies.
//
// The promise: what Verify calls complete is right to the bit; every fault is repaired by sending again or reported.
// The counters of the fault decorator prove that the faults happened.
#include <gmock/gmock.h>

#include <random>

#include "absl/strings/str_cat.h"
#include "kvtransfer/extent_header.h"
#include "kvtransfer/fault_transport.h"
#include "kvtransfer/receiver.h"
#include "kvtransfer/sender.h"
#include "kvtransfer/status.h"
#include "kvtransfer/transport_test_util.h"

namespace millrace::kvtransfer::testing {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

constexpr LeaseKey kKey{0x81f3, 7};

// A prefill worker's memory and a decode worker's, with a few extents of sizes around every boundary of the code.
class Handoff : public ::testing::TestWithParam<TransportKind> {
 protected:
  void SetUp() override {
    auto prefill = FaultTransport::Wrap(factory_.Make(), {});
    faults_ = prefill.get();
    prefill_ = std::move(prefill);
    decode_ = factory_.Make();
    receiver_ = std::make_unique<Receiver>(*decode_);
    peer_ = *prefill_->Connect(decode_->address());
    size_t total = 0;
    for (size_t bytes : {0ul, 1ul, 24ul, 1000ul, 8192ul, 16383ul, 16384ul, 16385ul, 100000ul, 300000ul, 1ul << 20}) {
      extents_.push_back({total, bytes});
      total += bytes;
    }
    source_ = Pattern(total, 42);
    destination_.assign(total, 0xcc);
  }
  void TearDown() override {
    sender_.reset();
    prefill_->Close();
    decode_->Close();
  }

  std::vector<ExpectedExtent> Expectation() {
    std::vector<ExpectedExtent> expected;
    for (size_t i = 0; i < extents_.size(); ++i)
      expected.push_back({Id(i), {destination_.data() + extents_[i].first, extents_[i].second}});
    return expected;
  }
  static uint64_t Id(size_t index) { return 1000 + 3 * index; }
  ConstMemory Source(size_t index) const { return {source_.data() + extents_[index].first, extents_[index].second}; }

  void Open(LeaseKey key = kKey) { ASSERT_TRUE(receiver_->Open(key, Expectation()).ok()); }
  void SendAll(LeaseKey key = kKey, SenderOptions options = {}) {
    sender_ = std::make_unique<Sender>(*prefill_, peer_, key, options);
    for (size_t i = 0; i < extents_.size(); ++i) {
      const absl::Status status = sender_->Send(Id(i), Source(i));
      if (!status.ok()) return;  // the hand-off has failed; Flush says why
    }
  }
  // As prefill does: flush, commit, send again what is asked for, a bounded number of times.
  absl::StatusOr<int> CommitWithRepair(int max_rounds) {
    for (int round = 0; round < max_rounds; ++round) {
      RETURN_IF_ERROR(sender_->FlushAndWait(kSoon));
      ASSIGN_OR_RETURN(const Manifest manifest, sender_->BuildManifest("token 0"));
      auto arrived = [&] { return receiver_->progress(kKey.lease).extents == extents_.size(); };
      (void)Eventually(arrived, absl::Milliseconds(round == 0 ? 100 : 30));
      ASSIGN_OR_RETURN(const VerifyResult result, receiver_->Verify(manifest));
      if (result.complete) return round;
      RETURN_IF_ERROR(sender_->Resend(result.resend));
    }
    return absl::DeadlineExceededError("test: not complete");
  }

  TransportFactory factory_{GetParam()};
  std::vector<std::pair<size_t, size_t>> extents_;  // offset, bytes
  std::vector<uint8_t> source_, destination_;
  std::unique_ptr<Transport> prefill_, decode_;
  FaultTransport* faults_ = nullptr;
  std::unique_ptr<Receiver> receiver_;
  std::unique_ptr<Sender> sender_;
  PeerId peer_;
};

INSTANTIATE_TEST_SUITE_P(All, Handoff, ::testing::ValuesIn(AllKinds()),
                         [](const auto& kind) { return KindName(kind.param); });

TEST_P(Handoff, ArrivesCompleteWithSmallExtentsPacked) {
  Open();
  SendAll();
  auto rounds = CommitWithRepair(1);
  ASSERT_TRUE(rounds.ok()) << rounds.status();
  EXPECT_TRUE(destination_ == source_);
  EXPECT_EQ(receiver_->statistics().extents_proved, extents_.size());
  EXPECT_EQ(receiver_->statistics().messages_packed, 1u);
  EXPECT_EQ(sender_->statistics().messages, 6u) << "six extents below 16 KiB travel in one message";
  EXPECT_THAT(receiver_->statistics().rejected, IsEmpty());
}

TEST_P(Handoff, ArrivesCompleteOneMessageAnExtentAndOneAtATime) {
  Open();
  SenderOptions options;
  options.pack_below_bytes = 0;
  options.max_in_flight_bytes = 1;
  SendAll(kKey, options);
  auto rounds = CommitWithRepair(1);
  ASSERT_TRUE(rounds.ok()) << rounds.status();
  EXPECT_TRUE(destination_ == source_);
  EXPECT_EQ(sender_->statistics().messages, extents_.size());
}

TEST_P(Handoff, NothingIsAcceptedForALeaseThatIsNotLive) {
  Open();
  SendAll({kKey.lease + 1, kKey.epoch});
  ASSERT_TRUE(sender_->FlushAndWait(kSoon).ok()) << "the sender cannot know";
  ASSERT_TRUE(Eventually([&] { return receiver_->statistics().rejected["not_live"] == extents_.size(); }));
  SendAll({kKey.lease, kKey.epoch - 1});
  ASSERT_TRUE(sender_->FlushAndWait(kSoon).ok());
  ASSERT_TRUE(Eventually([&] { return receiver_->statistics().rejected["stale_epoch"] == extents_.size(); }));
  EXPECT_EQ(destination_, std::vector<uint8_t>(destination_.size(), 0xcc));
  auto manifest = sender_->BuildManifest("");
  ASSERT_TRUE(manifest.ok());
  EXPECT_TRUE(absl::IsFailedPrecondition(receiver_->Verify(*manifest).status())) << "stale epoch";
  manifest->key.lease = 99;
  Seal(*manifest);
  EXPECT_TRUE(absl::IsNotFound(receiver_->Verify(*manifest).status()));
}

TEST_P(Handoff, MissingExtentsAreNamedAndThenCompleted) {
  Open();
  sender_ = std::make_unique<Sender>(*prefill_, peer_, kKey);
  Sender& sender = *sender_;
  for (size_t i = 0; i + 1 < extents_.size(); ++i) ASSERT_TRUE(sender.Send(Id(i), Source(i)).ok());
  ASSERT_TRUE(sender.FlushAndWait(kSoon).ok());
  ASSERT_TRUE(Eventually([&] { return receiver_->progress(kKey.lease).extents + 1 == extents_.size(); }));
  EXPECT_TRUE(absl::IsInvalidArgument(receiver_->Verify(*sender.BuildManifest("")).status()))
      << "the manifest itself lacks an extent";
  faults_->SetPlan({.max_faults = 1, .drop = 1});
  ASSERT_TRUE(sender.Send(Id(extents_.size() - 1), Source(extents_.size() - 1)).ok());
  ASSERT_TRUE(sender.FlushAndWait(kSoon).ok());
  EXPECT_EQ(faults_->counts().dropped, 1u);
  auto verified = receiver_->Verify(*sender.BuildManifest(""));
  ASSERT_TRUE(verified.ok()) << verified.status();
  EXPECT_FALSE(verified->complete);
  EXPECT_THAT(verified->resend, ElementsAre(Id(extents_.size() - 1)));
  ASSERT_TRUE(sender.Resend(verified->resend).ok());
  auto rounds = CommitWithRepair(1);
  ASSERT_TRUE(rounds.ok()) << rounds.status();
  EXPECT_TRUE(destination_ == source_);
  EXPECT_TRUE(absl::IsAlreadyExists(sender.Send(Id(0), Source(0))));
  EXPECT_TRUE(absl::IsNotFound(sender.Resend({5})));
}

struct FaultCase {
  const char* name;
  FaultPlan plan;
};

// Every kind of fault alone and all together, with seeds: repaired to the bit, or reported; never silently accepted.
TEST_P(Handoff, EveryFaultIsRepairedOrReported) {
  const std::vector<FaultCase> cases = {
      {"drop", {.drop = 0.4}},
      {"truncate", {.truncate = 0.4}},
      {"flip_payload", {.flip_payload = 0.4}},
      {"flip_header", {.flip_header = 0.4}},
      {"duplicate", {.duplicate = 0.6}},
      {"reorder", {.reorder = 0.6}},
      {"delay", {.delay = 0.6}},
      {"all",
       {.drop = .1,
        .truncate = .1,
        .flip_payload = .1,
        .flip_header = .1,
        .duplicate = .2,
        .reorder = .2,
        .delay = .2}},
  };
  for (const FaultCase& fault : cases) {
    uint64_t happened = 0;
    for (uint64_t seed = 1; seed <= 4; ++seed) {
      SCOPED_TRACE(absl::StrCat(fault.name, " seed ", seed));
      std::fill(destination_.begin(), destination_.end(), 0xcc);
      const uint64_t before = faults_->counts().total();
      FaultPlan plan = fault.plan;
      plan.seed = seed;
      plan.max_faults = 25;  // so that repair ends
      plan.delay_up_to = absl::Milliseconds(5);
      faults_->SetPlan(plan);
      Open();
      SenderOptions options;
      options.pack_below_bytes = seed % 2 == 0 ? 0 : 16384;
      SendAll(kKey, options);
      auto rounds = CommitWithRepair(50);
      ASSERT_TRUE(rounds.ok()) << rounds.status();
      EXPECT_TRUE(destination_ == source_);
      happened += faults_->counts().total() - before;
      sender_.reset();
      ASSERT_TRUE(receiver_->FenceAndWait(kKey.lease, kSoon));
    }
    EXPECT_GT(happened, 0u) << fault.name;
  }
  const auto rejected = receiver_->statistics().rejected;
  EXPECT_TRUE(rejected.contains("digest_mismatch"));
  EXPECT_TRUE(rejected.contains("wrong_length"));
  EXPECT_TRUE(rejected.contains("bad_header"));
  EXPECT_TRUE(rejected.contains("duplicate"));
}

TEST_P(Handoff, TransportErrorEndsTheHandOffAndReleasesTheSources) {
  Open();
  faults_->SetPlan({.max_faults = 1, .fail = 1});
  SendAll();
  EXPECT_TRUE(absl::IsUnavailable(sender_->FlushAndWait(kSoon)));
  EXPECT_EQ(faults_->counts().failed, 1u);
  EXPECT_FALSE(sender_->Send(5, Source(0)).ok());
  EXPECT_FALSE(sender_->BuildManifest("").ok());
  EXPECT_FALSE(sender_->status().ok());
}

TEST_P(Handoff, BlockOfAnotherRequestWithAValidDigestIsRefused) {
  Open();
  // Two extents of the same length, swapped by the sender: the bytes are whole, the place is wrong.
  std::vector<uint8_t> other = Pattern(extents_[8].second, 5);
  sender_ = std::make_unique<Sender>(*prefill_, peer_, kKey);
  ASSERT_TRUE(sender_->Send(Id(8), {other.data(), other.size()}).ok());
  ASSERT_TRUE(sender_->FlushAndWait(kSoon).ok());
  ASSERT_TRUE(Eventually([&] { return receiver_->progress(kKey.lease).extents == 1; }));
  // It was proved against its own message, but the manifest, made from the true sources, disagrees.
  Manifest manifest;
  manifest.key = kKey;
  for (size_t i = 0; i < extents_.size(); ++i) {
    const ConstMemory source = Source(i);
    manifest.extents.push_back(
        {Id(i), source.bytes, BindDigest(ContentDigest(source.data, source.bytes), kKey, Id(i), source.bytes)});
  }
  Seal(manifest);
  auto verified = receiver_->Verify(manifest);
  ASSERT_TRUE(verified.ok());
  EXPECT_EQ(verified->resend.size(), extents_.size());
  EXPECT_EQ(receiver_->statistics().rejected["manifest_mismatch"], 1u);

  // And a message whose digest was made for another extent.
  const ConstMemory source = Source(8);
  internal::ExtentHeader header;
  header.digest_algorithm = kDigestXxh3;
  header.lease = kKey.lease, header.epoch = kKey.epoch;
  header.extent_id = Id(8), header.bytes = source.bytes;
  header.digest = BindDigest(ContentDigest(source.data, source.bytes), kKey, Id(9), source.bytes);
  header.Seal();
  Outcome sent;
  ASSERT_TRUE(prefill_
                  ->SendMessage(peer_, kHandoffChannel, {reinterpret_cast<const uint8_t*>(&header), sizeof(header)},
                                source, sent.Callback())
                  .ok());
  ASSERT_TRUE(Eventually([&] { return receiver_->statistics().rejected["digest_mismatch"] == 1; }));
  header.digest_algorithm = kDigestNone;
  header.Seal();
  ASSERT_TRUE(prefill_
                  ->SendMessage(peer_, kHandoffChannel, {reinterpret_cast<const uint8_t*>(&header), sizeof(header)},
                                source, sent.Callback())
                  .ok());
  ASSERT_TRUE(Eventually([&] { return receiver_->statistics().rejected["bad_algorithm"] == 1; }));
}

TEST_P(Handoff, ProvedMemoryIsNeverWrittenAgain) {
  Open();
  SendAll();
  ASSERT_TRUE(CommitWithRepair(1).ok());
  std::fill(destination_.begin(), destination_.end(), 0xdd);  // decode owns it now and writes
  std::vector<uint64_t> all;
  for (size_t i = 0; i < extents_.size(); ++i) all.push_back(Id(i));
  ASSERT_TRUE(sender_->Resend(all).ok());
  ASSERT_TRUE(sender_->FlushAndWait(kSoon).ok());
  ASSERT_TRUE(Eventually([&] { return receiver_->statistics().rejected["duplicate"] == extents_.size(); }));
  EXPECT_EQ(destination_, std::vector<uint8_t>(destination_.size(), 0xdd));
}

TEST_P(Handoff, VerifyIsIdempotentAndASecondStoryIsRefused) {
  Open();
  SendAll();
  ASSERT_TRUE(CommitWithRepair(1).ok());
  EXPECT_TRUE(receiver_->Verify(*sender_->BuildManifest("token 0"))->complete);
  EXPECT_TRUE(absl::IsAborted(receiver_->Verify(*sender_->BuildManifest("token 1")).status()));
}

TEST_P(Handoff, OpenRefusesRepeatsAndALeaseMayBeBegunAgainAfterItsFence) {
  Open();
  EXPECT_TRUE(absl::IsAlreadyExists(receiver_->Open(kKey, {})));
  EXPECT_TRUE(absl::IsAlreadyExists(receiver_->Open({kKey.lease, kKey.epoch + 1}, {})));
  EXPECT_TRUE(absl::IsInvalidArgument(receiver_->Open({5, 1}, {{1, {}}, {2, {}}, {1, {}}})));
  ASSERT_TRUE(receiver_->FenceAndWait(kKey.lease, kSoon));
  ASSERT_TRUE(receiver_->FenceAndWait(kKey.lease, kSoon)) << "unknown leases are fenced";
  Open({kKey.lease, kKey.epoch + 1});
  SendAll();  // the old epoch's sender, late
  ASSERT_TRUE(sender_->FlushAndWait(kSoon).ok());
  ASSERT_TRUE(Eventually([&] { return receiver_->statistics().rejected["stale_epoch"] == extents_.size(); }));
  EXPECT_EQ(destination_, std::vector<uint8_t>(destination_.size(), 0xcc));
}

// Abort while the sender hangs in the middle of an extent: the memory comes back within a bound, and stays untouched.
TEST_P(Handoff, FenceOfAHangingSenderIsBoundedAndNothingWritesAfterIt) {
  Open();
  sender_ = std::make_unique<Sender>(*prefill_, peer_, kKey);
  Gate hang;
  FunctionHandler wait_for_hang([&](const IncomingMessage& m) {
    prefill_->RunAfter(absl::ZeroDuration(), [&] { hang.WaitHere(); });
    hang.AwaitSomebody();
    return receiver_->OnMessage(m);
  });
  decode_->SetHandler(kHandoffChannel, &wait_for_hang);
  ASSERT_TRUE(sender_->Send(Id(10), Source(10)).ok());
  ASSERT_TRUE(Eventually([&] { return receiver_->progress(kKey.lease).arriving == 1; }));
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  ASSERT_EQ(receiver_->progress(kKey.lease).arriving, 1u);

  const absl::Time start = absl::Now();
  EXPECT_FALSE(receiver_->FenceAndWait(kKey.lease, absl::Milliseconds(50))) << "not while it may still be written";
  EXPECT_EQ(receiver_->statistics().leases_fencing, 1u);
  EXPECT_TRUE(absl::IsAlreadyExists(receiver_->Open(kKey, Expectation())));
  EXPECT_TRUE(receiver_->FenceAndWait(kKey.lease, kFailureBound));
  EXPECT_LT(absl::Now() - start, kFailureBound);
  std::fill(destination_.begin(), destination_.end(), 0xee);
  hang.Open();
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  EXPECT_EQ(destination_, std::vector<uint8_t>(destination_.size(), 0xee));
  EXPECT_EQ(receiver_->statistics().rejected["fenced"], 1u);
  sender_.reset();
}

TEST_P(Handoff, CancelReleasesSourcesThoughTheReceiverHangs) {
  Open();
  ASSERT_TRUE(receiver_->Open({1, 1}, {{1, {destination_.data(), 1}}}).ok());
  Gate hang;
  decode_->RunAfter(absl::ZeroDuration(), [&] { hang.WaitHere(); });
  hang.AwaitSomebody();
  SenderOptions options;
  options.max_in_flight_bytes = 1 << 20;
  SendAll(kKey, options);
  EXPECT_TRUE(absl::IsDeadlineExceeded(sender_->FlushAndWait(absl::Milliseconds(50))));
  const absl::Time start = absl::Now();
  sender_.reset();
  EXPECT_LT(absl::Now() - start, kFailureBound);
  std::fill(source_.begin(), source_.end(), 0);  // ours again
  hang.Open();
}

TEST_P(Handoff, DestroyedReceiverLeavesTheChannelUnhandled) {
  receiver_.reset();
  SendAll();
  ASSERT_TRUE(sender_->FlushAndWait(kSoon).ok());
  EXPECT_TRUE(Eventually([&] { return decode_->statistics().drops["no_handler"] >= 6; }));
}

}  // namespace
}  // namespace millrace::kvtransfer::testing
