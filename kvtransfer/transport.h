// SPDX-License-Identifier: Apache-2.0
// What a transport must do: carry messages between processes into memory that the receiver chose.
//
// A message is a small header and a payload. When its header arrives, the receiver's handler names the memory for the
// payload or drops the message; no address or key of anybody's memory ever travels. Two users: the hand-off of cache
// extents (payloads of 0.5 to 64 MiB, sender.h and receiver.h) and expert rows (up to about 1 MiB, where a round trip
// should cost 12 to 30 us). A transport knows neither: it promises that bytes arrive, not that they are right, nor
// their order. Proof is the digest's business (digest.h), completeness the manifest's (manifest.h).
//
// Implementations: loopback_transport.h (in-process), ucx_transport.h (between processes); decorators of either:
// sealed_transport.h (what travels is encrypted and proved), staged_transport.h (device memory by way of the host),
// fault_transport.h (breaks things on purpose). transport_test.cc is the contract in executable form.
//
// Threads. Every method may be called from any thread, callbacks included, unless it says otherwise. Handlers and
// callbacks run one at a time on the transport thread, or on the thread inside WaitFor: they must be short (decode a
// header, look up a destination, post to a queue; compute only if it is the point) and must not call Close, WaitFor or
// SendAtOnce.
// Handlers and whatever callbacks capture must live until Close has returned.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/functional/any_invocable.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "kvtransfer/memory.h"

namespace millrace::kvtransfer {

// One connection to one incarnation of a peer, as named on this side. Never reused in a process; 0 names nobody. Both
// sides of a connection have one: whoever receives a message can answer `from` without connecting.
struct PeerId {
  uint64_t value = 0;
  friend bool operator==(PeerId a, PeerId b) { return a.value == b.value; }
  friend bool operator!=(PeerId a, PeerId b) { return a.value != b.value; }
  template <typename H>
  friend H AbslHashValue(H h, PeerId id) {
    return H::combine(std::move(h), id.value);
  }
};

// One accepted send. Never reused in a process; 0 names none.
struct SendId {
  uint64_t value = 0;
};

inline constexpr size_t kMaxHeaderBytes = 512;
inline constexpr size_t kMaxChannels = 64;

// Called once, with the outcome, when the transport no longer reads the payload. Ok says that the peer's transport took
// or dropped the bytes: what was accepted only the peer's own answer can tell.
using SendDone = absl::AnyInvocable<void(absl::Status)>;

// Called once, with the outcome, when nothing of this message can touch the destination any more, whatever the status:
// that is the fence after which the memory may be reused. Not OK means that the contents are undefined.
using ArrivalDone = absl::AnyInvocable<void(absl::Status)>;

struct IncomingMessage {
  PeerId from;
  uint16_t channel = 0;
  absl::Span<const uint8_t> header;  // valid during the call only
  size_t payload_bytes = 0;
  absl::Span<const uint8_t> payload;  // already here (small messages, host memory), valid during the call; else empty
};

// The receiver's answer to a header.
struct Placement {
  // No memory wanted: `reason` is counted (Statistics::drops). A handler that has consumed `message.payload` in place
  // answers Consumed instead.
  static Placement Drop(const char* reason) { return {Verdict::kDrop, {}, nullptr, reason}; }
  static Placement Consumed() { return {Verdict::kConsumed, {}, nullptr, ""}; }
  // `destination.bytes` must be at least the payload's, else the message is dropped and `done` gets InvalidArgument.
  static Placement Into(Memory destination, ArrivalDone done) {
    return {Verdict::kPlace, destination, std::move(done), ""};
  }

  enum class Verdict : uint8_t { kDrop, kConsumed, kPlace };
  Verdict verdict = Verdict::kDrop;
  Memory destination;
  ArrivalDone done;
  const char* reason = "";  // a literal
};

class MessageHandler {
 public:
  virtual ~MessageHandler() = default;
  virtual Placement OnMessage(const IncomingMessage& message) = 0;
};

// Told once for every connection that ends other than by our own Close: by a dead or silent peer, by its goodbye, or by
// our Disconnect. Sends of that peer have been completed before; its arrivals complete after their fence.
using PeerFailed = std::function<void(PeerId peer, const absl::Status& why)>;

struct TransportOptions {
  std::string name = "millrace";  // shows in logs of this library and of UCX
  // What may be on the wire at once. A send over a limit waits in the peer's queue; a full queue is ResourceExhausted.
  // One message larger than a limit goes alone.
  size_t max_in_flight_bytes_per_peer = 256u << 20;
  size_t max_in_flight_bytes = 1u << 30;
  size_t max_queued_messages_per_peer = 4096;
  size_t max_peers = 1024;
  // A thread that drives the transport polls this long after the last event before it sleeps in the kernel; one in
  // WaitFor only if the wait before was not much longer. 0 sleeps at once, absl::InfiniteDuration() never sleeps.
  absl::Duration spin = absl::Microseconds(50);
  absl::Duration connect_timeout = absl::Seconds(3);
  // Where connections come in, if the transport has such a thing. A numeric address of this host or the name of an
  // interface keeps all traffic to that interface; empty or a wildcard: every interface. Port 0: any free one.
  std::string listen_address;
  uint16_t listen_port = 0;
  // A thread that waits in WaitFor is expected to wait again soon: for so long after it, its own sends do not wake the
  // transport thread, which they would only race. Other threads' sends are not affected.
  absl::Duration linger = absl::Milliseconds(1);
  MemoryFunctions memory = HostMemoryFunctions();
  // One line at a time, on the transport thread: lanes of a new connection, errors nobody else can report. Null:
  // stderr.
  std::function<void(absl::string_view)> log;
};

struct TransportStatistics {
  uint64_t messages_sent = 0, messages_received = 0;     // completed without error; received means placed or consumed
  uint64_t bytes_sent = 0, bytes_received = 0;           // payload bytes of those
  uint64_t messages_in_flight = 0, bytes_in_flight = 0;  // sends given to the wire, not yet completed
  uint64_t messages_queued = 0;                          // sends waiting for room
  uint64_t arrivals_in_flight = 0;                       // placed, not yet done
  uint64_t peers_connected = 0, peers_failed = 0;        // now; ever
  absl::flat_hash_map<std::string, uint64_t> errors;     // failed sends and arrivals by status code name
  absl::flat_hash_map<std::string, uint64_t> drops;      // messages dropped on arrival by reason
  std::vector<std::string> lanes;                        // one line per connection: what really carries it
};

class Transport {
 public:
  virtual ~Transport() = default;  // closes

  // Required. Opaque bytes to hand to peers; names this incarnation. At most 8 KiB. Constant from construction on.
  virtual const std::string& address() const = 0;

  // Required. Whether payloads of this kind can leave from and land in this process.
  virtual bool Supports(MemoryKind kind) const = 0;

  // Optional. The longest header of a message; what a decorator adds to headers is taken off.
  virtual size_t max_header_bytes() const { return kMaxHeaderBytes; }

  // Required. Who gets the messages of a channel (below kMaxChannels); nullptr: messages are dropped as
  // "no_handler". Not from callbacks; after it returns the former handler is no longer called.
  virtual void SetHandler(uint16_t channel, MessageHandler* handler) = 0;

  // Required. Adds a callback for connections that end. Stays until Close.
  virtual void OnPeerFailed(PeerFailed callback) = 0;

  // Required. Names the peer at once; the connection is made behind it and sends wait for it, up to connect_timeout.
  // The same address gives the same peer while that connection lives, whichever side began it.
  // InvalidArgument: not an address, damaged, or another version's. ResourceExhausted: max_peers.
  virtual absl::StatusOr<PeerId> Connect(absl::string_view address) = 0;

  // Required. Sends header (copied) and payload (borrowed until `done`). On success `done` is called exactly once,
  // maybe before this returns only if called from a callback; on error never. Messages may overtake each other.
  // NotFound: peer unknown or failed. ResourceExhausted: queue full. InvalidArgument: header too long, channel too
  // large, memory kind unsupported.
  virtual absl::StatusOr<SendId> SendMessage(PeerId peer, uint16_t channel, absl::Span<const uint8_t> header,
                                             ConstMemory payload, SendDone done) = 0;

  // Required. A send that has not reached the wire completes with Cancelled; one that has is not recalled and completes
  // as it would have. Unknown ids are ignored.
  virtual void Cancel(SendId send) = 0;

  // Required. Ends a connection by force: its sends complete, its arrivals complete with an error after their fence,
  // the failure callbacks run, then `fenced` (may be null): from then on nothing from this peer touches our memory.
  // Bounded even if the peer hangs. Unknown peers are fenced already.
  virtual void Disconnect(PeerId peer, absl::AnyInvocable<void()> fenced) = 0;

  // Required. Runs `callback` on the transport thread after `delay` (zero: soon). Dropped, not run, by Close.
  virtual void RunAfter(absl::Duration delay, absl::AnyInvocable<void()> callback) = 0;

  // Required. Blocks until `done()` is true (result true) or `timeout` passes (false). `done` must be cheap and safe on
  // the calling thread (an atomic). For latency an implementation polls the wire on the calling thread meanwhile, so
  // that callbacks run right here and no thread switch is paid.
  virtual bool WaitFor(absl::FunctionRef<bool()> done, absl::Duration timeout) = 0;

  // Runs `post`, which sends a few small messages, and puts them on the wire on the calling thread where that spares
  // waking another. For a thread that computes a little before it waits in WaitFor.
  virtual void SendAtOnce(absl::FunctionRef<void()> post) { post(); }

  // Required. Completes everything with Cancelled, fences all memory, joins the thread. After it returns no callback
  // runs. Idempotent; not from callbacks.
  virtual void Close() = 0;

  virtual TransportStatistics statistics() const = 0;

  // Optional. A few lines for start-up and status pages: library version, devices, limits. Default: nothing.
  virtual std::string Describe() const { return ""; }
};

}  // namespace millrace::kvtransfer
