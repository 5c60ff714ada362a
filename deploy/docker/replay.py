#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Replays a Dockerfile without a container engine: each stage in a folder made by debootstrap, its RUN lines by chroot.

    deploy/docker/replay.py [--dockerfile FILE] [--keep FOLDER] [--ccache FOLDER] [--mirror URL=FOLDER]
                            [--have STAGE=FOLDER] [COMMAND...]

It knows the instructions that our Dockerfiles use and stops at any other. The context is what git tracks. At the end it
prints the size of the last stage, and runs COMMAND in it as the stage's USER, with the folders that its process needs.
Of FROM only debian:bookworm-slim can be had this way. Needs root, debootstrap, and Debian's packages by apt.

    deploy/docker/replay.py -- millrace run /opt/millrace/demo-model --prompt "Compute 34 + 29." --greedy

A machine that cannot reach a repository which a stage clones gives a copy of it (--mirror); one that has what a stage
would build gives that (--have), and the stage is not replayed.
"""
import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BASE = "debian:bookworm-slim"
MIRROR = "http://deb.debian.org/debian"
# What bookworm-slim leaves out of a minimal Debian.
SLIM = ("usr/share/doc", "usr/share/man", "usr/share/info", "usr/share/locale", "var/cache/apt", "var/lib/apt/lists")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def instructions(path):
    """(keyword, text) of each instruction, continuation lines joined."""
    joined = ""
    with open(path) as source:
        for line in source:
            if line.lstrip().startswith("#") or not (joined or line.strip()):
                continue
            joined += line.rstrip("\n")
            if joined.endswith("\\"):
                joined = joined[:-1] + " "
                continue
            keyword, _, text = joined.strip().partition(" ")
            yield keyword, " ".join(text.split()) if keyword != "RUN" else text
            joined = ""


class Stage:
    def __init__(self, folder):
        self.folder = folder
        self.directory, self.user, self.shell, self.environment = "/", "0:0", ["/bin/sh", "-c"], {}
        self.entrypoint = []

    def inside(self, path):
        return os.path.join(self.folder, os.path.join(self.directory, path).lstrip("/"))

    def run(self, command, user="0:0", ccache=None, mirrors=()):
        """A command by chroot, in a mount namespace that ends with it."""
        uid, gid = user.split(":")
        environment = dict(self.environment)
        mounts = ["mount --make-rprivate /", f"mount -t proc proc {self.folder}/proc",
                  f"mount --rbind /dev {self.folder}/dev", f"mount -t sysfs sysfs {self.folder}/sys -o ro"]
        if ccache:
            mounts += [f"mkdir -p {self.folder}/root/.cache/ccache",
                       f"mount --bind {ccache} {self.folder}/root/.cache/ccache"]
        # The machine's own way to the package registries, not part of the image.
        authorities = "/etc/ssl/certs/ca-certificates.crt"
        if os.path.exists(authorities) and os.path.exists(self.folder + authorities):
            mounts += [f"mount --bind {authorities} {self.folder}{authorities}"]
        for index, (url, folder) in enumerate(mirrors):
            mounts += [f"mkdir -p {self.folder}/tmp/mirror-{index}",
                       f"mount --bind {folder} {self.folder}/tmp/mirror-{index}"]
            environment |= {f"GIT_CONFIG_KEY_{index}": f"url./tmp/mirror-{index}.insteadOf",
                            f"GIT_CONFIG_VALUE_{index}": url, "GIT_CONFIG_COUNT": str(index + 1)}
        script = "; ".join(mounts) + '; exec chroot --userspec="$1" "$2" /usr/bin/env -i "${@:4}"'
        variables = [f"PATH={PATH}", "HOME=/root", *(f"{key}={value}" for key, value in environment.items())]
        subprocess.run(["unshare", "--mount", "bash", "-euc", script, "bash", f"{uid}:{gid}", self.folder, "--",
                        *variables, "/bin/sh", "-c", f"cd {shlex.quote(self.directory)} && exec \"$@\"", "sh",
                        *command], check=True)

    def size(self):
        total = 0
        for folder, _, files in os.walk(self.folder):
            for name in files:
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
        return total


def base(image, folder, stages):
    if image in stages:
        subprocess.run(["cp", "-a", "--reflink=auto", stages[image].folder, folder], check=True)
        return
    if image != BASE:
        sys.exit(f"replay: {image}: only {BASE} can be made from Debian's archive")
    subprocess.run(["debootstrap", "--variant=minbase", "--include=ca-certificates", "bookworm", folder, MIRROR],
                   check=True, stdout=subprocess.DEVNULL)
    with open(os.path.join(folder, "etc/apt/sources.list"), "w") as out:
        out.write(f"deb {MIRROR} bookworm main\ndeb {MIRROR} bookworm-updates main\n"
                  "deb http://deb.debian.org/debian-security bookworm-security main\n")
    # The machine's way to the archive is not part of the image.
    for name in ("etc/resolv.conf", "etc/hosts"):
        shutil.copy("/" + name, os.path.join(folder, name))
    for path in SLIM:
        subprocess.run(f"rm -rf {shlex.quote(os.path.join(folder, path))}/*", shell=True, check=True)


def copy(stage, stages, text):
    words = shlex.split(text)
    source = None
    if words[0].startswith("--from="):
        source = stages[words.pop(0).removeprefix("--from=")]
    *paths, target = words
    destination = stage.inside(target)
    for path in paths:
        if source:
            origin = source.inside(path)
        else:
            origin = os.path.join(ROOT, path)
            if not subprocess.run(["git", "-C", ROOT, "ls-files", "--", path], capture_output=True).stdout:
                sys.exit(f"replay: COPY {path}: git tracks nothing there")
        if os.path.isdir(origin):
            shutil.copytree(origin, destination, dirs_exist_ok=True, symlinks=True)
        else:
            into = os.path.join(destination, os.path.basename(path)) if target.endswith("/") else destination
            os.makedirs(os.path.dirname(into), exist_ok=True)
            shutil.copy2(origin, into)


def replay(path, work, ccache=None, mirrors=(), have=()):
    stages, stage = {name: Stage(folder) for name, folder in have}, None
    given = set(stages)
    for keyword, text in instructions(path):
        if keyword == "FROM":
            image, _, name = text.partition(" AS ")
            left_out = name in given
            if not left_out:
                print(f"replay: {keyword} {text}", flush=True)
                stage = Stage(os.path.join(work, f"stage-{len(stages)}"))
                base(image, stage.folder, stages)
                # A stage goes on where the one that it is made from ended.
                if image in stages:
                    stage.shell, stage.directory = stages[image].shell, stages[image].directory
                    stage.environment = dict(stages[image].environment)
                stages[name or str(len(stages))] = stage
            continue
        if left_out:
            continue
        print(f"replay: {keyword} {text[:100]}", flush=True)
        if keyword == "ARG" and "=" not in text:
            sys.exit(f"replay: ARG {text} has no default")
        if keyword == "SHELL":
            stage.shell = json.loads(text)
        elif keyword == "WORKDIR":
            stage.directory = text
            os.makedirs(stage.inside("."), exist_ok=True)
        elif keyword == "RUN":
            stage.run([*stage.shell, text], ccache=ccache, mirrors=mirrors)
        elif keyword == "COPY":
            copy(stage, stages, text)
        elif keyword in ("ENV", "ARG"):
            stage.environment.update(word.split("=", 1) for word in shlex.split(text))
        elif keyword == "USER":
            stage.user = text
        elif keyword == "ENTRYPOINT":
            stage.entrypoint = json.loads(text)
        elif keyword not in ("LABEL", "EXPOSE", "HEALTHCHECK", "CMD"):
            sys.exit(f"replay: {keyword} is not known here")
    return stage


def pair(text):
    first, equals, second = text.rpartition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text}: wanted NAME=FOLDER")
    return first, os.path.abspath(second)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dockerfile", default=os.path.join(ROOT, "deploy/docker/Dockerfile.cpu"))
    parser.add_argument("--keep", help="leave the stages in this folder")
    parser.add_argument("--ccache", help="a compiler cache to use inside; an image build has none")
    parser.add_argument("--mirror", metavar="URL=FOLDER", type=pair, action="append", default=[],
                        help="a bare copy of a git repository, used in place of its address")
    parser.add_argument("--have", metavar="STAGE=FOLDER", type=pair, action="append", default=[],
                        help="what COPY --from=STAGE is to find; the stage is not replayed")
    parser.add_argument("command", nargs="*")
    arguments = parser.parse_args()
    work = arguments.keep or tempfile.mkdtemp(prefix="millrace-replay-")
    os.makedirs(work, exist_ok=True)
    os.chmod(work, 0o755)
    try:
        stage = replay(arguments.dockerfile, work, arguments.ccache, arguments.mirror, arguments.have)
        print(f"replay: last stage {stage.size() / 1e6:.0f} MB unpacked", flush=True)
        if arguments.command:
            stage.run(arguments.command, user=stage.user)
    finally:
        if not arguments.keep:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
