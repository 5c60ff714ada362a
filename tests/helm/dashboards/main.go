// SPDX-License-Identifier: Apache-2.0
// Reads dashboards as Grafana's own types have them, strictly, and says what does not fit.
//
//	grafana-check FILE...
//
// The types come from Grafana's schemas of dashboards, panels and queries (grafana-foundation-sdk). A field that they do
// not know, that has another type or that is required and missing is an error; so is a value outside its limits. It does
// not run Grafana: whether a panel is drawn as meant, it cannot tell.
package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/cog/plugins"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
)

func check(path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var read dashboard.Dashboard
	// An empty list of errors is no nil error.
	var found cog.BuildErrors
	if err := read.UnmarshalJSONStrict(text); err != nil && (!errors.As(err, &found) || len(found) > 0) {
		return err
	}
	return read.Validate()
}

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: grafana-check FILE...")
		os.Exit(2)
	}
	// Without these, what a panel's kind and a query add would not be looked at.
	plugins.RegisterDefaultPlugins()
	status := 0
	for _, path := range os.Args[1:] {
		if err := check(path); err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", path, err)
			status = 1
		}
	}
	os.Exit(status)
}
