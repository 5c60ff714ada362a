// SPDX-License-Identifier: Apache-2.0
// What other processes send: rows for experts, extents, manifests, and requests between router and workers.
#include <algorithm>
#include <cstring>

#include "absl/types/span.h"
#include "engine/status.h"
#include "kvtransfer/digest.h"
#include "kvtransfer/extent_header.h"
#include "kvtransfer/manifest.h"
#include "millrace/v1/handoff.pb.h"
#include "millrace/v1/prefill.pb.h"
#include "services/decode/decode_service.h"
#include "services/expert/expert_wire.h"
#include "services/prefill/prefill_service.h"
#include "tests/fuzz/targets.h"

namespace millrace::fuzz {
namespace {

absl::Span<const uint8_t> Bytes(std::string_view text) {
  return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}

// A header and its payload as they are, then with sizes and digest made right for what they say.
void ExpertRows(std::string_view input) {
  if (input.size() < sizeof(expert::ExpertHeader)) {
    CHECK(!expert::DecodeHeader(Bytes(input)).ok());
    return;
  }
  const auto payload = Bytes(input.substr(sizeof(expert::ExpertHeader)));
  expert::ExpertHeader header;
  std::memcpy(&header, input.data(), sizeof header);
  for (const bool sealed : {false, true}) {
    if (sealed) expert::SealHeader(header, payload);
    const auto decoded = expert::DecodeHeader(expert::HeaderBytes(header));
    if (!decoded.ok() || decoded->kind != expert::MessageKind::kRequest) continue;
    const auto request = expert::ParseRequest(*decoded, payload, /*num_experts=*/16);
    if (!request.ok()) continue;
    uint64_t pairs = 0;
    for (const ExpertGroup& group : request->experts) {
      CHECK(group.expert < 16);
      pairs += group.count;
    }
    CHECK(pairs == request->rows.size() && pairs == request->weights.size());
    std::vector<float> row(decoded->hidden);
    const int64_t row_bytes = RowBytes(decoded->format, decoded->hidden);
    for (const uint32_t index : request->rows) {
      CHECK(index < decoded->num_rows);
      RowIsFinite(request->data + index * row_bytes, decoded->format, decoded->hidden);
      ConvertRow(request->data + index * row_bytes, decoded->format, decoded->hidden, RowFormat::kF32, row.data());
    }
  }
}

std::vector<std::string> ExpertSeeds() {
  expert::ExpertHeader header;
  header.hidden = 4;
  header.num_experts = 2;
  header.num_rows = 2;
  header.num_pairs = 3;
  std::vector<uint8_t> payload(expert::RequestBytes(header));
  const uint32_t words[] = {1, 2, 5, 1, 0, 1, 1};  // experts 1 (two pairs) and 5 (one), rows 0, 1, 1
  std::memcpy(payload.data(), words, sizeof words);
  expert::SealHeader(header, payload);
  return {expert::MakeFrame(header, payload)};
}

void ExtentHeader(std::string_view input) {
  using kvtransfer::internal::ExtentHeader;
  (void)kvtransfer::internal::ParseExtentHeader(Bytes(input));
  ExtentHeader header;
  if (input.size() < sizeof header) return;
  std::memcpy(&header, input.data(), sizeof header);
  header.magic = ExtentHeader::kMagic;
  header.version = ExtentHeader::kVersion;
  header.Seal();
  const auto parsed =
      kvtransfer::internal::ParseExtentHeader({reinterpret_cast<const uint8_t*>(&header), sizeof header});
  CHECK(parsed.has_value() && parsed->key() == header.key());
}
std::vector<std::string> ExtentSeeds() {
  kvtransfer::internal::ExtentHeader header;
  header.lease = 7, header.epoch = 3, header.extent_id = 2, header.bytes = 100;
  header.Seal();
  return {std::string(reinterpret_cast<const char*>(&header), sizeof header)};
}

// As it came, and with the digest made right for whatever it says: what is then accepted encodes to the same bytes.
void Manifest(std::string_view input) {
  std::string bytes(input);
  for (const bool sealed : {false, true}) {
    if (sealed) {
      if (bytes.size() < 8) return;
      const uint64_t digest = kvtransfer::ContentDigest(bytes.data(), bytes.size() - 8);
      std::memcpy(bytes.data() + bytes.size() - 8, &digest, 8);
    }
    const auto manifest = kvtransfer::DecodeManifest(bytes);
    if (!manifest.ok()) continue;
    CHECK(kvtransfer::EncodeManifest(*manifest) == bytes, "a manifest that is written otherwise than it was read");
    v1::HandoffState state;
    (void)state.ParseFromString(manifest->metadata);
  }
}
std::vector<std::string> ManifestSeeds() {
  kvtransfer::Manifest manifest;
  manifest.key = {7, 3};
  for (uint64_t id = 0; id < 4; ++id) manifest.extents.push_back({id, 100 + id, id * 99});
  v1::HandoffState state;
  state.set_request_id("r");
  state.set_token_count(5);
  manifest.metadata = state.SerializeAsString();
  kvtransfer::Seal(manifest);
  return {kvtransfer::EncodeManifest(manifest)};
}

// The first byte says which message the rest is. What passes the checks is within the limits that the loops rely on.
void WorkerRequest(std::string_view input) {
  if (input.empty()) return;
  const RequestLimits limits{.vocab_size = 1536, .max_context_tokens = 2048};
  const std::string bytes(input.substr(1));
  if (input[0] % 2 == 0) {
    v1::PrefillRequest request;
    if (!request.ParseFromString(bytes) || !prefill::CheckPrefillRequest(request, limits).ok()) return;
    CHECK(request.prompt_ids_size() >= 1 && request.prompt_ids_size() <= 2048);
    CHECK(std::all_of(request.prompt_ids().begin(), request.prompt_ids().end(),
                      [](int32_t id) { return id >= 0 && id < 1536; }));
  } else {
    v1::ReserveRequest request;
    if (!request.ParseFromString(bytes) || !decode::CheckReserve(request, limits).ok()) return;
    CHECK(request.prompt_tokens() >= 1 && request.prompt_tokens() <= 2048 && request.spec().max_tokens() >= 1);
  }
}
std::vector<std::string> WorkerSeeds() {
  v1::GenerationSpec spec;
  spec.set_max_tokens(5);
  spec.mutable_sampling()->set_top_p(1);
  spec.mutable_sampling()->set_repetition_penalty(1);
  v1::PrefillRequest prefill;
  prefill.set_request_id("r");
  prefill.set_attempt(1);
  *prefill.mutable_spec() = spec;
  for (const int id : {3, 4, 5}) prefill.add_prompt_ids(id);
  auto* target = prefill.mutable_target();
  target->mutable_lease()->set_id(7);
  target->mutable_lease()->set_epoch(3);
  target->mutable_lease()->mutable_owner()->set_low(1);
  target->set_transfer_address("somewhere");
  target->set_control_address("127.0.0.1:1");
  prefill.set_deadline_ms(1000);
  v1::ReserveRequest reserve;
  reserve.set_request_id("r");
  reserve.set_attempt(1);
  *reserve.mutable_spec() = spec;
  reserve.set_prompt_tokens(3);
  reserve.mutable_prefill()->set_low(1);
  reserve.mutable_router()->set_low(2);
  reserve.set_deadline_ms(1000);
  const RequestLimits limits{.vocab_size = 1536, .max_context_tokens = 2048};
  const auto good = prefill::CheckPrefillRequest(prefill, limits);
  CHECK(good.ok(), std::string(good.status().message()));
  return {'\0' + prefill.SerializeAsString(), '\1' + reserve.SerializeAsString()};
}

}  // namespace

std::vector<Target> WireTargets() {
  return {{"expert_rows", ExpertRows, ExpertSeeds},
          {"extent_header", ExtentHeader, ExtentSeeds},
          {"manifest", Manifest, ManifestSeeds},
          {"worker_request", WorkerRequest, WorkerSeeds}};
}

std::vector<Target> AllTargets() {
  std::vector<Target> all;
  for (const auto& group : {FrontTargets(), TextTargets(), FileTargets(), WireTargets()}) {
    all.insert(all.end(), group.begin(), group.end());
  }
  return all;
}

}  // namespace millrace::fuzz
