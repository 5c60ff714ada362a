// SPDX-License-Identifier: Apache-2.0
// See incarnation.h.
#include "services/common/incarnation.h"

#include <sys/random.h>

#include "engine/status.h"

namespace millrace {

IncarnationId IncarnationId::Random() {
  IncarnationId id;
  while (id.empty()) {
    uint64_t words[2];
    CHECK(getrandom(words, sizeof(words), 0) == sizeof(words), "getrandom");
    id = {words[0], words[1]};
  }
  return id;
}

}  // namespace millrace
