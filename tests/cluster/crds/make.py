"""Makes the schemas beside this file from KubeRay's CRDs; NOTICE.md says which.

    git clone --depth 1 --branch v1.7.0 https://github.com/ray-project/kuberay
    python tests/cluster/crds/make.py kuberay/helm-chart/kuberay-operator/crds/ray.io_{rayclusters,rayjobs}.yaml

Of each CRD the `openAPIV3Schema` of `ray.io/v1` is kept, as it is but for the descriptions, which are most of it.
"""

import gzip
import json
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).parent
VERSION = "v1"


def without_descriptions(schema: object) -> object:
    """A schema without its texts. A property may be called `description`: that is a mapping, and stays."""
    if isinstance(schema, list):
        return [without_descriptions(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: without_descriptions(value)
        for name, value in schema.items()
        if not (name == "description" and isinstance(value, str))
    }


def schema_of(crd: dict) -> object:
    """The schema of the version that clusters here use."""
    (version,) = (version for version in crd["spec"]["versions"] if version["name"] == VERSION)
    return without_descriptions(version["schema"]["openAPIV3Schema"])


def main(files: list[str]) -> None:
    """Write `<kind>.json.gz` for every CRD; the same bytes whenever it is made."""
    for file in files:
        crd = yaml.load(Path(file).read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
        content = json.dumps(schema_of(crd), sort_keys=True, separators=(",", ":")).encode()
        (HERE / f"{crd['spec']['names']['kind']}.json.gz").write_bytes(gzip.compress(content, 9, mtime=0))


if __name__ == "__main__":
    main(sys.argv[1:])
