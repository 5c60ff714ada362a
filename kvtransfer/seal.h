// SPDX-License-Identifier: Apache-2.0
// The cryptography of sealed transports: identities, session keys, sealing and opening, replays. Internal to
// kvtransfer; what goes over the wire and why is in sealed_transport.h.
//
// X25519, HKDF-SHA256 and AES-256-GCM of OpenSSL, nothing of our own. Keys are wiped when they go and never printed.
//
// Thread: values and pure functions; a Session's counter and window are its owner's to guard.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace millrace::kvtransfer::internal {

inline constexpr size_t kSealKeyBytes = 32;  // of X25519 keys, admission secrets and session keys alike
inline constexpr size_t kSealTagBytes = 16;
using SealBytes = std::array<uint8_t, kSealKeyBytes>;

// An X25519 key pair of one incarnation or of one connection. Wiped when it goes.
class SealKeyPair {
 public:
  static SealKeyPair Random();
  SealKeyPair(SealKeyPair&&) noexcept;
  SealKeyPair& operator=(SealKeyPair&&) = delete;
  ~SealKeyPair();
  const SealBytes& public_key() const { return public_; }

 private:
  friend struct SealKeys;
  SealKeyPair() = default;
  SealBytes private_{}, public_{};
};

SealBytes RandomSealBytes();

// The two keys of a connection, one a direction: whoever began it seals with `to_acceptor`. Wiped when they go.
struct SealKeys {
  SealBytes to_acceptor{}, to_initiator{};

  SealKeys() = default;
  SealKeys(const SealKeys&) = delete;
  SealKeys& operator=(const SealKeys&) = delete;
  ~SealKeys();

  // Both sides derive the same from what each has: its own pair, the other's public key, and the acceptor's admission
  // secret. InvalidArgument: a public key that yields no shared secret.
  static absl::StatusOr<std::unique_ptr<SealKeys>> Derive(const SealKeyPair& own, const SealBytes& other,
                                                          const SealBytes& initiator, const SealBytes& acceptor,
                                                          const SealBytes& admission);
};

// Which of a message's two parts: each has a nonce of its own.
enum class SealPart : uint32_t { kHeader = 1, kPayload = 2 };

// AES-256-GCM with nonce (part, counter). `in` and `out` have one length and may be the same memory. A key must never
// meet the same part and counter twice.
void Seal(const SealBytes& key, SealPart part, uint64_t counter, absl::Span<const uint8_t> associated,
          absl::Span<const uint8_t> in, uint8_t* out, uint8_t* tag);
// False: not what was sealed with this key, part, counter and associated data; `out` is then undefined.
[[nodiscard]] bool Open(const SealBytes& key, SealPart part, uint64_t counter, absl::Span<const uint8_t> associated,
                        absl::Span<const uint8_t> in, uint8_t* out, const uint8_t* tag);

// Which counters of a connection were seen: each is new once, and one further back than the window never is.
class ReplayWindow {
 public:
  static constexpr uint64_t kSize = 1 << 16;  // far more than can overtake each other: queues hold 4,096
  bool Accept(uint64_t counter);

 private:
  uint64_t next_ = 0;           // one past the highest seen
  std::vector<uint64_t> seen_;  // a bit a counter, modulo kSize; empty until the first
};

}  // namespace millrace::kvtransfer::internal
