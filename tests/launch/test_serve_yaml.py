"""The Deployment of the service: its flags, paths and probes are those of `serve`."""

import inspect
import pathlib
import re

import pytest

from vixml_jax.service import openapi, serve

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def documents():
    yaml = pytest.importorskip("yaml")
    text = (ROOT / "launch" / "serve.yaml").read_text(encoding="utf-8")
    return {found["kind"]: found for found in yaml.safe_load_all(text)}


@pytest.fixture(scope="module")
def container(documents):
    (container,) = documents["Deployment"]["spec"]["template"]["spec"]["containers"]
    return container


def test_the_command_is_one_of_serve(container):
    command, *arguments = container["args"]
    assert command == "serve"
    defined = inspect.getsource(serve.define_flags)
    for argument in arguments:
        name = re.fullmatch(r"--(\w+)=.+", argument)[1]
        assert f'"{name}"' in defined
    assert container["env"][0]["name"] == serve.TOKEN_VARIABLE


def test_probes_ask_what_the_service_answers(container):
    paths = {endpoint.path for endpoint in openapi.ENDPOINTS if endpoint.method == "GET"}
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[name]["httpGet"]["path"] in paths
        assert container[name]["httpGet"]["port"] == container["ports"][0]["name"]
    # The process is only restarted if it does not answer, not while it is opening the run.
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert f"--port={container['ports'][0]['containerPort']}" in container["args"]


def test_a_request_that_has_begun_has_time_to_end(documents, container):
    pod = documents["Deployment"]["spec"]["template"]["spec"]
    wait = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    timeout = next(float(x[12:]) for x in container["args"] if x.startswith("--timeout_s="))
    assert pod["terminationGracePeriodSeconds"] > wait + timeout


def test_names_fit_each_other(documents, container):
    spec = documents["Deployment"]["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"] == labels == documents["Service"]["spec"]["selector"]
    assert documents["Service"]["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    volumes = {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_it_runs_without_privileges(documents, container):
    pod = documents["Deployment"]["spec"]["template"]["spec"]["securityContext"]
    assert pod["runAsNonRoot"] and pod["runAsUser"] > 0
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
