"""Pages, JSON Schema and sample say what the schema says."""

import json
from pathlib import Path

from agent.config.document import json_schema, markdown, sample, with_migration_table
from agent.config.interlock import KEYS
from agent.config.settings import Extension, OpenResty, Settings, load

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_page_is_what_the_schema_gives() -> None:
    assert (DOCS / "configuration.md").read_text() == markdown()


def test_the_json_schema_is_what_the_schema_gives() -> None:
    assert (DOCS / "configuration.schema.json").read_text() == json_schema()


def test_the_json_schema_knows_every_key_under_its_name() -> None:
    schema = json.loads(json_schema())
    keys = {field.alias for field in Extension.model_fields.values()}
    assert set(schema["$defs"]["Extension"]["properties"]) == keys
    assert schema["properties"]["PollInterval"]["anyOf"][0]["type"] == "string"
    assert schema["$defs"]["Extension"]["properties"]["Port"]["minimum"] == 0
    assert schema["$defs"]["Extension"]["additionalProperties"] is False


def test_the_page_on_migration_has_what_became_of_each_key() -> None:
    page = (DOCS / "migration.md").read_text()
    assert page == with_migration_table(page)
    for key in KEYS:
        assert f"| `{key.name}` |" in page


def test_the_sample_loads_without_a_remark_and_is_all_defaults() -> None:
    settings, remarks = load(sample(), where="sample")
    assert remarks == ()
    assert settings == Settings(extensions=(Extension(),))


def test_the_sample_has_every_key_that_does_something() -> None:
    text = sample()
    for table in (Settings, Extension, OpenResty):
        for field in table.model_fields.values():
            if field.alias not in ("Extensions", "OpenResty", "Rules"):
                assert f"{field.alias}" in text


def test_every_key_is_explained() -> None:
    for table in (Settings, Extension, OpenResty):
        for name, field in table.model_fields.items():
            if name not in ("extensions", "openresty"):
                assert field.description, f"{table.__name__}.{name}"
