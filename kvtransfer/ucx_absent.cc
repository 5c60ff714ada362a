// SPDX-License-Identifier: Apache-2.0
// What ucx_transport.h answers in a build without UCX.
#include "kvtransfer/ucx_transport.h"

namespace millrace::kvtransfer {

bool UcxAvailable() { return false; }
std::string UcxVersion() { return ""; }

absl::StatusOr<std::unique_ptr<Transport>> CreateUcxTransport(TransportOptions) {
  return absl::UnimplementedError("built without UCX: install libucx-dev and build again");
}

}  // namespace millrace::kvtransfer
