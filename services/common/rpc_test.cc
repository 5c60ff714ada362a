// SPDX-License-Identifier: Apache-2.0
// Configuration, failpoints, status table and queue: what every worker stands on.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "services/common/bounded_queue.h"
#include "services/common/config.h"
#include "services/common/failpoints.h"
#include "services/common/grpc_status.h"
#include "services/common/incarnation.h"

namespace millrace {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string ErrorOf(std::string_view json) {
  const auto config = ParseClusterConfig(json, "/models");
  return config.ok() ? "ok" : std::string(config.status().message());
}

TEST(Config, FillsDefaultsAndResolvesTheModelPath) {
  const auto config = ParseClusterConfig(R"({"model":{"path":"demo"},"prefill":[{}],"decode":[{},{}]})", "/models");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->model().path(), "/models/demo");
  EXPECT_EQ(config->model().id(), "demo");
  EXPECT_EQ(config->decode(1).worker().name(), "decode-1");
  EXPECT_EQ(config->decode(1).cache_pages(), 1024u);
  EXPECT_EQ(config->timers().lease_ttl_ms(), 10000u);
  EXPECT_EQ(config->timers().expert_timeout_ms(), 1000u);
  EXPECT_EQ(config->timers().watchdog_ms(), 2000u);
  EXPECT_EQ(config->timers().startup_timeout_ms(), 60000u);
  EXPECT_EQ(config->router().http_listen(), "127.0.0.1:8080");
}

TEST(Config, EveryMistakeNamesItsField) {
  EXPECT_THAT(ErrorOf("{}"), HasSubstr("model.path"));
  EXPECT_THAT(ErrorOf(R"({"model":{"path":"m","nme":"x"}})"), HasSubstr("nme"));
  EXPECT_THAT(ErrorOf(R"({"model":{"path":"m"},"prefill":[{"cache_pages":"many"}]})"), HasSubstr("cache_pages"));
  EXPECT_THAT(ErrorOf(R"({"model":{"path":"m"},"prefill":[{"max_batch_tokens":9999999}]})"),
              HasSubstr("prefill[0].max_batch_tokens"));
  EXPECT_THAT(ErrorOf(R"({"model":{"path":"m","numerics":"fast"}})"), HasSubstr("model.numerics"));
  EXPECT_THAT(ErrorOf(R"({"model":{"path":"m"},"router":{"http_listen":"here"}})"), HasSubstr("router.http_listen"));
  EXPECT_THAT(ErrorOf(R"({"model":{"path":"m"},"router":{"http_listen":"a:1","grpc_listen":"a:1"}})"),
              HasSubstr("twice"));
  EXPECT_THAT(ErrorOf(R"({"model":{"path":"m"},"timers":{"heartbeat_ms":2000}})"), HasSubstr("timers.dead_after_ms"));
  EXPECT_THAT(
      ErrorOf(R"({"model":{"path":"m"},"prefill":[{"worker":{"name":"a"}}],"decode":[{"worker":{"name":"a"}}]})"),
      HasSubstr("decode[0].worker.name"));
  EXPECT_THAT(ErrorOf("{\"model\":"), ::testing::Not(HasSubstr("\n")));
}

TEST(Config, AKeyWrittenTwiceIsRefused) {
  EXPECT_THAT(ErrorOf(R"({"model":{"path":"m"},"decode":[{"cache_pages":64,"cache_pages":128}]})"),
              HasSubstr("found key \"cache_pages\" twice"));
  EXPECT_THAT(ErrorOf(R"({"router":{"max_requests":1},"model":{"path":"m"},"router":{}})"),
              HasSubstr("found key \"router\" twice"));
  EXPECT_TRUE(
      ParseClusterConfig(R"({"model":{"path":"m"},"decode":[{"cache_pages":64},{"cache_pages":64}]})", "/").ok());
}

TEST(Config, ADocumentThatIsHostileIsRefusedAndNotExpanded) {
  EXPECT_THAT(ErrorOf(R"({"model":{"path":")" + std::string(1 << 20, 'x') + "\"}}"), HasSubstr("larger than 1 MiB"));
  EXPECT_FALSE(ErrorOf(std::string(500000, '[')).empty());
  EXPECT_FALSE(ErrorOf(R"({"model":)" + std::string(100000, '{')).empty());
  // YAML's anchors and tabs mean nothing here.
  EXPECT_FALSE(ErrorOf("model: &m\n  path: m\nprefill: [*m]\n").empty());
}

TEST(Config, OutputLimitsFitARequestAndEachOther) {
  const auto router = [](const std::string& members) { return R"({"model":{"path":"m"},"router":{)" + members + "}}"; };
  EXPECT_THAT(ErrorOf(router(R"("max_tokens_limit":2147483648)")), HasSubstr("router.max_tokens_limit"));
  EXPECT_THAT(ErrorOf(router(R"("max_tokens_limit":100,"default_max_tokens":101)")),
              HasSubstr("router.default_max_tokens: found 101, allowed 1 to 100"));
  const auto config = ParseClusterConfig(router(R"("max_tokens_limit":100)"), "/");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->router().default_max_tokens(), 100u);
}

TEST(Config, WhatWouldOnlyLookLikeALockIsRefused) {
  EXPECT_THAT(ErrorOf(R"({"model":{"path":"m"},"router":{"api_keys":["ab"]}})"), HasSubstr("api_keys"));
  EXPECT_THAT(ErrorOf(R"({"model":{"path":"m"},"transfer":{"transport":"loopback"}})"),
              HasSubstr("transfer.transport: found \"loopback\", allowed ucx"));
}

TEST(Config, WhatLeavesLoopbackHasALockOrSaysThatItNeedsNone) {
  const auto error = [](const std::string& members, const std::string& security = "{}") {
    return ErrorOf(R"({"model":{"path":"m"},"security":)" + security + "," + members + "}");
  };
  const std::string tls = R"({"tls":{"certificate":"c","key":"k","ca":"a"}})";
  for (const char* listen : {"0.0.0.0:1", "[::]:1", "192.0.2.1:1", "router-0:1"}) {
    const std::string control = absl::StrCat(R"("router":{"control_listen":")", listen, "\"}");
    EXPECT_THAT(error(control),
                ::testing::AllOf(HasSubstr(absl::StrCat("router.control_listen: found \"", listen, "\" without")),
                                 HasSubstr("security.allow_insecure")));
    EXPECT_EQ(error(control, tls), "ok");
    EXPECT_EQ(error(control, R"({"allow_insecure":true})"), "ok");
  }
  for (const char* listen : {"127.0.0.1:1", "127.3.2.1:1", "[::1]:1", "localhost:1"}) {
    EXPECT_EQ(error(absl::StrCat(R"("router":{"control_listen":")", listen, "\"}")), "ok") << listen;
  }
  EXPECT_THAT(error(R"("prefill":[{}],"decode":[{"worker":{"name":"d","listen":"0.0.0.0:0"}}])"),
              HasSubstr("d: worker.listen: found \"0.0.0.0:0\" without security.tls"));
  // It has verbs; metrics alone, as a worker's, need no lock.
  EXPECT_THAT(error(R"("router":{"operator_listen":"0.0.0.0:1"})"), HasSubstr("router.operator_listen"));
  EXPECT_EQ(error(R"("router":{"operator_listen":"0.0.0.0:1"})", R"({"api_keys_file":"keys"})"), "ok");
  EXPECT_EQ(error(R"("expert":[{"worker":{"operator_listen":"0.0.0.0:1"}}])"), "ok");
  // Blocks are not encrypted by TLS: they stay on a network that was named, or are sealed.
  const std::string away = R"("prefill":[{"worker":{"listen":"0.0.0.0:0"}}])";
  EXPECT_THAT(error(away, tls), HasSubstr("transfer.listen_address: found nothing, which is every interface"));
  EXPECT_THAT(error(away + R"(,"transfer":{"listen_address":"0.0.0.0"})", tls), HasSubstr("found 0.0.0.0"));
  EXPECT_EQ(error(away + R"(,"transfer":{"listen_address":"eth1"})", tls), "ok");
  EXPECT_EQ(error(away + R"(,"transfer":{"seal":true})", tls), "ok");
  // A seal's keys are agreed on over TLS; nothing but loopback does without, whatever else is allowed.
  for (const char* security : {"{}", R"({"allow_insecure":true})"}) {
    EXPECT_THAT(error(away + R"(,"transfer":{"seal":true,"listen_address":"eth1"})", security),
                HasSubstr("transfer.seal: found true without security.tls while worker.listen of prefill-0"));
    EXPECT_THAT(error(R"("router":{"control_listen":"10.0.0.1:1"},"transfer":{"seal":true})", security),
                HasSubstr("transfer.seal: found true without security.tls while router.control_listen"));
  }
  EXPECT_EQ(error(R"("prefill":[{}],"decode":[{}],"transfer":{"seal":true})"), "ok");
  EXPECT_THAT(error(R"("transfer":{"listen_port":65536})"), HasSubstr("transfer.listen_port: found 65536"));
}

TEST(Config, LoopbackIsAnAddressOfItOrLocalhost) {
  for (const char* address : {"127.0.0.1:1", "127.8.0.1:0", "localhost:80", "[::1]:8081"}) {
    EXPECT_TRUE(OnLoopback(address)) << address;
  }
  for (const char* address : {"0.0.0.0:1", "[::]:1", "10.0.0.1:1", "127.evil.example:1", "router:1", "[::2]:1"}) {
    EXPECT_FALSE(OnLoopback(address)) << address;
  }
}

TEST(Config, NamesOfTheOperatorPortAreHostsWithoutPorts) {
  const auto with = [](const std::string& hosts) {
    return R"({"model":{"path":"m"},"router":{"operator_hosts":[)" + hosts + "]}}";
  };
  EXPECT_EQ(ErrorOf(with(R"("ops.example","grafana")")), "ok");
  for (const char* host : {R"("")", R"("ops.example:8081")", R"("http://ops.example")", R"("*.example")"}) {
    EXPECT_THAT(ErrorOf(with(host)), HasSubstr("router.operator_hosts: found")) << host;
  }
}

TEST(Config, LocksAreCompleteAndTheirFilesLieBesideTheDocument) {
  const auto parse = [](const std::string& security) {
    return ParseClusterConfig(R"({"model":{"path":"m"},"prefill":[{}],"security":)" + security + "}", "/etc/m");
  };
  const auto config = parse(
      R"({"tls":{"certificate":"tls/{role}.pem","key":"/k","ca":"ca.pem"},"public_tls":{"certificate":"p","key":"q"},
          "api_keys_file":"keys.json"})");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->security().tls().certificate(), "/etc/m/tls/{role}.pem");
  EXPECT_EQ(config->security().tls().key(), "/k");
  EXPECT_EQ(config->security().tls().trust_domain(), "cluster.local");
  EXPECT_EQ(config->security().public_tls().key(), "/etc/m/q");
  EXPECT_EQ(config->security().api_keys_file(), "/etc/m/keys.json");
  EXPECT_EQ(config->transfer().listen_address(), "127.0.0.1");
  EXPECT_THAT(parse(R"({"tls":{"certificate":"c","ca":"a"}})").status().message(),
              HasSubstr("security.tls.key: found nothing"));
  EXPECT_THAT(parse(R"({"public_tls":{"certificate":"c"}})").status().message(),
              HasSubstr("security.public_tls.key: found nothing"));
  EXPECT_THAT(parse(R"({"tls":{"certificate":"c","key":"k","ca":"a","reload_interval_ms":1500}})").status().message(),
              HasSubstr("security.tls.reload_interval_ms: found 1500, allowed whole seconds"));
}

TEST(Config, LimitsHaveDefaultsAndFitEachOther) {
  const auto limits = [](const std::string& members) {
    return ParseClusterConfig(R"({"model":{"path":"m"},"router":{"limits":{)" + members + "}}}", "/");
  };
  ASSERT_TRUE(limits("").ok()) << limits("").status();
  EXPECT_EQ(limits("")->router().limits().max_body_bytes(), 16u << 20);
  EXPECT_EQ(limits(R"("max_body_bytes":268435456)")->router().limits().max_body_bytes_total(), 268435456u);
  EXPECT_THAT(limits(R"("max_n":65)").status().message(), HasSubstr("router.limits.max_n: found 65, allowed 1 to 64"));
  EXPECT_THAT(limits(R"("max_body_bytes_total":2048)").status().message(),
              HasSubstr("router.limits.max_body_bytes_total"));
}

TEST(Config, APoolIsOnOneDeviceWhichCallersHaveToo) {
  const auto device = [](const std::string& model, const std::string& experts) {
    return ParseClusterConfig(
        R"({"model":{"path":"m","device":")" + model + R"("},"decode":[{}],"expert":[)" + experts + "]}", "/");
  };
  // Whatever the callers compute on, a pool that says nothing is on the CPU.
  for (const char* model : {"cpu", "cuda"}) {
    const auto config = device(model, "{},{}");
    ASSERT_TRUE(config.ok()) << config.status();
    EXPECT_FALSE(SelectWorker(*config, v1::ROLE_EXPERT, "expert-1")->pool_on_cuda());
    EXPECT_EQ(SelectWorker(*config, v1::ROLE_EXPERT, "expert-1")->device(), "cpu");
    EXPECT_EQ(SelectWorker(*config, v1::ROLE_DECODE, "")->device(), model);
  }
  const auto config = device("cuda", R"({"device":"cuda"},{"device":"cuda"})");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_TRUE(SelectWorker(*config, v1::ROLE_DECODE, "")->pool_on_cuda());
  EXPECT_EQ(SelectWorker(*config, v1::ROLE_EXPERT, "expert-0")->device(), "cuda");
  EXPECT_THAT(std::string(device("cuda", R"({"device":"cuda"},{})").status().message()),
              HasSubstr("expert[1].device: found cpu, allowed cuda, as expert[0]"));
  EXPECT_THAT(std::string(device("cpu", R"({"device":"cuda"})").status().message()),
              HasSubstr("expert[0].device: found cuda, allowed cpu, as model.device"));
  EXPECT_THAT(std::string(device("cuda", R"({"device":"tpu"})").status().message()), HasSubstr("expert[0].device"));
}

TEST(Config, DeviceMemoryIsStagedUnlessAskedForAndNeverMovedPastTheSeal) {
  const auto transfer = [](const std::string& members) {
    return ParseClusterConfig(R"({"model":{"path":"m"},"decode":[{}],"transfer":{)" + members + "}}", "/");
  };
  EXPECT_EQ(transfer("")->transfer().device_memory(), "staged");
  EXPECT_EQ(transfer(R"("device_memory":"direct")")->transfer().device_memory(), "direct");
  EXPECT_THAT(std::string(transfer(R"("device_memory":"rdma")").status().message()),
              HasSubstr("transfer.device_memory: found \"rdma\", allowed staged, direct"));
  EXPECT_THAT(std::string(transfer(R"("device_memory":"direct","seal":true)").status().message()),
              HasSubstr("transfer.device_memory: found direct with transfer.seal"));
}

TEST(Config, ExpertSetsAreRangesAndSharesAreEven) {
  EXPECT_THAT(*ParseExpertSet("0-2,5", 8), ElementsAre(0, 1, 2, 5));
  EXPECT_FALSE(ParseExpertSet("0-8", 8).ok());
  EXPECT_FALSE(ParseExpertSet("1,1", 8).ok());
  const auto config = ParseClusterConfig(R"({"model":{"path":"m"},"expert":[{},{},{}]})", "/");
  ASSERT_TRUE(config.ok());
  std::vector<int> all;
  for (const char* name : {"expert-0", "expert-1", "expert-2"}) {
    const auto worker = SelectWorker(*config, v1::ROLE_EXPERT, name);
    ASSERT_TRUE(worker.ok());
    const auto share = worker->ExpertsOf(16);
    ASSERT_TRUE(share.ok());
    all.insert(all.end(), share->begin(), share->end());
  }
  ASSERT_EQ(all.size(), 16u);
  for (int e = 0; e < 16; ++e) EXPECT_EQ(all[e], e);
  EXPECT_THAT(std::string(SelectWorker(*config, v1::ROLE_EXPERT, "x").status().message()), HasSubstr("expert-1"));
}

TEST(Config, WhatIsAdvertisedMayBeSaidOnTheCommandLine) {
  const auto config = ParseClusterConfig(R"({"model":{"path":"m"},"decode":[{}]})", "");
  WorkerConfig worker = *SelectWorker(*config, v1::ROLE_DECODE, "");
  const std::pair<const char*, const char*> kGood[] = {
      {"10.0.0.7:9090", "10.0.0.7:9090"}, {"10.0.0.7", "10.0.0.7:0"},   {"pod-1.svc", "pod-1.svc:0"},
      {"fd00::7", "[fd00::7]:0"},         {"[fd00::7]", "[fd00::7]:0"}, {"[fd00::7]:9090", "[fd00::7]:9090"}};
  for (const auto& [given, taken] : kGood) {
    ASSERT_TRUE(OverrideAdvertise(worker, given).ok()) << given;
    EXPECT_EQ(worker.worker().advertise(), taken);
  }
  for (const char* wrong : {":9090", "host:", "host:port", "host:70000"}) {
    EXPECT_THAT(std::string(OverrideAdvertise(worker, wrong).message()), HasSubstr("--advertise")) << wrong;
  }
}

TEST(Failpoints, OnlyTheHitAskedForFails) {
  ASSERT_TRUE(failpoints::Arm("d.reserve=error(UNAVAILABLE)@2;bug.double_token=on").ok());
  EXPECT_TRUE(failpoints::Hit("d.reserve").ok());
  EXPECT_EQ(failpoints::Hit("d.reserve").code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(failpoints::Hit("d.reserve").ok());
  EXPECT_EQ(failpoints::Hits("d.reserve"), 3u);
  EXPECT_TRUE(failpoints::Bug("bug.double_token"));
  EXPECT_FALSE(failpoints::Bug("bug.n_minus_1"));
  ASSERT_TRUE(failpoints::Arm("").ok());
  EXPECT_FALSE(failpoints::Bug("bug.double_token"));
}

TEST(Failpoints, UnknownPlacesAndActionsAreRefused) {
  EXPECT_FALSE(failpoints::Arm("d.reserv=crash").ok());
  EXPECT_FALSE(failpoints::Arm("d.reserve=explode").ok());
  EXPECT_FALSE(failpoints::Arm("d.reserve=error(NOPE)").ok());
  EXPECT_FALSE(failpoints::Arm("d.reserve=crash@0").ok());
}

TEST(GrpcStatus, CodesSurviveAndMessagesAreHeaderSafe) {
  for (int code = 1; code <= 16; ++code) {
    const absl::Status status(static_cast<absl::StatusCode>(code), "lease 81f3: late");
    EXPECT_EQ(FromGrpcStatus(ToGrpcStatus(status)), status);
  }
  EXPECT_EQ(ToGrpcStatus(absl::InternalError("a\n\xff b")).error_message(), "a?? b");
  EXPECT_EQ(ToGrpcStatus(absl::InternalError(std::string(5000, 'x'))).error_message().size(), kMaxGrpcMessageBytes);
}

TEST(BoundedQueue, RefusesWhenFullButNeverLosesACompletion) {
  BoundedQueue<int> queue(1);
  int one = 1, two = 2;
  EXPECT_TRUE(queue.TryPush(one));
  EXPECT_FALSE(queue.TryPush(two));
  EXPECT_TRUE(queue.Post(3));
  EXPECT_THAT(queue.DrainFor(absl::ZeroDuration()), ElementsAre(1, 3));
  queue.Close();
  EXPECT_FALSE(queue.Post(4));
}

TEST(Incarnation, IsNeverEmptyAndSurvivesItsProto) {
  const IncarnationId id = IncarnationId::Random();
  EXPECT_FALSE(id.empty());
  EXPECT_EQ(IncarnationId::From(id.ToProto()), id);
}

}  // namespace
}  // namespace millrace
