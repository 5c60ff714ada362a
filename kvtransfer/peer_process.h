// SPDX-License-Identifier: Apache-2.0
// The other process of the tests with two: this binary again, started with --peer (main is in peer_process.cc).
//
// It connects to the address that it reads, takes everything on kToPeer, and sends N bytes on kFromPeer when a header
// says "send N". Its first message is the header "hello". It ends when its standard input does.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

#include "kvtransfer/transport_test_util.h"

namespace millrace::kvtransfer::testing {

inline constexpr uint16_t kToPeer = 2, kFromPeer = 3;

class PeerProcess {
 public:
  // `prefix` is put before the command: how to get into a network namespace.
  void Start(const std::string& parent_address, std::vector<std::string> prefix = {});
  ~PeerProcess();
  void Signal(int signal) const;
  void Stop() const;  // SIGSTOP, and waits until it has stopped
  void Kill();
  int Finish();  // lets it close by itself

 private:
  pid_t pid_ = -1;
  int pipe_ = -1;
};

}  // namespace millrace::kvtransfer::testing
