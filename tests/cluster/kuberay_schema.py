"""What an API server of Kubernetes would say of a file: KubeRay's own schemas, and that of a claim of storage.

The schemas are structural: an API server drops what they do not know without a word, so a key that is misspelt would
have no effect. Here it is an error.
"""

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema

_STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
_METADATA = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"},
        "namespace": {"type": "string"},
        "labels": _STRINGS,
        "annotations": _STRINGS,
    },
}
"""Kubernetes's own ObjectMeta, which a CRD leaves to it."""
_CLAIM: dict[str, Any] = {
    "type": "object",
    "required": ["spec"],
    "properties": {
        "apiVersion": {"const": "v1"},
        "kind": {},
        "metadata": {},
        "spec": {
            "type": "object",
            "required": ["accessModes", "resources"],
            "properties": {
                "accessModes": {"type": "array", "items": {"enum": ["ReadWriteOnce", "ReadWriteMany"]}},
                "storageClassName": {"type": "string"},
                "resources": {
                    "type": "object",
                    "properties": {"requests": {"type": "object", "properties": {"storage": {"type": "string"}}}},
                },
            },
        },
    },
}
"""Of a PersistentVolumeClaim, by hand from Kubernetes's API reference: what is used here."""


def check(content: dict) -> None:
    """Validate a resource by the schema of its kind.

    Raises:
        jsonschema.ValidationError: it does not fit, or has a key that the schema does not know.
    """
    jsonschema.Draft202012Validator(_schema(content["kind"])).validate(content)


@cache
def _schema(kind: str) -> dict[str, Any]:
    if kind == "PersistentVolumeClaim":
        schema = _strict(_CLAIM)
    else:
        file = Path(__file__).parent / "crds" / f"{kind}.json.gz"
        schema = _strict(json.loads(gzip.decompress(file.read_bytes())))
        schema["properties"]["apiVersion"] = {"const": "ray.io/v1"}
    schema["properties"]["metadata"] = _strict(_METADATA)
    return schema | {"required": ["apiVersion", "kind", "metadata", "spec"]}


def _strict(schema: Any) -> Any:
    """The schema with unknown keys forbidden wherever an API server would drop them."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {
        name: {key: _strict(each) for key, each in value.items()} if name == "properties" else _strict(value)
        for name, value in schema.items()
    }
    if schema.get("nullable"):
        strict["type"] = [schema["type"], "null"]
    is_open = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields", False)
    return strict if schema.get("type") != "object" or is_open else strict | {"additionalProperties": False}
