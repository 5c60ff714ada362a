# SPDX-License-Identifier: Apache-2.0
"""Who may call whom, both ways: every caller, callee and port, against a table written down here.

The policies are evaluated as Kubernetes defines them: a connection stands if the caller's egress and the callee's
ingress both allow it, and a pod that no policy selects is open. Callers outside the release are pods of other
namespaces. What a CNI makes of the policies is the CNI's.
"""
import unittest

import yaml

from chart import NAMESPACE, RELEASE, ROLES, Rendered, main, values_files

# Caller, callee, port. "data" is the port range of the block transport.
ALLOWED = {
    ("client", "router", "http"), ("client", "router", "grpc"),
    ("tests", "router", "http"),
    ("prometheus", "router", "operator"), ("prometheus", "prefill", "operator"),
    ("prometheus", "decode", "operator"), ("prometheus", "expert", "operator"),
    ("prefill", "router", "control"), ("decode", "router", "control"), ("expert", "router", "control"),
    ("router", "prefill", "grpc"), ("router", "decode", "grpc"),
    ("prefill", "decode", "grpc"), ("prefill", "decode", "data"),
    ("prefill", "expert", "grpc"), ("prefill", "expert", "data"),
    ("decode", "expert", "grpc"), ("decode", "expert", "data"),
}
# The public ports are open to everybody unless networkPolicy.clients says who.
OPEN = {("router", "http"), ("router", "grpc")}


def labels_of(component, instance=RELEASE):
    return {"app.kubernetes.io/name": "millrace", "app.kubernetes.io/instance": instance,
            "app.kubernetes.io/component": component}


# name: (namespace, labels)
PODS = {role: (NAMESPACE, labels_of(role)) for role in ROLES}
PODS["tests"] = (NAMESPACE, labels_of("tests"))
PODS["client"] = ("gateway", {"app": "client"})
PODS["prometheus"] = ("monitoring", {"app": "prometheus"})
PODS["stranger"] = ("default", {"app": "stranger"})
PODS["neighbour"] = (NAMESPACE, {"app": "neighbour"})
PODS["other release"] = (NAMESPACE, labels_of("prefill", "another"))


def selects(selector, labels):
    assert set(selector) <= {"matchLabels"}, selector
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def peer_matches(peer, pod, policy_namespace):
    namespace, labels = pod
    if "namespaceSelector" in peer:
        if not selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": namespace}):
            return False
    elif namespace != policy_namespace:
        return False
    return selects(peer.get("podSelector", {}), labels)


def port_matches(ports, number):
    return any(port["protocol"] == "TCP" and port["port"] <= number <= port.get("endPort", port["port"])
               for port in ports)


def side_allows(policies, pod, direction, other, number):
    """One side's word: `direction` is "ingress" (other calls pod) or "egress" (pod calls other)."""
    selecting = [policy for policy in policies
                 if pod[0] == NAMESPACE and selects(policy["spec"]["podSelector"], pod[1])
                 and direction.capitalize() in policy["spec"]["policyTypes"]]
    if not selecting:
        return True
    key = "from" if direction == "ingress" else "to"
    return any(port_matches(rule["ports"], number)
               and (key not in rule or any(peer_matches(peer, other, NAMESPACE) for peer in rule[key]))
               for policy in selecting for rule in policy["spec"].get(direction, []))


def allowed(policies, caller, callee, number):
    return (side_allows(policies, PODS[caller], "egress", PODS[callee], number)
            and side_allows(policies, PODS[callee], "ingress", PODS[caller], number))


class Policies(unittest.TestCase):
    def check(self, rendered, roles, clients_named):
        policies = rendered.of("NetworkPolicy")
        for callee in roles:
            ports = {port["name"]: port["containerPort"]
                     for port in rendered.pod_template(callee)["spec"]["containers"][0]["ports"]}
            probes = [(name, number) for name, number in ports.items()] + [
                ("data", 32768), ("data", 60999), ("closed", 32767), ("closed", 61000), ("closed", 22)]
            for caller in set(PODS) - (set(ROLES) - set(roles)):
                for name, number in probes:
                    wanted = (caller, callee, name) in ALLOWED
                    if not clients_named and (callee, name) in OPEN and caller not in ROLES:
                        wanted = True
                    with self.subTest(f"{caller} to {callee} {name} {number}"):
                        self.assertEqual(allowed(policies, caller, callee, number), wanted)

    def test_only_what_the_table_names(self):
        values = {"networkPolicy": {"clients": [
            {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "gateway"}}}]}}
        self.check(Rendered(values), ROLES, clients_named=True)

    def test_public_ports_are_open_by_default_and_nothing_else_is(self):
        self.check(Rendered(), ROLES, clients_named=False)

    def test_without_a_pool_no_rule_names_it(self):
        rendered = Rendered({"expert": {"replicas": 0}})
        self.assertNotIn("component: expert", yaml.safe_dump_all(rendered.of("NetworkPolicy")))
        self.check(rendered, ("router", "prefill", "decode"), clients_named=False)

    def test_names_can_be_resolved_and_nothing_outside_be_reached(self):
        for policy in Rendered().of("NetworkPolicy"):
            for rule in policy["spec"]["egress"]:
                if "to" not in rule:
                    self.assertEqual({port["port"] for port in rule["ports"]}, {53})

    def test_data_ports_are_where_the_kernel_takes_them_from(self):
        rendered = Rendered({"network": {"dataPorts": {"first": 40000, "last": 41000}}})
        for role in ROLES[1:]:
            sysctls = rendered.pod_template(role)["spec"]["securityContext"]["sysctls"]
            self.assertEqual(sysctls, [{"name": "net.ipv4.ip_local_port_range", "value": "40000 41000"}])
        self.assertFalse(allowed(rendered.of("NetworkPolicy"), "prefill", "decode", 41001))
        self.assertTrue(allowed(rendered.of("NetworkPolicy"), "prefill", "decode", 41000))

    def test_every_role_of_every_values_file_has_a_policy(self):
        for name, path in values_files().items():
            with self.subTest(name):
                rendered = Rendered(files=[path])
                self.assertEqual(len(rendered.of("NetworkPolicy")), 4)


if __name__ == "__main__":
    main()
