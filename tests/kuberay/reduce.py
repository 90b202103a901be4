"""Write crds.json.gz from KubeRay's CRDs: python tests/kuberay/reduce.py FOLDER, see README.md."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import yaml

KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}
VERSION = "v1"
# What says whether a manifest is valid. The rest merges lists, fills in defaults, or needs CEL.
KEPT = (
    "additionalProperties",
    "anyOf",
    "enum",
    "items",
    "maximum",
    "maxItems",
    "maxLength",
    "minimum",
    "minItems",
    "minLength",
    "nullable",
    "pattern",
    "properties",
    "required",
    "type",
    "x-kubernetes-preserve-unknown-fields",
)


def reduced(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with the keywords in KEPT alone."""
    found = {key: value for key, value in schema.items() if key in KEPT}
    for key in ("items", "additionalProperties"):
        if isinstance(found.get(key), dict):
            found[key] = reduced(found[key])
    if "properties" in found:
        found["properties"] = {name: reduced(one) for name, one in found["properties"].items()}
    return found


def of_crd(path: Path) -> dict[str, Any]:
    """What a user writes of a CRD's resource; the operator writes its status."""
    crd = yaml.safe_load(path.read_text(encoding="utf-8"))
    (version,) = [one for one in crd["spec"]["versions"] if one["name"] == VERSION]
    schema = reduced(version["schema"]["openAPIV3Schema"])
    del schema["properties"]["status"]
    return schema


def main(folder: Path) -> None:
    schemas = {kind: of_crd(folder / f"ray.io_{name}.yaml") for kind, name in KINDS.items()}
    text = json.dumps(schemas, sort_keys=True, separators=(",", ":"))
    target = Path(__file__).with_name("crds.json.gz")
    target.write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
