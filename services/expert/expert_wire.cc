// SPDX-License-Identifier: Apache-2.0
// See expert_wire.h.
#include "services/expert/expert_wire.h"

#include <xxhash.h>

#include <cmath>

#include "absl/strings/str_cat.h"
#include "engine/status.h"

namespace millrace::expert {
namespace {

uint64_t Digest(ExpertHeader header, absl::Span<const uint8_t> payload) {
  header.digest = 0;
  return XXH3_64bits_withSeed(payload.data(), payload.size(), XXH3_64bits(&header, sizeof(header)));
}

absl::Status Bad(absl::string_view field, uint64_t found, absl::string_view allowed) {
  return absl::InvalidArgumentError(absl::StrCat("expert message: ", field, ": found ", found, ", allowed ", allowed));
}

}  // namespace

void SealHeader(ExpertHeader& header, absl::Span<const uint8_t> payload) {
  header.payload_bytes = payload.size();
  header.digest = Digest(header, payload);
}

uint64_t RequestBytes(const ExpertHeader& header) {
  return uint64_t{8} * header.num_experts + uint64_t{8} * header.num_pairs +
         uint64_t{header.num_rows} * static_cast<uint64_t>(RowBytes(header.format, header.hidden));
}

absl::StatusOr<ExpertHeader> DecodeHeader(absl::Span<const uint8_t> bytes) {
  ExpertHeader header;
  if (bytes.size() < sizeof(header)) return Bad("header bytes", bytes.size(), absl::StrCat(sizeof(header)));
  std::memcpy(&header, bytes.data(), sizeof(header));
  if (header.magic != ExpertHeader::kMagic) return Bad("magic", header.magic, absl::StrCat(ExpertHeader::kMagic));
  if (header.version != 1) return Bad("version", header.version, "1");
  const auto kind = static_cast<uint64_t>(header.kind);
  if (kind < 1 || kind > 3) return Bad("kind", kind, "1 to 3");
  const auto format = static_cast<uint64_t>(header.format);
  if (format < 1 || format > 2) return Bad("format", format, "1 or 2");
  if (header.payload_bytes > kMaxPayloadBytes) {
    return Bad("payload_bytes", header.payload_bytes, absl::StrCat("up to ", kMaxPayloadBytes));
  }
  // Each term below is bounded first, so that the sums cannot overflow.
  if (header.hidden == 0 || header.hidden > (1u << 16)) return Bad("hidden", header.hidden, "1 to 65536");
  if (header.num_rows > (1u << 24)) return Bad("num_rows", header.num_rows, "up to 2^24");
  if (header.num_pairs > (1u << 24)) return Bad("num_pairs", header.num_pairs, "up to 2^24");
  if (header.num_experts > (1u << 16)) return Bad("num_experts", header.num_experts, "up to 2^16");
  const uint64_t expected = header.kind == MessageKind::kRequest ? RequestBytes(header)
                            : header.kind == MessageKind::kReply
                                ? uint64_t{header.num_pairs} * RowBytes(header.format, header.hidden)
                                : header.payload_bytes;
  if (header.payload_bytes != expected) return Bad("payload_bytes", header.payload_bytes, absl::StrCat(expected));
  return header;
}

absl::Status CheckPayload(const ExpertHeader& header, absl::Span<const uint8_t> payload) {
  if (payload.size() != header.payload_bytes) {
    return absl::DataLossError(
        absl::StrCat("expert message: ", payload.size(), " bytes, header says ", header.payload_bytes));
  }
  if (Digest(header, payload) != header.digest) return absl::DataLossError("expert message: digest differs");
  return absl::OkStatus();
}

absl::StatusOr<RequestView> ParseRequest(const ExpertHeader& header, absl::Span<const uint8_t> payload,
                                         int num_experts) {
  RETURN_IF_ERROR(CheckPayload(header, payload));
  RequestView view;
  // The buffer comes from operator new, and all arrays before the rows are of four bytes.
  const auto* words = reinterpret_cast<const uint32_t*>(payload.data());
  view.experts = {reinterpret_cast<const ExpertGroup*>(words), header.num_experts};
  view.rows = {words + 2 * header.num_experts, header.num_pairs};
  view.weights = {reinterpret_cast<const float*>(view.rows.data() + header.num_pairs), header.num_pairs};
  view.data = payload.data() + 8 * (uint64_t{header.num_experts} + header.num_pairs);
  uint64_t pairs = 0;
  int64_t previous = -1;
  for (uint32_t i = 0; i < header.num_experts; ++i) {
    const int64_t id = view.experts[i].expert;
    if (id <= previous || id >= num_experts) {
      return Bad(absl::StrCat("experts[", i, "]"), static_cast<uint64_t>(id),
                 absl::StrCat("ascending ids below ", num_experts));
    }
    previous = id;
    pairs += view.experts[i].count;
  }
  if (pairs != header.num_pairs) return Bad("expert counts", pairs, absl::StrCat("a sum of ", header.num_pairs));
  for (uint32_t i = 0; i < header.num_pairs; ++i) {
    if (view.rows[i] >= header.num_rows) {
      return Bad(absl::StrCat("pair rows[", i, "]"), view.rows[i], absl::StrCat("below ", header.num_rows));
    }
    if (!std::isfinite(view.weights[i])) {
      return absl::InvalidArgumentError(absl::StrCat("expert message: weights[", i, "] is not finite"));
    }
  }
  return view;
}

std::string MakeFrame(const ExpertHeader& header, absl::Span<const uint8_t> payload) {
  std::string frame;
  frame.reserve(sizeof(header) + payload.size());
  frame.append(reinterpret_cast<const char*>(&header), sizeof(header));
  frame.append(reinterpret_cast<const char*>(payload.data()), payload.size());
  return frame;
}

}  // namespace millrace::expert
