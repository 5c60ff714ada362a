# SPDX-License-Identifier: Apache-2.0
"""What a release executable must have against the exploitation of a bug, read from its ELF headers by readelf."""
import os
import re
import subprocess
import unittest

BINARY = os.environ["MILLRACE"]


def readelf(*options):
    return subprocess.run(["readelf", "--wide", *options, BINARY], capture_output=True, check=True, text=True).stdout


class Hardening(unittest.TestCase):
    def assert_found(self, pattern, text):  # assertRegex would print all of the headers
        self.assertTrue(re.search(pattern, text), f"{pattern} not found")

    def test_it_is_position_independent(self):
        self.assert_found(r"Type:\s+DYN", readelf("--file-header"))
        self.assert_found(r"FLAGS_1\).*PIE", readelf("--dynamic"))

    def test_what_the_loader_filled_in_is_read_only(self):
        self.assert_found(r"GNU_RELRO", readelf("--program-headers"))
        self.assert_found(r"FLAGS_1\).*NOW", readelf("--dynamic"))

    def test_no_memory_is_both_written_and_run(self):
        segments = re.findall(r"^\s+(LOAD|GNU_STACK)\s+(?:0x\S+\s+){5}([R ][W ][E ])", readelf("--program-headers"),
                              re.MULTILINE)
        self.assertTrue(any(kind == "GNU_STACK" for kind, _ in segments))
        self.assertGreater(len(segments), 3)
        for kind, flags in segments:
            self.assertNotEqual(flags[1:], "WE", kind)
        self.assertFalse("TEXTREL" in readelf("--dynamic"))

    def test_libraries_come_from_the_system(self):
        self.assertFalse(re.search(r"\(R(UN)?PATH\)", readelf("--dynamic")))

    def test_readers_of_others_bytes_are_compiled_with_checks(self):
        symbols = readelf("--dyn-syms")
        self.assert_found("__stack_chk_fail", symbols)
        self.assert_found(r"__(mem|str|read|recv|snprintf|vsnprintf|fprintf|printf)\w*_chk", symbols)
        # The failed assertion of a container names the libstdc++ header that made it.
        self.assert_found("__glibcxx_assert_fail", symbols)


if __name__ == "__main__":
    unittest.main(verbosity=2)
