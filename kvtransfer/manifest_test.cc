// SPDX-License-Identifier: Apache-2.0
// Manifests: what is encoded is decoded, and nothing damaged or untrue gets through.
#include "kvtransfer/manifest.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

namespace millrace::kvtransfer {
namespace {

using ::testing::HasSubstr;

Manifest Example(int num_extents) {
  Manifest manifest;
  manifest.key = {0x81f3, 4};
  for (int i = num_extents; i-- > 0;)
    manifest.extents.push_back({10u + 2 * i, 100u + i, BindDigest(i, manifest.key, 10 + 2 * i, 100 + i)});
  manifest.metadata = std::string("token 0\0and more", 16);
  Seal(manifest);
  return manifest;
}

std::vector<ExpectedLength> Expected(const Manifest& manifest) {
  std::vector<ExpectedLength> expected;
  for (const auto& extent : manifest.extents) expected.push_back({extent.extent_id, extent.bytes});
  return expected;
}

// As a careless or hostile sender would: any field changed, and the digest right for what it says.
std::string Resealed(std::string bytes) {
  const uint64_t digest = ContentDigest(bytes.data(), bytes.size() - 8);
  std::memcpy(bytes.data() + bytes.size() - 8, &digest, 8);
  return bytes;
}

template <typename T>
std::string With(std::string bytes, size_t offset, T value) {
  std::memcpy(bytes.data() + offset, &value, sizeof(value));
  return Resealed(std::move(bytes));
}

TEST(Manifest, DecodesToWhatWasEncoded) {
  for (int num_extents : {0, 1, 2, 500}) {
    const Manifest manifest = Example(num_extents);
    auto decoded = DecodeManifest(EncodeManifest(manifest));
    ASSERT_TRUE(decoded.ok()) << decoded.status();
    EXPECT_EQ(decoded->key, manifest.key);
    EXPECT_EQ(decoded->extents, manifest.extents);
    EXPECT_EQ(decoded->metadata, manifest.metadata);
    EXPECT_EQ(decoded->whole_digest, manifest.whole_digest);
    EXPECT_TRUE(CheckManifest(*decoded, manifest.key, kDigestXxh3, Expected(manifest)).ok());
  }
}

TEST(Manifest, EveryFlippedBitAndEveryCutIsFound) {
  const std::string good = EncodeManifest(Example(5));
  for (size_t bit = 0; bit < good.size() * 8; ++bit) {
    std::string bad = good;
    bad[bit / 8] ^= static_cast<char>(1 << (bit % 8));
    EXPECT_FALSE(DecodeManifest(bad).ok()) << "bit " << bit;
  }
  for (size_t length = 0; length < good.size(); ++length) {
    EXPECT_TRUE(absl::IsDataLoss(DecodeManifest(good.substr(0, length)).status())) << length;
  }
  EXPECT_TRUE(absl::IsDataLoss(DecodeManifest(good + "x").status()));
}

TEST(Manifest, WellFormedLiesAreRefusedBeforeAnythingIsAllocated) {
  const std::string good = EncodeManifest(Example(5));
  EXPECT_THAT(DecodeManifest(With<uint32_t>(good, 4, 255)).status().message(), HasSubstr("version 255, expected 1"));
  EXPECT_THAT(DecodeManifest(With<uint32_t>(good, 8, 0)).status().message(), HasSubstr("digest_algorithm 0"));
  EXPECT_THAT(DecodeManifest(With<uint32_t>(good, 8, 77)).status().message(), HasSubstr("integrity is required"));
  const auto million = DecodeManifest(With<uint64_t>(good, 28, 1ull << 40));
  EXPECT_TRUE(absl::IsInvalidArgument(million.status())) << million.status();
  EXPECT_TRUE(absl::IsDataLoss(DecodeManifest(With<uint64_t>(good, 28, 6)).status()));
  EXPECT_TRUE(absl::IsDataLoss(DecodeManifest(With<uint64_t>(good, 28, 4)).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(DecodeManifest(With<uint64_t>(good, 36, ~0ull)).status()));
  const ManifestLimits boundless{~size_t{0}, ~size_t{0}};
  EXPECT_TRUE(absl::IsDataLoss(DecodeManifest(With<uint64_t>(good, 28, ~0ull), boundless).status()));
  EXPECT_TRUE(absl::IsDataLoss(DecodeManifest(With<uint64_t>(good, 36, ~0ull), boundless).status()));
  EXPECT_THAT(DecodeManifest(With<uint64_t>(good, 44, 12)).status().message(), HasSubstr("expected ascending ids"))
      << "a repeated id";
}

TEST(Manifest, CheckNamesWhatIsWrong) {
  const Manifest good = Example(5);
  const auto expected = Expected(good);
  auto check = [&](const Manifest& manifest, LeaseKey key = {0x81f3, 4}) {
    return CheckManifest(manifest, key, kDigestXxh3, expected);
  };
  EXPECT_TRUE(absl::IsFailedPrecondition(check(good, {0x81f4, 4})));
  EXPECT_THAT(check(good, {0x81f3, 5}).message(), HasSubstr("stale epoch"));

  Manifest missing = good;
  missing.extents.erase(missing.extents.begin() + 2);
  Seal(missing);
  EXPECT_THAT(check(missing).message(), HasSubstr("extent 14 missing (manifest has 4 extents, lease expects 5)"));
  Manifest last_missing = good;
  last_missing.extents.pop_back();
  Seal(last_missing);
  EXPECT_THAT(check(last_missing).message(), HasSubstr("extent 18 missing"));
  Manifest none = good;
  none.extents.clear();
  Seal(none);
  EXPECT_THAT(check(none).message(), HasSubstr("extent 10 missing"));

  Manifest more = good;
  more.extents.push_back({13, 1, 1});
  Seal(more);
  EXPECT_THAT(check(more).message(), HasSubstr("extent 13 unexpected"));
  Manifest longer = good;
  longer.extents[1].bytes += 1;
  Seal(longer);
  EXPECT_THAT(check(longer).message(), HasSubstr("extent 12 has 102 bytes, expected 101"));
  Manifest other_algorithm = good;
  other_algorithm.digest_algorithm = kDigestDevice;
  Seal(other_algorithm);
  EXPECT_THAT(check(other_algorithm).message(), HasSubstr("digest_algorithm 2, expected 1"));

  Manifest unsealed = good;
  unsealed.metadata += "!";
  EXPECT_TRUE(absl::IsDataLoss(check(unsealed)));
}

TEST(Digest, IsBoundToItsPlace) {
  const uint64_t content = ContentDigest("the same bytes");
  const uint64_t digest = BindDigest(content, {1, 2}, 3, 4);
  EXPECT_EQ(digest, BindDigest(content, {1, 2}, 3, 4));
  EXPECT_NE(digest, BindDigest(content, {9, 2}, 3, 4));
  EXPECT_NE(digest, BindDigest(content, {1, 9}, 3, 4));
  EXPECT_NE(digest, BindDigest(content, {1, 2}, 9, 4));
  EXPECT_NE(digest, BindDigest(content, {1, 2}, 3, 9));
  EXPECT_NE(digest, BindDigest(content, {2, 1}, 3, 4));
}

}  // namespace
}  // namespace millrace::kvtransfer
