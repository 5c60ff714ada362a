// SPDX-License-Identifier: Apache-2.0
// Who may use the public ports, and how much: keys, the tenants they belong to, and their quotas.
//
// Keys are 256 random bits, so a file of their SHA-256 digests tells nobody a key, and a digest needs no salt. The file
// (config.proto, KeyFile) is looked at again when it changes; one that is wrong is logged and the one before stays, so
// a slip of an editor locks nobody out. A tenant keeps its quotas' state over a change.
//
// Rates are buckets that hold a minute's worth and fill evenly. Tokens are charged when they are known (the prompt when
// it is read, each token as it is drawn), so the last request may overdraw; the next waits until that is paid back.
//
// Thread: any. `now` is an argument; only looking at the file reads the world.
#pragma once

#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "services/common/file_stamp.h"

namespace millrace::router {

struct TenantState;

// A request of a tenant that is running; it counts as one until it is released.
class Permit {
 public:
  explicit Permit(std::shared_ptr<TenantState> tenant) : tenant_(std::move(tenant)) {}
  ~Permit() { Release(); }
  Permit(const Permit&) = delete;
  Permit& operator=(const Permit&) = delete;

  void ChargeTokens(int64_t tokens, std::chrono::steady_clock::time_point now);
  void Release();  // idempotent

 private:
  std::mutex mutex_;
  std::shared_ptr<TenantState> tenant_;  // guarded by mutex_; null: released
};

class ApiKeys {
 public:
  using TimePoint = std::chrono::steady_clock::time_point;
  enum class Door { kPublic, kOperator };

  // InvalidArgument: "security.api_keys_file: ...", with what is wrong.
  static absl::StatusOr<std::unique_ptr<ApiKeys>> Open(const std::string& path);

  // The tenant whose key the value of an Authorization header holds, "Bearer KEY". Unauthenticated in the same words
  // and time whatever is wrong: nothing given, not a key, not a key of this door.
  absl::StatusOr<std::string> Authenticate(std::optional<std::string_view> authorization, Door door);

  // A place for one more request of `tenant`. ResourceExhausted names the limit and says when to come back.
  absl::StatusOr<std::shared_ptr<Permit>> Admit(const std::string& tenant, TimePoint now);

 private:
  struct Table;
  explicit ApiKeys(std::string path) : path_(std::move(path)) {}
  absl::StatusOr<std::shared_ptr<const Table>> Read() const;
  std::shared_ptr<const Table> Current();
  void Adopt(std::shared_ptr<const Table> table);

  const std::string path_;
  std::mutex mutex_;
  FileStamp stamp_;  // guarded by mutex_, as all below
  TimePoint looked_at_;
  std::shared_ptr<const Table> table_;
  std::map<std::string, std::shared_ptr<TenantState>> states_;  // by tenant
};

// The salt of a tenant's cached pages: equal salts of two tenants never meet. Without keys the request's own.
std::string TenantSalt(const std::string& tenant, const std::string& salt);

// A new key, "mr-" and 64 hex digits, and what the file holds of it: "sha256:" and 64 hex digits.
std::string NewApiKey();
std::string ApiKeyDigest(std::string_view key);

}  // namespace millrace::router
