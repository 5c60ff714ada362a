// SPDX-License-Identifier: Apache-2.0
// The messages between a caller and a member of the expert pool: a header of fixed size and a payload, the same bytes
// on every path.
//
//   request   experts [num_experts] {u32 id, u32 count}, pair rows u32 [num_pairs], weights f32 [num_pairs],
//             rows [num_rows, hidden]
//   reply     rows [num_pairs, hidden], in the order of the request's pairs
//   error     text
//
// Pairs are (row, expert), grouped by expert, experts ascending. Rows are BF16 in `release`, where every value is one
// already, and F32 in `exact`: nothing is rounded on the way. A wave of one member is cut into pieces of bounded size;
// a reply names caller, batch and piece, so that a late or repeated one cannot be taken for another. The digest covers
// the header too. Little endian. Thread: pure functions.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "engine/moe/expert_computer.h"
#include "services/common/incarnation.h"

namespace millrace::expert {

inline constexpr uint16_t kRequestChannel = 2;
inline constexpr uint16_t kReplyChannel = 3;
inline constexpr uint64_t kMaxPayloadBytes = 16 << 20;
// Beyond this gRPC slows down and a wave stops overlapping with the next; one pair may be larger and goes alone.
inline constexpr int64_t kPieceBytes = 1 << 20;

enum class MessageKind : uint8_t { kRequest = 1, kReply = 2, kError = 3 };

struct ExpertHeader {
  uint32_t magic = kMagic;
  uint16_t version = 1;
  MessageKind kind = MessageKind::kRequest;
  RowFormat format = RowFormat::kBf16;
  uint64_t caller_high = 0, caller_low = 0;  // incarnation of the prefill or decode worker
  uint64_t batch = 0;                        // the caller's count of MoE layers dispatched
  uint32_t piece = 0;                        // within the batch
  uint32_t wave = 0;
  uint32_t layer = 0;        // backbone layer, or their number for MTP
  uint32_t hidden = 0;       // values of a row
  uint32_t num_experts = 0;  // with at least one pair
  uint32_t num_rows = 0;
  uint32_t num_pairs = 0;
  uint32_t code = 0;  // error: absl::StatusCode
  uint64_t payload_bytes = 0;
  uint64_t digest = 0;  // XXH3-64 of the payload, seeded with that of the rest of the header

  static constexpr uint32_t kMagic = 0x5752584d;  // "MXRW"
  IncarnationId caller() const { return {caller_high, caller_low}; }
};
static_assert(sizeof(ExpertHeader) == 80, "travels as it lies in memory: no padding, little endian");

inline absl::Span<const uint8_t> HeaderBytes(const ExpertHeader& header) {
  return {reinterpret_cast<const uint8_t*>(&header), sizeof(header)};
}

// Sets payload_bytes and digest.
void SealHeader(ExpertHeader& header, absl::Span<const uint8_t> payload);

// InvalidArgument: not a header of ours, or sizes that contradict each other. The payload need not be here yet.
absl::StatusOr<ExpertHeader> DecodeHeader(absl::Span<const uint8_t> bytes);

// DataLoss: length or digest differ.
absl::Status CheckPayload(const ExpertHeader& header, absl::Span<const uint8_t> payload);

// A request's payload, taken apart in place. InvalidArgument names what is wrong (ids not ascending or not below
// `num_experts`, counts that do not add up, a row index out of range, a weight that is not finite).
struct RequestView {
  absl::Span<const ExpertGroup> experts;  // [num_experts]
  absl::Span<const uint32_t> rows;        // [num_pairs]
  absl::Span<const float> weights;        // [num_pairs]
  const uint8_t* data = nullptr;          // [num_rows, hidden]
};
absl::StatusOr<RequestView> ParseRequest(const ExpertHeader& header, absl::Span<const uint8_t> payload,
                                         int num_experts);
// Lengths of a request's payload.
uint64_t RequestBytes(const ExpertHeader& header);

// Header and payload in one string, for the gRPC stream.
std::string MakeFrame(const ExpertHeader& header, absl::Span<const uint8_t> payload);

}  // namespace millrace::expert
