// SPDX-License-Identifier: Apache-2.0
// The expert pool against LocalExperts: same bits for every split, wave and path, and a named error for every loss.
#include "services/expert/remote_experts.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <thread>

#include "absl/strings/str_cat.h"
#include "engine/moe/cuda_experts.h"
#include "engine/status.h"
#include "kvtransfer/loopback_transport.h"
#include "services/common/clock.h"
#include "services/common/error.h"
#include "services/common/failpoints.h"
#include "services/common/test_wait.h"
#include "services/expert/engine_host.h"
#include "services/expert/expert_loop.h"
#include "services/expert/expert_service.h"

namespace millrace::expert {
namespace {

using ::testing::HasSubstr;

const Checkpoint& Demo() {
  static const Checkpoint* checkpoint = [] {
    auto opened = Checkpoint::Open("deploy/demo/model");
    CHECK(opened.ok(), std::string(opened.status().message()));
    return opened->release();
  }();
  return *checkpoint;
}

// Where experts are computed, and in which numerics.
struct Kind {
  Numerics numerics = Numerics::kRelease;
  bool cuda = false;
};

std::unique_ptr<ExpertComputer> LoadComputer(const Kind& kind, std::vector<int> experts) {
  LocalExpertsOptions options;
  options.numerics = kind.numerics;
  options.experts = std::move(experts);
  absl::StatusOr<std::unique_ptr<ExpertComputer>> loaded =
      kind.cuda ? CreateCudaExperts(Demo(), std::move(options)) : LocalExperts::Create(Demo(), std::move(options));
  CHECK(loaded.ok(), std::string(loaded.status().message()));
  return *std::move(loaded);
}

// Experts in the process that asks, as an engine on the CPU has them.
std::unique_ptr<LocalExperts> Load(Numerics numerics, std::vector<int> experts) {
  LocalExpertsOptions options;
  options.numerics = numerics;
  options.experts = std::move(experts);
  auto loaded = LocalExperts::Create(Demo(), std::move(options));
  CHECK(loaded.ok(), std::string(loaded.status().message()));
  return *std::move(loaded);
}

RowFormat FormatOf(Numerics numerics) { return numerics == Numerics::kRelease ? RowFormat::kBf16 : RowFormat::kF32; }

// One expert worker without its membership.
struct Member {
  Member(std::shared_ptr<kvtransfer::LoopbackHub> hub, const Kind& kind, std::string name, std::vector<int> experts,
         uint32_t waves)
      : transport(kvtransfer::CreateLoopbackTransport(hub)), local(LoadComputer(kind, experts)) {
    ExpertLoopOptions options;
    options.num_experts = Demo().config().n_routed_experts;
    options.num_layers = Demo().config().num_hidden_layers;
    options.hidden = Demo().config().hidden_size;
    options.format = FormatOf(kind.numerics);
    loop = std::make_unique<ExpertLoop>(*local, transport.get(), options, nullptr);
    info.set_name(std::move(name));
    incarnation.To(info.mutable_incarnation());
    info.set_transfer_address(transport->address());
    info.set_expert_compat_hash("pool");
    info.mutable_share()->mutable_experts()->Add(experts.begin(), experts.end());
    info.mutable_share()->set_waves(waves);
    v1::DescribeExpertsResponse description;
    *description.mutable_incarnation() = info.incarnation();
    description.set_expert_compat_hash("pool");
    service.Serve(loop.get(), description);
    auto started = RpcServer::Start({"127.0.0.1:0"}, {&service});
    CHECK(started.ok(), std::string(started.status().message()));
    server = *std::move(started);
    info.set_control_address(server->address());
  }
  ~Member() {
    if (loop != nullptr) loop->Stop();
    service.Stop();
    server->Shutdown(absl::ZeroDuration());
    transport->Close();
  }

  const IncarnationId incarnation = IncarnationId::Random();
  std::unique_ptr<kvtransfer::Transport> transport;
  std::unique_ptr<ExpertComputer> local;
  std::unique_ptr<ExpertLoop> loop;
  ExpertService service;
  std::unique_ptr<RpcServer> server;
  v1::ExpertPeer info;
};

struct Setting {
  Kind kind;
  bool over_grpc = false;
  int members = 2;
  uint32_t waves = 2;
  std::vector<int> local_experts;
  absl::Duration timeout = absl::Seconds(30);
};

// A caller with its pool.
struct Pool {
  explicit Pool(const Setting& setting) {
    hub = kvtransfer::LoopbackHub::Create();
    transport = kvtransfer::CreateLoopbackTransport(hub);
    const int num_experts = Demo().config().n_routed_experts;
    for (int m = 0; m < setting.members; ++m) {
      std::vector<int> experts;  // dealt out like cards, so that shares are not ranges
      for (int e = m; e < num_experts; e += setting.members) experts.push_back(e);
      members.push_back(
          std::make_unique<Member>(hub, setting.kind, absl::StrCat("expert-", m), experts, setting.waves));
    }
    RemoteExpertsOptions options;
    options.pool.name = "decode-0";
    options.pool.incarnation = IncarnationId::Random();
    options.pool.expert_compat_hash = "pool";
    options.pool.num_experts = num_experts;
    options.pool.over_grpc = setting.over_grpc;
    options.pool.local_experts = setting.local_experts;
    options.format = FormatOf(setting.kind.numerics);
    options.timeout = setting.timeout;
    if (!setting.local_experts.empty()) own = LoadComputer(setting.kind, setting.local_experts);
    remote = std::make_unique<RemoteExperts>(options, transport.get(), channels, own.get());
    SetPeers();
  }
  ~Pool() {
    remote.reset();
    members.clear();
    transport->Close();
  }
  void SetPeers() {
    v1::PeerList peers;
    for (const auto& member : members) *peers.add_experts() = member->info;
    remote->SetPeers(peers);
  }
  bool BecomesReady() {
    return Eventually([this] { return remote->Ready().ok(); });
  }

  std::shared_ptr<kvtransfer::LoopbackHub> hub;
  std::unique_ptr<kvtransfer::Transport> transport;
  ChannelPool channels;
  std::vector<std::unique_ptr<Member>> members;
  std::unique_ptr<ExpertComputer> own;
  std::unique_ptr<RemoteExperts> remote;
};

struct Rows {
  Rows(int layer, int64_t num_tokens, uint32_t seed) {
    const ModelConfig& config = Demo().config();
    std::mt19937 random(seed);
    std::normal_distribution<float> value(0, 1);
    rows.resize(num_tokens * config.hidden_size);
    for (float& x : rows) {
      uint32_t bits;
      x = value(random);
      std::memcpy(&bits, &x, 4);
      bits &= 0xffff0000u;  // a BF16 value, as rows are in `release`
      std::memcpy(&x, &bits, 4);
    }
    const int top_k = config.num_experts_per_tok;
    for (int64_t t = 0; t < num_tokens; ++t) {
      std::vector<int32_t> ids(config.n_routed_experts);
      std::iota(ids.begin(), ids.end(), 0);
      std::shuffle(ids.begin(), ids.end(), random);
      std::sort(ids.begin(), ids.begin() + top_k);
      experts.insert(experts.end(), ids.begin(), ids.begin() + top_k);
      for (int k = 0; k < top_k; ++k) weights.push_back(0.1f + std::abs(value(random)));
    }
    batch = {layer, num_tokens, config.hidden_size, top_k, rows.data(), experts.data(), weights.data()};
  }
  std::vector<float> rows, weights;
  std::vector<int32_t> experts;
  ExpertBatch batch;
};

absl::StatusOr<std::vector<float>> Exchange(ExpertExchange& exchange, const Rows& rows) {
  std::vector<float> out(rows.batch.num_tokens * rows.batch.top_k * rows.batch.hidden, 777.0f);
  RETURN_IF_ERROR(exchange.Dispatch(rows.batch));
  RETURN_IF_ERROR(exchange.Combine(out.data()));
  return out;
}

// The same rows as an engine on a card has them, in BF16 both ways; values come back as floats.
absl::StatusOr<std::vector<float>> ExchangeBf16(ExpertExchange& exchange, const Rows& rows) {
  const auto convert = [](const auto& from, RowFormat from_format, RowFormat to_format, auto& to) {
    ConvertRow(from.data(), from_format, static_cast<int64_t>(from.size()), to_format, to.data());
  };
  std::vector<uint16_t> narrow(rows.rows.size()), out(rows.batch.num_tokens * rows.batch.top_k * rows.batch.hidden);
  convert(rows.rows, RowFormat::kF32, RowFormat::kBf16, narrow);
  ExpertBatch batch = rows.batch;
  batch.rows = narrow.data();
  batch.format = RowFormat::kBf16;
  RETURN_IF_ERROR(exchange.Dispatch(batch));
  RETURN_IF_ERROR(exchange.Combine(out.data()));
  std::vector<float> wide(out.size());
  convert(out, RowFormat::kBf16, RowFormat::kF32, wide);
  return wide;
}

bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

class RemoteExpertsTest : public ::testing::Test {
 protected:
  void TearDown() override { ASSERT_TRUE(failpoints::Arm("").ok()); }
};

TEST_F(RemoteExpertsTest, AnySplitWaveAndPathGivesTheBitsOfLocalExperts) {
  for (Numerics numerics : {Numerics::kRelease, Numerics::kExact}) {
    const auto all = Load(numerics, {});
    for (bool over_grpc : {false, true}) {
      for (int members : {1, 3}) {
        Setting setting{{numerics}, over_grpc, members, static_cast<uint32_t>(members)};
        if (members == 3) setting.local_experts = {1, 2, 9};  // some at home, although a member has them too
        Pool pool(setting);
        ASSERT_TRUE(pool.BecomesReady()) << pool.remote->Ready();
        for (int64_t tokens : {1, 2, 9, 100}) {
          const Rows rows(static_cast<int>(tokens % Demo().config().num_hidden_layers), tokens,
                          static_cast<uint32_t>(tokens));
          const auto expected = Exchange(*all, rows);
          const auto found = Exchange(*pool.remote, rows);
          ASSERT_TRUE(expected.ok() && found.ok()) << expected.status() << found.status();
          EXPECT_TRUE(SameBits(*found, *expected)) << members << " members, " << tokens << " tokens";
        }
      }
    }
  }
}

TEST_F(RemoteExpertsTest, RowsInBf16GiveTheBitsOfFloats) {
  for (bool over_grpc : {false, true}) {
    Setting setting;
    setting.over_grpc = over_grpc;
    setting.local_experts = {0, 3, 7};  // some travel, some do not
    Pool pool(setting);
    ASSERT_TRUE(pool.BecomesReady()) << pool.remote->Ready();
    for (int64_t tokens : {1, 33}) {
      const Rows rows(2, tokens, 11);
      const auto expected = Exchange(*Load(Numerics::kRelease, {}), rows);
      const auto found = ExchangeBf16(*pool.remote, rows);
      ASSERT_TRUE(expected.ok() && found.ok()) << expected.status() << found.status();
      EXPECT_TRUE(SameBits(*found, *expected)) << tokens << " tokens";
    }
  }
}

TEST_F(RemoteExpertsTest, AnExpertThatIsNotLoadedIsNamed) {
  const auto some = Load(Numerics::kRelease, {0, 2});
  const std::vector<float> row(Demo().config().hidden_size, 1.0f);
  std::vector<float> out(row.size());
  const ExpertGroup group{1, 1};
  const uint32_t first = 0;
  const float weight = 1;
  const absl::Status status =
      some->Compute({1, RowFormat::kF32, row.data(), {&group, 1}, {&first, 1}, {&weight, 1}}, out.data());
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("layer 1 expert 1"));
}

TEST_F(RemoteExpertsTest, WhatACardCannotDoIsSaidBeforeItIsAskedFor) {
  LocalExpertsOptions options;
  options.numerics = Numerics::kExact;
  const absl::Status exact = CreateCudaExperts(Demo(), options).status();
  if (absl::IsUnimplemented(exact)) {
    EXPECT_THAT(std::string(exact.message()), HasSubstr("no CUDA backend"));
    return;
  }
  EXPECT_THAT(std::string(exact.message()), HasSubstr("`exact` runs on the cpu"));
  options.numerics = Numerics::kRelease;
  options.experts = {0, 99};
  EXPECT_THAT(std::string(CreateCudaExperts(Demo(), options).status().message()), HasSubstr("experts: found 99"));
}

TEST_F(RemoteExpertsTest, ALargeBatchTravelsInBoundedPieces) {
  Pool pool({{Numerics::kExact}, false, 2, 2});
  ASSERT_TRUE(pool.BecomesReady());
  const int64_t tokens = 4 * kPieceBytes / (Demo().config().hidden_size * 4 * Demo().config().num_experts_per_tok);
  const Rows rows(0, tokens, 5);
  const auto found = Exchange(*pool.remote, rows);
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_GE(pool.remote->statistics().pieces, 4u);
  EXPECT_TRUE(SameBits(*found, *Exchange(*Load(Numerics::kExact, {}), rows)));
}

TEST_F(RemoteExpertsTest, ALostMemberIsNamedAndItsReplacementIsUsed) {
  for (bool over_grpc : {false, true}) {
    Pool pool({{Numerics::kRelease}, over_grpc, 2, 1});
    ASSERT_TRUE(pool.BecomesReady());
    const Rows rows(1, 20, 3);
    ASSERT_TRUE(Exchange(*pool.remote, rows).ok());
    // Killed while a batch is on its way.
    ASSERT_TRUE(failpoints::Arm("e.before_compute=sleep(300)").ok());
    std::thread killer([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      if (over_grpc) {
        pool.members[1]->server->Shutdown(absl::ZeroDuration());
      } else {
        pool.hub->Fail(pool.members[1]->transport->address());
      }
    });
    const auto lost = Exchange(*pool.remote, rows);
    killer.join();
    ASSERT_TRUE(failpoints::Arm("").ok());
    EXPECT_EQ(lost.status().code(), absl::StatusCode::kUnavailable) << lost.status();
    EXPECT_THAT(std::string(lost.status().message()), HasSubstr("expert-1"));
    EXPECT_FALSE(pool.remote->Ready().ok());
    EXPECT_EQ(Exchange(*pool.remote, rows).status().code(), absl::StatusCode::kUnavailable);

    std::vector<int> experts(pool.members[1]->info.share().experts().begin(),
                             pool.members[1]->info.share().experts().end());
    pool.members[1] = std::make_unique<Member>(pool.hub, Kind{}, "expert-1", experts, 1);
    pool.SetPeers();
    ASSERT_TRUE(pool.BecomesReady()) << pool.remote->Ready();
    const auto found = Exchange(*pool.remote, rows);
    ASSERT_TRUE(found.ok()) << found.status();
    EXPECT_TRUE(SameBits(*found, *Exchange(*Load(Numerics::kRelease, {}), rows)));
  }
}

TEST_F(RemoteExpertsTest, AMemberThatDrainsAnswersWhatItHasAndIsThenLetGo) {
  for (bool over_grpc : {false, true}) {
    Pool pool({{Numerics::kRelease}, over_grpc, 2, 1});
    ASSERT_TRUE(pool.BecomesReady());
    const Rows rows(1, 20, 3);
    const auto alone = Exchange(*Load(Numerics::kRelease, {}), rows);
    Member& leaving = *pool.members[1];
    const auto let_go = [&] { return leaving.loop->LetGo(MonotonicNow(), absl::InfiniteDuration()); };

    // Nobody else has its experts: it goes on for what runs, and no more is promised.
    leaving.info.set_draining(true);
    pool.SetPeers();
    EXPECT_THAT(std::string(pool.remote->Ready().message()), HasSubstr("expert-1, which drains"));
    const auto last_resort = Exchange(*pool.remote, rows);
    ASSERT_TRUE(last_resort.ok()) << last_resort.status();
    EXPECT_TRUE(SameBits(*last_resort, *alone));
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    EXPECT_FALSE(let_go());

    // Somebody has: a batch that is out comes back whole, later ones go elsewhere.
    std::vector<int> all(Demo().config().n_routed_experts);
    std::iota(all.begin(), all.end(), 0);
    ASSERT_TRUE(failpoints::Arm("e.before_compute=sleep(300)").ok());
    absl::StatusOr<std::vector<float>> under_way = absl::UnknownError("not asked");
    std::thread asking([&] { under_way = Exchange(*pool.remote, rows); });
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    pool.members.push_back(std::make_unique<Member>(pool.hub, Kind{}, "expert-2", all, 1));
    pool.SetPeers();
    asking.join();
    ASSERT_TRUE(failpoints::Arm("").ok());
    ASSERT_TRUE(under_way.ok()) << under_way.status();
    EXPECT_TRUE(SameBits(*under_way, *alone));
    ASSERT_TRUE(pool.BecomesReady()) << pool.remote->Ready();
    for (const absl::Time end = MonotonicNow() + absl::Seconds(20); !let_go() && MonotonicNow() < end;) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    EXPECT_TRUE(let_go());
    const auto found = Exchange(*pool.remote, rows);
    ASSERT_TRUE(found.ok()) << found.status();
    EXPECT_TRUE(SameBits(*found, *alone));
  }
}

TEST_F(RemoteExpertsTest, ALateMemberIsNamedAndItsLateReplyIsDropped) {
  Setting setting;
  setting.timeout = absl::Milliseconds(100);
  Pool pool(setting);
  ASSERT_TRUE(pool.BecomesReady());
  const Rows rows(0, 4, 3);
  ASSERT_TRUE(failpoints::Arm("e.before_compute=sleep(400)@1").ok());
  const auto late = Exchange(*pool.remote, rows);
  EXPECT_EQ(late.status().code(), absl::StatusCode::kUnavailable) << "the deadline that passed is not the request's";
  ASSERT_TRUE(GetApiError(late.status()).has_value()) << late.status();
  EXPECT_EQ(GetApiError(late.status())->code, "experts_late");
  EXPECT_THAT(std::string(late.status().message()), HasSubstr("expert-"));
  std::this_thread::sleep_for(std::chrono::milliseconds(500));
  ASSERT_TRUE(pool.BecomesReady());
  const auto found = Exchange(*pool.remote, rows);
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_TRUE(SameBits(*found, *Exchange(*Load(Numerics::kRelease, {}), rows)));
}

TEST_F(RemoteExpertsTest, AMembersErrorFailsTheBatchByName) {
  Pool pool(Setting{});
  ASSERT_TRUE(pool.BecomesReady());
  const Rows rows(0, 20, 3);
  ASSERT_TRUE(failpoints::Arm("e.before_compute=error(INTERNAL)@1").ok());
  const auto failed = Exchange(*pool.remote, rows);
  EXPECT_EQ(failed.status().code(), absl::StatusCode::kUnavailable) << failed.status();
  EXPECT_THAT(std::string(failed.status().message()), HasSubstr("expert worker expert-"));
  EXPECT_TRUE(Exchange(*pool.remote, rows).ok());
}

TEST_F(RemoteExpertsTest, AMemberWithAnotherHashIsNeverUsed) {
  Pool pool(Setting{});
  ASSERT_TRUE(pool.BecomesReady());
  pool.members[0]->info.set_expert_compat_hash("other");
  IncarnationId::Random().To(pool.members[0]->info.mutable_incarnation());
  pool.SetPeers();
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  EXPECT_THAT(std::string(pool.remote->Ready().message()), HasSubstr("incompatible_peer"));
}

TEST_F(RemoteExpertsTest, ASkippedExpertIsCaught) {
  Pool pool(Setting{});
  ASSERT_TRUE(pool.BecomesReady());
  const Rows rows(0, 5, 3);
  const auto truth = Exchange(*pool.remote, rows);
  ASSERT_TRUE(failpoints::Arm("bug.skip_expert=on").ok());
  const auto wrong = Exchange(*pool.remote, rows);
  ASSERT_TRUE(truth.ok() && wrong.ok());
  EXPECT_FALSE(SameBits(*truth, *wrong));
}

TEST_F(RemoteExpertsTest, RowsInOrderOfArrivalAreCaught) {
  Pool pool({{Numerics::kRelease}, false, 3, 1});
  ASSERT_TRUE(pool.BecomesReady());
  const Rows rows(0, 30, 3);
  const auto truth = Exchange(*pool.remote, rows);
  ASSERT_TRUE(failpoints::Arm("bug.arrival_order=on").ok());
  const auto wrong = Exchange(*pool.remote, rows);
  ASSERT_TRUE(truth.ok() && wrong.ok());
  EXPECT_FALSE(SameBits(*truth, *wrong));
}

// Needs a card: tests/gpu.sh.
class CudaRemoteExperts : public RemoteExpertsTest {
 protected:
  void SetUp() override {
    const auto probe = CreateCudaExperts(Demo(), {.experts = {0}});
    if (!probe.ok()) GTEST_SKIP() << probe.status().message();
  }
};

TEST_F(CudaRemoteExperts, AnySplitWaveAndPathGivesTheBitsOfOneHolder) {
  const Kind kind{Numerics::kRelease, true};
  // One holder of all experts, asked by a caller without a pool of others.
  Pool alone({kind, false, 1, 1});
  ASSERT_TRUE(alone.BecomesReady()) << alone.remote->Ready();
  for (bool over_grpc : {false, true}) {
    for (int members : {2, 3}) {
      Setting setting{kind, over_grpc, members, static_cast<uint32_t>(members)};
      if (members == 3) setting.local_experts = {1, 2, 9};  // some on the caller's own card
      Pool pool(setting);
      ASSERT_TRUE(pool.BecomesReady()) << pool.remote->Ready();
      for (int64_t tokens : {1, 2, 9, 100, 1500}) {  // the last is more than one slice of pairs
        const Rows rows(static_cast<int>(tokens % Demo().config().num_hidden_layers), tokens,
                        static_cast<uint32_t>(tokens));
        const auto expected = ExchangeBf16(*alone.remote, rows);
        const auto found = ExchangeBf16(*pool.remote, rows);
        ASSERT_TRUE(expected.ok() && found.ok()) << expected.status() << found.status();
        EXPECT_TRUE(SameBits(*found, *expected)) << members << " members, " << tokens << " tokens";
      }
    }
  }
}

TEST_F(CudaRemoteExperts, ACardIsNearTheCpu) {
  const Rows rows(1, 40, 4);
  Pool pool({{Numerics::kRelease, true}, false, 2, 1});
  ASSERT_TRUE(pool.BecomesReady()) << pool.remote->Ready();
  const auto card = ExchangeBf16(*pool.remote, rows);
  const auto cpu = Exchange(*Load(Numerics::kRelease, {}), rows);
  ASSERT_TRUE(card.ok() && cpu.ok()) << card.status() << cpu.status();
  double difference = 0, norm = 0;
  for (size_t i = 0; i < cpu->size(); ++i) {
    const double d = static_cast<double>((*card)[i]) - (*cpu)[i];
    difference += d * d;
    norm += static_cast<double>((*cpu)[i]) * (*cpu)[i];
  }
  // Sums in another order; what a code of E4M3 that falls to the other side costs is 2^-4 of one value in many.
  EXPECT_LT(std::sqrt(difference / norm), 0.01);
  EXPECT_GT(norm, 0);
}

TEST(ExpertWire, EveryDamagedByteIsNoticed) {
  ExpertHeader header;
  header.hidden = 4;
  header.num_experts = 1;
  header.num_rows = header.num_pairs = 1;
  std::vector<uint8_t> payload(RequestBytes(header));
  payload[0] = 3;                                       // expert 3
  payload[4] = 1;                                       // once
  std::memcpy(payload.data() + 12, "\0\0\x80\x3f", 4);  // weight 1
  SealHeader(header, payload);
  ASSERT_TRUE(DecodeHeader(HeaderBytes(header)).ok());
  ASSERT_TRUE(ParseRequest(header, payload, 16).ok());
  for (size_t i = 0; i < payload.size(); ++i) {
    auto damaged = payload;
    damaged[i] ^= 0x10;
    EXPECT_FALSE(ParseRequest(header, damaged, 16).ok()) << i;
  }
  for (size_t i = 0; i < sizeof(header); ++i) {
    auto bytes = std::vector<uint8_t>(HeaderBytes(header).begin(), HeaderBytes(header).end());
    bytes[i] ^= 0x10;
    const auto decoded = DecodeHeader(bytes);
    EXPECT_FALSE(decoded.ok() && ParseRequest(*decoded, payload, 16).ok()) << i;
  }
}

TEST(ExpertWire, ContradictionsAreRefusedByName) {
  ExpertHeader header;
  header.hidden = 2;
  header.num_experts = 2;
  header.num_rows = 1;
  header.num_pairs = 2;
  const auto error = [&](std::vector<uint32_t> words) {
    std::vector<uint8_t> payload(RequestBytes(header));
    std::memcpy(payload.data(), words.data(), words.size() * 4);
    SealHeader(header, payload);
    return std::string(ParseRequest(header, payload, 8).status().message());
  };
  EXPECT_EQ(error({1, 1, 2, 1, 0, 0}), "");
  EXPECT_THAT(error({2, 1, 1, 1, 0, 0}), HasSubstr("experts[1]"));
  EXPECT_THAT(error({1, 1, 8, 1, 0, 0}), HasSubstr("experts[1]"));
  EXPECT_THAT(error({1, 1, 2, 2, 0, 0}), HasSubstr("expert counts"));
  EXPECT_THAT(error({1, 1, 2, 1, 0, 1}), HasSubstr("pair rows[1]"));
  EXPECT_THAT(error({1, 1, 2, 1, 0, 0, 0x7fc00000}), HasSubstr("weights[0]"));
  header.payload_bytes = 17u << 20;
  EXPECT_FALSE(DecodeHeader(HeaderBytes(header)).ok());
}

}  // namespace
}  // namespace millrace::expert
