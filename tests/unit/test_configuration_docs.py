"""docs/configuration.md says what the schema says."""

from pathlib import Path

from agent.config.document import markdown
from agent.config.settings import Extension, OpenResty, Settings

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_page_is_what_the_schema_gives() -> None:
    assert (DOCS / "configuration.md").read_text() == markdown()


def test_every_key_is_explained() -> None:
    for table in (Settings, Extension, OpenResty):
        for name, field in table.model_fields.items():
            if name not in ("extensions", "openresty"):
                assert field.description, f"{table.__name__}.{name}"
