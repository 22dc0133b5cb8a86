"""`tidegate lint`: files as Docker reads them, verdicts as the running agent gives them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from agent import composefile
from agent.cli import NEGATIVE, OK, USAGE, main
from agent.compile import compile_snapshot
from agent.composefile import Kind, Port, Project, Service, interpolate
from agent.config.settings import Settings, load
from agent.errors import ComposeFileError
from agent.lint import Level, Outcome, Report, Verdict, lint
from agent.model import (
    Attachment,
    Instance,
    InstanceState,
    Snapshot,
    SourceSnapshot,
    Workload,
    WorkloadKey,
    WorkloadKind,
)
from tests.unit.clusters import check_golden


def read(*texts: str, environment: Mapping[str, str] | None = None, **more) -> Project:
    files = [(f"{chr(97 + number)}.yml", text) for number, text in enumerate(texts)]
    return composefile.read(files, environment=environment or {}, name="shop", **more)


def only(project: Project) -> Service:
    (service,) = project.services
    return service


def judge(*texts: str, environment: Mapping[str, str] | None = None, **more) -> Report:
    files = [(f"{chr(97 + number)}.yml", text) for number, text in enumerate(texts)]
    settings = more.pop("settings", Settings())
    return lint(files, settings, environment=environment or {}, **({"name": "shop"} | more))


def of(report: Report, key: str) -> Verdict:
    return next(verdict for verdict in report.verdicts if verdict.key == key)


def reasons(verdict: Verdict, level: Level = Level.REJECTED) -> list[str]:
    return [finding.reason for finding in verdict.findings if finding.level is level]


PROXY = """
  openresty:
    image: tidegate/openresty
    networks: [edge]
    deploy: { labels: { interlock.ext.name: nginx } }
"""
STACK = f"""\
version: "3.8"
services:
  web:
    image: shop/web
    networks: [edge]
    deploy:
      replicas: 2
      labels:
        interlock.hostname: www
        interlock.domain: example.com
        interlock.port: "8080"
{PROXY}
networks:
  edge:
"""


class TestReading:
    def test_labels_as_a_list_and_as_a_mapping_are_the_same(self):
        listed = only(read("services: {a: {labels: [interlock.port=80, x, 'y=a=b']}}"))
        mapped = only(read('services: {a: {labels: {interlock.port: 80, x: , y: "a=b"}}}'))
        for service in (listed, mapped):
            values = {name: label.value for name, label in service.labels.items()}
            assert values == {"interlock.port": "80", "x": "", "y": "a=b"}

    def test_each_label_knows_its_file_and_line(self):
        service = only(read(STACK.replace(PROXY, "")))
        assert str(service.deploy_labels["interlock.domain"].place) == "a.yml:10"
        assert str(service.place) == "a.yml:3"

    def test_anchors_merge_keys_and_extension_fields(self):
        service = only(
            read(
                "x-labels: &common {interlock.domain: example.com, interlock.ssl: 'true'}\n"
                "x-more: &more {interlock.domain: example.org, interlock.weight: '3'}\n"
                "services:\n"
                "  x-ignored: {labels: {a: b}}\n"
                "  web:\n"
                "    labels: {<<: [*common, *more], interlock.ssl: 'false'}\n"
            )
        )
        assert {name: label.value for name, label in service.labels.items()} == {
            "interlock.domain": "example.com",
            "interlock.ssl": "false",
            "interlock.weight": "3",
        }
        assert service.labels["interlock.weight"].place.line == 2

    @pytest.mark.parametrize(
        ("written", "value", "remarked"),
        [
            ("8080", "8080", False),
            ("010", "8", True),
            ("0x1f", "31", True),
            ("1_000", "1000", True),
            ("1.50", "1.5", True),
            ("2001-01-01", "2001-01-01", True),
            ("on", "on", False),
            ("yes", "yes", False),
            ("'010'", "010", False),
            ("", "", False),
        ],
    )
    def test_values_without_quotes_are_what_docker_makes_of_them(self, written, value, remarked):
        """As `docker stack config` of Docker 28 prints them."""
        project = read(f"services: {{web: {{labels: {{x: {written}}}}}}}")
        assert only(project).labels["x"].value == value
        assert bool(project.remarks) == remarked

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("$A-${B}", "one-two"),
            ("${NONE:-x}", "x"),
            ("${NONE-x}", "x"),
            ("${EMPTY:-x}", "x"),
            ("${EMPTY-x}", ""),
            ("${A:+x}${NONE:+y}", "x"),
            ("${EMPTY+x}", "x"),
            ("${NONE:-${A}-${NONE:-z}}", "one-z"),
            ("${A:?must}", "one"),
            ("$$A $${B}", "$A ${B}"),
            ("${NONE:-}", ""),
            ("a}b", "a}b"),
        ],
    )
    def test_variables(self, text, value):
        missing: set[str] = set()
        given = {"A": "one", "B": "two", "EMPTY": ""}
        assert interpolate(text, given.get, missing) == value
        assert not missing

    def test_a_variable_that_is_not_set_is_empty_and_told_once(self):
        project = read("services: {a: {labels: [x=$NOPE, y=$NOPE]}}")
        (remark,) = project.remarks
        assert "NOPE is not set" in remark.message
        assert only(project).labels["x"].value == ""

    @pytest.mark.parametrize(
        "text", ["$5", "${", "${A", "${A!b}", "${1}", "${NONE:?give it}", "a $ b"]
    )
    def test_what_is_no_variable_is_refused_with_its_line(self, text):
        with pytest.raises(ComposeFileError, match=r"^a\.yml:3: "):
            read(f"services:\n  a:\n    labels: ['x={text}']\n")

    def test_the_environment_beats_the_env_file(self):
        text = "services: {a: {labels: ['x=$A', 'y=$B', 'z=$C']}}"
        env_file = "# comment\nA=file\nexport B='sin gle' # no\nC=plain # yes\n"
        labels = only(read(text, environment={"A": "env"}, env_file=env_file)).labels
        assert [labels[name].value for name in "xyz"] == ["env", "sin gle", "plain"]

    def test_an_env_file_line_that_is_none_is_refused(self):
        with pytest.raises(ComposeFileError, match=r"\.env:2: expected NAME=value"):
            read("services: {}", env_file="A=1\nno sense\n")

    def test_an_env_file_as_people_have_them(self):
        text = "services: {a: {labels: ['a=$A', 'b=$B', 'c=$C', 'd=$D', 'e=$E', 'f=$F']}}"
        env_file = (
            '\ufeffKEY="-----BEGIN\r\nab=c\r\n-----END" # its end\r\n'
            "BASE=example.com\r\nA=shop.${BASE}\r\nB='shop.${BASE}'\r\n"
            'C="a \\"b\\" ${NONE:-c}"\r\nD=pa$$$ord\r\nmy-own.name=1\r\nE\r\nF=$G\r\n'
        )
        environment = {"E": "outer", "G": "of the environment"}
        labels = only(read(text, environment=environment, env_file=env_file)).labels
        assert {name: item.value for name, item in labels.items()} == {
            "a": "shop.example.com",
            "b": "shop.${BASE}",
            "c": 'a "b" c',
            "d": "pa$",
            "e": "outer",
            "f": "of the environment",
        }

    def test_variables_nested_too_deeply_are_refused(self):
        text = "${A:-" * 3000 + "}" * 3000
        with pytest.raises(ComposeFileError, match=r"^a\.yml:1: variables are nested too deeply"):
            read(f"services: {{a: {{hostname: '{text}'}}}}", env_file=f"B={text}")

    def test_an_env_file_with_an_open_quote_is_refused(self):
        with pytest.raises(ComposeFileError, match=r"\.env:2: the quote is not closed"):
            read("services: {}", env_file='A=1\nB="x\ny\n')

    def test_the_env_file_is_told_where_docker_does_not_read_it(self):
        text = "services: {a: {deploy: {labels: ['x=$A']}}}"
        (remark,) = read(text, env_file="A=1").remarks
        assert remark.message.startswith("A is set in .env, which `docker stack deploy` does not")

    def test_several_files_are_merged_as_docker_merges_them(self):
        """As `docker stack config -c a.yml -c b.yml` of Docker 28 prints it."""
        service = only(
            read(
                "services: {web: {ports: ['80:80'], labels: {a: '1', b: '2'}, networks: [n],"
                " deploy: {labels: [x=1]}}}\nnetworks: {n: }",
                "services: {web: {ports: ['81:80', '80:80'], labels: [a=3, c=4], networks: [m],"
                " deploy: {labels: {x: '2', y: '3'}, replicas: 0}}}\nnetworks: {m: }",
            )
        )
        assert {k: v.value for k, v in service.labels.items()} == {"a": "3", "b": "2", "c": "4"}
        assert {k: v.value for k, v in service.deploy_labels.items()} == {"x": "2", "y": "3"}
        assert set(service.ports) == {Port(80, 80), Port(80, 81)}
        assert service.networks == ("n", "m")
        assert service.replicas == 0
        assert service.labels["c"].place.file == "b.yml"

    def test_extends_of_the_same_and_of_another_file(self, tmp_path: Path):
        (tmp_path / "base.yml").write_text(
            "services: {base: {labels: {a: base, b: base}, expose: [80]}}"
        )
        path = str(tmp_path / "app.yml")
        text = (
            "services:\n"
            "  mid: {extends: {service: base, file: base.yml}, labels: {b: mid}}\n"
            "  web: {extends: mid, labels: [c=web], ports: ['8080']}\n"
        )
        project = composefile.read([(path, text)], environment={})
        web = project.services[-1]
        assert {k: v.value for k, v in web.labels.items()} == {"a": "base", "b": "mid", "c": "web"}
        assert (web.expose, web.ports) == ((80,), (Port(8080),))

    @pytest.mark.parametrize(
        ("written", "ports"),
        [
            ("'80'", [Port(80)]),
            ("8080:80", [Port(80, 8080)]),
            ("22:22", [Port(22, 22)]),
            ("'127.0.0.1:8080:80'", [Port(80, 8080, "127.0.0.1")]),
            ("'[::1]:8080:80'", [Port(80, 8080, "::1")]),
            ("'53:53/udp'", []),
            ("8000-8001:9000-9001", [Port(9000, 8000), Port(9001, 8001)]),
            ("{target: 80, published: 8080, mode: host}", [Port(80, 8080, "", "host")]),
            ("{target: 53, protocol: udp}", []),
        ],
    )
    def test_ports(self, written, ports):
        assert list(only(read(f"services: {{a: {{ports: [{written}]}}}}")).ports) == ports

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("", r"a\.yml: the file is empty"),
            ("a: [", r"a\.yml:1: not valid YAML"),
            ("- a", r"a\.yml:1: expected a mapping at the top level"),
            ("volumes: {}", "there is no services section"),
            ("a: 1\n---\nb: 2", "several documents"),
            ("services:\n  a:\n    labels: {x: 1}\n    labels: {y: 1}", ":4: the key labels .* 3"),
            ("services: {a: {labels: 5}}", "services.a.labels: expected a mapping"),
            ("services: {a: {labels: {x: [1]}}}", "the label x is no single value"),
            ("services: {a: {ports: ['a:b']}}", "'a:b' is not a port"),
            ("services: {a: {ports: ['1-9999']}}", "not a port or a range of ports"),
            ("services: {a: {ports: 80}}", "services.a.ports: expected a list"),
            ("services: {a: {labels: !reset null}}", "the tag !reset is not supported"),
            ("services: {a: &a [*a]}", "the anchor contains itself"),
            ("services: {a: !!python/object:os.system {}}", "is not supported"),
            ("services: {a: {extends: b}}", "there is no service 'b'"),
            ("services: {a: {extends: a}}", "extends itself"),
            ("services: {a: {extends: {file: nowhere.yml, service: b}}}", "nowhere.yml"),
            ("services: {a: {labels: {? [1] : 2}}}", "expected a name as the key"),
            ("services: {a: {labels: {<<: 5}}}", "<< takes a mapping"),
        ],
    )
    def test_an_unusable_file_is_refused_with_its_place(self, text, problem):
        with pytest.raises(ComposeFileError, match=problem):
            read(text)

    def test_a_bomb_of_anchors_is_refused_before_it_goes_off(self):
        bomb = "a0: &a0 [x]\n"
        for number in range(1, 12):
            bomb += f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 10)}]\n"
        with pytest.raises(ComposeFileError, match="too many values"):
            read(bomb + "services: {}\n")

    def test_files_of_the_first_layout(self):
        """Interlock's own examples have no `services`."""
        project = read("web:\n  image: a\n  labels: [x=1]\nproxy:\n  image: b\n  net: host\n")
        assert project.first_version
        assert [service.key for service in project.services] == ["web", "proxy"]
        assert project.services[1].network_mode == "host"

    @pytest.mark.parametrize(
        ("text", "kind"),
        [
            ("services: {a: {image: x}}", Kind.COMPOSE),
            ("services: {a: {deploy: {replicas: 2, resources: {}}}}", Kind.COMPOSE),
            ("services: {a: {deploy: {labels: {x: y}}}}", Kind.STACK),
            ("services: {a: {deploy: {mode: global}}}", Kind.STACK),
            ("services: {a: {image: x}}\nnetworks: {n: {driver: overlay}}", Kind.STACK),
        ],
    )
    def test_what_the_files_are_for_is_found_out(self, text, kind):
        assert read(text).kind is kind

    def test_names_of_networks(self):
        project = read(
            "services: {}\nnetworks:\n  own:\n  named: {name: other}\n  ext: {external: true}\n"
            "  old: {external: {name: older}}\n  both: {external: true, name: outside}\n"
        )
        names = [project.network_name(key) for key in ("own", "named", "ext", "old", "both")]
        assert names == ["shop_own", "other", "ext", "older", "outside"]

    @pytest.mark.parametrize(
        ("given", "environment", "text", "expected"),
        [
            ("told", {"COMPOSE_PROJECT_NAME": "env"}, "name: file", "told"),
            ("", {"COMPOSE_PROJECT_NAME": "env"}, "name: file", "file"),
            ("", {"COMPOSE_PROJECT_NAME": "env"}, "", "env"),
            ("", {}, "", "myapp-1"),
        ],
    )
    def test_name_of_the_project(self, tmp_path, given, environment, text, expected):
        directory = tmp_path / "_My App-1"
        directory.mkdir()
        file = (str(directory / "a.yml"), f"{text}\nservices: {{}}")
        assert composefile.read([file], environment=environment, name=given).name == expected


class TestStack:
    def test_a_service_is_routed(self):
        report = judge(STACK)
        web = of(report, "web")
        assert web.outcome is Outcome.ROUTED
        assert [str(line) for line in web.routes] == [
            "http://www.example.com/ -> port 8080 over shop_edge"
        ]
        assert of(report, "openresty").outcome is Outcome.PROXY
        assert report.networks == ("shop_edge",)
        assert report.count(Level.REJECTED) == report.count(Level.WARNING) == 0

    def test_the_words_are_those_of_the_running_agent(self):
        """The same service, as discovery would tell of it, is refused with the same sentence."""
        labels = {"interlock.hostname": "www", "interlock.port": "http"}
        running = Workload(
            key=WorkloadKey("swarm", "id"),
            kind=WorkloadKind.SERVICE,
            name="shop_web",
            created=1.0,
            labels=labels,
            networks=("shop_edge",),
            instances=(
                Instance("t", "t", InstanceState.UP, attachments=(Attachment("shop_edge", "::1"),)),
            ),
        )
        seen = SourceSnapshot("swarm", {running.key: running}, proxy_networks=("shop_edge",))
        (expected,) = compile_snapshot(Snapshot({"swarm": seen}), Settings()).rejections
        report = judge(STACK.replace('"8080"', "http").replace("interlock.domain", "x.domain"))
        (finding,) = of(report, "web").findings
        assert (finding.message, finding.hint) == (expected.message, expected.hint)

    def test_a_rejection_names_the_line_of_its_label(self):
        report = judge(STACK.replace('"8080"', "http"))
        web = of(report, "web")
        assert web.outcome is Outcome.REJECTED
        (finding,) = web.findings
        assert (finding.reason, str(finding.place)) == ("invalid_label", "a.yml:11")

    def test_labels_under_labels_are_read_and_those_under_deploy_win(self):
        text = STACK.replace(
            "    networks: [edge]\n    deploy:",
            "    labels: {interlock.port: '9090', interlock.alias_domain: shop.example.com}\n"
            "    networks: [edge]\n    deploy:",
            1,
        )
        web = of(judge(text), "web")
        assert [(line.host, line.port) for line in web.routes] == [
            ("www.example.com", 8080),
            ("shop.example.com", 8080),
        ]
        assert reasons(web, Level.WARNING) == ["label_twice"]
        assert reasons(web, Level.NOTE) == ["container_labels"]

    def test_the_network_may_be_named_without_the_stack(self):
        named = STACK.replace('"8080"', '"8080"\n        interlock.network: edge')
        assert of(judge(named), "web").routes[0].network == "shop_edge"
        wrong = STACK.replace('"8080"', '"8080"\n        interlock.network: egde')
        (finding,) = of(judge(wrong), "web").findings
        assert finding.reason == "network_unknown"
        assert "attached to egde nor shop_egde; it is attached to: shop_edge" in finding.message
        assert finding.place.line == 12

    def test_a_service_on_no_network_of_openresty_is_refused(self):
        text = STACK.replace("networks: [edge]\n    deploy:\n      rep", "deploy:\n      rep", 1)
        (finding,) = of(judge(text), "web").findings
        assert finding.reason == "network_not_shared"
        assert "It is attached to: shop_default; OpenResty is attached to: shop_edge" in (
            finding.message
        )

    def test_expose_is_no_port_in_a_stack(self):
        text = STACK.replace('        interlock.port: "8080"\n', "").replace(
            "    image: shop/web\n", "    image: shop/web\n    expose: [8080]\n"
        )
        web = of(judge(text), "web")
        assert reasons(web) == ["no_port"]
        assert reasons(web, Level.NOTE) == ["expose"]

    def test_published_ports_declare_the_port(self):
        text = STACK.replace('        interlock.port: "8080"\n', "").replace(
            "    image: shop/web\n", "    image: shop/web\n    ports: ['81:8081', '53:53/udp']\n"
        )
        assert of(judge(text), "web").routes[0].port == 8081

    def test_without_an_overlay_network_the_host_mode_port_counts(self):
        app = (
            "services:\n  web:\n    networks: [hostnet]\n"
            "    ports: [{target: 8080, published: 80, mode: %s}]\n"
            "    deploy: {labels: {interlock.hostname: a, interlock.port: '8080'}}\n"
            "networks: {hostnet: {external: true, name: %s}}\n"
        )
        routed = of(judge(app % ("host", "bridge")), "web")
        assert str(routed.routes[0]).endswith("-> port 8080, as published on its node")
        assert of(judge(app % ("host", "host")), "web").outcome is Outcome.ROUTED
        refused = judge(app % ("ingress", "bridge"), proxy_networks=["edge"])
        assert reasons(of(refused, "web")) == ["not_published"]

    def test_conflicting_services_are_told(self):
        other = (
            "services:\n  old:\n    networks: [edge]\n    deploy:\n      labels:\n"
            "        interlock.hostname: www\n        interlock.domain: example.com\n"
            "        interlock.port: 80\n        interlock.ssl_only: 'true'\n"
            "        interlock.ssl_cert: a.pem\n        interlock.ssl_cert_key: a.key\n"
        )
        report = judge(STACK, other)
        old = of(report, "old")
        assert old.outcome is Outcome.REJECTED
        assert "conflict" in reasons(old)
        conflict = next(item for item in old.findings if item.reason == "conflict")
        assert "www.example.com/ is held by service shop_web" in conflict.message
        assert "Docker decides which is older" in conflict.message
        assert of(report, "web").outcome is Outcome.ROUTED

    def test_services_that_serve_the_same_are_told(self):
        other = (
            "services:\n  canary:\n    networks: [edge]\n    deploy:\n      labels:\n"
            "        interlock.hostname: www\n        interlock.domain: example.com\n"
            "        interlock.port: 9090\n"
        )
        report = judge(STACK, other)
        assert of(report, "web").routes[0].shared_with == ("canary",)
        assert of(report, "canary").routes[0].shared_with == ("web",)

    def test_tls(self):
        tls = STACK.replace(
            '"8080"',
            '"8080"\n        interlock.ssl_only: "true"\n        interlock.ssl_cert: a.pem\n'
            "        interlock.ssl_cert_key: a.key",
        )
        (line,) = of(judge(tls), "web").routes
        assert (line.tls, line.tls_only) == (True, True)
        assert line.certificate == "/etc/tidegate/certs/a.pem"
        without = load('[[Extensions]]\nName = "nginx"\nSSLPort = 0\n', where="x")[0]
        assert reasons(of(judge(tls, settings=without), "web")) == ["tls_off"]

    def test_no_replicas_and_jobs(self):
        none = of(judge(STACK.replace("replicas: 2", "replicas: 0")), "web")
        assert none.outcome is Outcome.ROUTED
        assert reasons(none, Level.NOTE) == ["no_replicas"]
        job = of(judge(STACK.replace("replicas: 2", "mode: replicated-job")), "web")
        assert (job.outcome, reasons(job)) == (Outcome.REJECTED, ["job"])

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a: {deploy: {labels: {x: true}}}", "a label's value must be text"),
            ("b: {image: x}, a: {extends: b, deploy: {labels: {x: y}}}", "knows no extends"),
            ("a: {networks: [n], deploy: {labels: {x: y}}}", "do not declare"),
        ],
    )
    def test_what_docker_stack_deploy_refuses_is_refused(self, text, message):
        report = judge(f"services: {{{text}}}")
        assert report.count(Level.REJECTED) == 1
        assert message in report.findings[0].message

    def test_keys_that_are_nearly_right_are_told(self):
        report = judge("services: {a: {label: {x: y}, deploy: {lables: {x: y}}}}")
        assert [item.hint for item in report.findings] == [
            "Did you mean labels?",
            "Did you mean labels?",
        ]

    def test_openresty_that_is_elsewhere(self):
        several = STACK.replace(PROXY, "").replace("[edge]", "[edge, back]") + "  back:\n"
        unknown = of(judge(several), "web")
        assert (unknown.outcome, reasons(unknown)) == (Outcome.UNKNOWN, [])
        assert reasons(unknown, Level.WARNING) == ["network_ambiguous"]
        told = of(judge(several, proxy_networks=["shop_edge"]), "web")
        assert told.routes[0].network == "shop_edge"

    def test_openresty_by_the_name_of_its_service(self):
        unmarked = STACK.replace("interlock.ext.name: nginx", "x: y")
        settings = load('[OpenResty]\nServiceName = "shop_openresty"\n', where="x")[0]
        assert of(judge(unmarked, settings=settings), "openresty").outcome is Outcome.PROXY
        assert of(judge(unmarked), "openresty").outcome is Outcome.SILENT


class TestOptions:
    """What the dialects have beside hosts, as far as a file tells."""

    def judged(self, labels: str, **more) -> Verdict:
        body = STACK.replace(
            '        interlock.port: "8080"\n', f'        interlock.port: "8080"\n{labels}'
        )
        return of(judge(body, **more), "web")

    def test_several_routes_of_one_service(self):
        web = self.judged(
            "        interlock.admin.hostname: admin\n        interlock.admin.port: '9090'\n"
        )
        assert [(line.host, line.port) for line in web.routes] == [
            ("www.example.com", 8080),
            ("admin.example.com", 9090),
        ]

    def test_a_tcp_port(self):
        web = self.judged("        interlock.tcp_port: '5432'\n")
        assert str(web.routes[-1]) == "TCP port 5432 -> port 8080 over shop_edge"
        assert web.routes[-1].tcp_port == 5432

    def test_passthrough_and_the_default_backend(self):
        web = self.judged("        interlock.ssl_passthrough: 'true'\n")
        assert str(web.routes[0]).endswith("over shop_edge; TLS is passed through unopened")
        web = self.judged("        interlock.default_backend: 'true'\n")
        assert [line.default_backend for line in web.routes] == [False, True]

    def test_a_canary_is_told_as_one(self):
        canary = (
            "services:\n  next:\n    networks: [edge]\n    deploy:\n      labels:\n"
            "        interlock.hostname: www\n        interlock.domain: example.com\n"
            "        interlock.port: 8080\n        interlock.canary.weight: 10\n"
        )
        report = judge(STACK, canary)
        assert str(of(report, "next").routes[0]).endswith("over shop_edge; as its canary")
        assert of(report, "web").routes[0].shared_with == ()

    def test_a_virtual_ip_and_a_service_that_has_none(self):
        vip = "        interlock.backend_mode: vip\n"
        assert self.judged(vip).outcome is Outcome.ROUTED
        without = STACK.replace("      replicas: 2\n", "      endpoint_mode: dnsrr\n").replace(
            '        interlock.port: "8080"\n', f'        interlock.port: "8080"\n{vip}'
        )
        assert reasons(of(judge(without), "web")) == ["no_vip"]

    def test_another_cluster_is_a_note_and_no_failure(self):
        web = self.judged("        interlock.service_cluster: east\n")
        assert (web.outcome, reasons(web)) == (Outcome.REJECTED, [])
        assert reasons(web, Level.NOTE) == ["other_cluster"]
        east = Settings(service_clusters=("east",))
        assert self.judged("        interlock.service_cluster: east\n", settings=east).routes

    def test_a_mirror_that_is_not_in_the_files_is_a_warning(self):
        web = self.judged("        interlock.mirror: shadow.example.com\n")
        assert (web.outcome, reasons(web)) == (Outcome.ROUTED, [])
        assert reasons(web, Level.WARNING) == ["mirror_unknown"]

    @pytest.mark.parametrize(
        ("mounted", "lost"),
        [
            ("", "/run/secrets/cert, /run/secrets/key"),
            ("    secrets: [cert, {source: k, target: key}]\n", ""),
            ("    secrets: [{source: cert, target: /run/secrets/cert}]\n", "/run/secrets/key"),
        ],
    )
    def test_secrets_that_openresty_does_not_have(self, mounted: str, lost: str):
        text = (
            "services:\n  web:\n    networks: [edge]\n    deploy:\n      labels:\n"
            "        com.docker.lb.hosts: a.test\n        com.docker.lb.port: 80\n"
            "        com.docker.lb.ssl_cert: cert\n        com.docker.lb.ssl_key: key\n"
            f"  openresty:\n{mounted}    networks: [edge]\n    deploy: "
            "{ labels: { interlock.ext.name: nginx } }\nnetworks: {edge: }\n"
        )
        web = of(judge(text), "web")
        assert web.routes[0].tls
        told = [item.message for item in web.findings if item.reason == "secret_not_mounted"]
        assert told == ([f"a.test: OpenResty has no secret at {lost}."] if lost else [])

    def test_a_containers_own_name_where_that_is_switched_on(self):
        text = (
            "services: {web: {hostname: www, domainname: example.com, expose: [80],"
            " networks: [edge]}}\nnetworks: {edge: }"
        )
        settings = Settings(hostname_fallback=True)
        on = of(judge(text, settings=settings, proxy_networks=["shop_edge"]), "web")
        assert on.routes[0].host == "www.example.com"
        assert of(judge(text), "web").outcome is Outcome.SILENT


COMPOSE = """\
services:
  web:
    image: shop/web
    labels:
      - interlock.hostname=www
      - interlock.domain=example.com
    networks: [edge]
  openresty:
    image: tidegate/openresty
    labels: [interlock.ext.name=nginx]
    networks: [edge]
networks:
  edge:
"""


class TestCompose:
    def test_a_container_is_routed_over_the_shared_network(self):
        text = COMPOSE.replace(
            "    networks: [edge]\n  open", "    expose: [8080]\n    networks: [edge]\n  open"
        )
        web = of(judge(text), "web")
        assert [str(line) for line in web.routes] == [
            "http://www.example.com/ -> port 8080 over shop_edge"
        ]
        assert web.name == "shop-web-1"
        assert reasons(web, Level.WARNING) == ["port_of_image"], "the image may expose a lower one"

    def test_what_only_the_image_tells_is_not_known(self):
        web = of(judge(COMPOSE), "web")
        assert (web.outcome, reasons(web)) == (Outcome.UNKNOWN, [])
        (finding,) = web.findings
        assert finding.reason == "no_port"
        assert "What its image exposes is not known here" in finding.message

    def test_labels_under_deploy_are_told_to_be_lost(self):
        text = COMPOSE.replace(
            "    networks: [edge]\n  open",
            "    deploy: {labels: {interlock.port: 8080}}\n    networks: [edge]\n  open",
        )
        web = of(judge(text, kind=Kind.COMPOSE), "web")
        assert "deploy_labels" in reasons(web, Level.WARNING)
        assert of(judge(text), "web").routes[0].port == 8080, "as a stack they count"

    def test_published_ports_count_without_a_shared_network(self):
        app = (
            "services:\n  web:\n    ports: ['8000:80']\n"
            "    labels: [interlock.hostname=a, interlock.port=%s]\n"
        )
        assert of(judge(app % 80, proxy_networks=["edge"]), "web").outcome is Outcome.ROUTED
        refused = of(judge(app % 81, proxy_networks=["edge"]), "web")
        assert reasons(refused) == ["not_published"]
        unknown = of(judge(app % 81), "web")
        assert (unknown.outcome, reasons(unknown)) == (Outcome.UNKNOWN, [])

    def test_host_network(self):
        app = (
            "services: {web: {network_mode: host,"
            " labels: [interlock.hostname=a, interlock.port=80]}}"
        )
        assert of(judge(app), "web").outcome is Outcome.ROUTED

    @pytest.mark.parametrize(
        "body", ["network_mode: 'service:vpn'", "network_mode: 'container:x'", "label_file: ./l"]
    )
    def test_what_is_not_understood_is_said_and_not_guessed(self, body):
        report = judge(
            f"services: {{vpn: {{image: x}}, web: {{{body}, labels: [interlock.hostname=a]}}}}"
        )
        web = of(report, "web")
        assert (web.outcome, web.routes) == (Outcome.UNKNOWN, ())
        assert reasons(web, Level.WARNING) == ["unsupported"]

    def test_an_include_is_said_not_to_be_followed(self):
        report = judge("include: [other.yml]\nservices: {}")
        assert "include is not followed" in report.findings[0].message

    def test_the_label_of_a_proxy_that_is_none_of_ours(self):
        report = judge("services: {lb: {labels: [interlock.ext.name=traefik]}}")
        assert reasons(of(report, "lb"), Level.WARNING) == ["not_openresty"]


@pytest.fixture(autouse=True)
def no_settings_in_the_environment(monkeypatch):
    for name in ("INTERLOCK_CONFIG", "TIDEGATE_CONFIG", "DOCKER_HOST", "COMPOSE_PROJECT_NAME"):
        monkeypatch.delenv(name, raising=False)


def tidegate(*arguments: object, **more) -> Result:
    result = CliRunner().invoke(main, ["lint", *(str(item) for item in arguments)], **more)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


DOCUMENTED = Path(__file__).parent / "fixtures" / "documented"


@pytest.mark.parametrize("name", sorted(path.stem for path in DOCUMENTED.glob("*.yml")))
def test_golden_documented(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interlock's documented examples in both dialects: what is told of each, word for word."""
    monkeypatch.chdir(DOCUMENTED)
    environment = {"SWARM_HOST": "tcp://192.0.2.1:3376"}
    result = tidegate("--name", "mystack", f"{name}.yml", env=environment)
    check_golden(f"lint/{name}.txt", f"{result.stdout}exit code {result.exit_code}\n")


class TestCommand:
    @pytest.fixture
    def stack(self, tmp_path: Path) -> Path:
        path = tmp_path / "stack.yml"
        path.write_text(STACK)
        return path

    def test_exit_codes(self, stack: Path):
        assert tidegate(stack).exit_code == OK
        stack.write_text(STACK.replace('"8080"', "http"))
        result = tidegate(stack)
        assert result.exit_code == NEGATIVE
        assert f"{stack}:11: rejected: interlock.port=" in result.stdout
        stack.write_text("services: [")
        result = tidegate(stack)
        assert result.exit_code == USAGE
        assert f"tidegate: {stack}:1: not valid YAML" in result.stderr
        assert tidegate(stack / "nowhere").exit_code == USAGE
        assert tidegate().exit_code == USAGE

    def test_strict_takes_a_warning_for_a_failure(self, stack: Path):
        stack.write_text(STACK.replace('"8080"', '"8080"\n        interlock.wieght: 2'))
        assert tidegate(stack).exit_code == OK
        assert tidegate("--strict", stack).exit_code == NEGATIVE

    def test_settings_that_cannot_be_used(self, stack: Path, tmp_path: Path):
        bad = tmp_path / "config.toml"
        bad.write_text("ListenAddr = 5\n")
        assert tidegate("-c", bad, stack).exit_code == USAGE

    def test_settings_count(self, stack: Path, tmp_path: Path):
        stack.write_text(STACK.replace('"8080"', '"8080"\n        interlock.ssl: "true"'))
        assert "no_certificate" in tidegate(stack).stdout
        config = tmp_path / "config.toml"
        config.write_text(
            '[[Extensions]]\nName = "nginx"\nSSLDefaultCert = "/c.pem"\nSSLDefaultCertKey = "/k"\n'
        )
        result = tidegate("-c", config, "--name", "shop", stack)
        assert (result.exit_code, "https://www.example.com/" in result.stdout) == (OK, True)

    def test_json(self, stack: Path):
        told = json.loads(tidegate("--json", "--name", "shop", stack).stdout)
        assert (told["kind"], told["name"], told["rejected"]) == ("stack", "shop", 0)
        assert told["openresty_networks"] == ["shop_edge"]
        assert told["services"][0]["routes"] == [
            {
                "host": "www.example.com",
                "path": "/",
                "default_backend": False,
                "tcp_port": None,
                "port": 8080,
                "network": "shop_edge",
                "tls": False,
                "tls_only": False,
                "certificate": "",
                "passthrough": False,
                "rewrite": False,
                "backend_tls": False,
                "canary": False,
                "redirect": "",
                "shared_with": [],
            }
        ]

    def test_several_files_the_standard_input_and_variables(self, stack: Path, tmp_path: Path):
        over = "services: {web: {deploy: {labels: {interlock.port: $PORT}}}}"
        (tmp_path / ".env").write_text("PORT=9000\n")
        (tmp_path / "other.env").write_text("PORT=9001\n")
        assert "port 9000 over" in tidegate(stack, "-", input=over).stdout
        given = tidegate("--env-file", tmp_path / "other.env", stack, "-", input=over)
        assert "port 9001 over" in given.stdout
        beaten = tidegate(stack, "-", input=over, env={"PORT": "9002"})
        assert "port 9002 over" in beaten.stdout

    def test_kind_and_proxy_network_are_taken(self, stack: Path):
        assert "read as compose" in tidegate("--kind", "compose", stack).stdout
        result = tidegate("--proxy-network", "x", "--proxy-network", "y", stack)
        assert "OpenResty is on: " in result.stdout


def test_protocols_of_ports_are_read_in_any_case():
    text = 'services:\n  a:\n    image: x\n    ports: ["80/TCP", "53/UDP"]\n    expose: [81/TCP]\n'
    service = only(read(text))
    assert (service.ports, service.expose) == ((Port(80),), (81,))


def test_a_label_with_a_colon_in_a_list_is_told():
    report = judge('services:\n  a:\n    labels: ["interlock.hostname: shop"]\n')
    assert "NAME=VALUE" in report.findings[0].hint


def test_what_expose_does_not_say_is_told_in_the_dialect_of_the_service():
    text = (
        "services:\n  a:\n    expose: [80]\n    deploy:\n      labels:\n"
        "        com.docker.lb.hosts: a.example.com\n"
    )
    (finding,) = (item for item in of(judge(text), "a").findings if item.reason == "expose")
    assert finding.hint == "Name the port in the label com.docker.lb.port."
