// SPDX-License-Identifier: Apache-2.0
// See carried_state.h.
#include "tests/golden/carried_state.h"

#include <cstring>
#include <string>
#include <vector>

#include "engine/device/device_copy.h"
#include "engine/status.h"

namespace millrace::golden {
namespace {

void Require(const absl::Status& status) { CHECK(status.ok(), status.ToString()); }

}  // namespace

void FillExtent(const Engine& engine, const CacheExtent& extent, uint8_t byte) {
  const std::vector<uint8_t> bytes(extent.bytes, byte);
  if (engine.options().device == DeviceKind::kCuda)
    return Require(CopyToDevice(extent.data, bytes.data(), extent.bytes));
  std::memcpy(extent.data, bytes.data(), extent.bytes);
}

void CopyExtent(const Engine& source, const CacheExtent& from, const Engine& target, const CacheExtent& to) {
  std::vector<uint8_t> bytes(from.bytes);
  if (source.options().device == DeviceKind::kCuda) {
    Require(CopyFromDevice(bytes.data(), from.data, from.bytes));
  } else {
    std::memcpy(bytes.data(), from.data, from.bytes);
  }
  if (target.options().device == DeviceKind::kCuda) return Require(CopyToDevice(to.data, bytes.data(), to.bytes));
  std::memcpy(to.data, bytes.data(), to.bytes);
}

void CarryState(Engine& source, SequenceId from, Engine& target, SequenceId to, int64_t max_tokens,
                int64_t num_tokens) {
  // NaN in FP32 as in E4M3 and E8M0.
  for (const CacheExtent& extent : target.Extents(to, max_tokens)) FillExtent(target, extent, 0xff);
  const std::vector<CacheExtent> sent = source.Extents(from, num_tokens), placed = target.Extents(to, num_tokens);
  CHECK(!sent.empty() && sent.size() == placed.size(), "the same extents");
  CHECK(sent.back().page == -1, "the slot comes last");
  for (size_t i = 0; i < sent.size(); ++i) {
    CHECK(sent[i].index == static_cast<int64_t>(i) && placed[i].index == sent[i].index, "indices count");
    CHECK(placed[i].bytes == sent[i].bytes && placed[i].page == sent[i].page, "an extent is the same on both sides");
    CopyExtent(source, sent[i], target, placed[i]);
  }
  Require(target.CommitImport(to, num_tokens));
  CHECK(target.Length(to) == num_tokens, "its length");
}

}  // namespace millrace::golden
