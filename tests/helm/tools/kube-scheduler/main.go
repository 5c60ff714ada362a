// SPDX-License-Identifier: Apache-2.0

// kube-scheduler as released; tools.sh stamps the version.
package main

import (
	"os"

	"k8s.io/component-base/cli"
	"k8s.io/kubernetes/cmd/kube-scheduler/app"
)

func main() { os.Exit(cli.Run(app.NewSchedulerCommand())) }
