# SPDX-License-Identifier: Apache-2.0
"""JSON schemas for kubeconform: Kubernetes' own, from its OpenAPI document, and those of custom resources.

    schemas.py SWAGGER.json CRD_FOLDER OUTPUT_FOLDER

Strict throughout: a key that the API does not know is an error, as it is for a server-side apply. One file per kind,
<kind>-<group>-<version>.json, which refers to _definitions.json for what kinds share.
"""
import glob
import json
import os
import sys

import yaml

POD_TEMPLATE = "_definitions.json#/definitions/io.k8s.api.core.v1.PodTemplateSpec"


def strict(schema, definitions_file=""):
    """The same schema with unknown keys refused and references pointed at `definitions_file`."""
    if isinstance(schema, list):
        return [strict(item, definitions_file) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {}
    for key, value in schema.items():
        if key == "$ref":
            result[key] = definitions_file + value
        elif key == "properties":
            result[key] = {name: strict(part, definitions_file) for name, part in value.items()}
        elif key.startswith("x-kubernetes-") or key in ("description", "default", "format"):
            continue
        else:
            result[key] = strict(value, definitions_file)
    if schema.get("x-kubernetes-int-or-string") or schema.get("format") == "int-or-string":
        result.pop("type", None)
        result["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if "properties" in schema and not open_ended:
        result["additionalProperties"] = False
    return result


def write(folder, name, content):
    with open(os.path.join(folder, name), "w") as out:
        json.dump(content, out)


def main():
    swagger, crds, output = sys.argv[1:]
    os.makedirs(output)
    with open(swagger) as source:
        definitions = {name: strict(schema) for name, schema in json.load(source)["definitions"].items()}
    # A quantity may be written as a number, and is by many.
    definitions["io.k8s.apimachinery.pkg.api.resource.Quantity"] = {"anyOf": [{"type": "string"}, {"type": "number"}]}
    write(output, "_definitions.json", {"definitions": definitions})
    with open(swagger) as source:
        kinds = json.load(source)["definitions"]
    count = 0
    for name, schema in kinds.items():
        for kind in schema.get("x-kubernetes-group-version-kind", []):
            parts = [kind["kind"], kind["group"].split(".")[0], kind["version"]]
            file_name = "-".join(part.lower() for part in parts if part) + ".json"
            write(output, file_name, {"$ref": f"_definitions.json#/definitions/{name}"})
            count += 1
    for path in sorted(glob.glob(os.path.join(crds, "*.yaml"))):
        with open(path) as source:
            crd = yaml.safe_load(source)
        for version in crd["spec"]["versions"]:
            schema = strict(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {
                "$ref": "_definitions.json#/definitions/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}
            if crd["spec"]["names"]["kind"] == "LeaderWorkerSet":
                template = schema["properties"]["spec"]["properties"]["leaderWorkerTemplate"]["properties"]
                template["workerTemplate"] = {"$ref": POD_TEMPLATE}
            parts = [crd["spec"]["names"]["kind"], crd["spec"]["group"].split(".")[0], version["name"]]
            write(output, "-".join(part.lower() for part in parts) + ".json", schema)
            count += 1
    print(f"{count} kinds")


if __name__ == "__main__":
    main()
