// SPDX-License-Identifier: Apache-2.0
// `millrace key`: makes an API key and what the key file holds of it.
#include <cstdio>
#include <string>

#include "services/cli/command.h"
#include "services/router/api_keys.h"

namespace millrace::cli {

int RunKey(Arguments arguments) {
  std::string tenant = "default";
  Flags flags("key", "Makes an API key",
              "Prints two lines: the key, for whoever will use it, and its entry for the file that\n"
              "security.api_keys_file names. The key is not kept anywhere; the entry tells nobody the key.\n\n"
              "  millrace key --tenant team-a");
  flags.String("tenant", &tenant, "NAME", "Whose key it will be.");
  int exit_code = kExitOk;
  if (!ParseOrExplain(flags, "key", arguments, &exit_code)) return exit_code;
  const std::string key = router::NewApiKey();
  std::printf("%s\n{\"name\": \"%s\", \"keys\": [\"%s\"]}\n", key.c_str(), tenant.c_str(),
              router::ApiKeyDigest(key).c_str());
  return kExitOk;
}

}  // namespace millrace::cli
