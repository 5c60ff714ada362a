// SPDX-License-Identifier: Apache-2.0

//go:build tools

// Names what go.mod is for, so that `go mod tidy` keeps it. Never compiled.
package clients

import _ "github.com/fullstorydev/grpcurl/cmd/grpcurl"
