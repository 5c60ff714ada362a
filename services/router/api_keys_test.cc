// SPDX-License-Identifier: Apache-2.0
// Keys and quotas, with time as an argument; over sockets they are tests/cluster/security_test.py.
#include "services/router/api_keys.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <thread>

#include "absl/strings/str_cat.h"
#include "services/common/error.h"

namespace millrace::router {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using ::testing::HasSubstr;
using ::testing::Not;
using Door = ApiKeys::Door;

class ApiKeysTest : public ::testing::Test {
 protected:
  ApiKeysTest()
      : path_((std::filesystem::temp_directory_path() / absl::StrCat("millrace-keys-", ::getpid(), ".json")).string()) {
  }
  ~ApiKeysTest() override { std::filesystem::remove(path_); }

  // As an editor or Kubernetes does: a new file in the place of the old one.
  void Write(const std::string& text) {
    std::ofstream(path_ + ".new") << text;
    std::filesystem::rename(path_ + ".new", path_);
  }
  static std::string Tenant(const std::string& name, const std::string& key, const std::string& more = "") {
    return absl::StrCat(R"({"name":")", name, R"(","keys":[")", ApiKeyDigest(key), R"("])", more, "}");
  }
  static std::string File(const std::string& tenants) { return absl::StrCat(R"({"tenants":[)", tenants, "]}"); }
  std::unique_ptr<ApiKeys> Open(const std::string& text) {
    Write(text);
    auto keys = ApiKeys::Open(path_);
    EXPECT_TRUE(keys.ok()) << keys.status();
    return *std::move(keys);
  }
  std::string ErrorOf(const std::string& text) {
    Write(text);
    return std::string(ApiKeys::Open(path_).status().message());
  }
  static double RetryAfter(const absl::Status& status) { return GetApiError(status)->retry_after_s.value_or(-1); }

  const std::string path_;
  const ApiKeys::TimePoint start_ = std::chrono::steady_clock::now();
};

TEST_F(ApiKeysTest, OnlyAKeyOfTheDoorOpensItAndEveryRefusalReadsTheSame) {
  const std::string key = NewApiKey(), admin = NewApiKey();
  const auto keys = Open(File(Tenant("team-a", key) + "," + Tenant("ops", admin, R"(,"may_operate":true)")));
  EXPECT_EQ(*keys->Authenticate("Bearer " + key, Door::kPublic), "team-a");
  EXPECT_EQ(*keys->Authenticate("bearer " + key, Door::kPublic), "team-a");
  EXPECT_EQ(*keys->Authenticate("Bearer " + admin, Door::kOperator), "ops");
  const absl::Status nothing = keys->Authenticate(std::nullopt, Door::kPublic).status();
  EXPECT_EQ(nothing.code(), absl::StatusCode::kUnauthenticated);
  for (const std::string& header :
       {std::string(), std::string("Bearer "), std::string("Bearer"), "Basic " + key, key, "Bearer " + key + " ",
        "Bearer  " + key, "Bearer " + NewApiKey(), "Bearer " + ApiKeyDigest(key), "Bearer " + admin,
        "Bearer " + std::string(1 << 20, 'x')}) {
    EXPECT_EQ(keys->Authenticate(header, Door::kPublic).status(), nothing) << header.substr(0, 80);
  }
  EXPECT_EQ(keys->Authenticate("Bearer " + key, Door::kOperator).status(), nothing);
}

TEST_F(ApiKeysTest, AKeyHas256RandomBits) {
  const std::string key = NewApiKey();
  EXPECT_EQ(key.size(), 3u + 64u);
  EXPECT_NE(key, NewApiKey());
  EXPECT_EQ(ApiKeyDigest("abc"), "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

TEST_F(ApiKeysTest, AWrongFileIsRefusedAndNeverQuoted) {
  EXPECT_THAT(ErrorOf(R"({"tenants":[{"name":"a","keys":["mr-secret"]}]})"),
              ::testing::AllOf(HasSubstr("security.api_keys_file: "), HasSubstr("tenants[0].keys[0]"),
                               Not(HasSubstr("mr-secret"))));
  EXPECT_THAT(ErrorOf(R"({"tenants":"mr-secret"})"), Not(HasSubstr("mr-secret")));
  EXPECT_THAT(ErrorOf(R"({"tenant":[]})"), HasSubstr("is not the JSON of a KeyFile"));
  EXPECT_THAT(ErrorOf(File(Tenant("a b", "k"))), HasSubstr("tenants[0].name"));
  EXPECT_THAT(ErrorOf(File(Tenant("a", "k") + "," + Tenant("a", "l"))), HasSubstr("a twice"));
  EXPECT_THAT(ErrorOf(File(Tenant("a", "k") + "," + Tenant("b", "k"))), HasSubstr("tenants[1].keys[0]: twice"));
  EXPECT_THAT(ErrorOf(File(Tenant("a", ""))), HasSubstr("digest of nothing"));
  std::filesystem::remove(path_);
  EXPECT_THAT(std::string(ApiKeys::Open(path_).status().message()), HasSubstr("cannot be read"));
}

TEST_F(ApiKeysTest, ARequestRateRefillsEvenlyAndSaysWhenToComeBack) {
  const auto keys = Open(File(Tenant("a", "k", R"(,"requests_per_minute":3)") + "," + Tenant("b", "l")));
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(keys->Admit("a", start_).ok()) << i;
  const absl::Status refused = keys->Admit("a", start_).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("requests_per_minute 3"));
  EXPECT_NEAR(RetryAfter(refused), 20, 0.1);
  EXPECT_FALSE(keys->Admit("a", start_ + seconds(19)).ok());
  EXPECT_TRUE(keys->Admit("a", start_ + seconds(21)).ok());
  EXPECT_TRUE(keys->Admit("b", start_).ok());  // another tenant's rate is its own
  EXPECT_TRUE(keys->Admit("b", start_).ok());
}

TEST_F(ApiKeysTest, TokensAreChargedWhenKnownAndOverdraftIsPaidBack) {
  const auto keys = Open(File(Tenant("a", "k", R"(,"tokens_per_minute":600)")));
  const auto permit = *keys->Admit("a", start_);
  permit->ChargeTokens(1000, start_);
  const absl::Status refused = keys->Admit("a", start_).status();
  EXPECT_THAT(std::string(refused.message()), HasSubstr("tokens_per_minute 600"));
  EXPECT_NEAR(RetryAfter(refused), 40.1, 0.2);  // 401 tokens at 10 a second
  EXPECT_TRUE(keys->Admit("a", start_ + seconds(41)).ok());
}

TEST_F(ApiKeysTest, AReleasedRequestMakesRoomOnce) {
  const auto keys = Open(File(Tenant("a", "k", R"(,"max_concurrent":2)")));
  auto first = *keys->Admit("a", start_);
  auto second = *keys->Admit("a", start_);
  EXPECT_THAT(std::string(keys->Admit("a", start_).status().message()), HasSubstr("max_concurrent 2"));
  first->Release();
  first->Release();
  first.reset();
  const auto third = keys->Admit("a", start_);
  EXPECT_TRUE(third.ok());
  EXPECT_FALSE(keys->Admit("a", start_).ok());
}

TEST_F(ApiKeysTest, ANewFileIsTakenAWrongOneIsNotAndQuotasGoOn) {
  const auto keys = Open(File(Tenant("a", "old", R"(,"max_concurrent":1)")));
  const auto running = *keys->Admit("a", start_);
  const auto wait_for = [&](const std::string& key, bool opens) {
    const auto end = std::chrono::steady_clock::now() + seconds(20);
    while (keys->Authenticate("Bearer " + key, Door::kPublic).ok() != opens && std::chrono::steady_clock::now() < end) {
      std::this_thread::sleep_for(milliseconds(20));
    }
    return keys->Authenticate("Bearer " + key, Door::kPublic).ok() == opens;
  };
  Write(File(Tenant("a", "new", R"(,"max_concurrent":1)")));
  EXPECT_TRUE(wait_for("new", true));
  EXPECT_FALSE(keys->Authenticate("Bearer old", Door::kPublic).ok());
  EXPECT_FALSE(keys->Admit("a", start_).ok()) << "the running request was forgotten";
  Write("{");
  std::this_thread::sleep_for(milliseconds(1200));
  EXPECT_TRUE(keys->Authenticate("Bearer new", Door::kPublic).ok());
  Write(File(""));
  EXPECT_TRUE(wait_for("new", false));
  EXPECT_EQ(keys->Admit("a", start_).status().code(), absl::StatusCode::kUnauthenticated);
}

TEST(TenantSalt, KeepsTenantsApart) {
  EXPECT_EQ(TenantSalt("", "s"), "s");
  EXPECT_NE(TenantSalt("a", "b/c"), TenantSalt("b", "a/c"));
  EXPECT_NE(TenantSalt("a", ""), TenantSalt("b", ""));
}

}  // namespace
}  // namespace millrace::router
