// SPDX-License-Identifier: Apache-2.0
// Every bound of the HTTP front by name, with its default; tests shorten them.
//
// Thread: a value, read-only once the server runs.
#pragma once

#include <chrono>
#include <cstddef>

#include "services/router/json_reader.h"

namespace millrace::router {

// Bytes, connections and times of one listener.
struct HttpLimits {
  size_t max_uri_bytes = 4096;
  size_t max_header_bytes = 16u << 10;      // request line and all fields
  size_t max_header_line_bytes = 8u << 10;  // one field
  size_t max_header_fields = 100;
  size_t max_body_bytes = 16u << 20;        // a prompt of 1M tokens is 4 to 5 MB of English
  size_t max_body_bytes_total = 64u << 20;  // of all requests being read, or not yet parsed
  // What chunked framing may add to a body beyond half of it; one-byte chunks add five times the body.
  size_t max_chunk_overhead_bytes = 64u << 10;
  // Bytes read ahead while a request is being answered, in pipelining; beyond it TCP holds the client back.
  size_t max_read_ahead_bytes = 8u << 10;

  size_t max_connections = 1024;
  size_t max_connections_per_address = 64;

  std::chrono::milliseconds header_timeout{10'000};      // from the first byte to the end of the header
  std::chrono::milliseconds keep_alive_timeout{75'000};  // between two requests
  std::chrono::milliseconds body_idle_timeout{10'000};
  // After the grace the body must have come at this rate on average.
  std::chrono::milliseconds body_rate_grace{5'000};
  size_t min_body_bytes_per_second = 1024;
  std::chrono::milliseconds linger_timeout{1'000};  // reading on after an error, so that the client sees the answer

  // A slow reader: over the soft limit its generation pauses, and after the timeout, or at the hard limit, it ends.
  size_t soft_write_buffer_bytes = 256u << 10;
  size_t hard_write_buffer_bytes = 1u << 20;
  std::chrono::milliseconds slow_reader_timeout{10'000};
  // Unacknowledged data: finds hosts that vanished. Longer than slow_reader_timeout, because Linux counts a closed
  // window too and would otherwise cut a slow reader off before it is told why.
  std::chrono::milliseconds tcp_user_timeout{20'000};
};

// Fields of a request.
struct ApiLimits {
  JsonLimits json;
  size_t max_messages = 4096;
  size_t max_tools = 128;
  size_t max_tool_schema_bytes = 64u << 10;
  size_t max_tool_schema_depth = 16;
  size_t max_tool_name_bytes = 64;
  int max_n = 8;
  size_t max_prompts = 32;                     // of a completion request
  size_t max_choices = 64;                     // prompts times n
  int32_t completion_default_max_tokens = 16;  // OpenAI's; 0: as chat
  size_t max_stops = 4;
  size_t max_stop_bytes = 256;
  size_t max_logit_bias = 1024;
  int max_top_logprobs = 20;
  size_t max_user_bytes = 512;
  size_t max_metadata_entries = 16;
  size_t max_metadata_value_bytes = 512;
  size_t max_cache_salt_bytes = 256;
  size_t max_request_id_bytes = 128;
  size_t max_requests = 1024;  // in flight, all connections together
  std::chrono::milliseconds default_timeout{600'000};
  std::chrono::milliseconds max_timeout{3'600'000};
  std::chrono::milliseconds ping_interval{10'000};  // ": ping" while nothing else is sent
  // How long past its deadline a request may stay before the front ends it itself.
  std::chrono::milliseconds deadline_grace{2'000};
};

}  // namespace millrace::router
