// SPDX-License-Identifier: Apache-2.0
// See seal.h. What fails here other than a tag is out of memory or a broken OpenSSL, and ends the process.
#include "kvtransfer/seal.h"

#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/kdf.h>
#include <openssl/params.h>
#include <openssl/rand.h>

#include <algorithm>
#include <cstring>
#include <string_view>

#include "kvtransfer/status.h"

namespace millrace::kvtransfer::internal {
namespace {

constexpr std::string_view kPurpose = "millrace block seal 1";
constexpr size_t kMostAtOnce = size_t{1} << 30;  // OpenSSL counts in int

struct Free {
  void operator()(EVP_PKEY* p) const { EVP_PKEY_free(p); }
  void operator()(EVP_PKEY_CTX* p) const { EVP_PKEY_CTX_free(p); }
  void operator()(EVP_CIPHER_CTX* p) const { EVP_CIPHER_CTX_free(p); }
  void operator()(EVP_CIPHER* p) const { EVP_CIPHER_free(p); }
  void operator()(EVP_KDF* p) const { EVP_KDF_free(p); }
  void operator()(EVP_KDF_CTX* p) const { EVP_KDF_CTX_free(p); }
};
template <typename T>
using Owned = std::unique_ptr<T, Free>;

// A context a thread: making one costs more than sealing a small message.
EVP_CIPHER_CTX* Context() {
  static EVP_CIPHER* const cipher = EVP_CIPHER_fetch(nullptr, "AES-256-GCM", nullptr);
  CHECK(cipher != nullptr, "OpenSSL has no AES-256-GCM");
  thread_local const Owned<EVP_CIPHER_CTX> context = [] {
    Owned<EVP_CIPHER_CTX> made(EVP_CIPHER_CTX_new());
    CHECK(made != nullptr && EVP_CipherInit_ex2(made.get(), cipher, nullptr, nullptr, 1, nullptr) == 1);
    return made;
  }();
  return context.get();
}

struct Nonce {
  uint8_t bytes[12];
  Nonce(SealPart part, uint64_t counter) {
    std::memcpy(bytes, &part, sizeof(part));
    std::memcpy(bytes + sizeof(part), &counter, sizeof(counter));
  }
};

void Run(EVP_CIPHER_CTX* context, bool sealing, const SealBytes& key, SealPart part, uint64_t counter,
         absl::Span<const uint8_t> associated, absl::Span<const uint8_t> in, uint8_t* out) {
  const Nonce nonce(part, counter);
  int length = 0;
  CHECK(EVP_CipherInit_ex2(context, nullptr, key.data(), nonce.bytes, sealing ? 1 : 0, nullptr) == 1);
  CHECK(EVP_CipherUpdate(context, nullptr, &length, associated.data(), static_cast<int>(associated.size())) == 1);
  for (size_t at = 0; at < in.size(); at += kMostAtOnce) {
    const size_t bytes = std::min(kMostAtOnce, in.size() - at);
    CHECK(EVP_CipherUpdate(context, out + at, &length, in.data() + at, static_cast<int>(bytes)) == 1);
  }
}

}  // namespace

SealBytes RandomSealBytes() {
  SealBytes bytes;
  CHECK(RAND_priv_bytes(bytes.data(), static_cast<int>(bytes.size())) == 1, "no random numbers");
  return bytes;
}

SealKeyPair SealKeyPair::Random() {
  SealKeyPair pair;
  pair.private_ = RandomSealBytes();
  const Owned<EVP_PKEY> key(
      EVP_PKEY_new_raw_private_key(EVP_PKEY_X25519, nullptr, pair.private_.data(), pair.private_.size()));
  size_t bytes = pair.public_.size();
  CHECK(key != nullptr && EVP_PKEY_get_raw_public_key(key.get(), pair.public_.data(), &bytes) == 1);
  return pair;
}

SealKeyPair::SealKeyPair(SealKeyPair&& other) noexcept : private_(other.private_), public_(other.public_) {
  OPENSSL_cleanse(other.private_.data(), other.private_.size());
}

SealKeyPair::~SealKeyPair() { OPENSSL_cleanse(private_.data(), private_.size()); }

SealKeys::~SealKeys() {
  OPENSSL_cleanse(to_acceptor.data(), to_acceptor.size());
  OPENSSL_cleanse(to_initiator.data(), to_initiator.size());
}

absl::StatusOr<std::unique_ptr<SealKeys>> SealKeys::Derive(const SealKeyPair& own, const SealBytes& other,
                                                           const SealBytes& initiator, const SealBytes& acceptor,
                                                           const SealBytes& admission) {
  const Owned<EVP_PKEY> mine(
      EVP_PKEY_new_raw_private_key(EVP_PKEY_X25519, nullptr, own.private_.data(), own.private_.size()));
  const Owned<EVP_PKEY> theirs(EVP_PKEY_new_raw_public_key(EVP_PKEY_X25519, nullptr, other.data(), other.size()));
  CHECK(mine != nullptr && theirs != nullptr);
  const Owned<EVP_PKEY_CTX> agreement(EVP_PKEY_CTX_new(mine.get(), nullptr));
  SealBytes shared{};
  size_t bytes = shared.size();
  CHECK(agreement != nullptr && EVP_PKEY_derive_init(agreement.get()) == 1);
  if (EVP_PKEY_derive_set_peer(agreement.get(), theirs.get()) != 1 ||
      EVP_PKEY_derive(agreement.get(), shared.data(), &bytes) != 1) {
    return absl::InvalidArgumentError("seal: the peer's public key is not one to agree on a key with");
  }

  // The public keys are part of the derivation: a session is one initiator's with one acceptor, and nobody else's.
  std::vector<uint8_t> info(kPurpose.begin(), kPurpose.end());
  info.insert(info.end(), initiator.begin(), initiator.end());
  info.insert(info.end(), acceptor.begin(), acceptor.end());
  std::array<uint8_t, 2 * kSealKeyBytes> derived{};
  const Owned<EVP_KDF> kdf(EVP_KDF_fetch(nullptr, "HKDF", nullptr));
  const Owned<EVP_KDF_CTX> context(EVP_KDF_CTX_new(kdf.get()));
  char digest[] = "SHA256";
  OSSL_PARAM parameters[] = {
      OSSL_PARAM_construct_utf8_string(OSSL_KDF_PARAM_DIGEST, digest, 0),
      OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_KEY, shared.data(), shared.size()),
      OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_SALT, const_cast<uint8_t*>(admission.data()), admission.size()),
      OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_INFO, info.data(), info.size()), OSSL_PARAM_construct_end()};
  CHECK(context != nullptr && EVP_KDF_derive(context.get(), derived.data(), derived.size(), parameters) == 1);
  auto keys = std::make_unique<SealKeys>();
  std::copy_n(derived.begin(), kSealKeyBytes, keys->to_acceptor.begin());
  std::copy_n(derived.begin() + kSealKeyBytes, kSealKeyBytes, keys->to_initiator.begin());
  OPENSSL_cleanse(shared.data(), shared.size());
  OPENSSL_cleanse(derived.data(), derived.size());
  return keys;
}

void Seal(const SealBytes& key, SealPart part, uint64_t counter, absl::Span<const uint8_t> associated,
          absl::Span<const uint8_t> in, uint8_t* out, uint8_t* tag) {
  EVP_CIPHER_CTX* const context = Context();
  Run(context, true, key, part, counter, associated, in, out);
  int length = 0;
  uint8_t none[kSealTagBytes];
  CHECK(EVP_CipherFinal_ex(context, none, &length) == 1);
  CHECK(EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_GET_TAG, kSealTagBytes, tag) == 1);
}

bool Open(const SealBytes& key, SealPart part, uint64_t counter, absl::Span<const uint8_t> associated,
          absl::Span<const uint8_t> in, uint8_t* out, const uint8_t* tag) {
  EVP_CIPHER_CTX* const context = Context();
  Run(context, false, key, part, counter, associated, in, out);
  int length = 0;
  uint8_t none[kSealTagBytes];
  CHECK(EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_SET_TAG, kSealTagBytes, const_cast<uint8_t*>(tag)) == 1);
  return EVP_CipherFinal_ex(context, none, &length) == 1;
}

bool ReplayWindow::Accept(uint64_t counter) {
  if (seen_.empty()) seen_.resize(kSize / 64);
  if (counter + kSize < next_) return false;
  const auto word = [this](uint64_t c) -> uint64_t& { return seen_[c % kSize / 64]; };
  if (counter >= next_) {
    if (counter - next_ >= kSize) {
      std::fill(seen_.begin(), seen_.end(), 0);
    } else {
      for (uint64_t c = next_; c < counter; ++c) word(c) &= ~(1ull << (c % 64));
    }
    next_ = counter + 1;
    word(counter) |= 1ull << (counter % 64);
    return true;
  }
  const uint64_t bit = 1ull << (counter % 64);
  if ((word(counter) & bit) != 0) return false;
  word(counter) |= bit;
  return true;
}

}  // namespace millrace::kvtransfer::internal
