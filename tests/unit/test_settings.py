"""The schema of config.toml: Interlock's keys as they are, and mistakes told by name."""

from __future__ import annotations

import json

import pytest

from agent.config import interlock2
from agent.config.interlock import KEYS, Scope
from agent.config.settings import Extension, OpenResty, Settings, load
from agent.errors import SettingsError


def settings(text: str) -> Settings:
    return load(text, where="config.toml")[0]


def problem(text: str) -> str:
    with pytest.raises(SettingsError) as caught:
        load(text, where="config.toml")
    return str(caught.value)


def test_an_interlock_file_is_read_as_it_is():
    read, warnings = load(
        """
        ListenAddr = ":8080"
        DockerURL = "unix:///var/run/docker.sock"
        TLSCACert = "/certs/ca.pem"
        EnableMetrics = true
        PollInterval = "2s"

        [[Extensions]]
        Name = "nginx"
        Port = 8000
        SSLPort = 8443
        SSLCertPath = "/etc/ssl"
        ProxyReadTimeout = 60
        BackendOverrideAddress = "172.17.0.1"
        """,
        where="config.toml",
    )
    assert warnings == ()
    assert read.docker_url == "unix:///var/run/docker.sock"
    assert read.tls_ca_cert == "/certs/ca.pem"
    assert read.poll_interval == 2
    assert read.extension.port == 8000
    assert read.extension.ssl_port == 8443
    assert read.extension.ssl_cert_path == "/etc/ssl"
    assert read.extension.proxy_read_timeout == 60
    assert read.extension.backend_override_address == "172.17.0.1"


def test_an_empty_file_is_all_defaults():
    assert settings("") == Settings()
    assert settings("").extension == Extension()
    assert settings("").openresty == OpenResty()


@pytest.mark.parametrize("key", ["listenaddr", "LISTENADDR", "ListenAddr"])
def test_keys_match_in_any_case(key):
    assert settings(f'{key} = ":9"').listen_addr == ":9"


def test_keys_of_tables_match_in_any_case():
    read = settings('[openresty]\nurls = ["http://x"]\ntokenfile = "/t"\n[[extensions]]\nport = 1')
    assert read.openresty.urls == ("http://x",)
    assert read.openresty.token_file == "/t"
    assert read.extension.port == 1


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ('"500ms"', 0.5),
        ('"1m30s"', 90),
        ('"1h"', 3600),
        ('"1.5h"', 5400),
        ('".5s"', 0.5),
        ('"5.s"', 5),
        ('"250\u00b5s"', 0.00025),
        ('"250\u03bcs"', 0.00025),
        ('"1s500000000ns"', 1.5),
        ('"0"', 0),
        ("2", 2),
        ("0.25", 0.25),
    ],
)
def test_durations_are_read_as_go_did(text, seconds):
    assert settings(f"PollInterval = {text}").poll_interval == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ['"soon"', '"5"', '"5 parsecs"', "true", '"-1s"', "-1", "inf", "nan"]
)
def test_a_duration_that_is_none_is_refused_by_name(text):
    found = problem(f"PollInterval = {text}")
    assert "PollInterval" in found


def test_a_key_that_is_not_known_is_a_warning_with_the_one_that_was_meant():
    _, (warning,) = load("PolInterval = '1s'", where="config.toml")
    assert (
        str(warning)
        == "config.toml: unknown key PolInterval is ignored; did you mean PollInterval?"
    )


def test_a_key_of_a_table_that_is_not_known_is_a_warning_with_its_path():
    _, warnings = load("[[Extensions]]\nPrt = 1\n[OpenResty]\nUrl = 'x'", where="c")
    assert "Extensions[0].Prt" in str(warnings[0])
    assert "OpenResty.Url" in str(warnings[1])
    assert all(warning.unknown for warning in warnings)


def test_a_wrong_type_is_refused_with_path_and_value():
    assert problem('[[Extensions]]\nPort = "80"') == (
        "config.toml: line 2: Extensions[0].Port: got '80', expected a whole number"
    )


def test_every_mistake_is_told_at_once():
    with pytest.raises(SettingsError) as caught:
        load("ListenAddr = 5\nPollInterval = 'x'\nLogLevel = 'loud'", where="c")
    assert len(caught.value.problems) == 3


def test_a_file_that_is_no_toml_says_where_it_broke():
    assert "line 2" in problem("ListenAddr = ':1'\nPort = = 5")


def test_settings_that_are_equal_compare_equal_so_that_a_reread_can_be_skipped():
    assert settings('ListenAddr = ":1"') == settings("listenaddr = ':1' # same")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("EnableMetrics = 'yes'", "line 1: EnableMetrics: got 'yes', expected true or false"),
        ("# x\n\nlistenaddr = 5", "line 3: ListenAddr: got 5, expected a string"),
        ("Sources = 'swarm'", "line 1: Sources: got 'swarm', expected a list"),
        ("LogLevel = 'loud'", "expected 'debug', 'info', 'warning' or 'error'"),
        ("[OpenResty]\nAdminPort = 70000", "line 2: OpenResty.AdminPort: got 70000, expected at"),
        ("OpenResty = 'x'", "line 1: OpenResty: got 'x', expected a table"),
        ("[Extensions]\nPort = 1", "Extensions: got a table, expected tables that begin"),
        ("[[Extensions]]\n[[Extensions]]\nPort = 'x'", "line 3: Extensions[1].Port: got 'x'"),
        ("[[Extensions]]\nDHParam = 'true'", "Extensions[0].DHParam: got 'true', expected true or"),
        ("[[Extensions]]\nName = 5", "Extensions[0].Name: got 5, expected a string"),
        ("[[Extensions]]\nSSLProtocols = 'TLSv9'", "SSLProtocols: got 'TLSv9', expected some of"),
        ("[Rules.a]\nType = 5", "line 2: Rules.a.Type: got 5, expected a string"),
    ],
)
def test_a_wrong_value_is_told_with_line_path_value_and_what_is_expected(text, said):
    assert said in problem(text)


def test_a_wrong_table_is_not_printed_with_all_that_is_in_it():
    assert "s3cret" not in problem("[Extensions]\nAdminPass = 's3cret'")


# What Interlock's own files have in them.


def remarks(text: str) -> list[str]:
    return [remark.text for remark in load(text, where="c")[1]]


SPEC = """
ListenAddr = ":8080"
DockerURL = "unix:///var/run/docker.sock"
TLSCACert = ""
TLSCert = ""
TLSKey = ""
AllowInsecure = false
EnableMetrics = true
PollInterval = ""

[[Extensions]]
  Name = "nginx"
  ConfigPath = "/etc/nginx/nginx.conf"
  PidPath = "/var/run/nginx.pid"
  TemplatePath = "/etc/interlock/nginx.conf.template"
  BackendOverrideAddress = ""
  ConnectTimeout = 0
  ServerTimeout = 0
  ClientTimeout = 0
  MaxConn = 0
  Port = 0
  SyslogAddr = ""
  AdminUser = ""
  AdminPass = ""
  SSLCertPath = ""
  SSLCert = ""
  SSLPort = 0
  SSLOpts = ""
  SSLDefaultDHParam = 0
  SSLServerVerify = ""
  NginxPlusEnabled = false
  User = ""
  WorkerProcesses = 0
  RLimitNoFile = 0
  ProxyConnectTimeout = 0
  ProxySendTimeout = 0
  ProxyReadTimeout = 0
  SendTimeout = 0
  SSLCiphers = ""
  SSLProtocols = ""
  DHParam = false
  DHParamPath = ""
  StatsInterval = ""
  StatsBackendType = ""
  StatsPrometheusPushGatewayURL = ""
  StatsInfluxDBAddress = ""
  StatsInfluxDBUser = ""
  StatsInfluxDBPassword = ""
  StatsInfluxDBDatabase = ""
  StatsInfluxDBPrecision = ""
"""


def test_what_interlocks_spec_prints_is_all_defaults_where_it_says_nothing():
    read, said = load(SPEC, where="c")
    assert read.poll_interval == Settings().poll_interval
    assert read.extension.model_copy(update={"config_path": "", "pid_path": ""}) == Extension(
        ssl_port=0
    )
    assert [remark.text.split()[1] for remark in said] == [
        "Extensions[0].ConfigPath",
        "Extensions[0].PidPath",
        "Extensions[0].TemplatePath",
    ]
    assert not any(remark.unknown for remark in said)


@pytest.mark.parametrize("name", ["nginx", "Nginx", "HAProxy", "haproxy"])
def test_nginx_and_haproxy_in_any_case_set_up_openresty(name):
    read, said = load(f"[[Extensions]]\nName = '{name}'\nPort = 8000", where="c")
    assert read.extension.port == 8000
    assert said == ()


def test_haproxys_time_outs_are_milliseconds_with_haproxys_defaults():
    times = settings("[[Extensions]]\nName = 'haproxy'\nServerTimeout = 2500").extension.times
    assert times == {
        "proxy_connect_timeout": "5000ms",
        "proxy_send_timeout": "2500ms",
        "proxy_read_timeout": "2500ms",
        "send_timeout": "10000ms",
    }


def test_haproxys_certificate_is_the_default_one_and_serves_every_host():
    extension = settings("[[Extensions]]\nName = 'haproxy'\nSSLCert = '/ssl/all.pem'").extension
    assert extension.default_certificate == ("/ssl/all.pem", "/ssl/all.pem")
    assert extension.tls_everywhere


def test_a_key_of_the_other_extension_is_named_with_what_works_here():
    (said,) = remarks("[[Extensions]]\nName = 'nginx'\nConnectTimeout = 100")
    assert "Extensions[0].ConnectTimeout is not used: it is a key of haproxy's" in said
    assert "use ProxyConnectTimeout" in said
    (said,) = remarks("[[Extensions]]\nName = 'haproxy'\nProxyReadTimeout = 100")
    assert "use ServerTimeout" in said


def test_each_key_that_is_not_used_is_one_remark_that_says_what_to_use():
    (said,) = remarks("[[Extensions]]\nName = 'nginx'\nRLimitNoFile = 4096")
    assert said.startswith("c: Extensions[0].RLimitNoFile is not used: ")
    assert "ulimits: nofile" in said


@pytest.mark.parametrize(
    "text",
    [
        "[[Extensions]]\nName = 'nginx'\nMaxConn = 4096\nWorkerProcesses = 3",
        "[[Extensions]]\nName = 'haproxy'\nMaxConn = 4096\nWorkerProcesses = 3",
        "[Extensions.default.Config]\nMaxConnections = 4096\nWorkerProcesses = 3",
    ],
)
def test_connections_and_workers_are_taken_from_every_form_of_the_file(text):
    read, said = load(text, where="c")
    assert (read.extension.max_conn, read.extension.worker_processes, said) == (4096, 3, ())


def test_workers_can_be_one_per_core():
    assert settings("[[Extensions]]\nWorkerProcesses = 'auto'").extension.worker_processes == "auto"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("MaxConn = 1", ["got 1, expected 128 to 1048576", "TIDEGATE_WORKER_CONNECTIONS"]),
        ("MaxConn = 2000000", ["got 2000000, expected 128 to 1048576"]),
        ("MaxConn = -1", ["got -1, expected 128 to 1048576"]),
        ("MaxConn = '4k'", ["got '4k', expected a whole number"]),
        ("MaxConn = true", ["got True, expected a whole number"]),
        ("WorkerProcesses = -1", ["got -1, expected 1 to 128 workers", "TIDEGATE_WORKERS"]),
        ("WorkerProcesses = 129", ["got 129, expected 1 to 128 workers"]),
        ("WorkerProcesses = 'all'", ["got 'all', expected 1 to 128 workers"]),
        ("WorkerProcesses = true", ["got True, expected 1 to 128 workers"]),
    ],
)
def test_connections_and_workers_that_cannot_work_are_errors_with_the_cure(line, told):
    with pytest.raises(SettingsError) as caught:
        load(f"[[Extensions]]\n{line}", where="c")
    (problem,) = caught.value.problems
    assert problem.startswith(f"c: line 2: Extensions[0].{line.split(' ', 1)[0]}: ")
    for words in told:
        assert words in problem


def test_of_several_extensions_the_first_that_serves_counts():
    text = """
    [[Extensions]]
    Name = "beacon"
    StatsBackendType = "prometheus"
    [[Extensions]]
    Name = "haproxy"
    Port = 81
    [[Extensions]]
    Name = "nginx"
    Port = 82
    MaxConn = 512
    [Rules.all]
    Type = "image"
    Regex = ".*"
    """
    assert settings(text).extension.port == 81
    beacon, second, rules = remarks(text)
    assert "Extensions[0] (beacon: StatsBackendType) is not used" in beacon
    assert "cAdvisor" in beacon
    assert "Extensions[2] (nginx) is not used: the first one" in second
    assert "that is Extensions[1] (haproxy)" in second
    assert "Rules is not used" in rules


def test_an_extension_that_nobody_knows_is_a_remark():
    (said,) = remarks("[[Extensions]]\nName = 'traefik'")
    assert "no extension is called traefik" in said
    assert settings("[[Extensions]]\nName = 'traefik'\nPort = 9").extension == Extension()


def test_protocols_that_nobody_has_any_more_are_left_out_with_a_remark():
    text = "[[Extensions]]\nSSLProtocols = 'SSLv3 TLSv1 TLSv1.2'"
    assert settings(text).extension.ssl_protocols == "TLSv1 TLSv1.2"
    broken, old = remarks(text)
    assert "SSLv3 is left out" in broken
    assert "TLSv1 is deprecated" in old
    assert settings("[[Extensions]]\nSSLProtocols = 'SSLv3'").extension == Extension()


def test_dh_parameters_need_their_file():
    assert "name the file in DHParamPath" in remarks("[[Extensions]]\nDHParam = true")[0]
    text = "[[Extensions]]\nDHParam = true\nDHParamPath = 'dh.pem'"
    assert remarks(text) == []
    assert settings(text).extension.dh_parameters == "/etc/tidegate/certs/dh.pem"


INTERLOCKS_KEYS = {
    Scope.TOP: "ListenAddr DockerURL TLSCACert TLSCert TLSKey AllowInsecure EnableMetrics "
    "PollInterval Extensions Rules.<name>.Type Rules.<name>.Regex",
    Scope.EXTENSION: "Name ConfigPath PidPath TemplatePath BackendOverrideAddress MaxConn Port "
    "SSLPort SSLCertPath SSLCert SSLOpts SSLDefaultDHParam SSLServerVerify ConnectTimeout "
    "ServerTimeout ClientTimeout SyslogAddr AdminUser AdminPass DHParam DHParamPath "
    "NginxPlusEnabled User WorkerProcesses RLimitNoFile ProxyConnectTimeout ProxySendTimeout "
    "ProxyReadTimeout SendTimeout SSLCiphers SSLProtocols StatsInterval StatsBackendType "
    "StatsPrometheusPushGatewayURL StatsInfluxDBAddress StatsInfluxDBUser StatsInfluxDBPassword "
    "StatsInfluxDBDatabase StatsInfluxDBPrecision",
    Scope.ENVIRONMENT: "INTERLOCK_CONFIG DOCKER_HOST DOCKER_CERT_PATH DOCKER_TLS_VERIFY",
}


@pytest.mark.parametrize("scope", INTERLOCKS_KEYS)
def test_every_key_of_interlock_has_its_verdict(scope):
    assert [key.name for key in KEYS if key.scope is scope] == INTERLOCKS_KEYS[scope].split()
    assert all(key.text for key in KEYS)


def test_every_key_of_an_extension_is_in_the_schema_and_none_is_unknown():
    known = {field.alias for field in Extension.model_fields.values()}
    assert set(INTERLOCKS_KEYS[Scope.EXTENSION].split()) <= known


def test_a_key_that_is_marked_as_not_used_says_so_when_it_is_used():
    for key in KEYS:
        if key.scope is Scope.EXTENSION and not key.honoured:
            name = next(n for n, f in Extension.model_fields.items() if f.alias == key.name)
            value = {str: "'x'", int: "7", bool: "true"}[Extension.model_fields[name].annotation]
            (said,) = remarks(f"[[Extensions]]\nName = 'nginx'\n{key.name} = {value}")
            assert said == f"c: Extensions[0].{key.name} is not used: {key.text}"


def test_what_labels_may_do_is_a_setting():
    read = settings(
        'ServiceClusters = ["east", ""]\nHostnameFallback = true\n[[Extensions]]\n'
        'SSLSecretPath = "/secrets"\nHSTS = "max-age=300; includeSubDomains"\n'
        'AllowedDirectives = ["proxy_buffering"]'
    )
    assert read.service_clusters == ("east", "")
    assert read.hostname_fallback is True
    assert read.extension.secret_path("a") == "/secrets/a"
    assert read.extension.hsts == "max-age=300; includeSubDomains"
    assert read.extension.allowed_directives == ("proxy_buffering",)
    assert settings('[[Extensions]]\nHSTS = "off"').extension.hsts == "off"


@pytest.mark.parametrize("text", ["on", "max-age", "max-age=1\\nX: y", "max-age=1; evil"])
def test_a_header_that_is_no_hsts_is_refused(text):
    assert "HSTS" in problem(f'[[Extensions]]\nHSTS = "{text}"')


# --- Interlock 2 and 3

INTERLOCK_2S_KEYS = {
    Scope.TOP: "EndpointOverride",
    Scope.TABLE: "Image Args Labels Networks ContainerLabels Constraints PlacementPreferences "
    "ServiceName ProxyImage ProxyArgs ProxyLabels ProxyContainerLabels ProxyServiceName "
    "ProxyConfigPath ProxyReplicas ProxyStopSignal ProxyStopGracePeriod ProxyConstraints "
    "ProxyPlacementPreferences ProxyUpdateDelay ServiceCluster PublishMode PublishedPort "
    "TargetPort PublishedSSLPort TargetSSLPort Template HitlessServiceUpdate ConfigImage "
    "ConfigServiceName",
    Scope.TABLE_CONFIG: "User PidPath MaxConnections ConnectTimeout SendTimeout ReadTimeout "
    "ServerTimeout ClientTimeout IPHash SSLOpts SSLDefaultDHParam SSLDefaultDHParamPath SSLVerify "
    "WorkerProcesses RLimitNoFile SSLCiphers SSLProtocols HideInfoHeaders KeepaliveTimeout "
    "ClientMaxBodySize ClientBodyBufferSize ClientHeaderBufferSize LargeClientHeaderBuffers "
    "ClientBodyTimeout UnderscoresInHeaders ServerNamesHashBucketSize UpstreamZoneSize "
    "GlobalOptions DefaultOptions HTTPOptions TCPOptions AccessLogPath ErrorLogPath MainLogFormat "
    "TraceLogFormat AdminUser AdminPass",
}
INTERLOCK_2 = """
ListenAddr = ":8080"
DockerURL = "unix:///var/run/docker.sock"
PollInterval = "3s"
EndpointOverride = "10.0.0.1:8080"

[Extensions]
  [Extensions.default]
    Image = "docker/ucp-interlock-extension:3.3.0"
    Args = []
    ServiceName = "ucp-interlock-extension"
    ProxyImage = "docker/ucp-interlock-proxy:3.3.0"
    ProxyReplicas = 2
    PublishMode = "ingress"
    PublishedPort = 80
    TargetPort = 8000
    PublishedSSLPort = 8443
    TargetSSLPort = 8443
    [Extensions.default.Labels]
      "com.docker.ucp.InstanceID" = "x"
    [Extensions.default.Config]
      User = "nginx"
      MaxConnections = 1024
      ConnectTimeout = 60
      SendTimeout = 61
      ReadTimeout = 62
      SSLCiphers = "HIGH:!aNULL:!MD5"
      SSLProtocols = "TLSv1.2"
      SSLDefaultDHParamPath = "/dh.pem"
      HideInfoHeaders = true
      KeepaliveTimeout = "65s"
      ClientMaxBodySize = "32m"
      ClientBodyBufferSize = "8k"
      ClientHeaderBufferSize = "2k"
      LargeClientHeaderBuffers = "8 16k"
      ClientBodyTimeout = "30s"
      UnderscoresInHeaders = true
      HTTPOptions = ["gzip on;"]
      TCPOptions = []
"""


@pytest.mark.parametrize("scope", INTERLOCK_2S_KEYS)
def test_every_key_of_interlock_2_has_its_verdict(scope):
    names = [key.name for key in interlock2.KEYS if key.scope is scope]
    assert names == INTERLOCK_2S_KEYS[scope].split()
    assert all(key.text for key in interlock2.KEYS)


def test_a_file_of_interlock_2_is_read_as_it_is():
    read, said = load(INTERLOCK_2, where="c")
    extension = read.extension
    assert (extension.port, extension.ssl_port) == (8000, 8443)
    assert extension.max_conn == 1024
    assert extension.times == {
        "proxy_connect_timeout": "60s",
        "proxy_send_timeout": "61s",
        "proxy_read_timeout": "62s",
        "send_timeout": "600s",
    }
    assert extension.dh_parameters == "/dh.pem"
    assert extension.client_max_body_size == "32m"
    assert extension.hide_info_headers
    assert extension.client_options == {
        "keepalive_timeout": "65000ms",
        "client_body_timeout": "30000ms",
        "client_body_buffer_size": "8k",
        "client_header_buffer_size": "2k",
        "large_client_header_buffers": "8 16k",
        "underscores_in_headers": "on",
    }
    named = [str(remark).split(" ")[1] for remark in said]
    assert named == [
        "EndpointOverride",
        *(
            f"Extensions.default.{key}"
            for key in [
                "Image",
                "ServiceName",
                "ProxyImage",
                "ProxyReplicas",
                "PublishMode",
                "PublishedPort",
                "PublishedSSLPort",
                "Labels",
                "Config.User",
                "Config.HTTPOptions",
            ]
        ),
    ]
    assert not any(remark.unknown for remark in said)


def test_each_key_of_interlock_2_that_is_not_used_says_so():
    for key in interlock2.KEYS:
        if not key.honoured and key.scope is not Scope.TOP:
            table = "Extensions.x.Config" if key.scope is Scope.TABLE_CONFIG else "Extensions.x"
            said = remarks(f"[{table}]\n{key.name.upper()} = 'y'")
            assert said == [f"c: {table}.{key.name.upper()} is not used: {key.text}"]


def test_what_interlock_2_did_not_know_is_told_in_its_form_too():
    (remark,) = load("[Extensions.x]\nPrt = 8", where="c")[1]
    assert remark.unknown
    assert "unknown key Extensions.x.Prt" in str(remark)


# --- what is in front of OpenResty


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (["10.0.0.1"], ("10.0.0.1/32",)),
        (["10.1.2.3/8", " fd00::1/8 "], ("10.0.0.0/8", "fd00::/8")),
        (["::1", "0.0.0.0/0"], ("::1/128", "0.0.0.0/0")),
        ([], ()),
    ],
)
@pytest.mark.parametrize("key", ["TrustedProxies", "NginxStatusFrom"])
def test_addresses_and_networks(key, written, meant):
    extension = settings(f"[[Extensions]]\n{key} = {json.dumps(written)}").extension
    assert (
        meant
        == {
            "TrustedProxies": extension.trusted_proxies,
            "NginxStatusFrom": extension.nginx_status_from,
        }[key]
    )


@pytest.mark.parametrize(
    "value",
    ["example.com", "10.0.0.0/33", "", "10.0.0.1; include /etc/passwd", "unix:", "1.2.3.4 5.6.7.8"],
)
def test_what_is_no_address_is_refused(value):
    with pytest.raises(SettingsError, match="an address or a network"):
        load(f"[[Extensions]]\nTrustedProxies = [{value!r}]", where="c")


def test_the_proxy_protocol_without_trusted_proxies_is_told():
    (said,) = remarks("[[Extensions]]\nProxyProtocol = true")
    assert "name the load balancers in TrustedProxies" in said
    assert remarks("[[Extensions]]\nProxyProtocol = true\nTrustedProxies = ['10.0.0.1']") == []


@pytest.mark.parametrize(
    "line",
    [
        "ClientBodyBufferSize = '8x'",
        "ClientHeaderBufferSize = '1k; return 200'",
        "LargeClientHeaderBuffers = '8k'",
        "LargeClientHeaderBuffers = '4 8k 9'",
        "KeepaliveTimeout = '1 minute'",
        "UnderscoresInHeaders = 'on'",
        "GRPCPort = 70000",
    ],
)
def test_settings_for_connections_of_clients_are_checked(line):
    with pytest.raises(SettingsError):
        load(f"[[Extensions]]\n{line}", where="c")


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8081", "localhost:8081", "http://", "http://h:port", "http://h:0", "ftp://h",
        "http://[::1", "http://user:word@h", "http://h/?x", "unix:relative", "/run/admin.sock",
    ],
)  # fmt: skip
def test_an_admin_url_that_is_none_is_told_with_what_is_expected(url):
    said = problem(f'[OpenResty]\nURLs = ["http://good:8081", "{url}"]')
    assert said == (
        f"config.toml: line 2: OpenResty.URLs[1]: got '{url}', expected "
        '"http://HOST:PORT", "https://HOST:PORT" or "unix:/PATH"'
    )


@pytest.mark.parametrize("url", ["http://h", "https://h:1", "http://[::1]:1/base", "unix:/run/x"])
def test_an_admin_url_is_taken_as_it_is(url):
    assert settings(f'[OpenResty]\nURLs = ["{url}"]').openresty.urls == (url,)


@pytest.mark.parametrize("value", ["inf", "nan", '"999999h"', "31536001"])
def test_a_time_is_one_that_can_be_waited_for(value):
    assert "PollInterval" in problem(f"PollInterval = {value}")


@pytest.mark.parametrize("text", [f"Port = {'9' * 5000}", f"x = {'[' * 5000}{']' * 5000}"])
def test_toml_that_no_reader_takes_is_told_like_toml_that_is_none(text):
    assert problem(text).startswith("config.toml: not valid TOML: ")


def test_a_mark_in_front_and_lines_as_windows_writes_them():
    text = '\ufeffListenAddr = ":9"\r\n[[Extensions]]\r\nName = "nginx"\r\nPort = 8000\r\n'
    read, warnings = load(text, where="c")
    assert (read.listen_addr, read.extension.port, warnings) == (":9", 8000, ())


def test_a_key_that_is_there_in_two_spellings_is_told_and_the_first_counts():
    read, (warning,) = load('ListenAddr = ":1"\nlistenaddr = ":2"', where="c")
    assert read.listen_addr == ":1"
    assert str(warning) == (
        "c: listenaddr is the same key as ListenAddr, whose value counts; remove one of the two"
    )


@pytest.mark.parametrize(
    ("lines", "key"),
    [
        ("Port = 443", "SSLPort"),
        ("Port = 8443\nSSLPort = 8443", "SSLPort"),
        ("GRPCPort = 80", "GRPCPort"),
        ("GRPCPort = 443", "GRPCPort"),
    ],
)
def test_two_listeners_on_one_port_are_refused(lines, key):
    found = problem(f"[[Extensions]]\nName = 'nginx'\n{lines}")
    assert f"Extensions[0].{key}: got" in found
    assert "another port than that of" in found


def test_no_listener_is_on_no_port():
    read = settings("[[Extensions]]\nName = 'nginx'\nPort = 443\nSSLPort = 0")
    assert (read.extension.port, read.extension.ssl_port) == (443, 0)


@pytest.mark.parametrize(
    "line",
    [
        "ResyncInterval = 0",
        'RequestTimeout = "0s"',
        "[OpenResty]\nHeartbeat = 0",
        "[OpenResty]\nTimeout = 0.0",
    ],
)
def test_a_time_without_which_a_loop_would_spin_is_not_nothing(line):
    assert "more than 0" in problem(line)


def test_what_is_tried_again_is_in_words_of_nginx():
    found = problem("[[Extensions]]\nProxyNextUpstream = 'error timeouts'")
    assert "line 2: Extensions[0].ProxyNextUpstream: got 'error timeouts'" in found
    assert "invalid_header" in found


def test_a_wrong_value_of_interlock_2_is_told_where_it_stands():
    with pytest.raises(SettingsError) as caught:
        load(
            "[Extensions]\n"
            "[Extensions.default]\n"
            'TargetPort = "80"\n'
            "[Extensions.default.Config]\n"
            'ConnectTimeout = "6s"\n'
            'KeepaliveTimeout = "soon"\n',
            where="c",
        )
    assert caught.value.problems == (
        "c: line 3: Extensions.default.TargetPort: got '80', expected a whole number",
        "c: line 5: Extensions.default.Config.ConnectTimeout: got '6s', expected a whole number",
        "c: line 6: Extensions.default.Config.KeepaliveTimeout: got 'soon', "
        'expected a duration such as "500ms" or "1m30s"',
    )


def test_an_unknown_key_of_interlock_2_is_told_where_it_stands():
    _, (warning,) = load("[Extensions.default.Config]\nVersion = 'x'", where="c")
    assert str(warning) == "c: unknown key Extensions.default.Config.Version is ignored"


@pytest.mark.parametrize(
    "line",
    [
        'ListenAddr = "8080x"',
        'ListenAddr = ":99999"',
        '[[Extensions]]\nSSLCiphers = "HIGH$x"',
        '[[Extensions]]\nSSLCiphers = "a\\nb"',
        '[[Extensions]]\nDHParamPath = "a\\tb"',
    ],
)
def test_what_could_never_come_into_force_is_refused_at_once(line):
    assert "expected" in problem(line)
