"""The fields as pages show them: the engine's own by section, and the table of TRL's."""

from __future__ import annotations

from typing import Any

from engine.config.accepted import AcceptedFields
from engine.config.gkd import GKDConfig
from engine.config.options import Option, section_title
from engine.config.refused import RefusedFields
from engine.config.renamed import RenamedFields
from engine.config.run import UnsetStrategy


def own_sections() -> dict[str, list[Option]]:
    """The options that do something here and are no other name of one, by title of their section."""
    sections: dict[str, list[Option]] = {}
    for option in GKDConfig.options().values():
        if option.section not in (AcceptedFields, RefusedFields, RenamedFields):
            sections.setdefault(section_title(option.section), []).append(option)
    return sections


def shown_default(option: Option) -> Any:
    return None if isinstance(option.default, UnsetStrategy) else option.default
