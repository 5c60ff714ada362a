# SPDX-License-Identifier: Apache-2.0
"""The Dockerfiles without an engine: what they copy exists, what they install is needed, who they run as.

deploy/docker/replay.py builds them for real, in a folder; that takes minutes and root, and is not part of a run.
"""
import importlib.util
import json
import os
import re
import subprocess
import unittest

from chart import CHART, HELM, ROOT, TOOLS, Rendered, main, values_files

BINARY = os.environ.get("MILLRACE", os.path.join(ROOT, "build/release/bin/millrace"))
HADOLINT = os.path.join(TOOLS, "bin/hadolint")
FILES = [os.path.join(ROOT, "deploy/docker", name) for name in ("Dockerfile.cpu", "Dockerfile.cuda")]


def load_replay():
    spec = importlib.util.spec_from_file_location("replay", os.path.join(ROOT, "deploy/docker/replay.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stages(path):
    """Lists of (keyword, text), one a stage."""
    found = []
    for keyword, text in load_replay().instructions(path):
        if keyword == "FROM":
            found.append([])
        found[-1].append((keyword, text))
    return found


def installed(stage):
    packages = set()
    for keyword, text in stage:
        for command in re.findall(r"apt-get install ([^&]*)", text) if keyword == "RUN" else ():
            packages |= {word for word in command.split() if not word.startswith("-")}
    return packages


def needed_packages():
    """Debian packages of the libraries that the binary names itself."""
    names = set(re.findall(r"\(NEEDED\).*\[(.*)\]", subprocess.run(
        ["readelf", "-d", BINARY], capture_output=True, text=True, check=True).stdout))
    paths = dict(re.findall(r"^\s*(\S+) => (\S+)", subprocess.run(
        ["ldd", BINARY], capture_output=True, text=True, check=True).stdout, re.M))
    packages = set()
    for name in names & set(paths):
        # dpkg knows libraries of the C library by their place before /lib became a link.
        path = os.path.realpath(paths[name])
        owner = subprocess.run(["dpkg", "-S", path, path.removeprefix("/usr")], capture_output=True, text=True).stdout
        packages.add(owner.split(":")[0])
    return packages


class Dockerfiles(unittest.TestCase):
    def each(self):
        for path in FILES:
            yield path, stages(path)

    def test_bases_are_named_by_version(self):
        for _, parts in self.each():
            earlier = set()
            for stage in parts:
                image, *rest = stage[0][1].split()
                earlier.update(rest[1:])
                if image in earlier:
                    continue
                self.assertRegex(image, r":[a-z0-9][a-z0-9.-]+$")
                self.assertNotIn("latest", image)

    def test_what_is_copied_exists_and_the_build_has_all_of_it(self):
        for _, parts in self.each():
            copied = set()
            for keyword, text in (instruction for stage in parts for instruction in stage):
                if keyword == "COPY" and "--from=" not in text:
                    for path in text.split()[:-1]:
                        copied.add(path)
                        tracked = subprocess.run(["git", "-C", ROOT, "ls-files", "--", path], capture_output=True,
                                                 text=True).stdout
                        self.assertTrue(tracked, path)
            with open(os.path.join(ROOT, "CMakeLists.txt")) as source:
                folders = set(re.findall(r"add_subdirectory\((\w+)\)", source.read()))
            self.assertLessEqual(folders | {"cmake", "CMakeLists.txt", "CMakePresets.json"}, copied)

    def test_the_context_lets_through_what_is_copied(self):
        with open(os.path.join(ROOT, ".dockerignore")) as source:
            allowed = {line[1:].strip() for line in source if line.startswith("!")}
        for _, parts in self.each():
            for keyword, text in (instruction for stage in parts for instruction in stage):
                if keyword == "COPY" and "--from=" not in text:
                    for path in text.split()[:-1]:
                        self.assertIn(path.split("/")[0], allowed)

    def test_the_last_stage_installs_what_the_binary_is_linked_against(self):
        needed = needed_packages() - {"libc6", "libgcc-s1", "libstdc++6"}  # the base image's own
        self.assertGreater(len(needed), 5)
        # gRPC brings libgrpc29 and Abseil by its own version; only what is left to us is listed.
        brought = {"libgrpc29", "libgpr29", "libupb29", "libaddress-sorting29", "libre2-9", "libc-ares2"}
        for path, parts in self.each():
            listed = installed(parts[-1])
            ucx = {"libucx0"} if path.endswith("cuda") else set()
            self.assertEqual(needed - brought - ucx - listed, set(), "linked and not installed")
            own = {"ibverbs-providers", "libibverbs1", "librdmacm1", "libnuma1"} if path.endswith("cuda") else set()
            self.assertEqual(listed - needed - own, set(), "installed and not linked")

    def test_nobody_is_root_and_the_health_is_asked(self):
        for _, parts in self.each():
            last = dict(parts[-1])
            self.assertEqual(last["USER"], "65532:65532")
            self.assertIn('CMD ["millrace", "health"', last["HEALTHCHECK"])
            self.assertEqual(json.loads(last["ENTRYPOINT"]), ["millrace"])
            self.assertFalse([text for keyword, text in parts[-1] if keyword == "ADD"])

    def test_packages_come_without_recommendations_and_leave_no_lists(self):
        for _, parts in self.each():
            for keyword, text in (instruction for stage in parts for instruction in stage):
                if keyword == "RUN" and "apt-get install" in text:
                    self.assertIn("--no-install-recommends", text)
                    self.assertIn("rm -rf /var/lib/apt/lists/*", text)

    def test_a_linter_finds_nothing(self):
        # DL3008 wants versions of Debian's packages: the archive keeps only the newest, so that a pin breaks the build
        # with the next security update.
        done = subprocess.run([HADOLINT, "--no-color", "--ignore", "DL3008", *FILES], capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout), (0, ""))

    def test_versions_agree(self):
        with open(os.path.join(CHART, "Chart.yaml")) as source:
            version = re.search(r'appVersion: "(.*)"', source.read()).group(1)
        with open(os.path.join(ROOT, "CMakeLists.txt")) as source:
            self.assertIn(f"VERSION {version} ", source.read())
        for path, parts in self.each():
            self.assertIn(f'image.version="{version}"', dict(parts[-1])["LABEL"])

    def test_the_chart_runs_what_the_image_has(self):
        rendered = Rendered(files=[values_files()["cpu-demo"]])
        targets = " ".join(text for keyword, text in stages(FILES[0])[-1] if keyword == "COPY")
        self.assertIn(rendered.document()["model"]["path"], targets)
        spec = rendered.pod_template("decode")["spec"]
        self.assertIn(f"/usr/local/bin/{spec['containers'][0]['command'][0]}", targets)
        self.assertEqual(f"{spec['securityContext']['runAsUser']}:{spec['securityContext']['runAsGroup']}",
                         dict(stages(FILES[0])[-1])["USER"])


if __name__ == "__main__":
    main(", ".join(os.path.basename(tool) for tool in (HELM, HADOLINT) if not os.path.exists(tool)))
