# SPDX-License-Identifier: Apache-2.0
"""What the chart refuses, and in which words: wrong keys and types by its schema, contradictions in sentences.

Tests are named after what an operator gets wrong. Each asserts the field that the message names, and what to write.
"""
import os
import re
import shlex
import subprocess
import tempfile
import unittest

from chart import CHART, OPEN, ROOT, Rendered, helm, main, refusal, template, values_files


class Refusals(unittest.TestCase):
    def refused(self, values, *words, insecure=True):
        text = refusal(dict(OPEN if insecure else {}, **values))
        for word in words:
            self.assertIn(word, text)
        return text

    def test_an_unknown_key_is_named(self):
        self.refused({"prefill": {"replcias": 3}}, "/prefill", "replcias")
        self.refused({"prefil": {"replicas": 3}}, "prefil")
        self.refused({"decode": {"config": {"cache_page": 3}}}, "/decode/config", "cache_page")
        self.refused({"decode": {"config": {"page_tokens": 100}}}, "/decode/config", "page_tokens")
        self.refused({"timers": {"renew_ms": 100}}, "/timers", "renew_ms")

    def test_a_wrong_type_is_named(self):
        for wrong in ("two", -1, 1.5, []):
            with self.subTest(wrong):
                self.refused({"decode": {"replicas": wrong}}, "/decode/replicas")
        self.refused({"decode": {"replicas": float("nan")}}, "unsupported value: NaN")
        # null is Helm's way to drop a default; what is left is no replica at all.
        self.refused({"decode": {"replicas": None}}, "decode.replicas")

    def test_a_misspelt_choice_lists_the_choices(self):
        self.refused({"model": {"device": "gpu"}}, "/model/device", "'cpu', 'cuda'")
        self.refused({"model": {"numerics": "fast"}}, "/model/numerics", "'exact', 'release'")
        self.refused({"decode": {"config": {"worker": {"log_level": "loud"}}}}, "log_level", "'debug'")
        self.refused({"modelStore": {"type": "pvc"}}, "/modelStore/type", "'claim'")
        self.refused({"transfer": {"transport": "loopback"}}, "/transfer/transport", "'ucx'")

    def test_a_role_that_a_request_needs_cannot_be_zero(self):
        self.refused({"decode": {"replicas": 0}, "prefill": {"replicas": 2}}, "decode.replicas",
                     "decode needs at least 1")
        self.refused({"prefill": {"replicas": 0}}, "prefill needs at least 1")
        self.refused({"router": {"replicas": 0}}, "router needs at least 1")
        self.assertIsNone(Rendered({"expert": {"replicas": 0}}).workload("expert"))

    def test_ports_are_ports_and_apart(self):
        self.refused({"router": {"ports": {"http": 0}}}, "/router/ports/http")
        self.refused({"router": {"ports": {"http": 70000}}}, "/router/ports/http")
        self.refused({"router": {"ports": {"http": 8081}}}, "router.ports", "http and operator are both 8081")
        self.refused({"decode": {"ports": {"grpc": 9091}}}, "decode.ports", "both 9091")
        self.refused({"decode": {"ports": {"grpc": 40000}}}, "decode.ports.grpc", "network.dataPorts")
        self.refused({"network": {"dataPorts": {"first": 5000, "last": 4000}}}, "network.dataPorts")

    def test_no_encryption_needs_a_word(self):
        self.refused({"tls": {"enabled": False}, "auth": {"existingSecret": "keys"}}, "tls.enabled: found false",
                     "--set allowInsecure=true", insecure=False)
        self.refused({}, "auth.existingSecret: found nothing", "--set tls.enabled=false,allowInsecure=true",
                     insecure=False)
        self.refused({"auth": {"existingSecret": "keys"}, "transfer": {"listen_address": "0.0.0.0"}},
                     "transfer.listen_address", "--set transfer.seal=true", insecure=False)
        self.refused({"transfer": {"seal": True}, "tls": {"enabled": False}}, "transfer.seal: found true")
        sealed = Rendered({"auth": {"existingSecret": "keys"}, "tls": {"enabled": True}, "allowInsecure": False,
                           "transfer": {"listen_address": "0.0.0.0", "seal": True}})
        self.assertIs(sealed.document()["transfer"]["seal"], True)
        self.refused({"tls": {"enabled": True, "certManager": {"enabled": True}}}, "tls.certManager.issuerRef.name")

    def test_a_secret_in_the_values_is_refused(self):
        self.refused({"router": {"config": {"api_keys": ["abc"]}}}, "/router/config", "api_keys")
        self.refused({"auth": {"keys": ["abc"]}}, "/auth", "keys")
        self.refused({"prefill": {"extraEnv": [{"name": "HF_TOKEN", "value": "abc"}]}}, "HF_TOKEN", "secretKeyRef")
        self.refused({"modelStore": {"fetch": {"env": {"AWS_SECRET_ACCESS_KEY": "abc"}}}}, "AWS_SECRET_ACCESS_KEY",
                     "existingSecret")
        self.refused({"modelStore": {"fetch": {"token": "abc"}}}, "/modelStore/fetch", "token")
        Rendered({"prefill": {"extraEnv": [{"name": "HF_TOKEN", "valueFrom": {
            "secretKeyRef": {"name": "hf", "key": "token"}}}]}})

    def test_a_missing_secret_keeps_the_pod_from_starting(self):
        # Kubernetes' own doing as long as no reference is optional and none has a default.
        job = Rendered({"model": {"path": "/models/demo"}, "modelStore": {
            "type": "claim", "verify": {"enabled": True},
            "fetch": {"enabled": True, "image": "fetch:1", "existingSecret": "hf"}}}).of("Job")[0]
        self.assertEqual(job["spec"]["template"]["spec"]["initContainers"][0]["envFrom"],
                         [{"secretRef": {"name": "hf"}}])

    def test_too_little_memory_is_refused_with_the_sum(self):
        text = self.refused({"decode": {"resources": {"limits": {"memory": "64Mi"}}}}, "decode.resources.limits.memory",
                            "found 67108864 bytes", "weights 12812878 + pages 44040192 + slots 22196224")
        self.assertIn(f"wanted at least {-(-(12812878 + 44040192 + 22196224) * 11 // 10)}", text)
        self.refused({"expert": {"resources": {"limits": {"memory": "2Mi"}}}}, "expert.resources.limits.memory")
        files = [os.path.join(CHART, "values/single-node-8gpu.yaml")]
        done = template({"gpu": {"memory": "80G"}}, files, check=False)
        self.assertIn("gpu.memory: found 80000000000 bytes for decode", done.stderr)

    def test_a_share_of_the_memory_is_no_number_of_pages(self):
        for wrong in (1.2, -1, 0.9):
            with self.subTest(wrong):
                self.refused({"decode": {"config": {"cache_pages": wrong}}}, "/decode/config/cache_pages")
        self.refused({"decode": {"config": {"cache_pages": float("nan")}}}, "unsupported value: NaN")

    def test_a_context_is_at_least_a_page(self):
        self.refused({"model": {"max_context_tokens": 100}}, "model.max_context_tokens", "128")

    def test_timers_that_contradict_each_other_name_both_keys(self):
        self.refused({"timers": {"heartbeat_ms": 2000}}, "timers.dead_after_ms", "3 * timers.heartbeat_ms")
        self.refused({"timers": {"heartbeat_ms": 1000, "lease_ttl_ms": 2000}}, "timers.lease_ttl_ms",
                     "3 * timers.heartbeat_ms")
        self.refused({"decode": {"terminationGracePeriodSeconds": 20}}, "decode.terminationGracePeriodSeconds",
                     "timers.drain_grace_ms")
        self.refused({"timers": {"drain_grace_ms": 120000}, "router": {"terminationGracePeriodSeconds": 60}},
                     "router.terminationGracePeriodSeconds", "135", "timers.drain_grace_ms")

    def test_a_default_above_its_limit_names_both_keys(self):
        self.refused({"router": {"config": {"max_tokens_limit": 100, "default_max_tokens": 200}}},
                     "router.config.default_max_tokens", "router.config.max_tokens_limit = 100")

    def test_every_expert_has_a_holder(self):
        self.refused({"expert": {"shares": ["0-7", "9-15"]}}, "expert.shares", "no pod holds expert 8")
        self.refused({"expert": {"shares": ["0-7,7", "8-15"]}}, "expert.shares[0]", "expert 7 twice")
        self.refused({"expert": {"shares": ["0-7", "8-16"]}}, "expert.shares[1]", "expert 16", "0 to 15")
        self.refused({"expert": {"shares": ["0-15"]}}, "expert.shares", "found 1 entries", "expert.replicas = 2")
        self.refused({"expert": {"shares": ["0-7", "a-b"]}}, "/expert/shares/1")
        self.refused({"expert": {"replicas": 0, "shares": ["0-15"]}}, "expert.replicas")
        self.refused({"expert": {"replicas": 3, "groupSize": 2}}, "expert.replicas", "expert.groupSize")
        self.refused({"expert": {"replicas": 32}}, "32 pods share 16 experts")
        self.refused({"expert": {"replicas": 4, "groupSize": 2}, "modelFacts": {"routedExperts": 0}},
                     "modelFacts.routedExperts")
        self.refused({"expert": {"config": {"experts": "0-7"}}}, "expert.config.experts", "expert.shares")
        Rendered({"expert": {"replicas": 3, "shares": ["0-7", "8-15", "0-3"]}})  # a replica is no mistake

    def test_a_worker_drives_one_gpu(self):
        gpu = {"resources": {"limits": {"nvidia.com/gpu": 2}}}
        self.refused({"model": {"device": "cuda"}}, "prefill.resources.limits", "wanted 1")
        self.refused({"model": {"device": "cuda"}, "decode": gpu}, "decode.resources.limits", "found 2")
        self.refused({"decode": gpu}, "decode.resources.limits", "model.device is cpu")
        self.refused({"router": gpu}, "router.resources.limits", "no weights")
        self.refused({"expert": gpu}, "expert.resources.limits", "expert.config.device is cpu")
        self.refused({"model": {"device": "cuda"}, "expert": {**gpu, "config": {"device": "cuda"}}},
                     "expert.resources.limits", "found 2", "expert.config.device cuda")
        self.refused({"model": {"device": "cuda", "numerics": "exact"}}, "model.numerics")

    def test_hostile_yaml_ends_before_a_template_sees_it(self):
        bomb = ["commonLabels:", "  a0: &a0 [x, x, x, x, x, x, x, x, x]"]
        bomb += [f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
        large = ["commonLabels:"] + [f"  k{i}: \"{'x' * 60}\"" for i in range(150000)]
        for name, text, words in (("aliases", "\n".join(bomb), "excessive aliasing"),
                                  ("10 MB", "\n".join(large), "/commonLabels"),
                                  ("tabs", "router:\n\treplicas: 1", "cannot start any token")):
            with self.subTest(name), tempfile.NamedTemporaryFile("w", suffix=".yaml") as values:
                values.write("allowInsecure: true\ntls: {enabled: false}\n" + text + "\n")
                values.flush()
                done = helm("template", "r", CHART, "--values", values.name, check=False, timeout=60)
                self.assertNotEqual(done.returncode, 0)
                self.assertIn(words, done.stderr)

    def test_a_key_written_twice_is_found_by_the_command_that_the_runbook_names(self):
        # Helm takes the last of the two and no template sees the first: it has to be looked for before. The binary
        # refuses such a document, but what Helm renders has each key once.
        with open(os.path.join(ROOT, "docs/operations.md")) as source:
            command = shlex.split(re.search(r"^ {4}(yamllint .*) VALUES$", source.read(), re.M).group(1))
        for path in [os.path.join(CHART, "values.yaml"), *values_files().values()]:
            done = subprocess.run([*command, path], capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stdout), (0, ""))
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as values:
            values.write("decode:\n  replicas: 2\n  replicas: 3\n")
            values.flush()
            done = subprocess.run([*command, values.name], capture_output=True, text=True)
            self.assertEqual(done.returncode, 1)
            self.assertIn('duplication of key "replicas"', done.stdout)
            rendered = Rendered(OPEN, files=[values.name])
        self.assertEqual(rendered.workload("decode")["spec"]["replicas"], 3)

    def test_a_document_over_its_limit_is_refused(self):
        many = {role: {"replicas": 1000} for role in ("prefill", "decode", "expert")}
        self.refused(dict(many, fullnameOverride="a" * 40, modelFacts={"routedExperts": 1000}), "cluster.json",
                     "1048576")

    def test_the_environment_is_no_second_configuration(self):
        self.refused({"router": {"extraEnv": [{"name": "MILLRACE_PORT", "value": "abc"}]}}, "MILLRACE_PORT",
                     "in the document")
        self.refused({"decode": {"extraEnv": [{"name": "UCX_TLS", "value": "rc"}]}}, "UCX_TLS", "network.ucx")
        self.refused({"network": {"ucx": {"NCCL_DEBUG": "INFO"}}}, "NCCL_DEBUG", "^UCX_")
        for role in ("router", "decode"):
            self.assertFalse(Rendered().pod_template(role)["spec"]["enableServiceLinks"])

    def test_privileges_need_an_acknowledgement_each(self):
        for values, word, switch in (
                ({"decode": {"podSecurityContext": {"runAsUser": 0}}}, "user 0", "runAsRoot"),
                ({"decode": {"securityContext": {"runAsNonRoot": False}}}, "user 0", "runAsRoot"),
                ({"expert": {"securityContext": {"privileged": True}}}, "privileges", "privileged"),
                ({"expert": {"securityContext": {"allowPrivilegeEscalation": True}}}, "privileges", "privileged"),
                ({"prefill": {"hostNetwork": True}}, "hostNetwork", "hostNetwork"),
                ({"image": {"tag": "latest"}}, "latest", "latestTag")):
            with self.subTest(switch):
                self.refused(values, word, f"--set unsafe.{switch}=true")
                Rendered(dict(values, unsafe={switch: True}))

    def test_one_router_and_a_pool_of_fixed_size(self):
        self.refused({"router": {"replicas": 2}}, "router.replicas", "second release")
        self.refused({"router": {"autoscaling": {"enabled": True}}}, "router.autoscaling")
        self.refused({"expert": {"autoscaling": {"enabled": True}}}, "expert.autoscaling")

    def test_scaling_needs_what_it_scales_by(self):
        scaling = {"enabled": True, "keda": {"enabled": True}}
        self.refused({"decode": {"autoscaling": scaling}}, "decode.autoscaling.keda.prometheusAddress")
        self.refused({"decode": {"autoscaling": {"keda": {"enabled": True}}}}, "decode.autoscaling.enabled")
        self.refused({"decode": {"autoscaling": {"enabled": True, "minReplicas": 9}}}, "minReplicas 9")

    def test_the_model_lies_on_the_volume_that_is_mounted(self):
        self.refused({"modelStore": {"type": "claim"}}, "model.path", "modelStore.mountPath")
        self.refused({"modelStore": {"type": "hostPath"}, "model": {"path": "/models/x"}}, "modelStore.hostPath")
        self.refused({"modelStore": {"hostPath": "/data"}}, "modelStore.hostPath", "modelStore.type image")
        self.refused({"modelStore": {"verify": {"enabled": True}}}, "modelStore.verify.enabled", "claim")
        self.refused({"modelStore": {"type": "claim", "fetch": {"enabled": True}}, "model": {"path": "/models/x"}},
                     "modelStore.fetch.enabled", "modelStore.fetch.image")

    def test_half_of_an_option_is_refused(self):
        self.refused({"ingress": {"enabled": True}}, "ingress.hosts")
        self.refused({"httpRoute": {"enabled": True}}, "httpRoute.parentRefs")
        self.refused({"inferencePool": {"enabled": True}}, "inferencePool.endpointPicker.name")
        self.refused({"networkPolicy": {"operators": []}}, "networkPolicy.operators")

    def test_all_problems_are_named_at_once(self):
        text = self.refused({"router": {"replicas": 2}, "decode": {"replicas": 0}}, "2 problem(s)")
        self.assertIn("router.replicas", text)
        self.assertIn("decode.replicas", text)


if __name__ == "__main__":
    main()
