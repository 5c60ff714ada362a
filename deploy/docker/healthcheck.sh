#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Asks this container's operator port whether the process lives: exit 0 if it answers 200 on /healthz.
#
# One image runs every role, so both operator ports that the chart and the documents use are tried: the router's and a
# worker's. bash opens the connection itself; the image has no HTTP client.
set -u

for port in 8081 9091; do
  if { exec 3<> "/dev/tcp/127.0.0.1/$port"; } 2> /dev/null; then
    printf 'GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n' >&3
    read -r -t 2 _ status _ <&3
    exec 3>&-
    [[ "${status:-}" == 200 ]] && exit 0
  fi
done
exit 1
