// SPDX-License-Identifier: Apache-2.0
// See api_keys.h.
#include "services/router/api_keys.h"

#include <google/protobuf/util/json_util.h>
#include <openssl/crypto.h>
#include <openssl/rand.h>
#include <openssl/sha.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <fstream>
#include <set>
#include <sstream>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "engine/status.h"
#include "millrace/v1/config.pb.h"
#include "services/common/error.h"
#include "spdlog/spdlog.h"

namespace millrace::router {
namespace {

constexpr char kField[] = "security.api_keys_file";
constexpr absl::string_view kDigestPrefix = "sha256:";
constexpr size_t kMaxFileBytes = 1 << 20;
constexpr size_t kMaxKeyBytes = 256;
constexpr auto kLookAgainAfter = std::chrono::seconds(1);

using Digest = std::array<unsigned char, SHA256_DIGEST_LENGTH>;

Digest DigestOf(std::string_view key) {
  Digest digest;
  SHA256(reinterpret_cast<const unsigned char*>(key.data()), key.size(), digest.data());
  return digest;
}

absl::Status Wrong(absl::string_view path, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat(kField, ": ", path, ": ", what));
}

absl::Status NotAdmitted() {
  return MakeError(absl::StatusCode::kUnauthenticated, "A valid API key is required, as \"Authorization: Bearer KEY\".",
                   {.code = "invalid_api_key"});
}

// A bucket that fills at `per_minute` and holds as much. May be overdrawn.
struct Bucket {
  double per_minute = 0;  // 0: unlimited
  double level = 0;
  ApiKeys::TimePoint filled_at{};

  void Fill(ApiKeys::TimePoint now) {
    const double minutes = std::chrono::duration<double, std::ratio<60>>(now - filled_at).count();
    level = std::min(per_minute, level + std::max(0.0, minutes) * per_minute);
    filled_at = std::max(filled_at, now);
  }
  void SetRate(double rate, ApiKeys::TimePoint now) {
    if (per_minute == 0) level = rate, filled_at = now;
    per_minute = rate;
    level = std::min(level, rate);
  }
  double SecondsUntil(double wanted) const { return (wanted - level) / per_minute * 60; }
};

}  // namespace

// What a tenant may do and has done. Shared by its permits.
struct TenantState {
  std::mutex mutex;
  Bucket requests, tokens;  // guarded by mutex, as all below
  uint32_t max_concurrent = 0, running = 0;
};

struct ApiKeys::Table {
  struct Key {
    Digest digest;
    std::string tenant;
    Door door;
  };
  std::vector<Key> keys;
  std::vector<v1::Tenant> tenants;
};

void Permit::ChargeTokens(int64_t tokens, std::chrono::steady_clock::time_point now) {
  const std::lock_guard lock(mutex_);
  if (tenant_ == nullptr) return;
  const std::lock_guard tenant_lock(tenant_->mutex);
  if (tenant_->tokens.per_minute == 0) return;
  tenant_->tokens.Fill(now);
  tenant_->tokens.level -= static_cast<double>(tokens);
}

void Permit::Release() {
  const std::lock_guard lock(mutex_);
  if (tenant_ == nullptr) return;
  {
    const std::lock_guard tenant_lock(tenant_->mutex);
    --tenant_->running;
  }
  tenant_.reset();
}

absl::StatusOr<std::unique_ptr<ApiKeys>> ApiKeys::Open(const std::string& path) {
  std::unique_ptr<ApiKeys> keys(new ApiKeys(path));
  keys->stamp_ = FileStamp::Of(path);
  keys->looked_at_ = std::chrono::steady_clock::now();
  ASSIGN_OR_RETURN(auto table, keys->Read());
  keys->Adopt(std::move(table));
  return keys;
}

absl::StatusOr<std::shared_ptr<const ApiKeys::Table>> ApiKeys::Read() const {
  std::ifstream in(path_, std::ios::binary);
  if (!in) return Wrong(path_, "cannot be read");
  std::ostringstream bytes;
  bytes << in.rdbuf();
  const std::string text = bytes.str();
  if (text.size() > kMaxFileBytes) return Wrong(path_, "larger than 1 MiB");
  v1::KeyFile file;
  const auto parsed = google::protobuf::util::JsonStringToMessage(text, &file);
  if (!parsed.ok()) {  // protobuf quotes the text, which may be a key that was put in the wrong place
    return Wrong(path_, "is not the JSON of a KeyFile (docs/configuration.md, \"API keys\")");
  }
  auto table = std::make_shared<Table>();
  std::set<std::string> names, digests;
  for (int i = 0; i < file.tenants_size(); ++i) {
    const v1::Tenant& tenant = file.tenants(i);
    const std::string where = absl::StrCat("tenants[", i, "]");
    const std::string& name = tenant.name();
    const bool valid = !name.empty() && name.size() <= 64 && std::all_of(name.begin(), name.end(), [](char c) {
      return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '_' || c == '-';
    });
    if (!valid) return Wrong(path_, absl::StrCat(where, ".name: allowed 1 to 64 of [A-Za-z0-9._-]"));
    if (!names.insert(name).second) return Wrong(path_, absl::StrCat(where, ".name: ", name, " twice"));
    for (int k = 0; k < tenant.keys_size(); ++k) {
      const std::string key_where = absl::StrCat(where, ".keys[", k, "]");
      const std::string hex = absl::AsciiStrToLower(absl::StripPrefix(tenant.keys(k), kDigestPrefix));
      if (!absl::StartsWith(tenant.keys(k), kDigestPrefix) || hex.size() != 2 * sizeof(Digest) ||
          hex.find_first_not_of("0123456789abcdef") != std::string::npos) {
        return Wrong(path_,
                     absl::StrCat(key_where, ": allowed \"sha256:\" and 64 hex digits, as `millrace key` prints"));
      }
      if (!digests.insert(hex).second) return Wrong(path_, absl::StrCat(key_where, ": twice"));
      Table::Key key{{}, name, tenant.may_operate() ? Door::kOperator : Door::kPublic};
      const std::string raw = absl::HexStringToBytes(hex);
      std::copy(raw.begin(), raw.end(), key.digest.begin());
      if (key.digest == DigestOf("")) return Wrong(path_, absl::StrCat(key_where, ": is the digest of nothing"));
      table->keys.push_back(std::move(key));
    }
    table->tenants.push_back(tenant);
  }
  return table;
}

// mutex_ held, or nobody else there yet.
void ApiKeys::Adopt(std::shared_ptr<const Table> table) {
  const auto now = std::chrono::steady_clock::now();
  std::map<std::string, std::shared_ptr<TenantState>> states;
  for (const v1::Tenant& tenant : table->tenants) {
    auto& state = states[tenant.name()];
    const auto before = states_.find(tenant.name());
    state = before != states_.end() ? before->second : std::make_shared<TenantState>();
    const std::lock_guard lock(state->mutex);
    state->requests.SetRate(tenant.requests_per_minute(), now);
    state->tokens.SetRate(static_cast<double>(tenant.tokens_per_minute()), now);
    state->max_concurrent = tenant.max_concurrent();
  }
  states_ = std::move(states);
  table_ = std::move(table);
}

std::shared_ptr<const ApiKeys::Table> ApiKeys::Current() {
  const std::lock_guard lock(mutex_);
  const auto now = std::chrono::steady_clock::now();
  if (now - looked_at_ < kLookAgainAfter) return table_;
  looked_at_ = now;
  const FileStamp stamp = FileStamp::Of(path_);
  if (stamp == stamp_) return table_;
  stamp_ = stamp;
  auto table = Read();
  if (table.ok()) {
    spdlog::info("{} read again: {} keys of {} tenants", kField, (*table)->keys.size(), (*table)->tenants.size());
    Adopt(*std::move(table));
  } else {
    spdlog::error("{}; the keys before it stay", std::string(table.status().message()));
  }
  return table_;
}

absl::StatusOr<std::string> ApiKeys::Authenticate(std::optional<std::string_view> authorization, Door door) {
  const auto table = Current();
  std::string_view key;
  const absl::string_view given =
      authorization ? absl::string_view(authorization->data(), authorization->size()) : absl::string_view();
  constexpr size_t kSchemeBytes = sizeof("Bearer ") - 1;
  if (absl::StartsWithIgnoreCase(given, "Bearer ") && given.size() - kSchemeBytes <= kMaxKeyBytes) {
    key = std::string_view(given.data() + kSchemeBytes, given.size() - kSchemeBytes);
  }
  // Every key is compared, whichever fits: what can be timed says nothing about any of them.
  const Digest digest = DigestOf(key);
  const Table::Key* found = nullptr;
  for (const Table::Key& candidate : table->keys) {
    if (CRYPTO_memcmp(candidate.digest.data(), digest.data(), digest.size()) == 0) found = &candidate;
  }
  if (found == nullptr || found->door != door) return NotAdmitted();
  return found->tenant;
}

absl::StatusOr<std::shared_ptr<Permit>> ApiKeys::Admit(const std::string& tenant, TimePoint now) {
  std::shared_ptr<TenantState> state;
  {
    const std::lock_guard lock(mutex_);
    const auto found = states_.find(tenant);
    if (found == states_.end()) return NotAdmitted();  // removed since its key was looked at
    state = found->second;
  }
  const auto refuse = [](absl::string_view limit, double value, double retry_after_s) {
    return MakeError(absl::StatusCode::kResourceExhausted,
                     absl::StrCat("The limit of your key is reached: ", limit, " ", std::llround(value), "."),
                     {.code = "rate_limit_exceeded", .retry_after_s = retry_after_s});
  };
  const std::lock_guard lock(state->mutex);
  if (state->max_concurrent != 0 && state->running >= state->max_concurrent) {
    return refuse("max_concurrent", state->max_concurrent, 1);
  }
  for (Bucket* bucket : {&state->requests, &state->tokens}) {
    if (bucket->per_minute == 0) continue;
    bucket->Fill(now);
    if (bucket->level >= 1) continue;
    return refuse(bucket == &state->requests ? "requests_per_minute" : "tokens_per_minute", bucket->per_minute,
                  bucket->SecondsUntil(1));
  }
  if (state->requests.per_minute != 0) state->requests.level -= 1;
  ++state->running;
  return std::make_shared<Permit>(state);
}

std::string TenantSalt(const std::string& tenant, const std::string& salt) {
  return tenant.empty() ? salt : absl::StrCat(tenant, "/", salt);  // a tenant's name has no slash
}

std::string NewApiKey() {
  unsigned char bytes[32];
  CHECK(RAND_bytes(bytes, sizeof bytes) == 1);
  return absl::StrCat("mr-", absl::BytesToHexString({reinterpret_cast<const char*>(bytes), sizeof bytes}));
}

std::string ApiKeyDigest(std::string_view key) {
  const Digest digest = DigestOf(key);
  return absl::StrCat(kDigestPrefix,
                      absl::BytesToHexString({reinterpret_cast<const char*>(digest.data()), digest.size()}));
}

}  // namespace millrace::router
