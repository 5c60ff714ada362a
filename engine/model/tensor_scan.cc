// SPDX-License-Identifier: Apache-2.0
// Scans for values that are not numbers: see tensor_scan.h.
#include "engine/model/tensor_scan.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "engine/status.h"

namespace millrace {
namespace {

struct Findings {
  int64_t count = 0;
  int64_t first = -1;
};

// `is_bad` is a bit test, so the inner loop becomes a few vector instructions; only blocks with a finding are looked at
// twice. Words are copied out because tensors may lie unaligned in the file.
template <typename Word, typename IsBad>
Findings Scan(const uint8_t* data, int64_t elements, IsBad is_bad) {
  constexpr int64_t kBlock = 4096;
  Word block[kBlock];
  Findings findings;
  for (int64_t at = 0; at < elements; at += kBlock) {
    const int64_t n = std::min(kBlock, elements - at);
    std::memcpy(block, data + at * static_cast<int64_t>(sizeof(Word)), static_cast<size_t>(n) * sizeof(Word));
    int64_t bad = 0;
    for (int64_t i = 0; i < n; ++i) bad += is_bad(block[i]) ? 1 : 0;
    if (bad > 0 && findings.first < 0) {
      findings.first = at + (std::find_if(block, block + n, is_bad) - block);
    }
    findings.count += bad;
  }
  return findings;
}

Findings ScanDType(const HostTensor& tensor) {
  const int64_t n = tensor.elements();
  switch (tensor.dtype) {
    case DType::kF32:
      return Scan<uint32_t>(tensor.data, n, [](uint32_t v) { return (v & 0x7f800000u) == 0x7f800000u; });
    case DType::kBF16:
      return Scan<uint16_t>(tensor.data, n, [](uint16_t v) { return (v & 0x7f80u) == 0x7f80u; });
    case DType::kF16:
      return Scan<uint16_t>(tensor.data, n, [](uint16_t v) { return (v & 0x7c00u) == 0x7c00u; });
    case DType::kF8E4M3:
      return Scan<uint8_t>(tensor.data, n, [](uint8_t v) { return (v & 0x7fu) == 0x7fu; });
    case DType::kF8E8M0:
      return Scan<uint8_t>(tensor.data, n, [](uint8_t v) { return v == 0xffu; });
    case DType::kI64:
    case DType::kI32:
    case DType::kI8:
    case DType::kU8:
      return {};
  }
  return {};
}

}  // namespace

absl::Status CheckFinite(const std::string& file, const std::string& name, const HostTensor& tensor) {
  const Findings findings = ScanDType(tensor);
  if (findings.count == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(file, ": tensor ", name, ": found ", findings.count,
                                                 " values that are NaN or infinite, the first at index ",
                                                 findings.first, ", expected none"));
}

absl::Status CheckExpertIds(const std::string& file, const std::string& name, const HostTensor& tensor,
                            int64_t num_experts) {
  CHECK(tensor.dtype == DType::kI64 && tensor.shape.size() == 2, name);
  const int64_t k = tensor.shape[1];
  std::vector<int64_t> row(static_cast<size_t>(k));
  const size_t row_bytes = row.size() * sizeof(int64_t);
  for (int64_t token = 0; token < tensor.shape[0]; ++token) {
    std::memcpy(row.data(), tensor.data + static_cast<size_t>(token) * row_bytes, row_bytes);
    for (int64_t i = 0; i < k; ++i) {
      if (row[i] < 0 || row[i] >= num_experts) {
        return absl::InvalidArgumentError(absl::StrCat(file, ": tensor ", name, ": found expert ", row[i], " at index ",
                                                       token * k + i, ", expected 0 to ", num_experts - 1));
      }
      if (std::find(row.begin(), row.begin() + i, row[i]) != row.begin() + i) {
        return absl::InvalidArgumentError(absl::StrCat(file, ": tensor ", name, ": found expert ", row[i],
                                                       " twice for token ", token, ", expected ", k,
                                                       " different ones"));
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace millrace
