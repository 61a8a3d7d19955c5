"""What stands in deploy/ is of use: the policy loads and accepts no build there is, and the manifest is sound TOML."""

from __future__ import annotations

import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import pytest

from veiltune.errors import ConfigError
from veiltune.tee.attestation.policy import load_policy

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
VALUES = {
    "python": "/opt/veiltune/bin/python3",
    "prefix": "/opt/veiltune",
    "stdlib": "/usr/lib/python3.11",
    "arch_libdir": "/lib/x86_64-linux-gnu",
    "config": "/etc/veiltune/enclave.toml",
    "state": "/var/lib/veiltune",
    "keys": "/var/lib/veiltune-keys",
    "listen": "0.0.0.0:7431",
    "threads": "4",
    "enclave_size": "16G",
    "gramine": SimpleNamespace(
        libos="/usr/lib/gramine/libsysdb.so", runtimedir=lambda: "/usr/lib/gramine/runtime/glibc"
    ),
}


def manifest(keygen: str, model: str = "") -> dict[str, Any]:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)  # noqa: S701 - no HTML
    template = environment.from_string((DEPLOY / "gramine" / "enclave.manifest.template").read_text())
    return tomllib.loads(template.render(VALUES, keygen=keygen, model=model))


def test_the_example_of_a_policy_loads_and_accepts_nothing_simulated() -> None:
    policy = load_policy(DEPLOY / "policy.toml")
    assert (len(policy.sgx), len(policy.tdx), len(policy.snp)) == (1, 1, 1)
    assert not policy.allow_simulated
    assert policy.sgx[0].collateral == DEPLOY / "sgx-collateral.json"
    for digests in (policy.sgx[0].mr_enclave, policy.tdx[0].mr_td, policy.snp[0].measurements):
        assert all(len({digest[i : i + 2] for i in range(0, len(digest), 2)}) == 1 for digest in digests), "a real one"


def test_the_example_without_its_tables_is_refused(tmp_path: Path) -> None:
    text = (DEPLOY / "policy.toml").read_text()
    (tmp_path / "policy.toml").write_text(text[: text.index("[[sgx]]")])
    with pytest.raises(ConfigError, match="accepts nothing"):
        load_policy(tmp_path / "policy.toml")


@pytest.mark.parametrize("keygen", ["", "yes"])
def test_the_manifest_renders_and_leaves_nothing_to_the_host(keygen: str) -> None:
    made = manifest(keygen)
    sgx, loader = made["sgx"], made["loader"]
    assert (sgx["debug"], sgx["remote_attestation"], sgx["file_check_policy"]) == (False, "dcap", "strict")
    assert "allowed_files" not in sgx
    assert not [name for name in loader if name.startswith("insecure")]
    assert all(isinstance(value, str) for value in loader["env"].values()), "a passthrough is a table"
    assert loader["argv"][3:6] == ["veiltune", "keygen", "enclave"] if keygen else ["veiltune", "party", "enclave"]
    assert sgx["max_threads"] == 20


def test_a_sealed_model_is_all_that_the_host_may_change() -> None:
    made, without = manifest("", "/srv/model.sealed"), manifest("")
    assert made["sgx"].pop("allowed_files") == ["file:/srv/model.sealed"]
    made["fs"]["mounts"].remove({"path": "/srv/model.sealed", "uri": "file:/srv/model.sealed"})
    assert made == without


def test_what_the_enclave_writes_is_encrypted_and_what_it_reads_is_measured() -> None:
    made = manifest("")
    trusted = tuple(path.removeprefix("file:") for path in made["sgx"]["trusted_files"])
    kinds = {mount["path"]: mount.get("type", "plain") for mount in made["fs"]["mounts"]}
    assert kinds.pop("/tmp") == "tmpfs"
    assert {kinds.pop("/state"), kinds.pop("/keys")} == {"encrypted"}
    for mount in made["fs"]["mounts"]:
        if mount["path"] in kinds:
            assert mount["uri"].removeprefix("file:").rstrip("/") in {path.rstrip("/") for path in trusted}, mount
