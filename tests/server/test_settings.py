"""Settings from flags, environment and file."""

from pathlib import Path

import pytest

from engine.config import ConfigError, EngineConfig
from engine.model_files import DEFAULT_MODEL
from engine.process_config import EngineOptions, LogConfig
from server.settings import GROUPS, ServeSettings, flag_name, load_settings


def test_defaults() -> None:
    settings = load_settings({}, {})
    assert settings == ServeSettings()
    assert (settings.host, settings.port, settings.max_body_bytes) == ("127.0.0.1", 8000, 16 << 20)
    assert settings.model_names() == (DEFAULT_MODEL,)
    assert settings.log_config() == LogConfig(level="info", format="plain")


def test_a_flag_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('port = 1\nmax-rows = 1\nmax_waiting = 1\nserved-model-name = ["a", "b"]\n', encoding="utf-8")
    environment = {"BLOCKSERVE_CONFIG": str(file), "BLOCKSERVE_PORT": "2", "BLOCKSERVE_MAX_ROWS": "2"}
    settings = load_settings({"port": "3"}, environment)
    assert (settings.port, settings.max_rows, settings.max_waiting) == (3, 2, 1)
    assert settings.model_names() == ("a", "b")


def test_the_flag_for_the_file_wins_over_the_variable(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text("port = 7", encoding="utf-8")
    assert load_settings({"config": str(file)}, {"BLOCKSERVE_CONFIG": "/absent"}).port == 7


def test_every_setting_can_come_from_the_environment(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("k3\n", encoding="utf-8")
    texts = {
        "model": "dir", "served_model_name": "a, b", "random_weights": "3", "host": "::1", "port": "0",
        "api_processes": "2",
        "device": "cuda:1",
        "dtype": "bfloat16", "threads": "2", "max_rows": "4", "max_waiting": "5", "page_size": "8",
        "max_step_positions": "99", "prefer": "latency", "kv_bytes": "1GiB", "memory_fraction": "0.5",
        "max_choices": "6",
        "max_stop_strings": "7",
        "max_unread": "8", "stall_timeout": "9",
        "max_body_bytes": "1MiB", "stream_chunks": "token", "drain_timeout": "1.5",
        "step_timeout": "2.5", "log_level": "debug", "log_format": "json", "sync": "true", "api_key": "k1, k2",
        "prefix_cache": "false",
        "api_key_file": str(tmp_path / "keys"), "metrics_without_key": "true",
    }  # fmt: skip
    # Excludes `device`.
    assert set(texts) == set(ServeSettings.model_fields) - {"devices"}
    assert load_settings({}, {"BLOCKSERVE_DEVICES": "0, 1"}).devices == ("cuda:0", "cuda:1")
    settings = load_settings({}, {f"BLOCKSERVE_{name.upper()}": text for name, text in texts.items()})
    unchanged = [name for name, value in settings if name in texts and value == getattr(ServeSettings(), name)]
    assert unchanged == []
    assert settings.served_model_name == ("a", "b")
    assert settings.api_keys() == ("k1", "k2", "k3")
    assert settings.engine_options() == EngineOptions(
        device="cuda:1", dtype="bfloat16", max_rows=4, max_waiting=5, page_size=8, max_step_positions=99,
        prefer="latency", kv_bytes=1 << 30, memory_fraction=0.5, prefix_cache=False, overlapped=False,
    )  # fmt: skip
    assert ServeSettings.model_validate_json(settings.model_dump_json()) == settings


def test_the_loop_is_the_engines_choice_unless_steps_are_to_be_taken_one_by_one() -> None:
    assert load_settings({}, {}).engine_options().overlapped is None
    assert load_settings({"sync": "true"}, {}).engine_options().overlapped is False


def test_auto_and_empty_variables_are_defaults() -> None:
    settings = load_settings({"device": "auto", "dtype": "auto"}, {"BLOCKSERVE_PORT": "", "BLOCKSERVE_MODEL": ""})
    assert settings == ServeSettings()


def test_variables_of_others_are_left_alone() -> None:
    assert load_settings({}, {"BLOCKSERVE_SERVICE_HOST": "10.0.0.1", "PORT": "9"}) == ServeSettings()


def test_engine_defaults_are_those_of_the_engine() -> None:
    engine, options = EngineConfig(), ServeSettings().engine_options()
    assert (options.max_waiting, options.page_size, options.memory_fraction) == (
        engine.max_waiting, engine.page_size, engine.memory_fraction,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("port", "x"), ("port", "65536"), ("port", "-1"), ("host", " "), ("device", "tpu"), ("device", "cuda:x"),
        ("dtype", "int8"), ("threads", "0"), ("max_rows", "0"), ("max_waiting", "0"), ("page_size", "9"),
        ("page_size", "x"), ("max_step_positions", "1"), ("kv_bytes", "0"), ("kv_bytes", "-1"), ("kv_bytes", "1 XiB"),
        ("memory_fraction", "1"), ("memory_fraction", "nan"), ("max_choices", "0"), ("max_stop_strings", "0"),
        ("max_body_bytes", "10"), ("stream_chunks", "byte"), ("drain_timeout", "-1"), ("drain_timeout", "inf"),
        ("step_timeout", "0"), ("log_level", "loud"), ("log_format", "xml"), ("served_model_name", "a,,b"),
        ("served_model_name", "a,a"), ("served_model_name", "a\nb"), ("random_weights", "-1"), ("api_key", "k,,k"),
        ("api_key", "a key"), ("api_key", "ké"), ("api_key_file", "/absent"), ("metrics_without_key", "perhaps"),
    ],
)  # fmt: skip
def test_the_error_names_where_the_value_came_from(name: str, text: str, tmp_path: Path) -> None:
    variable = f"BLOCKSERVE_{name.upper()}"
    with pytest.raises(ConfigError, match=f"^{variable}: "):
        load_settings({}, {variable: text})
    with pytest.raises(ConfigError, match=f"^{flag_name(name)}: "):
        load_settings({name: text}, {})
    file = tmp_path / "serve.toml"
    escaped = text.replace("\n", "\\n")
    file.write_text(f'{name} = "{escaped}"', encoding="utf-8")
    with pytest.raises(ConfigError, match=f"serve.toml: {name}: "):
        load_settings({"config": str(file)}, {})


@pytest.mark.parametrize(
    ("content", "message"),
    [("prot = 1", "serve.toml: prot is no setting"), ("port 1", "not valid TOML"), ("port = [1]", "serve.toml: port")],
)
def test_a_bad_file(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_settings({"config": str(file)}, {})


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_settings({"config": str(tmp_path / "absent.toml")}, {})


def test_every_setting_has_what_its_help_needs() -> None:
    for name, field in ServeSettings.model_fields.items():
        assert field.description, name
        assert isinstance(field.json_schema_extra, dict), name
        assert field.json_schema_extra["group"] in GROUPS, name
        assert field.default is not None or field.json_schema_extra["shown"], name


def test_keys_come_from_every_source_that_takes_them(tmp_path: Path) -> None:
    keys, file = tmp_path / "keys", tmp_path / "serve.toml"
    keys.write_text("# one\nk3\n", encoding="utf-8")
    file.write_text(f'api-key = ["k1", "k2"]\napi-key-file = "{keys}"\n', encoding="utf-8")
    settings = load_settings({"config": str(file)}, {})
    assert settings.api_keys() == ("k1", "k2", "k3")
    assert load_settings({"config": str(file), "api_key": ["k4"]}, {}).api_keys() == ("k4", "k3")
    assert ServeSettings.model_validate_json(settings.model_dump_json()) == settings
    assert load_settings({}, {}).api_keys() == ()


def test_settings_do_not_tell_their_keys() -> None:
    settings = load_settings({"api_key": ["sk-secret"]}, {})
    assert "sk-secret" not in f"{settings!r} {settings} {settings.model_dump()}"


@pytest.mark.parametrize("value", ["sk-secret é", ["sk-secret", "sk secret"], ["sk-secret", 5], {"sk-secret": 1}, [""]])
def test_a_bad_key_is_not_quoted(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^--api-key: ") as caught:
        load_settings({"api_key": value}, {})
    assert "secret" not in str(caught.value)
    assert "5" not in str(caught.value)


def test_a_file_of_keys_that_nobody_read_opens_nothing() -> None:
    with pytest.raises(AssertionError, match="not read"):
        ServeSettings(api_key_file="keys").api_keys()


def test_api_processes_follow_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, processes in ((1, 1), (7, 1), (8, 2), (16, 4), (128, 8)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert ServeSettings().front_ends() == processes
        assert ServeSettings(api_processes=3).front_ends() == 3


@pytest.mark.parametrize("given", ["0,1", "cuda:0, 1", ["0", "1"], ["0,1"]])
def test_devices_are_named_by_number_or_in_full(given: object) -> None:
    assert ServeSettings.model_validate({"devices": given}).engine_devices() == ("cuda:0", "cuda:1")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"devices": "0,cuda:0"}, "cuda:0 is given twice"),
        ({"devices": "cpu,tpu"}, "none of cpu, cuda:N, N"),
        ({"devices": "0,"}, "none of cpu, cuda:N, N"),
        ({"devices": "0", "device": "cpu"}, "give one of them"),
    ],
)
def test_devices_that_do_not_fit(values: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings(dict(values), {})


def test_engines_on_the_cpu_share_memory_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(9)))
    two = ServeSettings.model_validate({"devices": "cpu,cpu"})
    assert two.engine_options("cpu").memory_fraction == ServeSettings().memory_fraction / 2
    assert (two.engine_threads(), ServeSettings().engine_threads()) == (4, None)
    assert ServeSettings.model_validate({"devices": "0,1"}).engine_options("cuda:1").memory_fraction == 0.9


def test_other_defaults_give_way_to_every_source(tmp_path: Path) -> None:
    defaults = {"log_level": "warning"}
    assert load_settings({}, {}, defaults).log_level == "warning"
    assert load_settings({}, {"BLOCKSERVE_LOG_LEVEL": "debug"}, defaults).log_level == "debug"
    assert load_settings({"log_level": "error"}, {}, defaults).log_level == "error"
    (tmp_path / "settings.toml").write_text('log-level = "debug"\n')
    assert load_settings({"config": str(tmp_path / "settings.toml")}, {}, defaults).log_level == "debug"
