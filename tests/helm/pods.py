# SPDX-License-Identifier: Apache-2.0
"""Runs the pods of a rendering as processes of this machine: a kubelet, a network and its policies, in miniature.

Each pod gets a network namespace with an address of its own, on a switch in yet another namespace, so that nothing is
added to the machine's interfaces. Inside, a private mount namespace holds what the image holds (the binary and the demo
model at their places), the ConfigMap and Secrets at their mount paths, an empty /tmp and a root that is read-only. The process runs as
the user, with the environment, arguments and sysctls that the pod has. Names resolve by /etc/hosts. NetworkPolicies
become nftables rules in the pod's namespace.

It is no container runtime: no image, no cgroup, no seccomp. Needs root, ip, nft, curl and overlayfs; see missing().
"""
import os
import shutil
import subprocess
import tempfile
import time

from chart import HELM, NAMESPACE, ROOT

BINARY = os.environ.get("MILLRACE", os.path.join(ROOT, "build/release/bin/millrace"))
# What the image has, as deploy/docker/Dockerfile.cpu puts it.
IMAGE = {"/usr/local/bin/millrace": BINARY, "/opt/millrace/demo-model": os.path.join(ROOT, "deploy/demo/model")}
PREFIX = "millrace-test"
NODE = "10.77.0.1"
SERVING = b"\x00\x00\x00\x00\x02\x08\x01"  # grpc.health.v1.HealthCheckResponse{status: SERVING}, framed


def missing():
    """What this machine lacks to run pods; empty if nothing."""
    lacking = [tool for tool in ("ip", "nft", "ss", "curl", "unshare", "setpriv") if shutil.which(tool) is None]
    if not os.path.exists(HELM):
        lacking.append("helm")
    if os.geteuid() != 0:
        lacking.append("root")
    if not lacking:
        tried = subprocess.run(["unshare", "--mount", "sh", "-ec", "mount -t tmpfs t /mnt; mkdir /mnt/u /mnt/w; "
                                "mount -t overlay o -o lowerdir=/etc,upperdir=/mnt/u,workdir=/mnt/w /etc; "
                                "ip netns list"], capture_output=True, text=True)
        if tried.returncode != 0:
            lacking.append("namespaces with overlay mounts: " + tried.stderr.strip())
    return ", ".join(lacking)


def shell(*command, check=True, **options):
    return subprocess.run(command, check=check, capture_output=True, timeout=60, **options)


class Network:
    """A switch in its own namespace, and one namespace with one address per pod."""

    def __init__(self):
        self.switch = f"{PREFIX}-{os.getpid()}"
        self.namespaces = [self.switch]
        self.addresses = {}
        shell("ip", "netns", "add", self.switch)
        shell("ip", "-n", self.switch, "link", "add", "switch", "type", "bridge")
        shell("ip", "-n", self.switch, "address", "add", NODE + "/24", "dev", "switch")
        shell("ip", "-n", self.switch, "link", "set", "switch", "up")

    def add(self, name, sysctls=()):
        index = len(self.namespaces)
        namespace = f"{self.switch}-{index}"
        shell("ip", "netns", "add", namespace)
        self.namespaces.append(namespace)
        shell("ip", "-n", namespace, "link", "add", "eth0", "type", "veth", "peer", "name", f"pod{index}", "netns",
              self.switch)
        shell("ip", "-n", self.switch, "link", "set", f"pod{index}", "master", "switch", "up")
        self.addresses[name] = f"10.77.0.{index + 1}"
        shell("ip", "-n", namespace, "address", "add", self.addresses[name] + "/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            shell("ip", "-n", namespace, "link", "set", device, "up")
        for sysctl in sysctls:
            path = "/proc/sys/" + sysctl["name"].replace(".", "/")
            shell("ip", "netns", "exec", namespace, "sh", "-ec", f'echo "{sysctl["value"]}" > {path}')
        return namespace

    def close(self):
        for namespace in reversed(self.namespaces):
            shell("ip", "netns", "del", namespace, check=False)


class Pod:
    """One pod: its namespace, its process, and what its probes say."""

    def __init__(self, name, labels, spec, network):
        self.name, self.labels, self.spec = name, labels, spec
        self.container = spec["containers"][0]
        self.network = network
        self.namespace = network.add(name, spec["securityContext"].get("sysctls", ()))
        self.address = network.addresses[name]
        self.process = self.log = None

    def start(self, directory, config_maps, secrets, hosts):
        scratch = tempfile.mkdtemp(prefix=self.name + "-", dir=directory)
        with open(os.path.join(scratch, "hosts"), "w") as out:
            out.write("127.0.0.1 localhost\n" + hosts)
        for volume in self.spec.get("volumes", []):
            if "configMap" in volume:
                files = config_maps[volume["configMap"]["name"]]
            elif "secret" in volume:
                files = secrets[volume["secret"]["secretName"]]
            else:
                continue
            os.makedirs(os.path.join(scratch, "volumes", volume["name"]))
            for key, text in files.items():
                with open(os.path.join(scratch, "volumes", volume["name"], key), "w") as out:
                    out.write(text)
        self.secrets = secrets
        self.log = os.path.join(directory, self.name + ".log")
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, "unshare", "--mount", "--uts", "sh", "-ec",
                 self.script(scratch), "sh", *self.command()],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={})

    def command(self):
        environment = {"POD_NAME": self.name}
        arguments = self.container["command"] + self.container["args"]
        return [argument.replace("$(POD_NAME)", environment["POD_NAME"]) for argument in arguments]

    def script(self, scratch):
        """Mounts what the container sees, gives up everything, and becomes the process."""
        context = dict(self.spec["securityContext"], **self.container["securityContext"])
        lines = [f"hostname {self.name}", "export PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
                 f"mkdir {scratch}/layers", f"mount -t tmpfs layers {scratch}/layers"]
        for folder in ("/etc", "/opt", "/usr/local/bin"):
            layer = f"{scratch}/layers{folder}"
            lines += [f"mkdir -p {layer}/upper {layer}/work",
                      f"mount -t overlay overlay -o lowerdir={folder},upperdir={layer}/upper,workdir={layer}/work "
                      f"{folder}"]
        lines += [f"cp {scratch}/hosts /etc/hosts"]
        for target, source in IMAGE.items():
            lines += [f"mkdir -p {target}" if os.path.isdir(source) else f"touch {target}",
                      f"mount --bind {source} {target}"]
        empty = []  # last: an empty /tmp hides the scratch folder
        for mount in self.container.get("volumeMounts", []):
            volume = next(item for item in self.spec["volumes"] if item["name"] == mount["name"])
            path = mount["mountPath"]
            if "configMap" in volume or "secret" in volume:
                lines += [f"mkdir -p {path}", f"cp {scratch}/volumes/{volume['name']}/* {path}"]
            elif "emptyDir" in volume:
                empty += [f"mount -t tmpfs -o mode=1777,size=64m empty {path}"]
            else:
                raise AssertionError(f"{self.name}: no way to mount {volume}")
        lines += empty
        if context["readOnlyRootFilesystem"]:
            lines += [f"mount -o remount,bind,ro {folder}" for folder in ("/etc", "/opt", "/usr/local/bin", "/")]
        for variable in self.container.get("env", []):
            if "value" in variable:
                lines += [f"export {variable['name']}='{variable['value']}'"]
            elif "secretKeyRef" in variable.get("valueFrom", {}):
                source = variable["valueFrom"]["secretKeyRef"]
                lines += [f"export {variable['name']}='{self.secrets[source['name']][source['key']]}'"]
        privileges = "" if context["allowPrivilegeEscalation"] else "--no-new-privs"
        drop = "--bounding-set=-all --inh-caps=-all" if context["capabilities"]["drop"] == ["ALL"] else ""
        lines += [f"exec setpriv --reuid {context['runAsUser']} --regid {context.get('runAsGroup', 0)} --clear-groups "
                  f"{privileges} {drop} \"$@\""]
        return "\n".join(lines)

    # Probes, asked from the node as the kubelet does.

    def port(self, name):
        if isinstance(name, int):
            return name
        return next(port["containerPort"] for port in self.container["ports"] if port["name"] == name)

    def probe(self, kind):
        probe = self.container[kind]
        seconds = str(probe.get("timeoutSeconds", 1))
        if "httpGet" in probe:
            url = f"http://{self.address}:{self.port(probe['httpGet']['port'])}{probe['httpGet']['path']}"
            done = self.from_node("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-m", seconds, url)
            return done.stdout[:1] in (b"2", b"3")
        url = f"http://{self.address}:{self.port(probe['grpc']['port'])}/grpc.health.v1.Health/Check"
        done = self.from_node("curl", "-s", "-m", seconds, "--http2-prior-knowledge", "-H", "te: trailers", "-H",
                              "content-type: application/grpc", "--data-binary", "@-", url, input=b"\x00" * 5)
        return done.stdout == SERVING

    def from_node(self, *command, **options):
        return shell("ip", "netns", "exec", self.network.switch, *command, check=False, **options)

    def wait(self, kind, seconds):
        """Until the probe succeeds, or as often as it may fail."""
        probe = self.container[kind]
        end = time.monotonic() + min(seconds, probe["periodSeconds"] * probe.get("failureThreshold", 3))
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise AssertionError(f"{self.name} ended with {self.process.returncode}\n{self.tail()}")
            if self.probe(kind):
                return
            time.sleep(0.2)
        raise AssertionError(f"{self.name}: {kind} never succeeded\n{self.tail()}")

    def terminate(self):
        """As the kubelet ends a pod: preStop, SIGTERM, and SIGKILL after the grace. True: it ended by itself."""
        end = time.monotonic() + self.spec["terminationGracePeriodSeconds"]
        pre_stop = self.container.get("lifecycle", {}).get("preStop")
        if pre_stop:
            subprocess.run(pre_stop["exec"]["command"], check=True)
        self.process.terminate()
        try:
            self.process.wait(max(0.1, end - time.monotonic()))
            return self.process.returncode == 0
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return False

    def tail(self):
        with open(self.log, errors="replace") as log:
            return f"--- {self.name} ({self.log})\n" + "".join(log.readlines()[-25:])

    # Policies.

    def apply_policies(self, policies, pods, outsiders):
        """nftables rules of this pod's namespace. `outsiders`: name -> (namespace labels, address) of other pods."""
        selecting = [policy["spec"] for policy in policies if matches(policy["spec"]["podSelector"], self.labels)]
        if not selecting:
            return
        rules = ["table inet calls {"]
        for hook, key, side, word in (("input", "ingress", "from", "saddr"), ("output", "egress", "to", "daddr")):
            rules += [f" chain {hook} {{", f"  type filter hook {hook} priority 0; policy drop;",
                      "  meta oif lo accept" if hook == "output" else "  meta iif lo accept",
                      "  ct state established,related accept", "  meta l4proto { icmp, icmpv6 } accept"]
            if hook == "input":
                rules += [f"  ip saddr {NODE} accept"]
            for spec in selecting:
                for rule in spec[key]:
                    addresses = peer_addresses(rule.get(side), pods, outsiders)
                    ports = ", ".join(port_range(port) for port in rule["ports"] if port["protocol"] == "TCP")
                    where = "" if addresses is None else f"ip {word} {{ {', '.join(addresses)} }} "
                    if addresses is None or addresses:
                        rules += [f"  {where}tcp dport {{ {ports} }} accept"]
            rules += [" }"]
        rules += ["}"]
        shell("ip", "netns", "exec", self.namespace, "nft", "-f", "-", input="\n".join(rules).encode())


def matches(selector, labels):
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def port_range(port):
    last = port.get("endPort", port["port"])
    return str(last) if last == port["port"] else f"{port['port']}-{last}"


def peer_addresses(peers, pods, outsiders):
    """Addresses that a rule's peers stand for; None for everybody."""
    if peers is None:
        return None
    found = []
    for peer in peers:
        if "namespaceSelector" in peer:
            found += [address for labels, address in outsiders.values() if matches(peer["namespaceSelector"], labels)]
        else:
            found += [pod.address for pod in pods if matches(peer["podSelector"], pod.labels)]
    return found


class Node:
    """All pods of a rendering on one machine."""

    def __init__(self, rendered, secrets=None):
        self.secrets = secrets or {}  # by name: what each file holds
        self.directory = tempfile.mkdtemp(prefix="millrace-pods-")
        os.chmod(self.directory, 0o755)
        self.rendered = rendered
        self.network = Network()
        self.config_maps = {item["metadata"]["name"]: item["data"] for item in rendered.of("ConfigMap")}
        self.pods, self.outsiders = {}, {}
        for role in ("router", "prefill", "decode", "expert"):
            workload = rendered.workload(role)
            template = rendered.pod_template(role)
            for ordinal in range(workload["spec"]["replicas"]):
                name = f"{workload['metadata']['name']}-{ordinal}"
                self.pods[name] = Pod(name, template["metadata"]["labels"], template["spec"], self.network)
        for item in rendered.of("Pod"):
            name = item["metadata"]["name"]
            self.pods[name] = Pod(name, item["metadata"]["labels"], item["spec"], self.network)

    def add_outsider(self, name, namespace):
        """A pod of somebody else's, in another Kubernetes namespace."""
        network_namespace = self.network.add(name)
        self.outsiders[name] = ({"kubernetes.io/metadata.name": namespace}, self.network.addresses[name])
        return network_namespace

    def of_role(self, role):
        return [pod for pod in self.pods.values() if pod.labels["app.kubernetes.io/component"] == role]

    def hosts(self):
        """Names that cluster DNS would answer: Services with one pod behind them, and pods of headless Services."""
        lines = []
        for service in self.rendered.of("Service"):
            domain = f"{service['metadata']['name']}.{NAMESPACE}.svc.cluster.local"
            for pod in self.pods.values():
                if matches({"matchLabels": service["spec"]["selector"]}, pod.labels):
                    name = f"{pod.name}.{domain}" if service["spec"].get("clusterIP") == "None" else domain
                    lines.append(f"{pod.address} {name}\n")
        return "".join(lines)

    def apply_policies(self):
        for pod in self.pods.values():
            pod.apply_policies(self.rendered.of("NetworkPolicy"), self.pods.values(), self.outsiders)

    def start(self, pod):
        pod.start(self.directory, self.config_maps, self.secrets, self.hosts())

    def can_connect(self, namespace, pod, port):
        """Whether a TCP connection from a network namespace to a pod's port stands within a second."""
        done = shell("ip", "netns", "exec", namespace, "timeout", "1", "bash", "-c",
                     f"exec 3<>/dev/tcp/{pod.address}/{port}", check=False)
        return done.returncode == 0

    def close(self):
        for pod in self.pods.values():
            if pod.process is not None and pod.process.poll() is None:
                pod.process.kill()
                pod.process.wait()
        self.network.close()
        shutil.rmtree(self.directory, ignore_errors=True)

