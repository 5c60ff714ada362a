// SPDX-License-Identifier: Apache-2.0
// Workers as they run, in one process: gRPC, membership, the expert pool, hand-off and decode on the demo checkpoint.
//
// The test is the router, by way of workers_cluster.h: answers over the wire are the bits of one process, refusals name
// the field, and a cancel, a lost expert or a drain leaves nothing behind. Whole processes are cluster_test.py.
#include <gmock/gmock.h>
#include <grpcpp/client_context.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <functional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/cluster/workers_cluster.h"

namespace millrace {
namespace {

using ::testing::HasSubstr;

TEST_F(Workers, ARequestOverTheWireGivesTheBitsOfOneProcess) {
  for (const auto& [expert_transport, members] : {std::pair("kvtransfer", 3), std::pair("grpc", 2), std::pair("", 0)}) {
    Cluster cluster(expert_transport, members);
    ASSERT_TRUE(cluster.BecomesReady()) << cluster.router.Get("decode-0").status.DebugString();
    for (int64_t length : {1, 130, 300}) {
      const auto prompt = MakePrompt(length);
      const Answer answer = cluster.Run(absl::StrCat("r", length), prompt, MakeSpec(8));
      EXPECT_TRUE(answer.prefill.ok()) << answer.prefill.error_message();
      EXPECT_TRUE(answer.decode.ok()) << answer.decode.error_message();
      EXPECT_EQ(DescribeTokens(answer.tokens), Reference(prompt, MakeSpec(8))) << expert_transport << " " << length;
    }
    EXPECT_TRUE(cluster.BecomesClean());
  }
}

TEST_F(Workers, BadRequestsAreRefusedByTheNameOfTheField) {
  Cluster cluster("", 0);
  ASSERT_TRUE(cluster.BecomesReady());
  const auto prompt = MakePrompt(10);
  const auto refused = [&](const std::function<void(v1::ReserveRequest&)>& change) {
    auto request = cluster.MakeReserve("bad", prompt, MakeSpec(5));
    change(request);
    v1::ReserveResponse response;
    const grpc::Status status = cluster.Reserve(request, &response);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << status.error_message();
    return status.error_message();
  };
  EXPECT_THAT(refused([](auto& r) { r.clear_request_id(); }), HasSubstr("request_id"));
  EXPECT_THAT(refused([](auto& r) { r.set_attempt(0); }), HasSubstr("attempt"));
  EXPECT_THAT(refused([](auto& r) { r.clear_spec(); }), HasSubstr("spec"));
  EXPECT_THAT(refused([](auto& r) { r.mutable_spec()->set_max_tokens(0); }), HasSubstr("spec.max_tokens"));
  EXPECT_THAT(refused([](auto& r) { r.mutable_spec()->set_max_tokens(~0u); }), HasSubstr("spec.max_tokens"));
  EXPECT_THAT(refused([](auto& r) { r.set_prompt_tokens(0); }), HasSubstr("prompt_tokens"));
  EXPECT_THAT(refused([](auto& r) { r.set_prompt_tokens(~0u); }), HasSubstr("context"));
  EXPECT_THAT(refused([](auto& r) { r.mutable_spec()->mutable_sampling()->set_temperature(std::nanf("")); }),
              HasSubstr("temperature"));
  EXPECT_THAT(refused([](auto& r) { r.mutable_spec()->mutable_sampling()->set_top_p(1.5f); }), HasSubstr("top_p"));
  EXPECT_THAT(refused([](auto& r) { r.mutable_spec()->add_end_ids(1u << 30); }), HasSubstr("spec.end_ids[0]"));
  EXPECT_THAT(refused([](auto& r) { r.mutable_spec()->set_num_logprobs(21); }), HasSubstr("num_logprobs"));
  EXPECT_THAT(refused([](auto& r) { r.mutable_spec()->set_prior_tokens(5); }), HasSubstr("prior_tokens"));
  EXPECT_THAT(refused([](auto& r) { r.add_prompt_ids(7); }), HasSubstr("length_mismatch"));
  EXPECT_THAT(refused([](auto& r) { r.clear_prefill(); }), HasSubstr("prefill"));
  EXPECT_THAT(refused([](auto& r) { r.clear_router(); }), HasSubstr("router"));

  v1::ReserveResponse reserved;
  auto late = cluster.MakeReserve("late", prompt, MakeSpec(5));
  late.set_deadline_ms(0);
  EXPECT_EQ(cluster.Reserve(late, &reserved).error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);

  ASSERT_TRUE(cluster.Reserve(cluster.MakeReserve("good", prompt, MakeSpec(5)), &reserved).ok());
  const auto prefill_refused = [&](const std::function<void(v1::PrefillRequest&)>& change) {
    auto request = cluster.MakePrefill("good", prompt, MakeSpec(5), reserved);
    change(request);
    std::vector<v1::Token> tokens;
    const grpc::Status status = cluster.Prefill(request, &tokens);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << status.error_message();
    EXPECT_TRUE(tokens.empty());
    return status.error_message();
  };
  EXPECT_THAT(prefill_refused([](auto& r) { r.clear_prompt_ids(); }), HasSubstr("prompt_ids"));
  EXPECT_THAT(prefill_refused([](auto& r) { r.set_prompt_ids(3, -1); }), HasSubstr("prompt_ids[3]"));
  EXPECT_THAT(prefill_refused([](auto& r) { r.set_prompt_ids(4, 1 << 20); }), HasSubstr("prompt_ids[4]"));
  EXPECT_THAT(prefill_refused([](auto& r) { r.clear_target(); }), HasSubstr("target"));
  EXPECT_THAT(prefill_refused([](auto& r) { r.mutable_target()->mutable_lease()->set_id(0); }),
              HasSubstr("target.lease.id"));
  EXPECT_THAT(prefill_refused([](auto& r) { r.mutable_target()->clear_transfer_address(); }),
              HasSubstr("transfer_address"));

  // Leases of somebody else, and of nobody.
  const auto stub = v1::Handoff::NewStub(cluster.channels.Get(cluster.decode->address(), PeerRole::kDecode));
  const auto renew = [&](v1::LeaseRef lease) {
    grpc::ClientContext context;
    v1::RenewRequest request;
    *request.mutable_lease() = std::move(lease);
    v1::RenewResponse response;
    return stub->Renew(&context, request, &response).error_code();
  };
  EXPECT_EQ(renew(reserved.lease()), grpc::StatusCode::OK);
  v1::LeaseRef other = reserved.lease();
  other.set_epoch(other.epoch() + 1);
  EXPECT_EQ(renew(other), grpc::StatusCode::ABORTED);
  other = reserved.lease();
  IncarnationId::Random().To(other.mutable_owner());
  EXPECT_EQ(renew(other), grpc::StatusCode::ABORTED);
  other = reserved.lease();
  other.set_id(other.id() + 1);
  EXPECT_EQ(renew(other), grpc::StatusCode::NOT_FOUND);
  other.clear_owner();
  EXPECT_EQ(renew(other), grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_F(Workers, CancellingTheStreamGivesEverythingBack) {
  Cluster cluster;
  ASSERT_TRUE(cluster.BecomesReady());
  const Answer answer = cluster.Run("leaves", MakePrompt(200), MakeSpec(500), [](size_t count, auto& context) {
    if (count == 3) context.TryCancel();
  });
  EXPECT_EQ(answer.decode.error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_TRUE(cluster.BecomesClean());
}

TEST_F(Workers, ALostExpertWorkerEndsItsRequestsByNameAndItsReplacementIsUsed) {
  for (const char* expert_transport : {"kvtransfer", "grpc"}) {
    Cluster cluster(expert_transport);
    ASSERT_TRUE(cluster.BecomesReady());
    const Answer answer = cluster.Run("unlucky", MakePrompt(50), MakeSpec(1000), [&](size_t count, auto&) {
      if (count == 3) cluster.experts[1]->Stop();
    });
    EXPECT_EQ(answer.decode.error_code(), grpc::StatusCode::UNAVAILABLE) << answer.decode.error_message();
    EXPECT_THAT(answer.decode.error_message(), HasSubstr("expert"));
    EXPECT_TRUE(cluster.BecomesClean());
    ASSERT_TRUE(Becomes([&] { return !cluster.router.Serving("decode-0"); }));

    cluster.StartExpert(1);
    ASSERT_TRUE(cluster.BecomesReady());
    const Answer again = cluster.Run("lucky", MakePrompt(50), MakeSpec(10));
    EXPECT_EQ(DescribeTokens(again.tokens), Reference(MakePrompt(50), MakeSpec(10))) << again.decode.error_message();
    EXPECT_TRUE(cluster.BecomesClean());
  }
}

TEST_F(Workers, ADrainingWorkerFinishesWhatItHasAndTakesNothingNew) {
  Cluster cluster("", 0);
  ASSERT_TRUE(cluster.BecomesReady());
  std::thread draining;
  std::atomic<bool> refused{false};
  const Answer answer = cluster.Run("before", MakePrompt(20), MakeSpec(60), [&](size_t count, auto&) {
    if (count != 2) return;
    draining = std::thread([&] { cluster.decode->Drain(absl::Seconds(60)); });
    // What is reserved before that would be a request of its own, and the drain would wait for its lease to end.
    const bool said =
        Becomes([&] { return cluster.router.Get("decode-0").status.state() == v1::WORKER_STATE_DRAINING; });
    refused =
        said && Becomes([&] {
          v1::ReserveResponse response;
          return cluster.Reserve(cluster.MakeReserve("after", MakePrompt(20), MakeSpec(5)), &response).error_code() ==
                 grpc::StatusCode::UNAVAILABLE;
        });
  });
  draining.join();
  EXPECT_TRUE(refused.load());
  EXPECT_TRUE(answer.decode.ok()) << answer.decode.error_message();
  EXPECT_EQ(answer.tokens.size(), 60u);
  EXPECT_TRUE(Becomes([&] { return cluster.router.Get("decode-0").status.state() == v1::WORKER_STATE_DRAINING; }));
}

TEST_F(Workers, WithoutEveryExpertNobodyIsServedAndTheReasonIsSaid) {
  Cluster cluster;
  ASSERT_TRUE(cluster.BecomesReady());
  cluster.experts[0]->Stop();
  ASSERT_TRUE(Becomes([&] { return !cluster.router.Serving("decode-0"); }));
  const Answer answer = cluster.Run("none", MakePrompt(20), MakeSpec(5));
  EXPECT_EQ(answer.reserve.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(answer.reserve.error_message(), HasSubstr("expert 0"));
}

}  // namespace
}  // namespace millrace
